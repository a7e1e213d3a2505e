package snapshot

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

// ErrLargeLoad says that the time of a call ended before its entities were loaded, which are
// so many or so large that their load had to wait for others, or was not done in time. It does
// not say that the service is overloaded or away: somebody who writes entities could make the
// checks about them fail open. The text is for the caller.
var ErrLargeLoad = fmt.Errorf("this question depends on more than %d KiB of entities, and its time ended before they were loaded", store.LargeLoad>>10)

// maxLargeLoads is what the large loads of one call may weigh together, in bytes: some times
// what those of one question may, because a batch can have several that are too large.
const maxLargeLoads = 4 * engine.MaxSliceWeight

// loader loads the entities of questions, from the cache or else from the store. An entity
// that many calls miss at the same time is loaded once.
//
// Each load first reads up to [store.LargeLoad]. That is enough for usual questions, and takes
// milliseconds. Only a load that turns out to be larger takes one of a few places, and reads up
// to [engine.MaxSliceWeight]. So large loads wait for each other, and leave the processors and
// the connections of the database to usual ones.
type loader struct {
	db     *store.DB
	cache  *entityCache
	metric *loaderMetrics
	large  chan struct{} // has a place for each large load

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
	return &loader{
		db: db, cache: cache, metric: newLoaderMetrics(metrics), flights: map[flightKey]*flight{},
		large: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
	}
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
	left := int64(maxLargeLoads)
	list, err := snap.Set.PrepareBatch(asks, pool, func(missing []cedar.EntityUID) error {
		began := time.Now()
		defer func() { loading += time.Since(began) }()
		return l.load(ctx, snap, pool, missing, &left)
	})
	return list, loading, err
}

// load loads entities with their ancestors into a pool, alone or with other calls. left is what
// the large loads of the call may still weigh.
func (l *loader) load(ctx context.Context, snap *Snapshot, pool *engine.Pool, missing []cedar.EntityUID, left *int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var large []cedar.EntityUID
	shared := false
	for _, part := range l.fly(ctx, snap, missing) {
		err := part.flight.wait(ctx)
		switch {
		case err == nil:
			pool.Add(part.flight.asked, part.flight.found)
		case errors.Is(err, store.ErrTooLarge):
			large = append(large, part.uids...)
			shared = shared || len(part.uids) < len(part.flight.asked)
		default:
			return err
		}
	}
	if shared {
		// Another call asked for more entities than this one, so perhaps only its were too
		// large.
		f := newFlight(large...)
		go l.run(ctx, snap, f, store.LargeLoad)
		err := f.wait(ctx)
		if err == nil {
			pool.Add(f.asked, f.found)
		}
		if !errors.Is(err, store.ErrTooLarge) {
			return err
		}
	}
	if len(large) == 0 {
		return nil
	}
	return l.loadLarge(ctx, snap, pool, large, left)
}

// loadLarge does a load that is larger than usual. Its error is an [engine.TooLargeError] if it
// is larger than a question may be, and [ErrLargeLoad] if there is no time for it.
func (l *loader) loadLarge(ctx context.Context, snap *Snapshot, pool *engine.Pool, asked []cedar.EntityUID, left *int64) error {
	if *left <= 0 {
		return &engine.TooLargeError{Batch: true}
	}
	soon, cancel := sooner(ctx)
	defer cancel()
	late := func() error {
		if errors.Is(ctx.Err(), context.Canceled) {
			return ctx.Err()
		}
		return ErrLargeLoad
	}
	select {
	case l.large <- struct{}{}:
	case <-soon.Done():
		return late()
	}
	if l.cached(snap, asked) { // by another call, while this one waited for its place
		<-l.large
		return nil
	}
	l.metric.large.Inc()
	f := newFlight(asked...)
	go func() {
		defer func() { <-l.large }()
		l.run(ctx, snap, f, engine.MaxSliceWeight)
	}()
	err := f.wait(soon)
	switch {
	case errors.Is(err, store.ErrTooLarge):
		*left -= engine.MaxSliceWeight
		return &engine.TooLargeError{Cause: err}
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return late()
	case err != nil:
		return err
	}
	for i := range f.found {
		*left -= f.found[i].Weight
	}
	pool.Add(f.asked, f.found)
	return nil
}

// sooner returns a context that ends a little before another one: while the caller, who has
// the same deadline, still waits for an answer.
func sooner(ctx context.Context) (context.Context, context.CancelFunc) {
	end, bounded := ctx.Deadline()
	if !bounded {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, end.Add(-time.Until(end)/5))
}

// cached reports whether the cache has all entities.
func (l *loader) cached(snap *Snapshot, uids []cedar.EntityUID) bool {
	for _, uid := range uids {
		if _, known := l.cache.get(snap, uid); !known {
			return false
		}
	}
	return true
}

func newFlight(asked ...cedar.EntityUID) *flight {
	return &flight{asked: asked, done: make(chan struct{})}
}

// wait returns the error of the load, or of the context.
func (f *flight) wait(ctx context.Context) error {
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// part is a load under way, and which of a call's entities it loads.
type part struct {
	flight *flight
	uids   []cedar.EntityUID
}

// fly returns the loads of entities: those that are under way, and a new one for the rest.
func (l *loader) fly(ctx context.Context, snap *Snapshot, uids []cedar.EntityUID) []part {
	if len(uids) == 0 {
		return nil
	}
	var parts []part
	joined := map[*flight]int{}
	own := newFlight()
	l.mu.Lock()
	for _, uid := range uids {
		key := flightKey{snap, uid}
		f := l.flights[key]
		if f == nil {
			f, l.flights[key] = own, own
			own.asked = append(own.asked, uid)
		}
		i, known := joined[f]
		if !known {
			i = len(parts)
			joined[f] = i
			parts = append(parts, part{flight: f})
		}
		parts[i].uids = append(parts[i].uids, uid)
	}
	l.mu.Unlock()
	l.metric.lookups.WithLabelValues("miss").Add(float64(len(own.asked)))
	l.metric.lookups.WithLabelValues("shared").Add(float64(len(uids) - len(own.asked)))
	if len(own.asked) > 0 {
		// Other calls may wait for the load, so it does not end with this one.
		go l.run(ctx, snap, own, store.LargeLoad)
	}
	return parts
}

// run does one load of at most some weight, for the calls that wait and for the cache. It does not
// end when the call does, but it may take as long as the call may, if that is more than storeTimeout.
func (l *loader) run(call context.Context, snap *Snapshot, f *flight, most int64) {
	end := time.Now().Add(storeTimeout)
	if last, bounded := call.Deadline(); bounded && last.After(end) {
		end = last
	}
	ctx, cancel := context.WithDeadline(context.WithoutCancel(call), end)
	defer cancel()
	func() {
		defer func() {
			if r := recover(); r != nil {
				f.err = fmt.Errorf("load entities: panic: %v\n%s", r, debug.Stack())
			}
		}()
		f.found, f.err = l.read(ctx, snap, f.asked, most)
	}()
	l.mu.Lock()
	for _, uid := range f.asked {
		if key := (flightKey{snap, uid}); l.flights[key] == f {
			delete(l.flights, key)
		}
	}
	l.mu.Unlock()
	close(f.done)
}

// read loads entities with their ancestors, in one round trip.
func (l *loader) read(ctx context.Context, snap *Snapshot, asked []cedar.EntityUID, most int64) ([]engine.Entity, error) {
	rows, err := l.db.LoadEntitiesAt(ctx, snap.Position, stored.UIDs(asked), most)
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
