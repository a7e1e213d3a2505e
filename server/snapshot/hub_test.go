package snapshot

import (
	"errors"
	"testing"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/store"
)

// tell publishes a made-up event, as large as an event can be.
func (h *hub) tell(first uint64) int64 {
	p, _, _ := h.newest()
	after := p.Number
	p.Number++
	tags := make([]uint64, maxEventTags)
	for i := range tags {
		tags[i] = first + uint64(i)
	}
	e := watchEventOf(after, p, tags, false)
	e.marks = h.marks
	h.publish(e)
	return p.Number
}

// A watcher that does not read gets a reset and an error. Another one gets everything.
func TestWatcherThatDoesNotRead(t *testing.T) {
	f := NewFollower(Config{Metrics: prometheus.NewRegistry()})
	f.hub.publish(newBreak(f.hub.position))
	watch := func() *Watcher {
		w, _, err := f.Watch(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	slow, quick := watch(), watch()
	for range hubTags/maxEventTags + 1 {
		newest := f.hub.tell(7)
		messages, err := quick.Messages()
		if err != nil || len(messages) != 1 || messages[0].Revision.Number != newest || messages[0].Reset_ || len(messages[0].Tags) != maxEventTags {
			t.Fatalf("%d messages, %v", len(messages), err)
		}
	}
	messages, err := slow.Messages()
	if !errors.Is(err, ErrTooSlow) || len(messages) != 1 || !messages[0].Reset_ || messages[0].After != 0 {
		t.Errorf("%v, %v", messages, err)
	}
	slow.Leave()
	quick.Leave()
	if len(f.hub.places) != 0 {
		t.Error("watchers that left still have their places")
	}
}

// from returns a revision of the history of a position, with the anchor 0, which every history
// has.
func from(p store.Position, number int64) named {
	p.Number, p.Mark = 0, uuid.Nil
	return named{number, p}
}

// A hub keeps a bounded number of events, and never leaves out a change.
func TestHubForgets(t *testing.T) {
	h := newHub(nil, 1, prometheus.NewRegistry())
	h.publish(newBreak(h.position))
	for range 50 {
		h.tell(7)
	}
	if h.tags > hubTags || len(h.events) != hubTags/maxEventTags {
		t.Errorf("%d tags in %d events", h.tags, len(h.events))
	}
	p := h.position
	for n, known := range map[int64]bool{0: false, 29: false, 30: true, 49: true, 50: true} {
		e, next, ok := h.recall(from(p, n), nil)
		if ok != known || ok && (e.after != n || e.position.Number != 50 || e.reset != (n == 30) || next != h.end()) {
			t.Errorf("from %d: %+v, %d, %v", n, e, next, ok)
		}
	}
	if _, _, _, ok := h.next(h.first - 1); ok {
		t.Error("goes on from what is forgotten")
	}
	// A watcher may be maxBehind events behind, and no more.
	small := newHub(nil, 1, prometheus.NewRegistry())
	small.publish(newBreak(small.position))
	for n := range int64(2 * hubEvents) {
		p := small.position
		p.Number = n + 1
		small.publish(watchEventOf(n, p, []uint64{uint64(n)}, false))
	}
	for behind, known := range map[int64]bool{0: true, maxBehind: true, maxBehind + 1: false} {
		events, _, _, ok := small.next(small.end() - behind)
		if ok != known || ok && int64(len(events)) != behind || len(small.events) != hubEvents {
			t.Errorf("%d behind: %d events, %v", behind, len(events), ok)
		}
	}
	// A break replaces all events before it. Watchers that resume after it do not get it.
	waits := h.first - 1
	p = h.position
	p.Timeline++
	history := newMarks(p.Number, nil)
	of := func(e *watchEvent) *watchEvent { e.marks = history; return e }
	h.publish(of(newBreak(p)))
	events, next, _, ok := h.next(waits)
	if !ok || len(events) != 1 || !events[0].reset || next != h.end() {
		t.Errorf("over a break: %v, %d, %v", events, next, ok)
	}
	later := p
	later.Number++
	h.publish(of(watchEventOf(p.Number, later, []uint64{7}, false)))
	if e, _, ok := h.recall(from(p, p.Number), nil); !ok || e.reset || len(e.tags) != 1 {
		t.Errorf("after a break: %v, %v", e, ok)
	}
	before := from(p, p.Number-2)
	if e, _, ok := h.recall(before, nil); ok {
		t.Errorf("from before a break: %+v", e)
	}
	// With an event that was read from the store, a watcher resumes from before the break. Other
	// watchers do not notice.
	end := h.end()
	e, _, ok := h.recall(before, of(watchEventOf(p.Number-5, p, []uint64{1}, false)))
	if !ok || e.after != before.number || e.reset || len(e.tags) != 2 || h.end() != end {
		t.Errorf("with what the store knows: %+v, %v, %d", e, ok, h.end()-end)
	}
	if e, _, ok := h.recall(before, nil); !ok || e.reset || len(e.tags) != 2 {
		t.Errorf("once more: %+v, %v", e, ok)
	}
}
