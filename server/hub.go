package server

import (
	"context"
	"errors"
	"slices"
	"sync"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxEventTags = 10_000  // of one event; with more it is a reset
	hubEvents    = 1024    // kept for those who come again,
	hubTags      = 200_000 // with so many tags in all
	maxBehind    = 256     // events that a watcher may be behind
	maxWatchers  = 10_000  // of one server
)

// watchEvent is what watchers learn of one swap of snapshots. It is immutable. One
// that is a reset and tells of no revision is a break: it does not go on from what
// was before, in numbers that may mean something else.
type watchEvent struct {
	after    int64          // the number that it goes on from
	position store.Position // it tells up to here
	tags     []uint64       // sorted; none with reset
	reset    bool           // what changed is not told
	message  *cedarpostv1.WatchResponse
	marks    *marks // of the history that position is of
}

func (e *watchEvent) breaks() bool { return e.reset && e.after == e.position.Number }

// newBreak makes an event for watchers to begin anew.
func newBreak(p store.Position) *watchEvent { return watchEventOf(p.Number, p, nil, true) }

// newWatchEvent makes an event of what changed; reset if that is not to be told, or
// too much.
func newWatchEvent(after int64, p store.Position, changes []store.Change, reset bool) *watchEvent {
	var tags []uint64
	for _, c := range changes {
		if c.Kind != store.KindKey { // no decision depends on one
			tags = append(tags, tag(p.Database, c.Kind, c.Type, c.ID))
		}
	}
	return watchEventOf(after, p, tags, reset)
}

func watchEventOf(after int64, p store.Position, tags []uint64, reset bool) *watchEvent {
	slices.Sort(tags)
	tags = slices.Compact(tags)
	if reset = reset || len(tags) > maxEventTags; reset {
		tags = nil
	}
	e := &watchEvent{after: after, position: p, tags: tags, reset: reset}
	e.message = &cedarpostv1.WatchResponse{After: after, Revision: encodeRevision(p, p.Number), Tags: tags, Reset_: reset}
	return e
}

// from is the message of the event for a watcher that has applied a number: as a
// rule the one that all share.
func (e *watchEvent) from(number int64) *cedarpostv1.WatchResponse {
	if number == e.after {
		return e.message
	}
	return &cedarpostv1.WatchResponse{After: number, Revision: e.message.Revision, Tags: e.tags, Reset_: e.reset}
}

// merge makes one event of several that follow one another, for a watcher that has
// applied a number within the first, or before it. What is too much to tell is not
// even sorted.
func merge(number int64, events []*watchEvent) *watchEvent {
	last := events[len(events)-1]
	var tags []uint64
	reset := false
	for _, e := range events {
		// A break was one for those who watched; in numbers nothing lies before it.
		reset = reset || e.reset && !e.breaks()
		if reset = reset || len(tags)+len(e.tags) > 2*maxEventTags; !reset {
			tags = append(tags, e.tags...)
		}
	}
	return watchEventOf(number, last.position, tags, reset)
}

// hub has the newest events, each of which all watchers read. It does not know who
// they are: each comes for what is new when it hears that there is something, and
// one that was away for too long finds that it is gone. So an event costs the same
// for any number of watchers, and a slow one is in nobody's way.
type hub struct {
	db     *store.DB
	places chan struct{} // one for each watcher
	turn   chan struct{} // to read from the store, one at a time

	mu       sync.Mutex
	position store.Position // where the newest event ends
	marks    *marks         // of its history
	events   []*watchEvent  // each begins where the one before it ends
	first    int64          // the number of events[0], which counts all that came
	tags     int            // in events
	reset    int64          // the number of the newest one that is a reset
	lost     int64          // who has applied no more than this cannot be told what changed
	moved    chan struct{}  // closed and replaced with each event
}

func newHub(db *store.DB) *hub {
	return &hub{
		db: db, places: make(chan struct{}, maxWatchers), turn: make(chan struct{}, 1),
		lost: -1, moved: make(chan struct{}),
	}
}

// publish gives out an event. It is called after the snapshot of the event is in
// force, by the follower alone, in order.
func (h *hub) publish(e *watchEvent) {
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

// end is the number of the event that comes next.
func (h *hub) end() int64 { return h.first + int64(len(h.events)) }

// begin is the revision from which on the hub knows what changed.
func (h *hub) begin() int64 {
	if len(h.events) > 0 {
		return h.events[0].after
	}
	return h.position.Number
}

// next returns the events from a number on, the number of the one after them, and
// what is closed when that is there. What came before a reset is left out. ok is
// false for a watcher that is too far behind.
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

// newest returns the newest position, the number of the event after it, and what is
// closed when that is there.
func (h *hub) newest() (p store.Position, next int64, moved <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.position, h.end(), h.moved
}

// await waits for a revision of the history that the hub is in, if it is of that.
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

// resume tells a watcher that has applied a revision what came since, in one event,
// and which event comes next. The event is a reset where what changed is not known.
func (h *hub) resume(ctx context.Context, p named) (e *watchEvent, next int64, err error) {
	if e, next, ok := h.recall(p, nil); ok {
		return e, next, nil
	}
	// After a restart many come at once. The first one reads, and the others find what
	// it has read.
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

// recall is resume from memory alone, and from an event of the time before, if that
// ends where memory begins. ok is false if the store has to be asked.
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

// read has the store tell what changed between a position and what the hub knows. If
// that cannot be told, the position is lost.
func (h *hub) read(ctx context.Context, p named) (older *watchEvent, err error) {
	ctx, cancel := context.WithTimeout(ctx, decisionTimeout)
	defer cancel()
	h.mu.Lock()
	here, history, begin := h.position, h.marks, h.begin()
	h.mu.Unlock()
	if history.look(p.at) == unknown {
		// The answer is kept in the marks, where recall finds it.
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
	// How a bundle differed from the one before is not looked up.
	told = told && !slices.ContainsFunc(changes, func(c store.Change) bool { return c.Kind == store.KindBundle })
	if !told {
		h.untold(history, p.number)
		return nil, nil
	}
	to := here
	to.Number = begin
	older = newWatchEvent(p.number, to, changes, false)
	older.marks = history
	older.message.Revision = encodeRevision(here, begin)
	return older, nil
}

// untold notes that a watcher that has applied this number of a history, or a smaller
// one, cannot be told what changed since.
func (h *hub) untold(history *marks, number int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.marks.older == history.older {
		h.lost = max(h.lost, number)
	}
}
