package server

import (
	"errors"
	"io"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/store"
)

// tell makes up that something changed, as large as an event can be.
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

// One who does not read is cut off, with a reset for a last message. Others hear
// everything meanwhile.
func TestSlowWatcher(t *testing.T) {
	t.Parallel() // it takes long
	times := defaultTimeouts
	times.message = 10 * time.Minute // the place in the buffers is to run out, and not the time
	s, _, clients, _, _ := hurriedPlane(t, "decision", times)
	hub := s.follower.hub
	for i, c := range clients {
		t.Run(wires[i].name, func(t *testing.T) {
			watch := func(c *connect.Client) (stream cedarpostv1connect.AuthorizationServiceWatchClientStream, at int64) {
				stream, err := cedarpostv1connect.NewAuthorizationServiceClient(c).Watch(t.Context(), &cedarpostv1.WatchRequest{})
				if err != nil {
					t.Fatal(err)
				}
				m, err := stream.Receive()
				if err != nil {
					t.Fatal(err)
				}
				return stream, m.Revision.Number
			}
			slow, at := watch(c)
			quick, _ := watch(clients[2])
			defer leave(t, hub)
			defer func() { _ = quick.Close() }()
			newest := at
			for range 200 { // more than the buffers of both sides
				newest = hub.tell(uint64(newest))
				m, err := quick.Receive()
				if err != nil || m.Revision.Number != newest || m.Reset_ || len(m.Tags) != maxEventTags {
					t.Fatalf("%d tags of %v, %v", len(m.GetTags()), m.GetRevision(), err)
				}
			}
			var last *cedarpostv1.WatchResponse
			for {
				m, err := slow.Receive()
				if err != nil {
					if connect.CodeOf(err) != connect.CodeResourceExhausted || errors.Is(err, io.EOF) {
						t.Errorf("ended with %v", err)
					}
					break
				}
				if m.After != at {
					t.Errorf("revision %d comes after %d", m.After, at)
				}
				last, at = m, m.Revision.Number
			}
			if !last.GetReset_() || len(last.GetTags()) > 0 {
				t.Errorf("the last message is of %v, and no reset", last.GetRevision())
			}
		})
	}
}

// Where nothing changes, a watcher hears that the connection lives.
func TestWatchHeartbeat(t *testing.T) {
	times := defaultTimeouts
	times.heartbeat = 20 * time.Millisecond
	s, _, clients, _, _ := hurriedPlane(t, "decision", times)
	for i, c := range clients {
		stream, err := cedarpostv1connect.NewAuthorizationServiceClient(c).Watch(t.Context(), &cedarpostv1.WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for n := range 5 {
			m, err := stream.Receive()
			if err != nil || m.After != m.Revision.Number || m.Reset_ || len(m.Tags) > 0 {
				t.Errorf("%s, message %d: %v, %v", wires[i].name, n, m, err)
			}
		}
		_ = stream.Close()
	}
	leave(t, s.follower.hub)
}

// leave waits until all who hung up have left their places.
func leave(t *testing.T, h *hub) {
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if len(h.places) == 0 {
			return
		}
	}
	t.Error("their places are still taken")
}

// There is room for so many, and then for no more.
func TestTooManyWatchers(t *testing.T) {
	s, _, clients, _, _ := hurriedPlane(t, "decision", defaultTimeouts)
	s.follower.hub.places = make(chan struct{}, 2)
	c := cedarpostv1connect.NewAuthorizationServiceClient(clients[2])
	for n := range 3 {
		stream, err := c.Watch(t.Context(), &cedarpostv1.WatchRequest{})
		if err == nil {
			_, err = stream.Receive()
		}
		if code := connect.CodeOf(err); (n < 2) != (err == nil) || err != nil && code != connect.CodeResourceExhausted {
			t.Errorf("watcher %d: %v", n, err)
		}
	}
}

// from is a revision of the history of a position, which is known without its mark.
func from(p store.Position, number int64) named {
	p.Number, p.Mark = 0, uuid.Nil
	return named{number, p}
}

// What a hub remembers is bounded, and it never says less than what changed.
func TestHubForgets(t *testing.T) {
	h := newHub(nil)
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
	// A watcher may be so many behind, and no more.
	small := newHub(nil)
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
	// A break stands for all before it, and those who come later have nothing to do
	// with it.
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
	// The store knows more of the new history. Who watches does not notice.
	end := h.end()
	e, _, ok := h.recall(before, of(watchEventOf(p.Number-5, p, []uint64{1}, false)))
	if !ok || e.after != before.number || e.reset || len(e.tags) != 2 || h.end() != end {
		t.Errorf("with what the store knows: %+v, %v, %d", e, ok, h.end()-end)
	}
	if e, _, ok := h.recall(before, nil); !ok || e.reset || len(e.tags) != 2 {
		t.Errorf("once more: %+v, %v", e, ok)
	}
}
