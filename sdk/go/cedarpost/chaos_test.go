package cedarpost_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// through puts a network proxy before a server's decision plane. The client has to
// notice failures by itself.
func through(t testing.TB, s *servertest.Server) (*servertest.Proxy, func(*cedarpost.Config)) {
	t.Helper()
	p := servertest.NewProxy(t, s.API)
	return p, func(cfg *cedarpost.Config) { cfg.Servers, cfg.HTTPClient = []string{p.URL()}, nil }
}

// bound is short, so that tests do not wait long. The tests do not depend on its
// length.
func bound(d time.Duration) func(*cedarpost.Config) {
	return func(cfg *cedarpost.Config) { cfg.MaxStaleness, cfg.Timeout = d, 300*time.Millisecond }
}

// A service that is away, in any way, causes only errors: first kept answers are reused
// for the bound, then none is. When the service is back, everything works as before.
func TestServiceAway(t *testing.T) {
	for _, way := range []struct {
		name        string
		leave, back func(*servertest.Proxy)
	}{
		{"gone", func(p *servertest.Proxy) { p.Refuse(true); p.Cut() }, func(p *servertest.Proxy) { p.Refuse(false) }},
		{"half open", func(p *servertest.Proxy) { p.Blackhole(true) }, func(p *servertest.Proxy) { p.Blackhole(false) }},
		{"too slow", func(p *servertest.Proxy) { p.Delay(func() time.Duration { return 2 * time.Second }) }, func(p *servertest.Proxy) { p.Delay(nil) }},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			s := startShop(t)
			network, via := through(t, s)
			c := dial(t, s, via, bound(time.Second))
			leased(t, c)
			eventually(t, "an answer", func() bool {
				r, err := c.Authorize(t.Context(), view("alice", "42"))
				return err == nil && r.Allowed()
			})
			way.leave(network)
			member(t, s, "alice", "support", false)
			written := time.Now() // and committed before
			stale := 0
			eventually(t, "no answer", func() bool {
				began := time.Now()
				r, err := c.Authorize(t.Context(), view("alice", "42"))
				if err == nil && r.Allowed() {
					stale++
					if began.Sub(written) > time.Second {
						t.Fatalf("a right can be used %v after it was revoked", began.Sub(written))
					}
					return false
				}
				return err != nil
			})
			t.Logf("%d answers from the cache meanwhile", stale)
			r, err := c.Authorize(t.Context(), view("alice", "42"))
			if !errors.Is(err, cedarpost.ErrUnavailable) || r.Allowed() {
				t.Errorf("%v, %v", r.Allowed(), err)
			}
			open := view("alice", "42")
			open.FailOpen = "reads may go on"
			r, err = c.Authorize(t.Context(), open)
			if err != nil || !r.Allowed() || !r.FailedOpen() || len(r.Fields().Permitted()) > 0 || r.DecisionID() != "" {
				t.Errorf("failing open: %+v, %v", r, err)
			}
			way.back(network)
			eventually(t, "answers again", func() bool {
				r, err := c.Authorize(t.Context(), view("alice", "42"))
				if err == nil && r.Allowed() {
					t.Fatal("what was revoked meanwhile is allowed")
				}
				return err == nil
			})
			eventually(t, "answers from the cache", func() bool {
				r, err := c.Authorize(t.Context(), view("alice", "42"))
				return err == nil && r.Reused()
			})
			eventually(t, "the log has what failed open", func() bool {
				events, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{Kind: cedarpostv1.EventRecord_FAILED_OPEN})
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range events.GetEvents() {
					f := e.GetFailedOpen().GetFailOpens()
					return len(f) == 1 && f[0].GetCount() == 1 && f[0].GetReason() == "reads may go on" && f[0].GetResource().GetId() == "42"
				}
				return false
			})
		})
	}
}

// With a slow network, calls are slow and none fails.
func TestSlowNetwork(t *testing.T) {
	s := startShop(t)
	network, via := through(t, s)
	network.Delay(func() time.Duration { return 10 * time.Millisecond })
	c := dial(t, s, via)
	leased(t, c)
	for i := range 50 {
		member(t, s, "alice", "support", i%2 == 1)
		eventually(t, "the change", func() bool { return mustAsk(t, c, view("alice", "42")).Allowed() == (i%2 == 1) })
	}
	if st := c.Stats(); st.Errors > 0 {
		t.Errorf("%+v", st)
	}
}

// The watch is cut again and again, and goes on each time: no change is lost, and a
// revoked right stays revoked.
func TestCutWatch(t *testing.T) {
	s := startShop(t)
	network, via := through(t, s)
	c := dial(t, s, via)
	leased(t, c)
	for i := range 40 {
		if i%2 == 0 {
			network.Cut()
		}
		member(t, s, "alice", "support", i%2 == 1)
		eventually(t, "the change", func() bool {
			r, err := c.Authorize(t.Context(), view("alice", "42"))
			return err == nil && r.Allowed() == (i%2 == 1)
		})
	}
	leased(t, c)
	eventually(t, "answers from the cache", func() bool { return mustAsk(t, c, view("alice", "42")).Reused() })
}

// One of two servers does not respond: the other answers every question.
func TestOneOfTwo(t *testing.T) {
	s := startShop(t)
	other := servertest.On(t, s.URL)
	network, _ := through(t, other)
	c := dial(t, s, func(cfg *cedarpost.Config) {
		cfg.Servers, cfg.HTTPClient, cfg.CacheBytes, cfg.Timeout = []string{s.API, network.URL()}, nil, -1, 8*time.Second
	})
	ask := func(n int) {
		for i := range n {
			if r := mustAsk(t, c, view("alice", fmt.Sprint(i))); !r.Allowed() {
				t.Fatal("alice may not")
			}
		}
	}
	ask(20)
	for name, leave := range map[string]func(){"silent": func() { network.Blackhole(true) }, "gone": func() { network.Refuse(true); network.Cut() }} {
		leave()
		if ask(60); c.Stats().Errors > 0 {
			t.Errorf("%s: %+v", name, c.Stats())
		}
	}
}

// The client does not accept an answer from a server that is behind what this client
// has seen.
func TestServerBehind(t *testing.T) {
	s := startShop(t)
	database := servertest.NewProxy(t, s.URL)
	behind := servertest.On(t, database.URL(), func(cfg *server.Config) { cfg.MaxStaleness = time.Minute })
	c := dial(t, s, func(cfg *cedarpost.Config) { cfg.Servers = []string{s.API, behind.API} })
	leased(t, c)
	database.Refuse(true)
	database.Cut()
	fresh := view("alice", "42")
	fresh.AtLeastAsFresh = member(t, s, "alice", "support", false)
	eventually(t, "the revocation", func() bool {
		r, err := c.Authorize(t.Context(), fresh)
		return err == nil && !r.Allowed()
	})
	// From here on the client has seen the change, and must never get an older answer.
	for i := range 30 {
		if r, err := c.Authorize(t.Context(), view("alice", fmt.Sprint(i))); err == nil && r.Allowed() {
			t.Fatalf("order %d: an older answer", i)
		}
	}
}

// Servers stop and start under load, and a revoked right never comes back.
func TestServersRestart(t *testing.T) {
	s := startShop(t)
	first := servertest.On(t, s.URL)
	network := servertest.NewProxy(t, first.API)
	c := dial(t, s, func(cfg *cedarpost.Config) { cfg.Servers, cfg.HTTPClient = []string{network.URL()}, nil })
	leased(t, c)
	var revoked atomic.Bool
	var all sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		all.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				was := revoked.Load()
				if r, err := c.Authorize(t.Context(), view("alice", fmt.Sprint(i%10))); err == nil && r.Allowed() && was {
					t.Error("a right that was seen revoked is back")
					return
				}
			}
		})
	}
	for range 3 {
		network.Refuse(true)
		network.Cut()
		first.Stop()
		first = servertest.On(t, s.URL)
		network.Retarget(t, first.API)
		network.Refuse(false)
		leased(t, c)
	}
	fresh := view("alice", "42")
	fresh.AtLeastAsFresh = member(t, s, "alice", "support", false)
	eventually(t, "the revocation", func() bool {
		r, err := c.Authorize(t.Context(), fresh)
		if err == nil && r.Allowed() {
			t.Fatal("alice may still")
		}
		return err == nil
	})
	// Once the cache shows a change, every later answer does.
	eventually(t, "the cache knows", func() bool { return !mustAsk(t, c, view("alice", "0")).Allowed() })
	for i := range 10 {
		eventually(t, "all know", func() bool { return !mustAsk(t, c, view("alice", fmt.Sprint(i))).Allowed() })
	}
	revoked.Store(true)
	eventually(t, "some thousand answers more", func() func() bool {
		had := c.Stats().Reused
		return func() bool { return c.Stats().Reused > had+5000 }
	}())
	close(stop)
	all.Wait()
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
	// A decision whose answer was lost is in the log, without an answer.
	st := c.Stats()
	if rows, uses := logged(t, s); uses != st.Reused || rows < st.Decided {
		t.Errorf("%d rows, %d uses; %+v", rows, uses, st)
	}
}
