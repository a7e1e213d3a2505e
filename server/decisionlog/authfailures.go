package decisionlog

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

const (
	failuresInterval = 10 * time.Second // between two records of counted failures
	maxFailures      = 1000             // pairs of address and reason that are counted apart
)

// AuthenticationFailures records failed authentication in the log. Callers without a key
// must not be able to fill the log, or to delay other calls. So the first failure with a
// reason from an address is recorded at once, in the background, and later ones are counted
// and recorded together.
type AuthenticationFailures struct {
	recorder *Recorder
	wakeup   chan struct{}

	mu   sync.Mutex
	seen map[failureKey]*failures
}

type failureKey struct{ address, reason string }

// failures counts the failures with one reason from one address. count of them are not
// recorded yet.
type failures struct {
	procedure   string
	count       int64
	first, last time.Time
	known       bool // one is recorded already, so the next ones can wait
}

// NewAuthenticationFailures returns a counter that records with r. Nothing is recorded
// until [AuthenticationFailures.Run] runs.
func NewAuthenticationFailures(r *Recorder) *AuthenticationFailures {
	return &AuthenticationFailures{recorder: r, wakeup: make(chan struct{}, 1), seen: map[failureKey]*failures{}}
}

// Note counts a failure and returns at once. peer is the address and port of the caller,
// procedure the RPC, and reason why authentication failed. reason must come from a small
// fixed set: each reason is counted apart.
func (a *AuthenticationFailures) Note(peer, procedure, reason string) {
	address, _, err := net.SplitHostPort(peer)
	if err != nil {
		address = "unknown"
	}
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	key := failureKey{address, reason}
	f := a.seen[key]
	if f == nil && len(a.seen) >= maxFailures {
		key.address = "others"
		f = a.seen[key]
	}
	if f == nil {
		f = &failures{}
		a.seen[key] = f
	}
	if f.count++; f.count == 1 {
		f.procedure, f.first = procedure, now
	}
	f.last = now
	if !f.known {
		select {
		case a.wakeup <- struct{}{}:
		default:
		}
	}
}

// Run records failures until ctx ends. Then it records those that are left, and returns.
func (a *AuthenticationFailures) Run(ctx context.Context) {
	tick := time.NewTicker(failuresInterval)
	defer tick.Stop()
	for {
		select {
		case <-a.wakeup:
			a.record(ctx, false)
		case <-tick.C:
			a.record(ctx, true)
		case <-ctx.Done():
			a.record(context.WithoutCancel(ctx), true)
			return
		}
	}
}

// record records all failures, or only those with a new address or reason. Failures that
// cannot be recorded stay counted.
func (a *AuthenticationFailures) record(ctx context.Context, all bool) {
	a.mu.Lock()
	due := map[failureKey]failures{}
	for key, f := range a.seen {
		switch {
		case f.count > 0 && (all || !f.known):
			due[key] = *f
			f.count, f.known = 0, true
		case all && f.count == 0:
			delete(a.seen, key)
		}
	}
	a.mu.Unlock()
	if len(due) == 0 {
		return
	}
	var failed error
	for key, f := range due {
		ctx, cancel := context.WithTimeout(ctx, RecordTimeout)
		err := a.recorder.RecordEvent(ctx, &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_AUTHENTICATION_FAILURE, Subject: key.address,
			Detail: &cedarpostv1.EventRecord_AuthenticationFailure{AuthenticationFailure: &cedarpostv1.AuthenticationFailure{
				Reason: key.reason, Address: key.address, Procedure: f.procedure, Count: f.count,
				First: timestamppb.New(f.first), Last: timestamppb.New(f.last),
			}},
		})
		cancel()
		if err != nil {
			failed = err
			a.putBack(key, f)
		}
	}
	a.recorder.cfg.Task(TaskAuthenticationFailures, failed)
	// Only the attempts at fixed times are logged, not those for a new failure: callers
	// without a key could fill the log.
	if failed != nil && all {
		a.recorder.cfg.Log.Error("failed authentication not recorded yet", "err", failed)
	}
}

// putBack counts failures again that could not be recorded.
func (a *AuthenticationFailures) putBack(key failureKey, f failures) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if now := a.seen[key]; now != nil && now.count > 0 {
		f.count += now.count
		f.last = now.last
	}
	f.known = true
	a.seen[key] = &f
}
