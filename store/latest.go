package store

import (
	"context"
	"sync"
)

// latest shares reads of a value of which only the newest is wanted. One read is
// under way at a time; who asks meanwhile gets the answer of the next one, for the
// one under way may have begun before something the caller knows of.
type latest[T any] struct {
	mu      sync.Mutex
	running bool
	next    *answer[T] // of the read that has not begun yet; nil when nobody waits for it
}

// answer is of one read, once done is closed.
type answer[T any] struct {
	done  chan struct{}
	value T
	err   error
}

// get returns what a read finds that begins after the call. The read goes on
// for the others when ctx ends, so read bounds itself.
func (l *latest[T]) get(ctx context.Context, read func() (T, error)) (value T, err error) {
	l.mu.Lock()
	if l.next == nil {
		l.next = &answer[T]{done: make(chan struct{})}
	}
	a := l.next
	if !l.running {
		l.running = true
		go l.run(read)
	}
	l.mu.Unlock()
	select {
	case <-a.done:
		return a.value, a.err
	case <-ctx.Done():
		return value, ctx.Err()
	}
}

// run reads as long as someone waits.
func (l *latest[T]) run(read func() (T, error)) {
	for {
		l.mu.Lock()
		a := l.next
		l.next = nil
		if a == nil {
			l.running = false
		}
		l.mu.Unlock()
		if a == nil {
			return
		}
		a.value, a.err = read()
		close(a.done)
	}
}
