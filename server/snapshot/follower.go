// Package snapshot keeps what a request sees of one revision: policies, API keys and entities.
// A [Follower] applies committed revisions and gives out a [View]: a [Snapshot] and how old it
// is. A [Watcher] reads what changes. A [Past] reads earlier revisions.
package snapshot

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/internal/pause"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

const (
	pollInterval = time.Second
	// changesPage is how many changes are read at once. Whoever is further behind
	// begins with an empty cache: that is cheaper, and takes bounded memory.
	changesPage   = 50_000
	freshWait     = time.Second     // for at_least_as_fresh and a caller's own writes
	storeTimeout  = 2 * time.Second // of one read for a waiting call
	loadTimeout   = 30 * time.Second
	listenBackoff = 500 * time.Millisecond
)

// Snapshot is the state of one revision, without entities: policies and API keys. It is
// immutable. A request takes one and keeps it to its end.
type Snapshot struct {
	// Position is that of the applied revision.
	Position store.Position
	// PolicyRevision is the newest revision that published a bundle.
	PolicyRevision int64
	// Set holds the compiled policies of all bundles.
	Set *engine.Set
	// Bundles are the published bundles, without their files.
	Bundles []store.Bundle

	marks   *marks                       // of its history
	schema  int64                        // generation of the entity cache that goes with set
	callers map[[sha256.Size]byte]string // hash of a key → caller
	names   map[string]bool              // of callers
}

// Caller returns the name that an API key stands for. hash is the SHA-256 of the key.
func (s *Snapshot) Caller(hash [sha256.Size]byte) (name string, known bool) {
	name, known = s.callers[hash]
	return name, known
}

// HasCaller reports whether an API key of this name is live.
func (s *Snapshot) HasCaller(name string) bool { return s.names[name] }

// View is a snapshot together with the moment that it is known to be current for. A
// request takes one view, uses it to its end, and asks answerable before it answers.
type View struct {
	*Snapshot
	follower *Follower
	asOf     time.Time
}

// Answerable returns errStale if the snapshot is older now than the server may use. An
// answer can take long to make, as on a machine that was suspended in between, so it must
// not leave before answerable returned nil.
func (v View) Answerable() error {
	asOf := v.asOf
	// If the snapshot is still the newest one, it may have been confirmed since.
	if now := v.follower.latestView(); now.Snapshot == v.Snapshot {
		asOf = now.asOf
	}
	if age(asOf) > v.follower.cfg.MaxStaleness {
		return ErrStale
	}
	return nil
}

// Prepare reads questions and loads the entities that they can touch, as of the view.
// loading is the time that the loads took. It ends with the context.
func (v View) Prepare(ctx context.Context, asks []engine.Ask) (list []engine.Evaluation, loading time.Duration, err error) {
	return v.follower.loader.prepare(ctx, v.Snapshot, asks)
}

// Config says what a follower follows, and how.
type Config struct {
	DB  *store.DB
	Log *slog.Logger
	// MaxStaleness is how old a snapshot may be before it is refused.
	MaxStaleness time.Duration
	// CacheBytes is about how much memory cached entities may take; 0 means no cache.
	CacheBytes uint64
	// Metrics gets the metrics of the follower.
	Metrics prometheus.Registerer
	// Claim, if not nil, gives a database that is a copy of another one an id of its own.
	// It returns the new id, or the zero UUID if the database needs none.
	Claim func(context.Context) (uuid.UUID, error)
	// MaxWatchers is how many callers may watch at once; 0 means 10,000.
	MaxWatchers int
	// NotListening, if not nil, is called when the connection for notifications is lost.
	NotListening func(error)
}

// Follower applies revisions in order and holds the current snapshot. It is the only one
// that writes snap.
type Follower struct {
	cfg    Config
	cache  *entityCache
	loader *loader
	hub    *hub // for watchers
	metric *followerMetrics

	snap   atomic.Pointer[Snapshot]
	newest atomic.Int64 // the newest revision heard of, applied or not
	oldest atomic.Int64 // the first revision that can be read, as far as this server heard
	wakeup chan struct{}
	// claimed is the id that this server gave the database; the log has it already.
	claimed atomic.Pointer[uuid.UUID]

	lostSaid atomic.Int64 // when errLost was last logged, in Unix nanoseconds

	mu        sync.Mutex
	applied   chan struct{} // closed and replaced at each swap
	confirmed time.Time     // when a question was sent whose answer snap covers
	trouble   error         // why the last attempt failed; nil: it did not
}

// NewFollower makes a follower that has no snapshot yet: the first catchUp loads one.
func NewFollower(c Config) *Follower {
	cache := newEntityCache(c.CacheBytes)
	f := &Follower{
		cfg: c, cache: cache, loader: newLoader(c.DB, cache, c.Metrics),
		hub: newHub(c.DB, cmp.Or(c.MaxWatchers, maxWatchers), c.Metrics), wakeup: make(chan struct{}, 1), applied: make(chan struct{}),
	}
	f.metric = newFollowerMetrics(f)
	return f
}

// Claim gives the database an id of its own if it is a copy of another one.
func (f *Follower) Claim(ctx context.Context) error {
	if f.cfg.Claim == nil {
		return nil
	}
	id, err := f.cfg.Claim(ctx)
	if err == nil && id != uuid.Nil {
		f.claimed.Store(&id)
	}
	return err
}

// HasClaimed reports whether this server gave the database its id.
func (f *Follower) HasClaimed(database uuid.UUID) bool {
	id := f.claimed.Load()
	return id != nil && *id == database
}

// Latest returns the newest snapshot, however old it is; nil before the first catchUp.
func (f *Follower) Latest() *Snapshot { return f.snap.Load() }

// latestView returns the newest snapshot and the moment that it is current for.
func (f *Follower) latestView() View {
	f.mu.Lock()
	defer f.mu.Unlock()
	return View{f.snap.Load(), f, f.confirmed}
}

// OldestRevision is the first revision that can be read, as far as this server heard.
func (f *Follower) OldestRevision() int64 { return f.oldest.Load() }

// wake makes the follower look now. Lost or doubled wake-ups do no harm: it
// looks each second anyway.
func (f *Follower) wake() {
	select {
	case f.wakeup <- struct{}{}:
	default:
	}
}

// Run follows until ctx ends.
func (f *Follower) Run(ctx context.Context) {
	go func() {
		for ctx.Err() == nil {
			if err := f.cfg.DB.Listen(ctx, f.wake); err != nil && ctx.Err() == nil {
				if f.cfg.NotListening != nil {
					f.cfg.NotListening(err)
				}
				f.cfg.Log.Warn("notifications lost, polling instead", "err", err)
			}
			pause.For(ctx, listenBackoff)
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
		if err := f.CatchUp(ctx); err != nil && ctx.Err() == nil {
			f.cfg.Log.Error("revisions not applied", "err", err)
		}
	}
}

// CatchUp applies what was committed since the snapshot. After an error the old
// snapshot stays, and ages.
func (f *Follower) CatchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	asked := time.Now()
	var next *Snapshot
	var told *watchEvent
	copied := false
	err := f.cfg.DB.View(ctx, func(v *store.View) (err error) {
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
		if old != nil && next != nil && next.Position.Database != old.Position.Database && !f.HasClaimed(next.Position.Database) {
			f.cfg.Log.Warn("the database has another id: it was restored, or replaced by another one. Tokens from before are refused",
				"before", old.Position.Database, "after", next.Position.Database)
		}
		// After the swap: who hears of a revision may ask this server for it at once.
		if told != nil {
			f.hub.publish(told)
		}
	case errors.Is(err, stored.ErrCompile):
		f.metric.failures.WithLabelValues("policy").Inc()
	default:
		f.metric.failures.WithLabelValues("database").Inc()
	}
	if copied {
		// The snapshot that was just read stays in use. The next one has the new id, and
		// begins another history.
		if err := f.Claim(ctx); err != nil {
			f.cfg.Log.Warn("the database is a copy and has no id of its own yet", "err", err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trouble = err
	return err
}

// next makes the snapshot of a view, and what watchers are told of it; both nil when
// the one there is it.
func (f *Follower) next(ctx context.Context, v *store.View) (*Snapshot, *watchEvent, error) {
	old := f.snap.Load()
	if old != nil && old.Position == v.Position {
		return nil, nil, nil
	}
	var changes []store.Change
	next := &Snapshot{Position: v.Position}
	// On another timeline, and in a database that was restored, the same numbers can mean
	// other things; and what was swept away can no longer be followed.
	anew := old == nil || !old.Position.SameHistory(v.Position) ||
		old.Position.Number >= v.Position.Number || old.Position.Number < v.Oldest
	if !anew {
		has, err := v.Has(ctx, old.Position)
		if err != nil {
			return nil, nil, err
		}
		anew = !has
	}
	sameHistory := !anew // below, anew can also mean that there are too many changes
	if !anew {
		*next = *old
		next.Position = v.Position
		var err error
		if changes, err = v.Changes(ctx, old.Position.Number, changesPage); err != nil {
			return nil, nil, err
		}
		anew = len(changes) == 0 || changes[len(changes)-1].Revision < v.Position.Number
	}
	after := int64(0)
	if sameHistory {
		after = old.Position.Number
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
	if anew || len(next.Set.ChangedTypes(old.Set)) > 0 {
		next.schema = f.cache.reset(v.Position.Number)
	} else {
		f.cache.apply(changes)
	}
	if anew {
		told := newBreak(next.Position)
		told.marks = next.marks
		return next, told, nil
	}
	told := newWatchEvent(old.Position.Number, next.Position, changes, !onlyPolicies(old.Bundles, next.Bundles, changes))
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

func (f *Follower) loadPolicy(ctx context.Context, v *store.View, next, old *Snapshot) (err error) {
	if next.Bundles, err = v.Bundles(ctx); err != nil {
		return err
	}
	if next.PolicyRevision, err = v.PolicyRevision(ctx); err != nil {
		return err
	}
	var previous *engine.Set
	if old != nil {
		previous = old.Set
	}
	if next.Set, err = stored.Compile(next.Bundles, previous); err != nil {
		return fmt.Errorf("revision %d %w", v.Position.Number, err)
	}
	return nil
}

// confirm swaps the snapshot (nil: the old one is current) and notes the moment
// it is known to be current for.
func (f *Follower) confirm(next *Snapshot, asked time.Time) {
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

// Heard takes a position that somebody else read from the primary, in a question
// sent at that time. Each commit to the log brings one.
func (f *Follower) Heard(p store.Position, asked time.Time) {
	snap := f.snap.Load()
	if snap.Position == p {
		f.mu.Lock()
		if asked.After(f.confirmed) {
			f.confirmed = asked
		}
		f.mu.Unlock()
		return
	}
	if snap.Position.SameHistory(p) && p.Number > f.newest.Load() {
		f.newest.Store(p.Number)
	}
	f.wake()
}

// staleness is how old the snapshot may be at most.
func (f *Follower) staleness() time.Duration {
	return age(f.latestView().asOf)
}

// Trouble tells what keeps the snapshot from being current, nil when nothing does.
func (f *Follower) Trouble() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.trouble
}

// behind is how many revisions are committed, as far as this server heard, and not
// applied.
func (f *Follower) behind() int64 { return max(f.newest.Load()-f.snap.Load().Position.Number, 0) }

// age is how long ago a moment was, by the clock that says more: the monotonic
// one stops while the machine is suspended, the other can be set back.
func age(t time.Time) time.Duration {
	now := time.Now()
	return max(now.Sub(t), now.Round(0).Sub(t.Round(0)))
}

var (
	ErrStale  = errors.New("policy and data are older than this server may use")
	ErrBehind = errors.New("this server has not applied that revision yet")
)

// Current returns a view of the newest snapshot. The error is errStale if that is older
// than the server may use.
func (f *Follower) Current() (View, error) {
	v := f.latestView()
	if age(v.asOf) > f.cfg.MaxStaleness {
		return View{}, ErrStale
	}
	return v, nil
}

// AtLeast returns a view that has applied a revision of the history that this server
// follows. It waits up to a second for it, and then returns errBehind.
func (f *Follower) AtLeast(ctx context.Context, number int64) (View, error) {
	return f.await(ctx, freshWait, func(s *Snapshot) bool { return s.Position.Number >= number })
}

// AtPosition is atLeast for a position that was just read. A revision with the same number
// in another history, as after a failover or a restore, is not enough.
func (f *Follower) AtPosition(ctx context.Context, p store.Position) (View, error) {
	return f.await(ctx, freshWait, func(s *Snapshot) bool { return s.Position.SameHistory(p) && s.marks.look(p) == known })
}

// CatchUpNow waits until this server has applied what is committed at the time of the call.
func (f *Follower) CatchUpNow(ctx context.Context) error {
	p, err := f.cfg.DB.Current(ctx)
	if err != nil {
		return err
	}
	_, err = f.AtPosition(ctx, p)
	return err
}

func (f *Follower) await(ctx context.Context, patience time.Duration, enough func(*Snapshot) bool) (View, error) {
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		f.mu.Lock()
		applied := f.applied
		f.mu.Unlock()
		if v := f.latestView(); enough(v.Snapshot) {
			if age(v.asOf) > f.cfg.MaxStaleness {
				return View{}, ErrStale
			}
			return v, nil
		}
		f.wake()
		select {
		case <-applied:
		case <-deadline.C:
			return View{}, ErrBehind
		case <-ctx.Done():
			return View{}, ctx.Err()
		}
	}
}
