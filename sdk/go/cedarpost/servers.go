package cedarpost

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/sony/gobreaker/v2"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

const (
	maxAttempts = 3
	retryWait   = 20 * time.Millisecond // doubled after each attempt
	// One in retryShare questions may be asked again, and retryReserve more at once. Without
	// this bound, a service in trouble would get several times the load.
	retryShare   = 10
	retryReserve = 20

	breakAfter = 5 // failures in a row
	breakFor   = time.Second
)

// servers are the servers of one service. Each can answer any question.
type servers struct {
	list []*peer
	next atomic.Uint32 // the server of the next question
	// watched is the server of the next watch. It is separate from next: with a shared
	// counter, a regular pattern of questions could lead every watch to one server.
	watched atomic.Uint32
	// retries is how many more questions may be asked again, times retryShare.
	retries atomic.Int64
	// patience is how much time a server must have had to answer before a timeout counts as
	// its failure.
	patience time.Duration
	close    func() // closes idle connections
}

// peer is one server. Its breaker opens when the server fails several times in a row, and
// lets one question through after a while.
type peer struct {
	name    string
	client  cedarpostv1connect.AuthorizationServiceClient
	breaker *gobreaker.TwoStepCircuitBreaker[struct{}]
	// untrusted is set by an error for which untrusted returns true, such as a certificate
	// that is not accepted, and cleared by the next answer of the server. While it is set
	// for any server, no check fails open.
	untrusted atomic.Bool
	// failure is the text of the newest error that counted against the server.
	failure atomic.Pointer[string]
}

func newServers(names []string, transports []connect.Transport, interceptors ...connect.ClientInterceptor) *servers {
	s := &servers{close: func() {}}
	s.retries.Store(retryReserve * retryShare)
	s.watched.Store(rand.Uint32()) //nolint:gosec // not secret; clients should not all watch the same server
	for i, t := range transports {
		s.list = append(s.list, &peer{
			name:   names[i],
			client: cedarpostv1connect.NewAuthorizationServiceClient(connect.NewClient(t, interceptors...)),
			breaker: gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
				Name: names[i], Timeout: breakFor,
				ReadyToTrip:  func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= breakAfter },
				IsSuccessful: func(err error) bool { return !failed(err) },
				IsExcluded:   func(err error) bool { return errors.Is(err, errNoVerdict) },
			}),
		})
	}
	return s
}

// allOpen is the error of a call while the breakers of all servers are open. It has the
// newest failure of each server as text only: that failure is of an earlier call, and
// errors.Is must not find, for example, its deadline in the error of this call.
func (s *servers) allOpen() error {
	text := "no server works; not asked again yet"
	for _, p := range s.list {
		if failure := p.failure.Load(); failure != nil {
			text += "; " + p.name + ": " + *failure
		}
	}
	return connect.NewError(connect.CodeUnavailable, text)
}

// errNoVerdict tells a breaker that the outcome of a call says nothing about the server.
var errNoVerdict = errors.New("no verdict")

// call asks one server after another, until one answers or ctx ends. fn may run more than
// once, so it must do no harm when it is repeated.
func (s *servers) call(ctx context.Context, fn func(context.Context, cedarpostv1connect.AuthorizationServiceClient) error) error {
	err := s.ask(ctx, fn)
	if err == nil || errors.Is(err, errOwnSide) {
		return err
	}
	for _, p := range s.list {
		if p.untrusted.Load() && failed(err) {
			return fmt.Errorf("%s: %w: %w", p.name, errOwnSide, err)
		}
	}
	return err
}

// ask is call without the check for servers that are not trusted.
func (s *servers) ask(ctx context.Context, fn func(context.Context, cedarpostv1connect.AuthorizationServiceClient) error) error {
	s.earn()
	// A call with a very short deadline must not open a breaker for all other calls.
	end, bounded := ctx.Deadline()
	hurried := bounded && time.Until(end) < s.patience
	var err error
	var tried []*peer
	for attempt := range maxAttempts {
		p, done := s.pick(tried)
		if p == nil && err == nil {
			return s.allOpen()
		}
		if p == nil {
			return err
		}
		attemptErr := s.try(ctx, p, attempt, fn)
		if errors.Is(ctx.Err(), context.Canceled) {
			done(errNoVerdict) // the caller gave up
			return ctx.Err()
		}
		if untrusted(attemptErr) {
			p.untrusted.Store(true)
		} else if answered(attemptErr) {
			p.untrusted.Store(false)
		}
		if exhausted(attemptErr) || errors.Is(attemptErr, ErrNoToken) {
			done(errNoVerdict)
			return fmt.Errorf("%s: %w: %w", p.name, errOwnSide, attemptErr)
		}
		if hurried && connect.CodeOf(attemptErr) == connect.CodeDeadlineExceeded {
			done(errNoVerdict)
		} else {
			if failed(attemptErr) {
				text := attemptErr.Error()
				p.failure.Store(&text) // before done, which may open the breaker
			}
			done(attemptErr)
		}
		if attemptErr == nil {
			return nil
		}
		err = fmt.Errorf("%s: %w", p.name, attemptErr)
		tried = append(tried, p)
		if !again(attemptErr) || attempt == maxAttempts-1 || !s.spend() {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryWait << attempt):
		}
	}
	return err
}

// try asks one server. If there are others, this server gets half of the remaining time,
// except in the last attempt: a server that accepts the connection and never answers would
// use up all of it. If a server fails when its time is over, the error is always that it
// did not answer in time.
func (s *servers) try(ctx context.Context, p *peer, attempt int, fn func(context.Context, cedarpostv1connect.AuthorizationServiceClient) error) error {
	if end, ok := ctx.Deadline(); ok && len(s.list) > 1 && attempt < maxAttempts-1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/2)
		defer cancel()
	}
	err := broken(fn(ctx, p.client))
	if failed(err) && over(ctx) {
		return connect.NewError(connect.CodeDeadlineExceeded, "no answer in time").WithCause(err)
	}
	return err
}

// again says whether asking again can help: the question was not answered, or its answer
// was lost. After resource_exhausted the question is not repeated, which would add to the
// overload.
func again(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded:
		return true
	}
	return false
}

// pick returns the next server whose breaker lets a question through. Servers where this question was
// tried already come last: other questions move the counter too, so it can lead an attempt to the server
// that has just failed. The caller passes the outcome to done.
func (s *servers) pick(tried []*peer) (p *peer, done func(error)) {
	from := int(s.next.Add(1) % uint32(len(s.list)))
	for _, again := range []bool{false, true} {
		for i := range s.list {
			p := s.list[(from+i)%len(s.list)]
			if slices.Contains(tried, p) != again {
				continue
			}
			if done, err := p.breaker.Allow(); err == nil {
				return p, done
			}
		}
	}
	return nil, nil
}

// pickWatch returns the next server whose breaker is not open. The outcome of a watch does
// not count for the breaker: a watch can break at a server that answers questions.
func (s *servers) pickWatch() *peer {
	from := int(s.watched.Add(1) % uint32(len(s.list)))
	for i := range s.list {
		if p := s.list[(from+i)%len(s.list)]; p.breaker.State() != gobreaker.StateOpen {
			return p
		}
	}
	return nil
}

// earn adds the share of one question to the retries that are allowed.
func (s *servers) earn() {
	if n := s.retries.Load(); n < retryReserve*retryShare {
		s.retries.CompareAndSwap(n, n+1)
	}
}

// spend takes one retry, and returns false if none is left.
func (s *servers) spend() bool {
	for {
		n := s.retries.Load()
		if n < retryShare {
			return false
		}
		if s.retries.CompareAndSwap(n, n-retryShare) {
			return true
		}
	}
}
