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
	"maps"
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
	// vainPause is the least time between a look that found nothing new and the next look.
	// Every login of the database can send notifications, and may send any number of them.
	vainPause = 10 * time.Millisecond
	// changesPage is how many changes are read at once. A follower that is further behind
	// begins with an empty cache: that is cheaper, and takes bounded memory.
	changesPage   = 50_000
	freshWait     = time.Second     // how long a call waits for a revision
	storeTimeout  = 2 * time.Second // of one read that a call waits for
	loadTimeout   = 30 * time.Second
	listenBackoff = 500 * time.Millisecond
)

// Snapshot is the state of one revision, without entities: policies, API keys and grants. It is
// immutable. A request uses one snapshot to its end.
type Snapshot struct {
	// Position is the position of the revision.
	Position store.Position
	// PolicyRevision is the newest revision that published a bundle.
	PolicyRevision int64
	// Set holds the compiled policies of all bundles.
	Set *engine.Set
	// Bundles are the published bundles, without their files.
	Bundles []store.Bundle

	marks  *marks                          // of its history
	schema int64                           // generation of the entity cache that goes with Set
	keys   map[[sha256.Size]byte]store.Key // by their hash
	names  map[string][]store.Key          // by their caller
	grants map[string][]store.Grant        // by their caller
	// keyChanges is the [store.View.KeyChanges] that the keys are of.
	keyChanges int64
}

// Key returns the API key with a hash, which can have expired. hash is the SHA-256 of its text.
func (s *Snapshot) Key(hash [sha256.Size]byte) (key store.Key, known bool) {
	key, known = s.keys[hash]
	return key, known
}

// HasKey reports whether a caller of this name has the API key with this id, and it has not ended at a
// time.
func (s *Snapshot) HasKey(name, id string, now time.Time) bool {
	return slices.ContainsFunc(s.names[name], func(k store.Key) bool { return k.ID == id && k.Live(now) })
}

// Grants returns the grants of a caller, which can have ended. Nobody may change them.
func (s *Snapshot) Grants(caller string) []store.Grant { return s.grants[caller] }

// AllGrants returns the grants by caller, role and bundle. They can have ended.
func (s *Snapshot) AllGrants() (list []store.Grant) {
	for _, caller := range slices.Sorted(maps.Keys(s.grants)) {
		list = append(list, s.grants[caller]...)
	}
	return list
}

// Bundle returns a published bundle.
func (s *Snapshot) Bundle(name string) (b store.Bundle, ok bool) {
	i := slices.IndexFunc(s.Bundles, func(b store.Bundle) bool { return b.Name == name })
	if i < 0 {
		return b, false
	}
	return s.Bundles[i], true
}

// View is a snapshot and the time at which it was known to be the newest one. A request
// takes one view, uses it to its end, and calls [View.Answerable] before it answers.
type View struct {
	*Snapshot
	follower *Follower
	asOf     time.Time
}

// Answerable returns [ErrStale] if the view is older than [Config.MaxStaleness] by now. An
// answer can take long to make, for example on a machine that is suspended meanwhile, so it
// must not leave before Answerable returns nil.
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
// loading is the time that the loads took. If a question cannot be read, the error is in its
// evaluation; err is the error of a load, that of the context, or that of pause, which is
// called as [engine.Pool.SetPause] says until the questions are decided.
func (v View) Prepare(ctx context.Context, asks []engine.Ask, pause engine.Pause) (list []engine.Evaluation, loading time.Duration, err error) {
	return v.follower.loader.prepare(ctx, v.Snapshot, asks, pause)
}

// Config configures a [Follower]. DB, Log, MaxStaleness and Metrics are required.
type Config struct {
	DB  *store.DB
	Log *slog.Logger
	// MaxStaleness is how old the newest snapshot may be. While it is older, calls are refused.
	MaxStaleness time.Duration
	// CacheBytes is about how many bytes the cached entities may take; 0 means no cache.
	CacheBytes uint64
	// Metrics gets the metrics of the package.
	Metrics prometheus.Registerer
	// Claim, if not nil, gives the database an id of its own if it is a copy of another one.
	// It returns the new id, or the zero UUID if the database keeps its id.
	Claim func(context.Context) (uuid.UUID, error)
	// MaxWatchers is how many callers may watch at once; 0 means [DefaultWatchers].
	MaxWatchers int
	// Caller returns the name of the caller of a call, for the log; nil: it is not logged.
	Caller func(ctx context.Context) string
	// NotListening, if not nil, is called with the error that ended the connection for
	// notifications, each time it is lost.
	NotListening func(error)
}

// Follower applies committed revisions in order and holds the newest snapshot. Its methods
// may be called by several goroutines, but only one goroutine at a time may be in
// [Follower.CatchUp] or [Follower.Run]. CatchUp must succeed once before any other method is
// called, except [Follower.Claim].
type Follower struct {
	cfg    Config
	cache  *entityCache
	loader *loader
	hub    *hub
	metric *followerMetrics

	snap   atomic.Pointer[Snapshot]
	newest atomic.Int64 // the newest revision that this server knows of, applied or not
	oldest atomic.Int64 // the oldest revision that can be read, as far as this server knows
	wakeup chan struct{}
	// claimed is the id that this server gave the database.
	claimed atomic.Pointer[uuid.UUID]

	lost lostLines // about tokens of another history

	mu        sync.Mutex
	applied   chan struct{} // closed and replaced when snap is
	confirmed time.Time     // when the last query was sent that found snap to be the newest
	trouble   error         // of the last CatchUp
}

// NewFollower makes a follower without a snapshot. The first [Follower.CatchUp] loads one.
func NewFollower(c Config) *Follower {
	cache := newEntityCache(c.CacheBytes)
	f := &Follower{
		cfg: c, cache: cache, loader: newLoader(c.DB, cache, c.Metrics),
		hub: newHub(c.DB, cmp.Or(c.MaxWatchers, DefaultWatchers), c.Metrics), wakeup: make(chan struct{}, 1), applied: make(chan struct{}),
	}
	f.metric = newFollowerMetrics(f)
	return f
}

// Claim calls [Config.Claim] and remembers the new id. It returns the error of that.
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

// HasClaimed reports whether [Follower.Claim] gave the database this id.
func (f *Follower) HasClaimed(database uuid.UUID) bool {
	id := f.claimed.Load()
	return id != nil && *id == database
}

// Latest returns the newest snapshot, however old it is; nil before the first
// [Follower.CatchUp].
func (f *Follower) Latest() *Snapshot { return f.snap.Load() }

// latestView returns a view of the newest snapshot, however old it is.
func (f *Follower) latestView() View {
	f.mu.Lock()
	defer f.mu.Unlock()
	return View{f.snap.Load(), f, f.confirmed}
}

// OldestRevision returns the oldest revision that can be read, as far as this server knows.
func (f *Follower) OldestRevision() int64 { return f.oldest.Load() }

// wake makes Run look for new revisions now. A lost or doubled wake-up does no harm: Run
// looks each second anyway.
func (f *Follower) wake() {
	select {
	case f.wakeup <- struct{}{}:
	default:
	}
}

// Run applies revisions as they are committed, until ctx ends. It logs errors and goes on. Each
// look that finds something new stands for a commit. All other looks are at most a hundred per
// second, however many notifications come.
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
		before := f.Latest()
		if err := f.CatchUp(ctx); err != nil && ctx.Err() == nil {
			f.cfg.Log.Error("revisions not applied", "err", err)
		}
		if f.Latest() == before {
			pause.For(ctx, vainPause)
		}
	}
}

// CatchUp applies what was committed since the newest snapshot, or loads the first one, and
// tells watchers. After an error the old snapshot stays in use and gets older. If policies do
// not compile, the error is [stored.ErrCompile].
func (f *Follower) CatchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	f.metric.looks.Inc()
	asked := time.Now()
	var next *Snapshot
	var event *watchEvent
	copied := false
	err := f.cfg.DB.View(ctx, func(v *store.View) (err error) {
		copied = v.Copied
		f.newest.Store(v.Position.Number)
		f.oldest.Store(v.Oldest)
		next, event, err = f.next(ctx, v)
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
		// After the swap, because a watcher may ask this server for the revision at once.
		switch {
		case event != nil:
			f.hub.publish(event)
		case next != nil: // the keys changed by hand
			f.hub.wake()
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

// next makes the snapshot of a view, and the event for watchers. Both are nil if the newest
// snapshot is that of the view.
func (f *Follower) next(ctx context.Context, v *store.View) (*Snapshot, *watchEvent, error) {
	old := f.snap.Load()
	if old != nil && old.Position == v.Position {
		if old.keyChanges == v.KeyChanges {
			return nil, nil, nil
		}
		// Somebody changed the keys by hand, which makes no revision.
		next := *old
		return &next, nil, next.readKeys(ctx, v)
	}
	var changes []store.Change
	next := &Snapshot{Position: v.Position}
	// On another timeline, and in a database that was restored, the same numbers can mean
	// other revisions. Changes that were swept can no longer be read.
	anew := old == nil || !old.Position.SameHistory(v.Position) ||
		old.Position.Number >= v.Position.Number || old.Position.Number < v.Oldest
	if !anew {
		has, err := v.Has(ctx, old.Position)
		if err != nil {
			return nil, nil, err
		}
		anew = !has
	}
	sameHistory := !anew // later, anew can also mean that there are too many changes
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
	if changed(store.KindKey) || next.keyChanges != v.KeyChanges {
		if err := next.readKeys(ctx, v); err != nil {
			return nil, nil, err
		}
	}
	if anew || slices.ContainsFunc(changes, func(c store.Change) bool { return c.Type == store.GrantType }) {
		if err := next.readGrants(ctx, v); err != nil {
			return nil, nil, err
		}
	}
	// Nothing can fail any more. The cache must change before the snapshot is given out.
	if anew || len(next.Set.ChangedTypes(old.Set)) > 0 {
		next.schema = f.cache.reset(v.Position.Number)
	} else {
		f.cache.apply(changes)
	}
	if anew {
		event := newBreak(next.Position)
		event.marks = next.marks
		return next, event, nil
	}
	event := newWatchEvent(old.Position.Number, next.Position, changes, !onlyPolicies(old.Bundles, next.Bundles, changes))
	event.marks = next.marks
	return next, event, nil
}

// readKeys reads the API keys of a view into a snapshot that is not given out yet.
func (s *Snapshot) readKeys(ctx context.Context, v *store.View) error {
	keys, err := v.Keys(ctx)
	if err != nil {
		return err
	}
	s.keys = make(map[[sha256.Size]byte]store.Key, len(keys))
	s.names = make(map[string][]store.Key, len(keys))
	for _, k := range keys {
		if len(k.Hash) != sha256.Size {
			continue // inserted by hand; no secret has this hash
		}
		s.keys[[sha256.Size]byte(k.Hash)] = k
		s.names[k.Name] = append(s.names[k.Name], k)
	}
	s.keyChanges = v.KeyChanges
	return nil
}

// readGrants reads the grants of a view into a snapshot that is not given out yet.
func (s *Snapshot) readGrants(ctx context.Context, v *store.View) error {
	list, err := v.Grants(ctx)
	if err != nil {
		return err
	}
	s.grants = map[string][]store.Grant{}
	for _, g := range list {
		s.grants[g.Caller] = append(s.grants[g.Caller], g)
	}
	return nil
}

// onlyPolicies reports whether bundles differ in their policies only, at every revision
// from one state to the other. The policies of a bundle affect the decisions that have the
// tag of the bundle, and every decision has the tag of guardrails. Schemas are different:
// they are read together, so a change of one can affect decisions of other bundles.
func onlyPolicies(old, now []store.Bundle, changes []store.Change) bool {
	published := map[string]bool{}
	for _, c := range changes {
		if c.Kind != store.KindBundle {
			continue
		}
		if published[c.ID] {
			return false // other servers may have decided by a version in between, which is not known here
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

// confirm swaps the snapshot, unless next is nil, and notes that it was the newest one when
// a query was sent.
func (f *Follower) confirm(next *Snapshot, asked time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if next != nil {
		f.snap.Store(next)
		close(f.applied)
		f.applied = make(chan struct{})
	}
	// Heard may have confirmed the same snapshot for a later time.
	if next != nil || asked.After(f.confirmed) {
		f.confirmed = asked
	}
}

// Heard tells the follower the newest position of the primary, as returned by a query that
// was sent at the time asked. Each commit to the log returns it.
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

// Trouble returns the error of the last [Follower.CatchUp].
func (f *Follower) Trouble() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.trouble
}

// age returns how long ago a time was, by the clock that says more: the monotonic clock
// stops while the machine is suspended, and the wall clock can be set back.
func age(t time.Time) time.Duration {
	now := time.Now()
	return max(now.Sub(t), now.Round(0).Sub(t.Round(0)))
}

// The errors of a server whose snapshot is too old for a call. Their text is for the caller.
var (
	// ErrStale says that the newest snapshot is older than [Config.MaxStaleness].
	ErrStale = errors.New("policy and data are older than this server may use")
	// ErrBehind says that a revision that exists is not applied yet.
	ErrBehind = errors.New("this server has not applied that revision yet")
)

// Current returns a view of the newest snapshot. If that is older than
// [Config.MaxStaleness], the error is [ErrStale].
func (f *Follower) Current() (View, error) {
	v := f.latestView()
	if age(v.asOf) > f.cfg.MaxStaleness {
		return View{}, ErrStale
	}
	return v, nil
}

// AtLeast returns a view that has applied a revision of the history that this server
// follows. If that does not happen within a second, the error is [ErrBehind]; if the view is
// too old, it is [ErrStale].
func (f *Follower) AtLeast(ctx context.Context, number int64) (View, error) {
	return f.AtLeastWithin(ctx, freshWait, number)
}

// AtLeastWithin is [Follower.AtLeast] with another patience than a second.
func (f *Follower) AtLeastWithin(ctx context.Context, patience time.Duration, number int64) (View, error) {
	return f.await(ctx, patience, func(s *Snapshot) bool { return s.Position.Number >= number })
}

// atPosition is AtLeast for a position that was just read. A revision with the same number
// in another history, as after a failover or a restore, is not enough.
func (f *Follower) atPosition(ctx context.Context, p store.Position) (View, error) {
	return f.await(ctx, freshWait, func(s *Snapshot) bool { return s.Position.SameHistory(p) && s.marks.look(p) == known })
}

// FullyConsistent returns a view that has applied everything that is committed at the time
// of the call. Its errors are those of [Follower.AtLeast] and of the database.
func (f *Follower) FullyConsistent(ctx context.Context) (View, error) {
	p, err := f.cfg.DB.Current(ctx)
	if err != nil {
		return View{}, err
	}
	return f.atPosition(ctx, p)
}

// await waits for a snapshot that is enough, and returns a view of it.
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
