package snapshot

import (
	"context"
	"errors"
	"fmt"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// The errors of watches. Their text is for the caller.
var (
	// ErrTooManyWatchers says that no place is free for another watcher.
	ErrTooManyWatchers = errors.New("callers watch this server already")
	// ErrTooSlow says that a watcher is too many events behind.
	ErrTooSlow = errors.New("this watcher does not keep up with what changes; begin anew")
)

// DefaultWatchers is how many callers may watch one server at once, if nothing else is set.
const DefaultWatchers = 10_000

// A Watcher reads what changes, from one revision on, without gaps. It takes one of
// [Config.MaxWatchers] places until [Watcher.Leave]. Only one goroutine may use it.
type Watcher struct {
	hub  *hub
	next int64                 // the number of the event that comes next
	last *cedarpostv1.Revision // the revision of the last message
	// Moved is closed when there are new messages, or when the API keys changed. It is valid after
	// a call of Messages, until the next one.
	Moved <-chan struct{}
}

// Watch begins a watch and returns its first message. after is the revision that the
// caller has applied; nil means the newest one. The error is [ErrTooManyWatchers] if no place
// is free, a [TokenError], or that of the database. Without an error, call [Watcher.Leave] at
// the end.
func (f *Follower) Watch(ctx context.Context, after *cedarpostv1.Revision) (w *Watcher, first *cedarpostv1.WatchResponse, err error) {
	h := f.hub
	select {
	case h.places <- struct{}{}:
	default:
		return nil, nil, fmt.Errorf("%d %w", cap(h.places), ErrTooManyWatchers)
	}
	w = &Watcher{hub: h}
	began := false
	defer func() {
		if !began { // also after a panic
			<-h.places
		}
	}()
	var event *watchEvent
	if after == nil {
		here, next, _ := h.newest()
		event, w.next = watchEventOf(here.Number, here, nil, false), next
	} else {
		p, err := parseToken("after", after)
		if err != nil {
			return nil, nil, err
		}
		if here, _, _ := h.newest(); here.SameHistory(p.at) && here.Number < p.at.Number {
			f.wake()
			wait, cancel := context.WithTimeout(ctx, freshWait)
			h.await(wait, p.at)
			cancel()
		}
		if event, w.next, err = h.resume(ctx, p); err != nil {
			return nil, nil, err
		}
	}
	w.last = event.message.Revision
	began = true
	return w, event.message, nil
}

// Messages returns the new messages, in order. If there are none, wait for Moved. If the
// watcher is too far behind, the error is [ErrTooSlow], and the only message is a reset.
func (w *Watcher) Messages() ([]*cedarpostv1.WatchResponse, error) {
	events, next, moved, ok := w.hub.next(w.next)
	if !ok {
		w.hub.metric.cuts.Inc()
		newest, _, _ := w.hub.newest()
		return []*cedarpostv1.WatchResponse{newBreak(newest).from(w.last.Number)}, ErrTooSlow
	}
	messages := make([]*cedarpostv1.WatchResponse, len(events))
	for i, e := range events {
		messages[i] = e.from(w.last.Number)
		w.last = e.message.Revision
	}
	w.next, w.Moved = next, moved
	return messages, nil
}

// Heartbeat returns a message that says that nothing changed since the last message.
func (w *Watcher) Heartbeat() *cedarpostv1.WatchResponse {
	return &cedarpostv1.WatchResponse{After: w.last.Number, Revision: w.last}
}

// Leave frees the place of the watcher.
func (w *Watcher) Leave() { <-w.hub.places }
