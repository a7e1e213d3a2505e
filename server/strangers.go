package server

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

const (
	strangersInterval = 10 * time.Second
	maxStrangers      = 1000 // addresses told apart
)

// strangers puts failed authentication into the log. A stranger must not be able to
// fill it, or to keep anybody waiting: the first failure of a kind from an address
// is recorded at once, beside the call, and those that follow are counted and
// recorded together.
type strangers struct {
	events *eventLog
	log    *slog.Logger
	metric *metrics
	wakeup chan struct{}

	mu   sync.Mutex
	seen map[strangerKey]*stranger
}

type strangerKey struct{ address, reason string }

// stranger are failures that are not recorded yet, if count is more than 0.
type stranger struct {
	procedure   string
	count       int64
	first, last time.Time
	known       bool // one has been recorded; the others can wait
}

func newStrangers(events *eventLog, log *slog.Logger, m *metrics) *strangers {
	return &strangers{events: events, log: log, metric: m, wakeup: make(chan struct{}, 1), seen: map[strangerKey]*stranger{}}
}

// note counts a failure of the peer, an address with a port.
func (s *strangers) note(peer, procedure, reason string) {
	address, _, err := net.SplitHostPort(peer)
	if err != nil {
		address = "unknown"
	}
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	key := strangerKey{address, reason}
	f := s.seen[key]
	if f == nil && len(s.seen) >= maxStrangers {
		key.address = "others"
		f = s.seen[key]
	}
	if f == nil {
		f = &stranger{}
		s.seen[key] = f
	}
	if f.count++; f.count == 1 {
		f.procedure, f.first = procedure, now
	}
	f.last = now
	if !f.known {
		select {
		case s.wakeup <- struct{}{}:
		default:
		}
	}
}

// run records until ctx ends, and then what is left.
func (s *strangers) run(ctx context.Context) {
	tick := time.NewTicker(strangersInterval)
	defer tick.Stop()
	for {
		select {
		case <-s.wakeup:
			s.record(ctx, false)
		case <-tick.C:
			s.record(ctx, true)
		case <-ctx.Done():
			s.record(context.WithoutCancel(ctx), true)
			return
		}
	}
}

// record takes what is new, or all. What cannot be recorded is counted on.
func (s *strangers) record(ctx context.Context, all bool) {
	s.mu.Lock()
	due := map[strangerKey]stranger{}
	for key, f := range s.seen {
		switch {
		case f.count > 0 && (all || !f.known):
			due[key] = *f
			f.count, f.known = 0, true
		case all && f.count == 0:
			delete(s.seen, key)
		}
	}
	s.mu.Unlock()
	if len(due) == 0 {
		return
	}
	var failed error
	for key, f := range due {
		ctx, cancel := context.WithTimeout(ctx, recordTimeout)
		err := s.events.add(ctx, &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_AUTHENTICATION_FAILURE, Subject: key.address,
			Detail: &cedarpostv1.EventRecord_AuthenticationFailure{AuthenticationFailure: &cedarpostv1.AuthenticationFailure{
				Reason: key.reason, Address: key.address, Procedure: f.procedure, Count: f.count,
				First: timestamppb.New(f.first), Last: timestamppb.New(f.last),
			}},
		})
		cancel()
		if err != nil {
			failed = err
			s.again(key, f)
		}
	}
	s.metric.task(taskStrangers, failed)
	// Only the attempts at fixed times are logged, not those for a new failure: callers
	// without a key could fill the log.
	if failed != nil && all {
		s.log.Error("failed authentication not recorded yet", "err", failed)
	}
}

// again takes back what could not be recorded.
func (s *strangers) again(key strangerKey, f stranger) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := s.seen[key]; now != nil && now.count > 0 {
		f.count += now.count
		f.last = now.last
	}
	f.known = true
	s.seen[key] = &f
}
