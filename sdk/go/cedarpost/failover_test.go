package cedarpost_test

import (
	"net/url"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"

	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// The primary dies with writes that the standby does not have. Decisions on those
// writes disappear from every client: kept answers, and the newest revision that a
// client had seen.
func TestFailover(t *testing.T) {
	primary := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), primary.URL(), nil); err != nil {
		t.Fatal(err)
	}
	standby := storetest.NewStandby(t, primary)
	both, err := url.Parse(primary.URL())
	if err != nil {
		t.Fatal(err)
	}
	second, err := url.Parse(standby.URL())
	if err != nil {
		t.Fatal(err)
	}
	both.Host += "," + second.Host
	s := servertest.On(t, both.String())
	s.MustLoadShop()
	member(t, s, "carol", "support", false)
	storetest.CutOff(t, standby, primary)
	clients := map[string]*cedarpost.Client{
		"with a cache":    dial(t, s),
		"without a cache": dial(t, s, func(cfg *cedarpost.Config) { cfg.CacheBytes = -1 }),
		"in batches":      dial(t, s, func(cfg *cedarpost.Config) { cfg.Coalesce = true }),
	}
	member(t, s, "carol", "support", true)
	lost := member(t, s, "alice", "support", false)
	for name, c := range clients {
		for _, check := range []cedarpost.Check{view("carol", "42"), view("alice", "42")} {
			want := check.Principal.ID == "carol"
			check.AtLeastAsFresh = lost
			if r := mustAsk(t, c, check); r.Allowed() != want {
				t.Fatalf("%s: %s before the failover: %v", name, check.Principal, r.Allowed())
			}
		}
	}
	leased(t, clients["with a cache"])
	mustAsk(t, clients["with a cache"], view("carol", "42"))
	if err := primary.Kill(); err != nil {
		t.Fatal(err)
	}
	storetest.Promote(t, standby)
	promoted := time.Now()
	for name, c := range clients {
		eventually(t, name+": the standby's data", func() bool {
			began := time.Now()
			r, err := c.Authorize(t.Context(), view("carol", "42"))
			if err == nil && r.Allowed() && r.Reused() && began.Sub(promoted) > 5*time.Second {
				t.Fatalf("%s: an answer of the lost history, %v later", name, began.Sub(promoted))
			}
			return err == nil && !r.Allowed()
		})
		if r := mustAsk(t, c, view("alice", "42")); !r.Allowed() {
			t.Errorf("%s: alice, whose revocation is lost, may not", name)
		}
		// A question that names the lost revision gets an error, and not an older
		// answer.
		check := view("alice", "42")
		check.AtLeastAsFresh = lost
		if r, err := c.Authorize(t.Context(), check); err == nil {
			t.Errorf("%s: the lost revision is known: %v", name, r.Allowed())
		}
	}
	leased(t, clients["with a cache"])
	eventually(t, "answers from the cache", func() bool { return mustAsk(t, clients["with a cache"], view("alice", "42")).Reused() })
}
