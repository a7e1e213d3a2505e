package access

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// Calls that take few steps never wait, however many costly ones do.
func TestLightCallsTakeNoTurn(t *testing.T) {
	s := NewShares(1)
	costly := s.Call(t.Context(), Caller{Name: "a"})
	if err := costly.Pause("x", freeSteps); err != nil {
		t.Fatal(err)
	}
	light := s.Call(t.Context(), Caller{Name: "b"})
	for range 3 {
		for range freeSteps / 100 {
			if err := light.Pause("x", 99); err != nil {
				t.Fatal(err)
			}
		}
		light.Next()
	}
	light.Rest()
	costly.Rest()
	if s.places != 1 || len(s.bundles) != 0 || len(s.callers) != 0 {
		t.Errorf("left over: %+v", s)
	}
}

// A costly call gives its place back, so that calls that wait for their turn take none from others.
func TestCostlyCallsGiveTheirPlaceBack(t *testing.T) {
	places := NewPlaces(8, time.Minute)
	w := NewShares(1).Call(t.Context(), Caller{Name: "a"})
	var err error
	if w.Place, err = places.Enter(t.Context(), "a", 1); err != nil {
		t.Fatal(err)
	}
	if err := w.Pause("x", freeSteps-1); err != nil || places.free != 7 {
		t.Errorf("%v, %d places are free", err, places.free)
	}
	if err := w.Pause("x", 1); err != nil || places.free != 8 {
		t.Errorf("%v, %d places are free", err, places.free)
	}
	w.Rest()
	w.Place.Leave()
	if places.free != 8 {
		t.Errorf("%d places are free", places.free)
	}
}

// Bundles share the places, whatever the number of their calls and callers, and so do the
// callers of one bundle.
func TestTurnsAreFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewShares(2)
		ctx, stop := context.WithCancel(t.Context())
		var mu sync.Mutex
		worked := map[string]int{}
		var all sync.WaitGroup
		begin := func(bundle, caller string, calls int) {
			for range calls {
				all.Go(func() {
					w := s.Call(ctx, Caller{Name: caller})
					defer w.Rest()
					for w.Pause(bundle, freeSteps) == nil {
						time.Sleep(time.Millisecond) // the work
						mu.Lock()
						worked[bundle+" "+caller]++
						mu.Unlock()
					}
				})
			}
		}
		begin("greedy", "a", 50)
		begin("greedy", "b", 5)
		time.Sleep(time.Second)
		mu.Lock()
		clear(worked)
		mu.Unlock()
		begin("modest", "c", 2)
		time.Sleep(time.Second)
		mu.Lock()
		a, b, c := worked["greedy a"], worked["greedy b"], worked["modest c"]
		mu.Unlock()
		stop()
		all.Wait()
		if near := func(x, y int) bool { return 10*x > 9*y && 10*y > 9*x }; !near(a+b, c) || !near(a, b) || a+b+c < 1900 {
			t.Errorf("in 2,000 turns: greedy a %d, greedy b %d, modest c %d", a, b, c)
		}
		if s.places != 2 || len(s.waiting)+len(s.bundles)+len(s.callers) != 0 {
			t.Errorf("left over: %+v", s)
		}
	})
}

// A call whose context ends stops waiting. Beyond the bound no call waits.
func TestWaitingCallsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewShares(1)
		first := s.Call(t.Context(), Caller{})
		if err := first.Pause("x", freeSteps); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var ended sync.WaitGroup
		for i := range maxWaitingCalls {
			ended.Go(func() {
				w := s.Call(ctx, Caller{Name: fmt.Sprint("caller", i%4)})
				defer w.Rest()
				if err := w.Pause(fmt.Sprint("bundle", i%2), freeSteps); !errors.Is(err, ErrNoTurn) {
					t.Errorf("a call that gave up: %v", err)
				}
			})
		}
		synctest.Wait()
		if err := s.Call(t.Context(), Caller{Name: "another"}).Pause("another", freeSteps); !errors.Is(err, ErrBusy) {
			t.Errorf("one more: %v", err)
		}
		cancel()
		ended.Wait()
		first.Rest()
		if s.places != 1 || len(s.waiting)+len(s.bundles)+len(s.callers) != 0 {
			t.Errorf("left over: %+v", s)
		}
	})
}

// The places are never exceeded, none is lost, and each call goes on in the end. This holds for
// any calls.
func TestSharesProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		places := rapid.IntRange(1, 3).Draw(t, "places")
		type call struct {
			bundle, caller string
			pauses, limit  int // it gives up at limit
		}
		calls := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) call {
			return call{
				rapid.SampledFrom([]string{"x", "y"}).Draw(t, "bundle"), rapid.SampledFrom([]string{"a", "b"}).Draw(t, "caller"),
				rapid.IntRange(0, 20).Draw(t, "pauses"), rapid.IntRange(0, 30).Draw(t, "limit"),
			}
		}), 1, 12).Draw(t, "calls")
		s := NewShares(places)
		var all sync.WaitGroup
		var mu sync.Mutex
		working := 0
		for _, c := range calls {
			all.Go(func() {
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				w := s.Call(ctx, Caller{Name: c.caller})
				defer w.Rest()
				for i := range c.pauses {
					if i == c.limit {
						cancel()
					}
					if w.Pause(c.bundle, freeSteps) != nil {
						return
					}
					mu.Lock()
					if working++; working > places {
						t.Errorf("%d calls work in %d places", working, places)
					}
					working--
					mu.Unlock()
				}
			})
		}
		all.Wait()
		if s.places != places || len(s.waiting)+len(s.bundles)+len(s.callers) != 0 {
			t.Errorf("left over: %+v", s)
		}
	})
}

// A costly call is ended while its caller still waits for the answer: otherwise the caller would
// take the service to be away. A usual call has all of its time.
func TestCostlyCallsEndBeforeTheirDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewShares(1)
		first := s.Call(t.Context(), Caller{})
		if err := first.Pause("x", freeSteps); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		usual, costly := s.Call(ctx, Caller{}), s.Call(ctx, Caller{})
		if err := costly.Pause("x", freeSteps); !errors.Is(err, ErrNoTurn) || ctx.Err() != nil {
			t.Errorf("a costly call without a turn: %v; its deadline: %v", err, ctx.Err())
		}
		if err := costly.Err(); !errors.Is(err, ErrNoTurn) {
			t.Errorf("after that: %v", err)
		}
		if err := usual.Pause("x", 1); err != nil {
			t.Errorf("a usual call: %v", err)
		}
		<-ctx.Done()
		late := fmt.Errorf("record: %w", context.DeadlineExceeded)
		if err := costly.Outcome(late); !errors.Is(err, ErrNoTurn) {
			t.Errorf("a costly call whose record came too late: %v", err)
		}
		if err := usual.Outcome(late); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a usual call whose record came too late: %v", err)
		}
		first.Rest()
		if s.places != 1 || len(s.waiting)+len(s.bundles)+len(s.callers) != 0 {
			t.Errorf("left over: %+v", s)
		}
	})
}
