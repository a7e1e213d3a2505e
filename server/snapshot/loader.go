package snapshot

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

// loader loads the entities of questions, from the cache or else from the store. An entity
// that many calls miss at the same time is loaded once.
type loader struct {
	db     *store.DB
	cache  *entityCache
	metric *loaderMetrics

	mu      sync.Mutex
	flights map[flightKey]*flight
}

// flightKey is an entity as of a snapshot.
type flightKey struct {
	snap *Snapshot
	uid  cedar.EntityUID
}

// flight is one load under way. found and err are valid after done is closed.
type flight struct {
	asked []cedar.EntityUID
	done  chan struct{}
	found []engine.Entity // with all ancestors
	err   error
}

func newLoader(db *store.DB, cache *entityCache, metrics prometheus.Registerer) *loader {
	return &loader{db: db, cache: cache, metric: newLoaderMetrics(metrics), flights: map[flightKey]*flight{}}
}

// prepare is [View.Prepare]. The entities that are not in the cache are loaded together, in
// at most one round trip for each level of dereference.
func (l *loader) prepare(ctx context.Context, snap *Snapshot, asks []engine.Ask, pause engine.Pause) (_ []engine.Evaluation, loading time.Duration, err error) {
	pool := engine.NewPool()
	pool.SetPause(pause)
	hits := 0
	defer func() { l.metric.lookups.WithLabelValues("hit").Add(float64(hits)) }()
	pool.SetSource(func(uid cedar.EntityUID) (*engine.Entity, bool) {
		if ctx.Err() != nil {
			return nil, false // ends the walk; the load that follows returns the error
		}
		e, known := l.cache.get(snap, uid)
		if known {
			hits++
		}
		return e, known
	})
	defer pool.SetSource(nil)
	list, err := snap.Set.PrepareBatch(asks, pool, func(missing []cedar.EntityUID) error {
		began := time.Now()
		defer func() { loading += time.Since(began) }()
		if err := ctx.Err(); err != nil {
			return err
		}
		for _, f := range l.fly(ctx, snap, missing) {
			select {
			case <-f.done:
			case <-ctx.Done():
				return ctx.Err()
			}
			if f.err != nil {
				return f.err
			}
			pool.Add(f.asked, f.found)
		}
		return nil
	})
	return list, loading, err
}

// fly returns the loads of entities: those that are under way, and a new one for the rest.
func (l *loader) fly(ctx context.Context, snap *Snapshot, uids []cedar.EntityUID) []*flight {
	if len(uids) == 0 {
		return nil
	}
	var flights []*flight
	joined := map[*flight]bool{}
	own := &flight{done: make(chan struct{})}
	l.mu.Lock()
	for _, uid := range uids {
		key := flightKey{snap, uid}
		f := l.flights[key]
		if f == nil {
			f, l.flights[key] = own, own
			own.asked = append(own.asked, uid)
		}
		if !joined[f] {
			joined[f] = true
			flights = append(flights, f)
		}
	}
	l.mu.Unlock()
	l.metric.lookups.WithLabelValues("miss").Add(float64(len(own.asked)))
	l.metric.lookups.WithLabelValues("shared").Add(float64(len(uids) - len(own.asked)))
	if len(own.asked) > 0 {
		// Other calls may wait for the load, so it does not end with this one.
		go l.run(context.WithoutCancel(ctx), snap, own)
	}
	return flights
}

// run does one load, for the calls that wait and for the cache.
func (l *loader) run(ctx context.Context, snap *Snapshot, f *flight) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	func() {
		defer func() {
			if r := recover(); r != nil {
				f.err = fmt.Errorf("load entities: panic: %v\n%s", r, debug.Stack())
			}
		}()
		f.found, f.err = l.read(ctx, snap, f.asked)
	}()
	l.mu.Lock()
	for _, uid := range f.asked {
		delete(l.flights, flightKey{snap, uid})
	}
	l.mu.Unlock()
	close(f.done)
}

// read loads entities with their ancestors, in one round trip.
func (l *loader) read(ctx context.Context, snap *Snapshot, asked []cedar.EntityUID) ([]engine.Entity, error) {
	rows, err := l.db.LoadEntitiesAt(ctx, snap.Position, stored.UIDs(asked))
	if err != nil {
		return nil, err
	}
	l.metric.loads.Inc()
	l.metric.loadedRows.Add(float64(len(rows)))
	found := make([]engine.Entity, len(rows))
	kept := make([]loaded, 0, len(rows)+len(asked))
	present := make(map[cedar.EntityUID]bool, len(rows))
	for i, row := range rows {
		if err := ctx.Err(); err != nil {
			return nil, err // sets of sets take long to read
		}
		e, err := stored.ReadEntity(snap.Set, row)
		if err != nil {
			return nil, err
		}
		found[i] = *e
		present[e.UID] = true
		kept = append(kept, loaded{e.UID, e, row.Since})
	}
	for _, uid := range asked {
		if !present[uid] {
			kept = append(kept, loaded{uid: uid})
		}
	}
	l.cache.keep(snap, kept)
	return found, nil
}
