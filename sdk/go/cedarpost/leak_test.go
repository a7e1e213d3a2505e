package cedarpost_test

import (
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// A client that was closed has left nothing running, whatever it went through.
func TestNothingIsLeftRunning(t *testing.T) {
	s := startShop(t)
	network, via := through(t, s)
	mustAsk(t, dial(t, s), view("alice", "42"))
	before := goleak.IgnoreCurrent()
	for range 5 {
		c := dial(t, s, via, func(cfg *cedarpost.Config) { cfg.Coalesce, cfg.Timeout = true, 200*time.Millisecond })
		leased(t, c)
		mustAsk(t, c, view("alice", "42"))
		network.Cut()
		network.Blackhole(true)
		for _, a := range c.AuthorizeBatch(t.Context(), []cedarpost.Check{view("bob", "1"), view("bob", "2")}) {
			if a.Err == nil {
				t.Error("an answer out of nowhere")
			}
		}
		network.Blackhole(false)
		if err := c.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	network.Cut()
	goleak.VerifyNone(t, before)
}
