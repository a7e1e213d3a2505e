package snapshot

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxEventTags = 10_000  // of one event; with more, it becomes a reset
	hubEvents    = 1024    // that are kept for watchers that resume
	hubTags      = 200_000 // of all these events
	maxBehind    = 256     // events that a watcher may be behind
)

// watchEvent says what changed with one swap of snapshots. It is immutable.
//
// A reset says that anything may have changed. A reset that covers no revisions is a break:
// it starts a new history, in which numbers can mean other revisions.
type watchEvent struct {
	after    int64          // the event covers the revisions after this one
	position store.Position // of the last revision that it covers
	tags     []uint64       // sorted; none in a reset
	reset    bool
	message  *cedarpostv1.WatchResponse
	marks    *marks // of the history of position
}

// breaks reports whether the event is a break.
func (e *watchEvent) breaks() bool { return e.reset && e.after == e.position.Number }

// newBreak makes a break at a position.
func newBreak(p store.Position) *watchEvent { return watchEventOf(p.Number, p, nil, true) }

// newWatchEvent makes an event of changes. It is a reset if reset is true or if there are too
// many of them.
func newWatchEvent(after int64, p store.Position, changes []store.Change, reset bool) *watchEvent {
	var tags []uint64
	for _, c := range changes {
		if c.Kind != store.KindKey && c.Type != store.GrantType { // no decision depends on API keys and grants
			tags = append(tags, tag(p.Database, c.Kind, c.Type, c.ID))
		}
	}
	return watchEventOf(after, p, tags, reset)
}

// watchEventOf makes an event of tags, in any order. It is a reset if reset is true or if
// there are too many of them.
func watchEventOf(after int64, p store.Position, tags []uint64, reset bool) *watchEvent {
	slices.Sort(tags)
	tags = slices.Compact(tags)
	if reset = reset || len(tags) > maxEventTags; reset {
		tags = nil
	}
	e := &watchEvent{after: after, position: p, tags: tags, reset: reset}
	e.message = &cedarpostv1.WatchResponse{After: after, Revision: EncodeRevision(p, p.Number), Tags: tags, Reset_: reset}
	return e
}

// from returns the message of the event for a watcher that has applied a revision. Most
// watchers get the message that they share.
func (e *watchEvent) from(number int64) *cedarpostv1.WatchResponse {
	if number == e.after {
		return e.message
	}
	return &cedarpostv1.WatchResponse{After: number, Revision: e.message.Revision, Tags: e.tags, Reset_: e.reset}
}

// merge makes one event of several consecutive events, for a watcher that has applied a
// revision that the first one covers, or one before it.
func merge(number int64, events []*watchEvent) *watchEvent {
	last := events[len(events)-1]
	var tags []uint64
	reset := false
	for _, e := range events {
		// A break is a reset for watchers of the history before it. In its own history no
		// revision is before it.
		reset = reset || e.reset && !e.breaks()
		// Twice the maximum is left to watchEventOf: events can have the same tags.
		if reset = reset || len(tags)+len(e.tags) > 2*maxEventTags; !reset {
			tags = append(tags, e.tags...)
		}
	}
	return watchEventOf(number, last.position, tags, reset)
}

// hub keeps the newest events, which all watchers read. It has no list of watchers: each
// watcher reads new events when moved is closed, and a watcher that is too late finds that
// its next event is gone. So an event costs the same for any number of watchers, and a slow
// one does not delay the others.
type hub struct {
	db     *store.DB
	metric *hubMetrics
	places chan struct{} // holds one element for each watcher
	turn   chan struct{} // holds one element while a resume reads from the store

	mu       sync.Mutex
	position store.Position // of the newest event
	marks    *marks         // of its history
	events   []*watchEvent  // each one begins where the one before it ends
	first    int64          // the number of events[0]; events are numbered as they are published
	tags     int            // of all events
	reset    int64          // the number of the newest event that is a reset
	lost     int64          // what changed since this revision, or an older one, is not known
	moved    chan struct{}  // closed and replaced with each event
}

func newHub(db *store.DB, places int, metrics prometheus.Registerer) *hub {
	h := &hub{
		db: db, places: make(chan struct{}, places), turn: make(chan struct{}, 1),
		lost: -1, moved: make(chan struct{}),
	}
	h.metric = newHubMetrics(h, metrics)
	return h
}

// publish gives out an event. Only the follower calls it, in order, after it has swapped to
// the snapshot of the event.
func (h *hub) publish(e *watchEvent) {
	h.metric.events.Inc()
	h.mu.Lock()
	defer h.mu.Unlock()
	if e.breaks() {
		h.first += int64(len(h.events))
		h.events, h.tags, h.lost = nil, 0, -1
	}
	h.events = append(h.events, e)
	h.tags += len(e.tags)
	for len(h.events) > hubEvents || h.tags > hubTags {
		h.tags -= len(h.events[0].tags)
		h.events = h.events[1:]
		h.first++
	}
	if e.reset {
		h.reset = h.end() - 1
	}
	h.position, h.marks = e.position, e.marks
	close(h.moved)
	h.moved = make(chan struct{})
}

// wake makes all watchers look up, without an event: a key of theirs may have been revoked.
func (h *hub) wake() {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.moved)
	h.moved = make(chan struct{})
}

// end returns the number of the next event.
func (h *hub) end() int64 { return h.first + int64(len(h.events)) }

// begin returns the revision since which the hub knows what changed.
func (h *hub) begin() int64 {
	if len(h.events) > 0 {
		return h.events[0].after
	}
	return h.position.Number
}

// next returns the events from a number on, without those before the newest reset. after is
// the number of the event after them, and moved is closed when there is that event. ok is
// false if the watcher is too far behind.
func (h *hub) next(number int64) (events []*watchEvent, after int64, moved <-chan struct{}, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if number < h.reset {
		number = h.reset
	}
	if number < h.first || h.end()-number > maxBehind {
		return nil, 0, nil, false
	}
	return slices.Clone(h.events[number-h.first:]), h.end(), h.moved, true
}

// newest returns the newest position and the number of the next event. moved is closed when
// there is that event.
func (h *hub) newest() (p store.Position, next int64, moved <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.position, h.end(), h.moved
}

// await waits until the hub has a position, or one after it. It does not wait for a position
// of another history.
func (h *hub) await(ctx context.Context, p store.Position) {
	for {
		here, _, moved := h.newest()
		if !here.SameHistory(p) || here.Number >= p.Number {
			return
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return
		}
	}
}

// resume returns one event with everything that changed since a revision, and the number of
// the event after it. The event is a reset if that is not known.
func (h *hub) resume(ctx context.Context, p named) (e *watchEvent, next int64, err error) {
	if e, next, ok := h.recall(p, nil); ok {
		return e, next, nil
	}
	// After a restart many watchers resume at once. The first one reads from the store, and
	// the others find in memory what it has read.
	select {
	case h.turn <- struct{}{}:
		defer func() { <-h.turn }()
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	var older *watchEvent
	for {
		if e, next, ok := h.recall(p, older); ok {
			return e, next, nil
		}
		if older, err = h.read(ctx, p); err != nil {
			return nil, 0, err
		}
	}
}

// recall is resume without the store. older, if not nil, is an event that read has made; it
// is used if it ends where the events of the hub begin. ok is false if the store has to be
// asked.
func (h *hub) recall(p named, older *watchEvent) (e *watchEvent, next int64, ok bool) {
	h.mu.Lock()
	here, history, next, events := h.position, h.marks, h.end(), h.events
	if older != nil && older.position.SameHistory(here) && older.marks.older == history.older && older.position.Number == h.begin() {
		events = append([]*watchEvent{older}, events...)
		if h.tags+len(older.tags) <= hubTags && len(h.events) < hubEvents {
			h.events = events
			h.first--
			h.tags += len(older.tags)
		}
	}
	untold := p.number <= h.lost
	h.mu.Unlock()
	if untold || !p.at.SameHistory(here) || p.at.Number > here.Number {
		return newBreak(here), next, true
	}
	switch history.look(p.at) {
	case known:
	case unknown:
		return nil, 0, false
	default:
		return newBreak(here), next, true
	}
	switch {
	case p.number == here.Number:
		return watchEventOf(here.Number, here, nil, false), next, true
	case len(events) == 0, p.number < events[0].after:
		return nil, 0, false
	}
	i := slices.IndexFunc(events, func(e *watchEvent) bool { return e.position.Number > p.number })
	return merge(p.number, events[i:]), next, true
}

// read makes an event of what changed between a revision and the events of the hub, from the
// store. If the store does not know, read notes that and returns nil.
func (h *hub) read(ctx context.Context, p named) (older *watchEvent, err error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	h.mu.Lock()
	here, history, begin := h.position, h.marks, h.begin()
	h.mu.Unlock()
	if history.look(p.at) == unknown {
		// The marks keep the answer, where recall finds it.
		v, err := history.ask(ctx, h.db, p.at, here)
		if errors.Is(err, store.ErrOtherHistory) {
			v, err = lost, nil
		}
		if err != nil {
			return nil, err
		}
		if v == lost {
			h.untold(history, p.number)
		}
		return nil, nil
	}
	changes, told, err := h.db.ChangesUpTo(ctx, p.number, begin, here, maxEventTags)
	if err != nil {
		return nil, err
	}
	// Whether a bundle changed in its policies only is not looked up.
	told = told && !slices.ContainsFunc(changes, func(c store.Change) bool { return c.Kind == store.KindBundle })
	if !told {
		h.untold(history, p.number)
		return nil, nil
	}
	to := here
	to.Number = begin
	older = newWatchEvent(p.number, to, changes, false)
	older.marks = history
	older.message.Revision = EncodeRevision(here, begin)
	return older, nil
}

// untold notes that it is not known what changed since this revision of a history, or since
// an older one.
func (h *hub) untold(history *marks, number int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.marks.older == history.older {
		h.lost = max(h.lost, number)
	}
}
