package cedarpost_test

import (
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// A closed client leaves no goroutine, whatever happened before.
func TestNothingIsLeftRunning(t *testing.T) {
	s := startShop(t)
	network, via := through(t, s)
	mustAsk(t, dial(t, s), view("alice", "42"))
	before := goleak.IgnoreCurrent()
	for range 5 {
		c := dial(t, s, via, func(cfg *cedarpost.Config) { cfg.Coalesce, cfg.Timeout = true, 200*time.Millisecond })
		leased(t, c)
		eventually(t, "an answer", func() bool { // within the short Timeout of this client
			_, err := c.Authorize(t.Context(), view("alice", "42"))
			return err == nil
		})
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
	var left error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if left = goleak.Find(before); left == nil {
			return
		}
	}
	t.Error(left)
}
