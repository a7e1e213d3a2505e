package server_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// latencies returns the median, the 99th percentile and the longest of times.
func latencies(took []time.Duration) string {
	slices.Sort(took)
	at := func(i int) time.Duration { return took[i].Round(100 * time.Microsecond) }
	n := len(took)
	return fmt.Sprintf("p50 %v, p99 %v, max %v", at(n/2), at((n-1)*99/100), at(n-1))
}

// One caller keeps 500 calls in flight. Another one, which asks every 20 ms, waits for a few of them
// only: without places it waited for all.
func TestAttackNoisyCaller(t *testing.T) {
	s := servertest.New(t, func(c *server.Config) { c.MaxDecisions = 2 * server.DecisionsOfProcessor })
	s.MustLoadShop()
	client := func(name string) cedarpostv1connect.AuthorizationServiceClient {
		return cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, newCaller(t, s, name, grant(access.Enforcer, "shop"))))
	}
	noisy, other := client("noisy"), client("other")
	ask := func(ctx context.Context, c cedarpostv1connect.AuthorizationServiceClient) error {
		return second(c.Authorize(ctx, servertest.AskShop("alice", "ViewOrder", "42", true)))
	}
	const asked, inFlight = 50, 500
	var answered, refused atomic.Int64
	measure := func() (took []time.Duration, overtaken []int64) {
		for start := time.Now(); len(took) < asked && (len(took) < 10 || time.Since(start) < 2*time.Second); {
			began, before := time.Now(), answered.Load()
			if err := ask(t.Context(), other); err != nil {
				t.Errorf("the other caller: %v", err)
			}
			took, overtaken = append(took, time.Since(began)), append(overtaken, answered.Load()-before)
			time.Sleep(20 * time.Millisecond)
		}
		return took, overtaken
	}
	quiet, _ := measure()
	ctx, stop := context.WithCancel(t.Context())
	var calls sync.WaitGroup
	for range inFlight {
		calls.Go(func() {
			for ctx.Err() == nil {
				switch err := ask(ctx, noisy); {
				case err == nil:
					answered.Add(1)
				case connect.CodeOf(err) == connect.CodeResourceExhausted:
					refused.Add(1)
				case ctx.Err() == nil:
					t.Errorf("the noisy caller: %v", err)
				}
			}
		})
	}
	servertest.Eventually(t, "the noise", func() bool { return answered.Load() >= inFlight })
	began, before := time.Now(), answered.Load()
	noise, overtaken := measure()
	perSecond := float64(answered.Load()-before) / time.Since(began).Seconds()
	stop()
	calls.Wait()
	slices.Sort(overtaken)
	median := overtaken[len(overtaken)/2]
	t.Logf("attack: one caller keeps %d calls in flight (%.0f answered a second, %d refused); another asks every 20 ms: %s before, %s meanwhile; one call of it waits for %d of the noisy one",
		inFlight, perSecond, refused.Load(), latencies(quiet), latencies(noise), median)
	if median > inFlight/2 {
		t.Errorf("a call of another caller waits for %d calls of the noisy one", median)
	}
}
