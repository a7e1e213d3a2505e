package store

import (
	"context"
	"errors"
	"testing"
)

// A call never gets the answer of a read that began before the call. Calls that wait at
// the same time share one read.
func TestLatest(t *testing.T) {
	var l latest[int]
	reads := 0 // only the reading goroutine changes it
	begun, finish := make(chan struct{}), make(chan struct{})
	read := func() (int, error) {
		reads++
		n := reads
		begun <- struct{}{}
		<-finish
		return n, nil
	}
	first := make(chan int)
	go func() {
		n, _ := l.get(t.Context(), read)
		first <- n
	}()
	<-begun

	const many = 10
	second := make(chan int, many)
	for range many {
		go func() {
			n, _ := l.get(t.Context(), read)
			second <- n
		}()
	}
	for waiting := false; !waiting; {
		l.mu.Lock()
		waiting = l.next != nil
		l.mu.Unlock()
	}
	// If one call gives up, the others still get an answer.
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.get(ended, read); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	finish <- struct{}{}
	if n := <-first; n != 1 {
		t.Errorf("the first caller got the answer of read %d", n)
	}
	for range many {
		select {
		case <-begun: // for a later call
			finish <- struct{}{}
		case n := <-second:
			if n < 2 {
				t.Errorf("a later caller got the answer of read %d", n)
			}
			continue
		}
		if n := <-second; n < 2 {
			t.Errorf("a later caller got the answer of read %d", n)
		}
	}
}
