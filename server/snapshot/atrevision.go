package snapshot

import (
	"context"

	"github.com/cedar-policy/cedar-go"

	"github.com/cedarpost/cedarpost/server/engine"
)

// maxKeptWeight is what the entities that an [AtRevision] keeps may weigh, in bytes. See
// [store.Entity.Weight].
const maxKeptWeight = 64 << 20

// AtRevision prepares many questions on the entities of one revision. It keeps the entities that it
// loads, apart from the cache that decisions use. It is not safe for concurrent use.
type AtRevision struct {
	past     *Past
	revision int64
	set      *engine.Set
	kept     *keptEntities
}

// keptEntities are entities of one revision, as one schema reads them. nil: not stored.
type keptEntities struct {
	known  map[cedar.EntityUID]*engine.Entity
	weight int64
}

// At returns an AtRevision. set decides, and can have other policies than those of the revision.
func (p *Past) At(revision int64, set *engine.Set) *AtRevision {
	return &AtRevision{past: p, revision: revision, set: set, kept: &keptEntities{known: map[cedar.EntityUID]*engine.Entity{}}}
}

// With returns an AtRevision of the same revision with another set. Both keep the same entities if the
// schemas read them alike.
func (a *AtRevision) With(set *engine.Set) *AtRevision {
	other := a.past.At(a.revision, set)
	if len(set.ChangedTypes(a.set)) == 0 {
		other.kept = a.kept
	}
	return other
}

// Prepare reads questions and loads what they can touch, together. It is [engine.Set.PrepareBatch]. The
// error is [store.ErrSwept] if history does not go back to the revision any more, that of the database,
// or that of pause. A question about a stored entity that the schema of the set does not read has the
// error [stored.UnfitError]; then that is the error of all.
func (a *AtRevision) Prepare(ctx context.Context, asks []engine.Ask, pause engine.Pause) ([]engine.Evaluation, error) {
	pool := engine.NewPool()
	pool.SetPause(pause)
	pool.SetSource(func(uid cedar.EntityUID) (e *engine.Entity, known bool) {
		e, known = a.kept.known[uid]
		return e, known
	})
	defer pool.SetSource(nil)
	return a.set.PrepareBatch(asks, pool, func(missing []cedar.EntityUID) error {
		found, err := a.past.loadInto(ctx, a.revision, a.set, pool, missing)
		if err != nil {
			return err
		}
		a.kept.add(missing, found)
		return nil
	})
}

// add keeps the result of a load. If there are too many entities, it forgets those of before.
func (k *keptEntities) add(asked []cedar.EntityUID, found []engine.Entity) {
	if k.weight > maxKeptWeight {
		k.known, k.weight = map[cedar.EntityUID]*engine.Entity{}, 0
	}
	for i := range found {
		k.known[found[i].UID] = &found[i]
		k.weight += found[i].Weight
	}
	for _, uid := range asked {
		if _, ok := k.known[uid]; !ok {
			k.known[uid] = nil
			k.weight += 256
		}
	}
}
