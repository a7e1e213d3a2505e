package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cedarpost/cedarpost/server/stored"

	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

const (
	pollInterval = time.Second
	// changesPage is how many changes are read at once. Whoever is further behind
	// begins with an empty cache: that is cheaper, and takes bounded memory.
	changesPage   = 50_000
	freshWait     = time.Second // for at_least_as_fresh and one's own writes
	loadTimeout   = 30 * time.Second
	listenBackoff = 500 * time.Millisecond
)

// snapshot is everything a request needs of one revision, entities apart. It is
// immutable; a request takes one and keeps it to its end.
type snapshot struct {
	position store.Position // Number is the applied revision
	marks    *marks         // of its history
	// policyRevision is the newest publish in it.
	policyRevision int64
	set            *engine.Set
	schema         int64 // generation of the entity cache that goes with set
	bundles        []store.Bundle
	callers        map[[sha256.Size]byte]string // hash of a key → caller
	names          map[string]bool              // of callers
}

// follower applies revisions in order and holds the current snapshot. It owns
// snap; everyone else reads it.
type follower struct {
	db           *store.DB
	log          *slog.Logger
	maxStaleness time.Duration
	cache        *entityCache
	metric       *metrics
	hub          *hub // for watchers

	snap   atomic.Pointer[snapshot]
	newest atomic.Int64 // the newest revision heard of, applied or not
	oldest atomic.Int64 // the first revision that can be read, as far as this server heard
	wakeup chan struct{}
	// claim, if not nil, gives a database that is a copy of another one an id of its own.
	claim func(context.Context) error
	// claimed is the id that this server gave the database, which the log has already.
	// Only the goroutine that catches up uses it.
	claimed uuid.UUID

	lostSaid atomic.Int64 // when errLost was last logged, in Unix nanoseconds

	mu        sync.Mutex
	applied   chan struct{} // closed and replaced at each swap
	confirmed time.Time     // when a question was sent whose answer snap covers
	trouble   error         // why the last attempt failed; nil: it did not
}

func newFollower(db *store.DB, log *slog.Logger, maxStaleness time.Duration, cache *entityCache, m *metrics) *follower {
	return &follower{
		db: db, log: log, maxStaleness: maxStaleness, cache: cache, metric: m, hub: newHub(db),
		wakeup:  make(chan struct{}, 1),
		applied: make(chan struct{}),
	}
}

// wake makes the follower look now. Lost or doubled wake-ups do no harm: it
// looks each second anyway.
func (f *follower) wake() {
	select {
	case f.wakeup <- struct{}{}:
	default:
	}
}

// run follows until ctx ends.
func (f *follower) run(ctx context.Context) {
	go func() {
		for ctx.Err() == nil {
			if err := f.db.Listen(ctx, f.wake); err != nil && ctx.Err() == nil {
				f.metric.task(taskNotifications, err)
				f.log.Warn("notifications lost, polling instead", "err", err)
			}
			sleep(ctx, listenBackoff)
		}
	}()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-f.wakeup:
		}
		if err := f.catchUp(ctx); err != nil && ctx.Err() == nil {
			f.log.Error("revisions not applied", "err", err)
		}
	}
}

// catchUp applies what was committed since the snapshot. After an error the old
// snapshot stays, and ages.
func (f *follower) catchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	asked := time.Now()
	var next *snapshot
	var told *watchEvent
	copied := false
	err := f.db.View(ctx, func(v *store.View) (err error) {
		copied = v.Copied
		f.newest.Store(v.Position.Number)
		f.oldest.Store(v.Oldest)
		next, told, err = f.next(ctx, v)
		return err
	})
	switch {
	case err == nil:
		old := f.snap.Load()
		f.confirm(next, asked)
		if old != nil && next != nil && next.position.Database != old.position.Database && next.position.Database != f.claimed {
			f.log.Warn("the database has another id: it was restored, or replaced by another one. Tokens from before are refused",
				"before", old.position.Database, "after", next.position.Database)
		}
		// After the swap: who hears of a revision may ask this server for it at once.
		if told != nil {
			f.hub.publish(told)
			f.metric.watchEvents.Inc()
		}
	case errors.Is(err, stored.ErrCompile):
		f.metric.followFails.WithLabelValues("policy").Inc()
	default:
		f.metric.followFails.WithLabelValues("database").Inc()
	}
	if copied && f.claim != nil {
		// The snapshot that was just read stays in use. The next one has the new id, and
		// begins another history.
		if err := f.claim(ctx); err != nil {
			f.log.Warn("the database is a copy and has no id of its own yet", "err", err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trouble = err
	return err
}

// next makes the snapshot of a view, and what watchers are told of it; both nil when
// the one there is it.
func (f *follower) next(ctx context.Context, v *store.View) (*snapshot, *watchEvent, error) {
	old := f.snap.Load()
	if old != nil && old.position == v.Position {
		return nil, nil, nil
	}
	var changes []store.Change
	next := &snapshot{position: v.Position}
	// On another timeline, and in a database that was restored, the same numbers can mean
	// other things; and what was swept away can no longer be followed.
	anew := old == nil || !old.position.SameHistory(v.Position) ||
		old.position.Number >= v.Position.Number || old.position.Number < v.Oldest
	if !anew {
		has, err := v.Has(ctx, old.position)
		if err != nil {
			return nil, nil, err
		}
		anew = !has
	}
	sameHistory := !anew // below, anew can also mean that there are too many changes
	if !anew {
		*next = *old
		next.position = v.Position
		var err error
		if changes, err = v.Changes(ctx, old.position.Number, changesPage); err != nil {
			return nil, nil, err
		}
		anew = len(changes) == 0 || changes[len(changes)-1].Revision < v.Position.Number
	}
	after := int64(0)
	if sameHistory {
		after = old.position.Number
	}
	list, err := v.Marks(ctx, after, keptMarks)
	if err != nil {
		return nil, nil, err
	}
	if sameHistory {
		next.marks = old.marks.grow(v.Position.Number, list)
	} else {
		next.marks = newMarks(v.Position.Number, list)
	}
	changed := func(kind string) bool {
		return anew || slices.ContainsFunc(changes, func(c store.Change) bool { return c.Kind == kind })
	}
	if changed(store.KindBundle) {
		if err := f.loadPolicy(ctx, v, next, old); err != nil {
			return nil, nil, err
		}
	}
	if changed(store.KindKey) {
		keys, err := v.Keys(ctx)
		if err != nil {
			return nil, nil, err
		}
		next.callers = make(map[[sha256.Size]byte]string, len(keys))
		next.names = make(map[string]bool, len(keys))
		for _, k := range keys {
			next.callers[[sha256.Size]byte(k.Hash)] = k.Name
			next.names[k.Name] = true
		}
	}
	// Nothing can fail any more. The cache comes before the snapshot is given out.
	if anew || len(next.set.ChangedTypes(old.set)) > 0 {
		next.schema = f.cache.reset(v.Position.Number)
	} else {
		f.cache.apply(changes)
	}
	if anew {
		told := newBreak(next.position)
		told.marks = next.marks
		return next, told, nil
	}
	told := newWatchEvent(old.position.Number, next.position, changes, !onlyPolicies(old.bundles, next.bundles, changes))
	told.marks = next.marks
	return next, told, nil
}

// onlyPolicies reports whether bundles differ in their policies at most, at every
// revision on the way from one state to the other. Policies concern the decisions of
// their bundle alone, or, of guardrails, are in the tags of all. But schemas are read
// together: who owns a type, or what an attribute of it is, concerns other bundles too.
func onlyPolicies(old, now []store.Bundle, changes []store.Change) bool {
	published := map[string]bool{}
	for _, c := range changes {
		if c.Kind != store.KindBundle {
			continue
		}
		if published[c.ID] {
			return false // what lies between the two is not known here, and others answered by it
		}
		published[c.ID] = true
	}
	return slices.EqualFunc(old, now, func(a, b store.Bundle) bool {
		return a.Name == b.Name && a.Schema == b.Schema && a.Fields == b.Fields && a.OnForbidError == b.OnForbidError
	})
}

func (f *follower) loadPolicy(ctx context.Context, v *store.View, next, old *snapshot) (err error) {
	if next.bundles, err = v.Bundles(ctx); err != nil {
		return err
	}
	if next.policyRevision, err = v.PolicyRevision(ctx); err != nil {
		return err
	}
	var previous *engine.Set
	if old != nil {
		previous = old.set
	}
	if next.set, err = stored.Compile(next.bundles, previous); err != nil {
		return fmt.Errorf("revision %d %w", v.Position.Number, err)
	}
	return nil
}

// confirm swaps the snapshot (nil: the old one is current) and notes the moment
// it is known to be current for.
func (f *follower) confirm(next *snapshot, asked time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if next != nil {
		f.snap.Store(next)
		close(f.applied)
		f.applied = make(chan struct{})
	}
	// A commit may have confirmed the same snapshot meanwhile.
	if next != nil || asked.After(f.confirmed) {
		f.confirmed = asked
	}
}

// heard takes a position that somebody else read from the primary, in a question
// sent at that time. Each commit to the log brings one.
func (f *follower) heard(p store.Position, asked time.Time) {
	snap := f.snap.Load()
	if snap.position == p {
		f.mu.Lock()
		if asked.After(f.confirmed) {
			f.confirmed = asked
		}
		f.mu.Unlock()
		return
	}
	if snap.position.SameHistory(p) && p.Number > f.newest.Load() {
		f.newest.Store(p.Number)
	}
	f.wake()
}

// staleness is how old the snapshot may be at most.
func (f *follower) staleness() time.Duration {
	return age(f.asOf())
}

// why tells what keeps the snapshot from being current, nil when nothing does.
func (f *follower) why() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.trouble
}

// behind is how many revisions are committed, as far as this server heard, and not
// applied.
func (f *follower) behind() int64 { return max(f.newest.Load()-f.snap.Load().position.Number, 0) }

// age is how long ago a moment was, by the clock that says more: the monotonic
// one stops while the machine is suspended, the other can be set back.
func age(t time.Time) time.Duration {
	now := time.Now()
	return max(now.Sub(t), now.Round(0).Sub(t.Round(0)))
}

// asOf is the moment that the snapshot is known to be current for. What is taken
// after the call is not older.
func (f *follower) asOf() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.confirmed
}

// answerable refuses an answer that was long in the making: its snapshot, taken after
// asOf was read, may by now be older than allowed. A machine that was suspended
// between a decision and its answer has not noticed.
func (f *follower) answerable(snap *snapshot, asOf time.Time) error {
	if f.snap.Load() == snap {
		asOf = f.asOf()
	}
	if age(asOf) > f.maxStaleness {
		return errStale
	}
	return nil
}

var (
	errStale  = errors.New("policy and data are older than this server may use")
	errBehind = errors.New("this server has not applied that revision yet")
)

// current returns the snapshot, unless it may be older than allowed.
func (f *follower) current() (*snapshot, error) {
	if f.staleness() > f.maxStaleness {
		return nil, errStale
	}
	return f.snap.Load(), nil
}

// atLeast returns a snapshot that has applied a revision of the history that
// this server follows, waiting for it a bounded time.
func (f *follower) atLeast(ctx context.Context, number int64) (*snapshot, error) {
	return f.await(ctx, freshWait, func(s *snapshot) bool { return s.position.Number >= number })
}

// atPosition is atLeast for a position that was just read: the same number of another
// history, as after a failover or a restore, does not do.
func (f *follower) atPosition(ctx context.Context, p store.Position) (*snapshot, error) {
	return f.await(ctx, freshWait, func(s *snapshot) bool { return s.position.SameHistory(p) && s.marks.look(p) == known })
}

func (f *follower) await(ctx context.Context, patience time.Duration, enough func(*snapshot) bool) (*snapshot, error) {
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		f.mu.Lock()
		applied := f.applied
		f.mu.Unlock()
		if snap := f.snap.Load(); enough(snap) {
			if _, err := f.current(); err != nil {
				return nil, err
			}
			return snap, nil
		}
		f.wake()
		select {
		case <-applied:
		case <-deadline.C:
			return nil, errBehind
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
