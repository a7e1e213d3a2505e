package access

import (
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"time"
)

// freeSteps is how many steps of the engine a call may take for one of its questions without
// waiting for its turn: many times what a usual decision takes, and less than a millisecond.
const freeSteps = 40_000

// maxWaitingCalls bounds the calls that wait for their turn. Half of them may be about one bundle,
// and a quarter of one caller.
const maxWaitingCalls = 1000

// The errors of a call that takes many steps. Their text is for the caller. They do not say that
// the service is overloaded or away: a check that fails open would let through a user who asks
// costly questions.
var (
	// ErrBusy says that too many others wait for their turn.
	ErrBusy = errors.New("this call takes much work, and too many such calls wait already")
	// ErrNoTurn says that the time of the call ended first.
	ErrNoTurn = errors.New("this call takes much work, and its time ended before it was done")
)

// Shares divides processors between costly calls. At most a fixed number of them work at a time.
// After each piece of work a call lets another one go on: first the bundle that has worked least
// gets a turn, and within it the caller that has worked least. So the policies and data of one tenant slow down another tenant's calls by no
// more than their share. Calls that take few steps take no turn.
type Shares struct {
	mu      sync.Mutex
	places  int // for calls that work
	waiting []*Work
	bundles tally
	callers tally
}

// NewShares returns Shares in which so many costly calls work at a time.
func NewShares(places int) *Shares {
	return &Shares{places: places, bundles: tally{}, callers: tally{}}
}

// Waiting returns how many calls wait for their turn.
func (s *Shares) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting)
}

// tally counts the steps of bundles or callers that work or wait now.
type tally map[any]*tallied

type tallied struct {
	steps int64
	calls int // that work or wait
}

// join adds a call. A bundle or caller that was idle begins where the one that has worked least
// is, so it neither waits for all that the others did before, nor may catch up on it.
func (t tally) join(key any) {
	if t[key] == nil {
		least := int64(math.MaxInt64)
		for _, other := range t {
			least = min(least, other.steps)
		}
		if len(t) == 0 {
			least = 0
		}
		t[key] = &tallied{steps: least}
	}
	t[key].calls++
}

func (t tally) leave(key any) {
	if t[key].calls--; t[key].calls == 0 {
		delete(t, key)
	}
}

// Work is the work of one call. It is not safe for concurrent use.
type Work struct {
	// Place has the places of the call, if it has any. A call that turns out to be costly gives them
	// back, so that it does not hold them while it waits for its turns.
	Place Place

	shares *Shares
	ctx    context.Context // of the call
	ends   time.Time       // when a costly call is ended; zero: never
	caller string          // its name
	bundle string
	steps  int64 // all of the call
	free   int64 // that it may take before its next turn
	costly bool  // it has taken more than was free

	joined bool // is in the tallies
	works  bool // has a place
	turn   chan struct{}
}

// Call returns the work of one call of a caller. Use [Work.Rest] when the call waits for
// something else, and when it ends.
func (s *Shares) Call(ctx context.Context, caller Caller) *Work {
	w := &Work{shares: s, ctx: ctx, caller: caller.Name, free: freeSteps}
	if end, bounded := ctx.Deadline(); bounded {
		// The caller has the same deadline. A costly call is ended a little earlier, so that
		// the caller gets the answer, and does not take the service to be away.
		w.ends = end.Add(-time.Until(end) / 5)
	}
	return w
}

// Next begins another question of the call.
func (w *Work) Next() { w.free = w.steps + freeSteps }

// Err returns nil while the call may go on. Otherwise it is [ErrNoTurn] for a call that took many
// steps, or else the error of the call's context.
func (w *Work) Err() error {
	err := w.ctx.Err()
	if w.costly && (err != nil || w.late()) {
		return ErrNoTurn
	}
	return err
}

func (w *Work) late() bool { return !w.ends.IsZero() && !time.Now().Before(w.ends) }

// Outcome returns the error of a call. It is [ErrNoTurn] in place of the end of the call's
// context, wherever that was noticed, if the call took many steps.
func (w *Work) Outcome(err error) error {
	if errors.Is(err, context.DeadlineExceeded) && w.costly && w.ctx.Err() != nil {
		return ErrNoTurn
	}
	return err
}

// Pause counts steps that a call took for a bundle, and may wait until other calls had their
// turn. The error is that of [Work.Err], or [ErrBusy].
func (w *Work) Pause(bundle string, steps int64) error {
	if err := w.Err(); err != nil {
		return err
	}
	if w.steps += steps; w.steps < w.free {
		return nil
	}
	w.costly = true
	w.Place.Leave()
	s := w.shares
	s.mu.Lock()
	if w.joined && w.bundle != bundle {
		w.leave()
	}
	if !w.joined {
		w.joined, w.bundle = true, bundle
		s.bundles.join(bundle)
		s.callers.join(w.caller)
	}
	s.bundles[bundle].steps += steps
	s.callers[w.caller].steps += steps
	if w.works && len(s.waiting) == 0 {
		s.mu.Unlock()
		return nil
	}
	if !w.works && (len(s.waiting) >= maxWaitingCalls || s.bundles[bundle].calls > maxWaitingCalls/2 || s.callers[w.caller].calls > maxWaitingCalls/4) {
		w.leave()
		s.mu.Unlock()
		return ErrBusy
	}
	if w.works {
		w.works = false
		s.places++
	}
	if w.turn == nil {
		w.turn = make(chan struct{}, 1)
	}
	s.waiting = append(s.waiting, w)
	s.next()
	s.mu.Unlock()

	var late <-chan time.Time
	if !w.ends.IsZero() {
		timer := time.NewTimer(time.Until(w.ends))
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-w.turn:
		return nil
	case <-w.ctx.Done():
	case <-late:
	}
	w.Rest()
	return ErrNoTurn
}

// Rest gives the place of the call to another one.
func (w *Work) Rest() {
	if !w.joined {
		return
	}
	s := w.shares
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.works {
		w.works = false
		s.places++
	} else if i := slices.Index(s.waiting, w); i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
	}
	select { // its turn may have come while its context ended
	case <-w.turn:
	default:
	}
	w.leave()
	s.next()
}

// leave takes the call out of the tallies. The caller holds the lock.
func (w *Work) leave() {
	w.shares.bundles.leave(w.bundle)
	w.shares.callers.leave(w.caller)
	w.joined = false
}

// next gives free places to waiting calls. The caller holds the lock.
func (s *Shares) next() {
	for s.places > 0 && len(s.waiting) > 0 {
		first := 0
		for i, w := range s.waiting {
			if s.before(w, s.waiting[first]) {
				first = i
			}
		}
		w := s.waiting[first]
		s.waiting = slices.Delete(s.waiting, first, first+1)
		s.places--
		w.works = true
		w.turn <- struct{}{}
	}
}

// before reports whether the turn of a comes before that of b.
func (s *Shares) before(a, b *Work) bool {
	if x, y := s.bundles[a.bundle].steps, s.bundles[b.bundle].steps; x != y {
		return x < y
	}
	return s.callers[a.caller].steps < s.callers[b.caller].steps
}
