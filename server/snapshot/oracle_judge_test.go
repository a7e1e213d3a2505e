package snapshot

import (
	"github.com/cedar-policy/cedar-go"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

// judge decides every question again, at the revision of its answer.
func (w *world) judge() {
	sets := map[int64]*engine.Set{} // by the revision of the newest publish
	policies := map[engine.PolicyRef]bool{}
	for revision, questions := range w.answers {
		published, err := w.db.PolicyRevision(w.ctx, revision)
		if err != nil {
			w.t.Fatal(err)
		}
		if sets[published] == nil {
			sets[published] = w.published(revision)
		}
		set := sets[published]
		pool := w.stored(revision, set)
		for q, answers := range questions {
			res, want := q.decideFrom(w.t, set, pool)
			for got, by := range answers {
				if got != want {
					w.t.Errorf("%s, revision %d, %+v:\n got %s\nwant %s", by, revision, q, got, want)
				}
			}
			if res.Allowed {
				w.tally.Allowed++
			} else {
				w.tally.Denied++
			}
			for _, p := range res.Policies {
				policies[p] = true
			}
		}
		w.tally.Answers += len(questions)
	}
	w.tally.Revisions, w.tally.Policies = len(w.answers), len(policies)
}

// published compiles the bundles of a revision.
func (w *world) published(revision int64) *engine.Set {
	bundles, err := w.db.Bundles(w.ctx, revision)
	if err != nil {
		w.t.Fatal(err)
	}
	var sources []engine.Source
	for _, b := range bundles {
		src, err := stored.Source(b)
		if err != nil {
			w.t.Fatal(err)
		}
		sources = append(sources, src)
	}
	set, findings := engine.Load(sources, nil)
	if set == nil {
		w.t.Fatal(findings)
	}
	return set
}

// stored reads all entities of a revision.
func (w *world) stored(revision int64, set *engine.Set) *engine.Pool {
	var all []store.UID
	for typ, ids := range map[string][]string{"W::User": users, "W::Group": groups, "W::Doc": docs} {
		for _, id := range ids {
			all = append(all, store.UID{Type: typ, ID: id})
		}
	}
	rows, err := w.db.LoadEntities(w.ctx, revision, all, 1<<40)
	if err != nil {
		w.t.Fatal(err)
	}
	pool := engine.NewPool()
	for _, uid := range all {
		pool.Put(cedar.NewEntityUID(cedar.EntityType(uid.Type), cedar.String(uid.ID)), nil)
	}
	for _, row := range rows {
		e, err := stored.ReadEntity(set, row)
		if err != nil {
			w.t.Fatal(err)
		}
		pool.Put(e.UID, e)
	}
	return pool
}
