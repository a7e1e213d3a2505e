package store

import (
	"context"
	"sync"
)

// latest shares reads of a value of which only the newest is wanted. One read is in
// progress at a time. A call that comes meanwhile gets the answer of the next read,
// because the one in progress may have begun before a change that the caller knows of.
type latest[T any] struct {
	mu      sync.Mutex
	running bool
	next    *answer[T] // of the next read; nil if no call waits for it
}

// answer is the answer of one read, after done is closed.
type answer[T any] struct {
	done  chan struct{}
	value T
	err   error
}

// get returns the result of a read that begins after the call. If ctx ends, the read goes
// on for the other calls, so it must have a timeout of its own.
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

// run reads as long as calls wait.
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
