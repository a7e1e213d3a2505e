package access

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// called is a call in a test of places.
type called struct {
	place Place
	wait  *waiter // nil: it has places
}

// settle moves the calls that have got places by now, and forgets those whose wait has ended.
func settle(calls []*called) []*called {
	return slices.DeleteFunc(calls, func(c *called) bool {
		if c.wait == nil {
			return false
		}
		select {
		case err := <-c.wait.end:
			c.wait = nil
			return err != nil
		default:
			return false
		}
	})
}

// Calls begin, end and give up in any order. No place is lost or given twice, and no caller has more
// than it may. No call waits while its places are free. The caller with the fewest places gets the next
// ones.
func TestPlaces(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := NewPlaces(rapid.IntRange(1, 40).Draw(t, "places"), time.Minute)
		p.queue = rapid.IntRange(1, 12).Draw(t, "queue")
		name := rapid.SampledFrom(strings.Split("abcdefghijkl", ""))
		var calls []*called
		with := func(what string, waits bool) *called {
			var list []*called
			for _, c := range calls {
				if (c.wait != nil) == waits {
					list = append(list, c)
				}
			}
			if len(list) == 0 {
				t.Skip("none")
			}
			return list[rapid.IntRange(0, len(list)-1).Draw(t, what)]
		}
		// fewest returns the caller whose call is the next one that gets places.
		fewest := func() (first *line) {
			for _, l := range p.callers {
				if len(l.waiting) == 0 || !p.may(l.held+l.waiting[0].places) {
					continue
				}
				if first == nil || l.held < first.held || l.held == first.held && l.waiting[0].arrival < first.waiting[0].arrival {
					first = l
				}
			}
			return first
		}
		t.Repeat(map[string]func(*rapid.T){
			"begin": func(t *rapid.T) {
				caller, queued := name.Draw(t, "caller"), p.queued
				longest := 0
				for _, l := range p.callers {
					longest = max(longest, len(l.waiting))
				}
				mine := len(p.lineOf(caller).waiting)
				place, w := p.enter(caller, rapid.IntRange(1, 100).Draw(t, "checks"))
				if place.places == 0 {
					if queued < p.queue || mine+1 < longest {
						t.Fatalf("a call of a caller with %d waiting calls is refused, with %d of %d in the queue, and %d of another caller", mine, queued, p.queue, longest)
					}
					return
				}
				calls = append(calls, &called{place, w})
			},
			"end": func(t *rapid.T) {
				c := with("ends", false)
				n := c.place.places
				p.free += n
				c.place.line.held -= n
				var next *waiter
				if l := fewest(); l != nil && l.waiting[0].places <= p.free {
					next = l.waiting[0]
				}
				p.free -= n
				c.place.line.held += n
				c.place.Leave()
				c.place.Leave() // has no effect
				if next != nil && len(next.end) == 0 {
					t.Fatal("the places are not for the caller with the fewest")
				}
				calls = slices.DeleteFunc(calls, func(o *called) bool { return o == c })
				if next != nil && rapid.Bool().Draw(t, "gives up at this moment") {
					i := slices.IndexFunc(calls, func(o *called) bool { return o.wait == next })
					if err := p.giveUp(calls[i].place.line, next, context.Canceled); !errors.Is(err, context.Canceled) {
						t.Fatal(err)
					}
					calls = slices.Delete(calls, i, i+1)
				}
			},
			"give up": func(t *rapid.T) {
				c := with("gives up", true)
				if err := p.giveUp(c.place.line, c.wait, context.Canceled); !errors.Is(err, context.Canceled) && !errors.Is(err, ErrOverloaded) {
					t.Fatal(err)
				}
				calls = slices.DeleteFunc(calls, func(o *called) bool { return o == c })
			},
			"a second passes": func(*rapid.T) {
				p.changed = p.changed.Add(-othersFor)
				p.next()
			},
			"": func(t *rapid.T) {
				if !p.changed.IsZero() && time.Since(p.changed) > othersFor/2 {
					p.changed = time.Time{} // the test is slow: the second must not end within a check
					p.next()
				}
				calls = settle(calls)
				held, waiting := map[*line]int{}, map[*line]int{}
				total, queued := 0, 0
				for _, c := range calls {
					if c.wait == nil {
						held[c.place.line] += c.place.places
						total += c.place.places
					} else {
						waiting[c.place.line]++
						queued++
					}
				}
				if total+p.free != p.total || p.free < 0 || queued != p.queued || queued > p.queue {
					t.Fatalf("%d places taken, %d free of %d; %d calls wait, %d counted", total, p.free, p.total, queued, p.queued)
				}
				lines := 0
				for _, l := range p.callers {
					if l.held != held[l] || len(l.waiting) != waiting[l] {
						t.Fatalf("a caller has %d places and %d waiting calls, counted are %d and %d", held[l], waiting[l], l.held, len(l.waiting))
					}
					if len(l.waiting) > 0 {
						lines++
					}
				}
				if lines != len(p.lines) {
					t.Fatalf("%d callers wait, counted are %d", lines, len(p.lines))
				}
				if first := fewest(); first != nil && first.waiting[0].places <= p.free {
					t.Fatal("a call waits, and its places are free")
				}
			},
		})
		for len(calls) > 0 {
			i := slices.IndexFunc(calls, func(c *called) bool { return c.wait == nil })
			if i < 0 {
				t.Fatalf("%d calls wait, and nobody has a place", len(calls))
			}
			calls[i].place.Leave()
			calls = slices.Delete(calls, i, i+1)
			calls = settle(calls)
		}
		if p.free != p.total || p.queued != 0 || len(p.lines) != 0 {
			t.Fatalf("left over: %d of %d places, %d calls", p.free, p.total, p.queued)
		}
	})
}

// A call of a caller without any goes before all calls that wait of one with many, and callers with
// equally many take turns.
func TestCallerWithFewCallsGoesFirst(t *testing.T) {
	p := NewPlaces(16, time.Minute) // two of one caller, as soon as there are others
	for i := range 12 {             // take all places but four
		if _, err := p.Enter(t.Context(), fmt.Sprint("x", i), 1); err != nil {
			t.Fatal(err)
		}
	}
	type call struct {
		caller string
		called
	}
	var inside, outside []*call
	enter := func(caller string, calls int) {
		for range calls {
			place, w := p.enter(caller, 1)
			c := &call{caller, called{place, w}}
			if w == nil {
				inside = append(inside, c)
			} else {
				outside = append(outside, c)
			}
		}
	}
	enter("a", 6)
	enter("b", 6)
	enter("c", 1)
	order := ""
	for len(inside) > 0 {
		first := inside[0]
		inside = inside[1:]
		order += first.caller
		first.place.Leave()
		outside = slices.DeleteFunc(outside, func(c *call) bool {
			if len(c.wait.end) == 0 {
				return false
			}
			inside = append(inside, c)
			return true
		})
	}
	if order != "aabbcaabbaabb" && order != "aabbcababaabb" && order != "aabbcabababab" {
		t.Error(order)
	}
	if p.free != 4 || p.queued != 0 {
		t.Errorf("left over: %d of %d places, %d calls", p.free, p.total, p.queued)
	}
}

// A caller that is alone has all places but an eighth, and an eighth while others call, and as many as
// before a second later.
func TestCallerAloneHasMostPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPlaces(16, time.Hour)
		var held []Place
		fill := func() (n int) {
			for {
				c, w := p.enter("a", 1)
				if w != nil {
					_ = p.giveUp(c.line, w, context.Canceled)
					return n
				}
				held = append(held, c)
				n++
			}
		}
		empty := func() {
			for i := range held {
				held[i].Leave()
			}
			held = nil
		}
		if n := fill(); n != 14 {
			t.Errorf("alone: %d places", n)
		}
		empty()
		b, err := p.Enter(t.Context(), "b", 1)
		if err != nil {
			t.Fatal(err)
		}
		b.Leave()
		if n := fill(); n != 2 {
			t.Errorf("with another caller: %d places", n)
		}
		time.Sleep(othersFor)
		if n := fill(); n != 12 {
			t.Errorf("a second later: %d places more", n)
		}
	})
}

// A call that finds no place is refused after its time, or ends with its context, and neither loses
// a place.
func TestWaitForAPlaceEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPlaces(8, 500*time.Millisecond)
		var held []Place
		for i := range 8 {
			c, err := p.Enter(t.Context(), fmt.Sprint(i), 1)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, c)
		}
		began := time.Now()
		if _, err := p.Enter(t.Context(), "late", 1); !errors.Is(err, ErrOverloaded) || time.Since(began) != 500*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		began = time.Now()
		if _, err := p.Enter(ctx, "late", 1); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != 100*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		for i := range held {
			held[i].Leave()
		}
		if p.free != 8 || p.Waiting() != 0 {
			t.Errorf("left over: %d places, %d calls", p.free, p.Waiting())
		}
	})
}

// If the queue is full, the caller with the most calls in it loses its newest one to a caller with
// fewer.
func TestFullQueueIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPlaces(8, time.Minute)
		p.queue = 10
		for i := range 8 {
			if _, err := p.Enter(t.Context(), fmt.Sprint(i), 1); err != nil {
				t.Fatal(err)
			}
		}
		var mu sync.Mutex
		refused := map[string]int{}
		ctx, stop := context.WithCancel(t.Context())
		wait := func(caller string, calls int) {
			for range calls {
				go func() {
					if _, err := p.Enter(ctx, caller, 1); errors.Is(err, ErrOverloaded) {
						mu.Lock()
						refused[caller]++
						mu.Unlock()
					}
				}()
				synctest.Wait()
			}
		}
		wait("a", 15)
		if refused["a"] != 5 {
			t.Errorf("%v", refused)
		}
		wait("b", 7)
		if refused["a"] != 10 || refused["b"] != 2 {
			t.Errorf("%v", refused)
		}
		wait("c", 1)
		if refused["c"] != 0 || p.Waiting() != 10 {
			t.Errorf("%v", refused)
		}
		stop()
		synctest.Wait()
		if p.Waiting() != 0 || len(p.lines) != 0 {
			t.Errorf("%d calls are left in the queue", p.Waiting())
		}
	})
}

// The callers that are remembered have a bound, and those with a call are not forgotten.
func TestIdleCallersAreForgotten(t *testing.T) {
	p := NewPlaces(8, time.Minute)
	first, err := p.Enter(t.Context(), "first", 1)
	if err != nil {
		t.Fatal(err)
	}
	most := p.total + maxQueue + maxIdle
	for i := range 2 * most {
		c, err := p.Enter(t.Context(), fmt.Sprint(i), 1)
		if err != nil {
			t.Fatal(err)
		}
		c.Leave()
	}
	if len(p.callers) > most || p.callers["first"] != first.line {
		t.Errorf("%d callers are remembered", len(p.callers))
	}
}

// Many goroutines, some of which give up at once: at the end all places are free.
func TestPlacesAtTheSameTime(t *testing.T) {
	p := NewPlaces(16, time.Minute)
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			for n := range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				if (i+n)%3 == 0 {
					go cancel()
				}
				if c, err := p.Enter(ctx, fmt.Sprint(i%5), 1+n%40); err == nil {
					c.Leave()
				}
				cancel()
			}
		})
	}
	all.Wait()
	if p.free != p.total || p.Waiting() != 0 {
		t.Errorf("left over: %d of %d places, %d calls", p.free, p.total, p.Waiting())
	}
}

func BenchmarkPlaces(b *testing.B) {
	p := NewPlaces(256, time.Second)
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		c, err := p.Enter(ctx, "caller", 1)
		if err != nil {
			b.Fatal(err)
		}
		c.Leave()
	}
}

// A call that waits for more places than are free lets no other one pass, until it gives up.
func TestLargeCallIsNotOvertaken(t *testing.T) {
	p := NewPlaces(16, time.Minute)
	for i := range 15 {
		if _, err := p.Enter(t.Context(), fmt.Sprint(i), 1); err != nil {
			t.Fatal(err)
		}
	}
	large, first := p.enter("large", 100)
	small, second := p.enter("small", 1)
	if large.places != 2 || first == nil || second == nil {
		t.Fatalf("%d places, %v, %v", large.places, first, second)
	}
	if err := p.giveUp(large.line, first, context.Canceled); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if len(second.end) != 1 || p.free != 0 || small.line.held != 1 {
		t.Error("the call behind it does not get the place that is free")
	}
}
