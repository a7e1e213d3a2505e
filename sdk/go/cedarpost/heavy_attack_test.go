package cedarpost_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// Questions about users whose entities are too large are no failures of a server: they open no
// breaker, so the other checks of the client are answered, and none of all these fails open.
func TestAttackHeavyPrincipalOpensNoBreaker(t *testing.T) {
	s := startShop(t)
	servertest.MustStoreHeavy(t, s, 4, 210)
	// The client waits for longer than any machine takes, so that all errors are the server's.
	c := dial(t, s, func(cfg *cedarpost.Config) { cfg.Timeout = time.Minute })
	open := func(who, action string) cedarpost.Check {
		check := view(who, "42")
		check.Action.ID, check.AllFields, check.FailOpen = action, false, "it must work"
		return check
	}
	var refused, through, others, failed atomic.Int64
	var attackers sync.WaitGroup
	for i := range 6 {
		attackers.Go(func() {
			for range 3 { // more than a breaker takes
				r, err := c.Authorize(t.Context(), open(fmt.Sprintf("deep%d", i%4), "ViewOrder"))
				if r.Allowed() || r.FailedOpen() {
					through.Add(1)
				}
				var ce *connect.Error
				if errors.Is(err, cedarpost.ErrInvalid) && errors.As(err, &ce) && ce.Code() == connect.CodeFailedPrecondition {
					refused.Add(1)
				} else {
					t.Errorf("a suspended user with 210 MB of parents: %v, %v", r, err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { attackers.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		n := others.Add(1)
		if _, err := c.Authorize(t.Context(), view(fmt.Sprintf("bob%d", n), "42")); err != nil {
			failed.Add(1)
			t.Errorf("another check: %v", err)
		}
		if r, err := c.Authorize(t.Context(), open("mallory", "DeleteOrder")); err != nil || r.Allowed() || r.FailedOpen() {
			through.Add(1)
			t.Errorf("mallory: %v, %v", r, err)
		}
	}
	t.Logf("attack: %d questions of one client about suspended users with 210 MB of parents, with FailOpen: %d refused, %d let through; %d of %d other checks of the client failed",
		6*3, refused.Load(), through.Load(), failed.Load(), others.Load())
}
