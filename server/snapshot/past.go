package snapshot

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/cedar-policy/cedar-go"
	"golang.org/x/sync/singleflight"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

// pastSetsKept is how many compiled sets of the past are kept. A replay of an hour of the
// log, on several connections, seldom needs more at the same time.
const pastSetsKept = 4

// MaxPastWeight is what the entities of a decision may weigh, in bytes, to be replayed: more than
// any decision of today has, because earlier ones had no bound. See [store.Entity.Weight].
const MaxPastWeight = 64 << 20

// Past reads policies and entities as they were at a revision. Its methods may be called by
// several goroutines.
type Past struct {
	follower  *Follower
	compiling singleflight.Group // by the name of the policies
	large     chan struct{}      // has room for one: a large load

	mu     sync.Mutex
	recent []pastSet // the one used last comes first
}

// pastSet is a compiled set, with the name that PastPolicies of the store gives its policies.
type pastSet struct {
	name string
	set  *engine.Set
}

// NewPast makes a Past of the database that a follower follows.
func NewPast(f *Follower) *Past { return &Past{follower: f, large: make(chan struct{}, 1)} }

// Policies returns the compiled policies of a revision. It compiles them, once for all calls
// that wait, unless they are those of the newest snapshot or were used recently. The error is
// [store.ErrSwept] or [store.ErrNotFound] if the revision cannot be read, and
// [stored.ErrCompile] if its policies do not compile.
func (p *Past) Policies(ctx context.Context, revision int64) (*engine.Set, error) {
	name, err := p.follower.cfg.DB.PastPolicies(ctx, revision)
	if err != nil {
		return nil, err
	}
	if live := p.follower.snap.Load(); nameOfPolicies(live.Bundles) == name {
		return live.Set, nil
	}
	if set := p.recall(name); set != nil {
		return set, nil
	}
	// Other calls may wait for the set, so compiling does not end with this one.
	compiled := p.compiling.DoChan(name, func() (any, error) {
		if set := p.recall(name); set != nil { // another call compiled it in between
			return set, nil
		}
		return p.compile(context.WithoutCancel(ctx), name, revision)
	})
	select {
	case res := <-compiled:
		set, _ := res.Val.(*engine.Set)
		return set, res.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// nameOfPolicies returns the name that [store.DB.PastPolicies] gives these bundles.
func nameOfPolicies(bundles []store.Bundle) string {
	names := make([]string, len(bundles))
	for i, b := range bundles {
		names[i] = fmt.Sprintf("%d %s %s", b.Version, b.Digest, b.Name)
	}
	return strings.Join(names, "\n")
}

// recall returns a set that was used recently, or nil.
func (p *Past) recall(name string) *engine.Set {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.recent, func(ps pastSet) bool { return ps.name == name })
	if i < 0 {
		return nil
	}
	ps := p.recent[i]
	p.recent = slices.Insert(slices.Delete(p.recent, i, i+1), 0, ps)
	return ps.set
}

// compile compiles the policies of a revision and keeps them. A failure is not kept.
func (p *Past) compile(ctx context.Context, name string, revision int64) (set *engine.Set, err error) {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	defer func() {
		if r := recover(); r != nil {
			set, err = nil, fmt.Errorf("compile policies of the past: panic: %v\n%s", r, debug.Stack())
		}
	}()
	bundles, err := p.follower.cfg.DB.PastBundles(ctx, revision)
	if err != nil {
		return nil, err
	}
	if set, err = stored.Compile(bundles, p.follower.snap.Load().Set); err != nil {
		return nil, fmt.Errorf("revision %d %w", revision, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.recent = slices.Insert(p.recent, 0, pastSet{name, set})
	p.recent = slices.Delete(p.recent, min(len(p.recent), pastSetsKept), len(p.recent))
	return set, nil
}

// Prepare reads a question by the policies of a revision, which are set, and loads the
// entities that it can touch, as they were at the revision. It does not use the cache, which
// has the newest entities only. The error is a [engine.RequestError], a
// [stored.UnfitError], that of the database or that of pause. The decision may take any
// number of steps, because it was made once. Its entities may weigh [MaxPastWeight]: with
// more, the error is [store.ErrTooLarge].
func (p *Past) Prepare(ctx context.Context, revision int64, set *engine.Set, ask engine.Ask, pause engine.Pause) (*engine.Evaluation, error) {
	pool := engine.NewPool()
	pool.SetUnbounded()
	return p.prepare(ctx, revision, set, ask, pool, pause)
}

// PrepareAnew is Prepare for other policies than those that made the decision: it has the budgets of a new
// one.
func (p *Past) PrepareAnew(ctx context.Context, revision int64, set *engine.Set, ask engine.Ask, pause engine.Pause) (*engine.Evaluation, error) {
	return p.prepare(ctx, revision, set, ask, engine.NewPool(), pause)
}

func (p *Past) prepare(ctx context.Context, revision int64, set *engine.Set, ask engine.Ask, pool *engine.Pool, pause engine.Pause) (*engine.Evaluation, error) {
	pool.SetPause(pause)
	return set.Prepare(ask, pool, func(missing []cedar.EntityUID) error {
		_, err := p.loadInto(ctx, revision, set, pool, missing)
		return err
	})
}

// loadInto loads entities of a revision into a pool, as a set reads them. found are those that are stored.
func (p *Past) loadInto(ctx context.Context, revision int64, set *engine.Set, pool *engine.Pool, missing []cedar.EntityUID) (found []engine.Entity, err error) {
	rows, err := p.load(ctx, revision, stored.UIDs(missing))
	if err != nil {
		return nil, err
	}
	found = make([]engine.Entity, len(rows))
	for i, row := range rows {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		e, err := stored.ReadEntity(set, row)
		if err != nil {
			return nil, err
		}
		found[i] = *e
	}
	pool.Add(missing, found)
	return found, nil
}

// load loads entities of the past. One large load runs at a time, so that they leave memory and
// connections to others.
func (p *Past) load(ctx context.Context, revision int64, uids []store.UID) ([]store.Entity, error) {
	db := p.follower.cfg.DB
	rows, err := db.PastEntities(ctx, revision, uids, store.LargeLoad)
	if !errors.Is(err, store.ErrTooLarge) {
		return rows, err
	}
	select {
	case p.large <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-p.large }()
	return db.PastEntities(ctx, revision, uids, MaxPastWeight)
}
