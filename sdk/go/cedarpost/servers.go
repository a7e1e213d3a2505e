package cedarpost

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/sony/gobreaker/v2"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

const (
	maxAttempts = 3
	retryWait   = 20 * time.Millisecond // doubled each time
	// retryShare is how many of the questions may be asked once more: without a bound,
	// a service in trouble gets several times the load.
	retryShare   = 10 // one in so many
	retryReserve = 20 // and so many at once

	breakAfter = 5 // failures in a row
	breakFor   = time.Second
)

// servers are the servers of one service. Each is as good as the others.
type servers struct {
	list []*peer
	next atomic.Uint32
	// watched is next for watches. In step with the questions, they would always come to
	// the same server again.
	watched atomic.Uint32
	// retries is how many more are allowed, times retryShare.
	retries atomic.Int64
	// patience is how long a server has to have had for an answer, before it is blamed
	// for none.
	patience time.Duration
	close    func() // idle connections
}

// peer is one server. Its breaker opens when it fails several times in a row, and
// lets one question through after a while.
type peer struct {
	name    string
	client  cedarpostv1connect.AuthorizationServiceClient
	breaker *gobreaker.TwoStepCircuitBreaker[struct{}]
	// untrusted says that an attempt found a certificate that is not accepted, or the
	// like, and that the server has not answered since. While that is so of any server,
	// no check fails open.
	untrusted atomic.Bool
	// failure is the text of the newest error that counted against the server.
	failure atomic.Pointer[string]
}

func newServers(names []string, transports []connect.Transport, interceptors ...connect.ClientInterceptor) *servers {
	s := &servers{close: func() {}}
	s.retries.Store(retryReserve * retryShare)
	s.watched.Store(rand.Uint32()) //nolint:gosec // so that not all clients watch the same one
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

// allOpen is the error of a call while every server failed so often lately that none is
// asked. It says how each failed, as text alone: an error that a server had with an
// earlier call, such as the end of its deadline, is not one of this call.
func (s *servers) allOpen() error {
	text := "no server works; not asked again yet"
	for _, p := range s.list {
		if failure := p.failure.Load(); failure != nil {
			text += "; " + p.name + ": " + *failure
		}
	}
	return connect.NewError(connect.CodeUnavailable, text)
}

// errNoVerdict: what came of a question says nothing of the server.
var errNoVerdict = errors.New("no verdict")

// call asks one server after another, until one answers or the time is over. fn may
// run more than once: it has to be a question, or one that counts once.
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

func (s *servers) ask(ctx context.Context, fn func(context.Context, cedarpostv1connect.AuthorizationServiceClient) error) error {
	s.earn()
	// A caller that leaves a server too little time must not open its breaker for all others.
	end, bounded := ctx.Deadline()
	hurried := bounded && time.Until(end) < s.patience
	var err error
	for attempt := range maxAttempts {
		p, done := s.pick()
		if p == nil && err == nil {
			return s.allOpen()
		}
		if p == nil {
			return err
		}
		attemptErr := s.try(ctx, p, attempt, fn)
		if errors.Is(ctx.Err(), context.Canceled) {
			done(errNoVerdict) // its caller gave up
			return ctx.Err()
		}
		if untrusted(attemptErr) {
			p.untrusted.Store(true)
		} else if answered(attemptErr) {
			p.untrusted.Store(false)
		}
		if exhausted(attemptErr) {
			done(errNoVerdict)
			return fmt.Errorf("%s: %w: %w", p.name, errOwnSide, attemptErr)
		}
		if hurried && connect.CodeOf(attemptErr) == connect.CodeDeadlineExceeded {
			done(errNoVerdict)
		} else {
			if failed(attemptErr) {
				text := attemptErr.Error()
				p.failure.Store(&text) // before the breaker opens
			}
			done(attemptErr)
		}
		if attemptErr == nil {
			return nil
		}
		err = fmt.Errorf("%s: %w", p.name, attemptErr)
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

// try asks one server. Where there are others, it does not get all of the time: one
// that took the connection and says nothing would use it up. If a server fails when its
// time is over, the error is that it did not answer in time, whatever the server says.
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

// again says whether asking once more can help, and does no harm: a question that
// was not answered, or whose answer was lost. Overload is left alone.
func again(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded:
		return true
	}
	return false
}

// pick takes the next server whose breaker lets a question through. done says how it
// went.
func (s *servers) pick() (p *peer, done func(error)) {
	from := int(s.next.Add(1) % uint32(len(s.list)))
	for i := range s.list {
		p := s.list[(from+i)%len(s.list)]
		if done, err := p.breaker.Allow(); err == nil {
			return p, done
		}
	}
	return nil, nil
}

// pickWatch takes the next server that works, as far as is known. A watch has no say in
// that: it may break where questions are answered, and hang where one is let through.
func (s *servers) pickWatch() *peer {
	from := int(s.watched.Add(1) % uint32(len(s.list)))
	for i := range s.list {
		if p := s.list[(from+i)%len(s.list)]; p.breaker.State() != gobreaker.StateOpen {
			return p
		}
	}
	return nil
}

// earn and spend keep the balance of retries.
func (s *servers) earn() {
	if n := s.retries.Load(); n < retryReserve*retryShare {
		s.retries.CompareAndSwap(n, n+1)
	}
}

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
