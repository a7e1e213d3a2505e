package access

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// ErrOverloaded is the error of a call that found no place in time, because the server makes as
// many decisions at once as it may. Its text is for the caller.
var ErrOverloaded = errors.New("the service makes as many decisions at once as it may, and too many calls wait already; try again later")

const (
	maxQueue = 1000 // calls that wait for places
	maxIdle  = 4096 // callers that are remembered while they have no call

	// othersFor is how long a caller counts as one of several after a call of another caller.
	othersFor = time.Second
	// fewPlaces divides the places: one of several callers may have an eighth of them, and a caller
	// that is alone leaves an eighth free.
	fewPlaces = 8

	// checksOfPlace is how many checks of a batch count as one place. The checks of a batch share the
	// work around a call, and most of their policies and entities.
	checksOfPlace = 8
)

// Places bounds how many decisions are made at once. A caller that is alone may have all places but an
// eighth, which stays free for the first calls of others. One of several callers may have an eighth. So
// a caller with many calls in flight does not delay the calls of others. Calls that find no place wait
// a short time in a short queue. The next place is for the caller that has the fewest. It is safe for
// concurrent use.
type Places struct {
	total int           // places
	few   int           // places that one of several callers may have
	wait  time.Duration // of a call, at most
	queue int           // calls that may wait

	mu      sync.Mutex
	free    int
	callers map[string]*line
	lines   []*line // with calls that wait
	queued  int     // calls that wait
	arrived uint64  // number of the call that joined the queue last
	entered uint64  // calls that asked for places

	last    *line     // of the caller that called last
	changed time.Time // when a call came from another caller than the call before
}

// line is the calls of one caller.
type line struct {
	held    int       // places
	waiting []*waiter // the oldest first
}

// waiter is a call that waits.
type waiter struct {
	places  int
	arrival uint64
	end     chan error // of the wait: nil with the places, or why there are none; has room for it
}

// Place is the places of one call. It is not safe for concurrent use.
type Place struct {
	of     *Places
	line   *line
	places int
}

// NewPlaces returns total places, but at least eight. A call waits for places for the time wait at most.
func NewPlaces(total int, wait time.Duration) *Places {
	total = max(total, fewPlaces)
	return &Places{total: total, few: total / fewPlaces, wait: wait, queue: maxQueue, free: total, callers: map[string]*line{}}
}

// Waiting returns how many calls wait for places.
func (p *Places) Waiting() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.queued
}

// Entered returns how many calls asked for places so far.
func (p *Places) Entered() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.entered
}

// Enter takes places for a call with this number of checks, and may wait for them: one place for each
// eight checks, but at most as many as one of several callers may have. Call [Place.Leave] when the call
// ends. The error is [ErrOverloaded], or that of ctx.
func (p *Places) Enter(ctx context.Context, caller string, checks int) (Place, error) {
	c, w := p.enter(caller, checks)
	if w == nil {
		if c.places == 0 {
			return Place{}, ErrOverloaded
		}
		return c, nil
	}
	timer := time.NewTimer(p.wait)
	defer timer.Stop()
	var err error
	select {
	case err = <-w.end:
	case <-ctx.Done():
		err = p.giveUp(c.line, w, ctx.Err())
	case <-timer.C:
		err = p.giveUp(c.line, w, ErrOverloaded)
	}
	if err != nil {
		return Place{}, err
	}
	return c, nil
}

// enter takes places for a call. If the call has to wait for them, w is not nil. If the queue is full,
// w is nil and c has no places.
func (p *Places) enter(caller string, checks int) (c Place, w *waiter) {
	n := max(1, min((checks+checksOfPlace-1)/checksOfPlace, p.few))
	p.mu.Lock()
	defer p.mu.Unlock()
	p.entered++
	l := p.lineOf(caller)
	if l != p.last {
		if p.last != nil {
			p.changed = time.Now()
		}
		p.last = l
	}
	if len(p.lines) == 0 && n <= p.free && p.may(l.held+n) {
		p.take(l, n)
		return Place{p, l, n}, nil
	}
	if w = p.join(l, n); w == nil {
		return Place{}, nil
	}
	return Place{p, l, n}, w
}

// Leave gives the places back. Further calls of Leave have no effect.
func (c *Place) Leave() {
	if c.places == 0 {
		return
	}
	c.of.mu.Lock()
	defer c.of.mu.Unlock()
	c.of.give(c.line, c.places)
	c.places = 0
}

// giveUp ends the wait of a call, and returns the error of the call. Places that came at the same
// moment are given back.
func (p *Places) giveUp(l *line, w *waiter, why error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(l.waiting, w); i >= 0 {
		p.remove(l, i)
		p.next() // those behind it may need fewer places
		return why
	}
	if err := <-w.end; err != nil {
		return err
	}
	p.give(l, w.places)
	return why
}

// The methods below are called with the lock.

// lineOf returns the calls of a caller.
func (p *Places) lineOf(caller string) *line {
	l := p.callers[caller]
	if l == nil {
		if len(p.callers) >= p.total+maxQueue+maxIdle { // at most total+maxQueue callers have calls
			for name, other := range p.callers {
				if other.held == 0 && len(other.waiting) == 0 {
					delete(p.callers, name)
				}
			}
		}
		l = &line{}
		p.callers[caller] = l
	}
	return l
}

// may reports whether a caller may have n places now.
func (p *Places) may(n int) bool {
	return n <= p.few || n <= p.total-p.few && time.Since(p.changed) >= othersFor
}

func (p *Places) take(l *line, n int) {
	p.free -= n
	l.held += n
}

func (p *Places) give(l *line, n int) {
	p.free += n
	l.held -= n
	p.next()
}

// join adds a call to the queue. If the queue is full, the newest call of the caller with the most
// calls in it ends; if that is the new one, the result is nil.
func (p *Places) join(l *line, n int) *waiter {
	if p.queued >= p.queue {
		longest := slices.MaxFunc(p.lines, func(a, b *line) int { return len(a.waiting) - len(b.waiting) })
		last := len(longest.waiting) - 1
		if last <= len(l.waiting) {
			return nil
		}
		longest.waiting[last].end <- ErrOverloaded
		p.remove(longest, last)
	}
	p.arrived++
	w := &waiter{places: n, arrival: p.arrived, end: make(chan error, 1)}
	if len(l.waiting) == 0 {
		p.lines = append(p.lines, l)
	}
	l.waiting = append(l.waiting, w)
	p.queued++
	p.next()
	return w
}

// remove takes a call out of the queue.
func (p *Places) remove(l *line, i int) {
	l.waiting = slices.Delete(l.waiting, i, i+1)
	p.queued--
	if len(l.waiting) == 0 {
		i := slices.Index(p.lines, l)
		p.lines = slices.Delete(p.lines, i, i+1)
	}
}

// next gives free places to calls that wait. If the first call needs more places than are free, the
// others wait too, so that it gets them in the end.
func (p *Places) next() {
	for {
		var first *line
		for _, l := range p.lines {
			if p.may(l.held+l.waiting[0].places) && (first == nil || l.before(first)) {
				first = l
			}
		}
		if first == nil || first.waiting[0].places > p.free {
			return
		}
		w := first.waiting[0]
		p.remove(first, 0)
		p.take(first, w.places)
		w.end <- nil
	}
}

// before reports whether the oldest call of a caller goes before that of another one.
func (l *line) before(o *line) bool {
	if l.held != o.held {
		return l.held < o.held
	}
	return l.waiting[0].arrival < o.waiting[0].arrival
}
