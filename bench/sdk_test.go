package bench

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// TestSDK prints the tables of docs/benchmarks.md about the Go client.
func TestSDK(t *testing.T) {
	if os.Getenv("CEDARPOST_BENCH") == "" {
		t.Skip("set CEDARPOST_BENCH=1 to run")
	}
	pg := storetest.NewServer(t)
	w := worldOf(10_000)
	s := newTarget(t, database(t, pg.URL(), "sdk"), cacheBytes)
	s.apply()
	s.importAll(w)
	hit(s, w)
	reuse(s, w)
	revoking20(s, w)
	cutOff(s, w)
}

// dial makes a client that has a lease.
func (s *target) dial(opts ...func(*cedarpost.Config)) *cedarpost.Client {
	s.t.Helper()
	cfg := cedarpost.Config{Servers: []string{s.API}, Token: s.Token, Timeout: 10 * time.Second}
	for _, o := range opts {
		o(&cfg)
	}
	c, err := cedarpost.New(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	for cfg.CacheBytes >= 0 && !c.Stats().Leased {
		time.Sleep(time.Millisecond)
	}
	return c
}

func (s *target) close(c *cedarpost.Client) {
	s.t.Helper()
	if err := c.Close(context.Background()); err != nil {
		s.t.Error(err)
	}
}

// check is a question in the client's words.
func check(req *cedarpostv1.AuthorizeRequest) cedarpost.Check {
	name := func(u *cedarpostv1.EntityUid) cedarpost.EntityUID { return cedarpost.UID(u.Type, u.Id) }
	return cedarpost.Check{Principal: name(req.Principal), Action: name(req.Action), Resource: name(req.Resource)}
}

// hit times one answer from the cache.
func hit(s *target, w world) {
	c := s.dial()
	defer s.close(c)
	checks := make([]cedarpost.Check, 1000)
	for i := range checks {
		checks[i] = check(w.question(rand.New(rand.NewPCG(uint64(i), 0)), i))
		checks[i].Context = map[string]any{}
		if _, err := c.Authorize(s.t.Context(), checks[i]); err != nil {
			s.t.Fatal(err)
		}
	}
	run := func(one func(i int)) testing.BenchmarkResult {
		return testing.Benchmark(func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				one(i)
			}
		})
	}
	ctx := s.t.Context()
	one := run(func(int) {
		if _, err := c.Authorize(ctx, checks[0]); err != nil {
			s.t.Fatal(err)
		}
	})
	many := run(func(i int) {
		if _, err := c.Authorize(ctx, checks[i%len(checks)]); err != nil {
			s.t.Fatal(err)
		}
	})
	fmt.Println("\n| a hit | ns | allocations | bytes |\n|---|---:|---:|---:|")
	fmt.Printf("| the same question | %d | %d | %d |\n", one.NsPerOp(), one.AllocsPerOp(), one.AllocedBytesPerOp())
	fmt.Printf("| one of %d in turn | %d | %d | %d |\n", len(checks), many.NsPerOp(), many.AllocsPerOp(), many.AllocedBytesPerOp())
}

// pairs are the questions of a service with so many, a few of which are asked often,
// by Zipf's law.
const pairs = 20_000

func (w world) pair(rnd *rand.Rand) cedarpost.Check {
	rank := rand.NewZipf(rnd, 1.1, 1, pairs-1).Uint64()
	of := rand.New(rand.NewPCG(rank, 1))
	return check(w.question(of, of.IntN(w.docs)))
}

// reuse compares clients with and without a cache, when one operation in a hundred is
// a write, and counts what is in the log.
func reuse(s *target, w world) {
	const writesPerMille = 10
	fmt.Println("\n| client | checks/s | answered from the cache | p50 | p99 |\n|---|---:|---:|---:|---:|")
	var rates []float64
	answered := int64(0)
	rowsBefore, usesBefore := s.logged()
	for _, kind := range []struct {
		name string
		opt  func(*cedarpost.Config)
	}{
		{"no cache", func(cfg *cedarpost.Config) { cfg.CacheBytes = -1 }},
		{"no cache, coalescing", func(cfg *cedarpost.Config) { cfg.CacheBytes, cfg.Coalesce = -1, true }},
		{"cache", func(*cedarpost.Config) {}},
		{"cache, any change drops all", func(cfg *cedarpost.Config) { cfg.Coarse = true }},
	} {
		c := s.dial(kind.opt)
		var writes atomic.Int64
		f, err := during(connections, 3*measured, func(who int, rnd *rand.Rand) error {
			if rnd.IntN(1000) < writesPerMille {
				_, err := s.Entities.WriteEntities(s.t.Context(), revoke(rnd.IntN(w.users), int(writes.Add(1))))
				return err
			}
			_, err := c.Authorize(s.t.Context(), w.pair(rnd))
			return err
		})
		if err != nil {
			s.t.Fatal(err)
		}
		s.close(c)
		st := c.Stats()
		checks := st.Decided + st.Reused
		answered += checks
		rate := float64(checks) / f.took.Seconds()
		rates = append(rates, rate)
		fmt.Printf("| %s | %.0f | %.1f %% | %s | %s |\n", kind.name, rate, 100*float64(st.Reused)/float64(checks), us(f.quantile(.5)), us(f.quantile(.99)))
	}
	rows, uses := s.logged()
	rows, uses = rows-rowsBefore, uses-usesBefore
	fmt.Printf("\nThe cache answers %.1f times as many. Of %d answers the log has %d decisions and %d uses: %d too few.\n",
		rates[2]/rates[0], answered, rows, uses, answered-rows-uses)
}

func us(d time.Duration) string { return fmt.Sprintf("%.1f µs", float64(d.Nanoseconds())/1000) }

// logged counts decisions, and uses of their answers.
func (s *target) logged() (rows, uses int64) {
	s.t.Helper()
	req := &cedarpostv1.QueryDecisionsRequest{PageSize: 1000}
	for {
		page, err := s.Audit.QueryDecisions(s.t.Context(), req)
		if err != nil {
			s.t.Fatal(err)
		}
		rows += int64(len(page.GetDecisions()))
		for _, u := range page.GetUses() {
			uses += u.GetHits()
		}
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return rows, uses
		}
	}
}

// reader is a question that is allowed by membership alone: a member of a document's
// department, who is not its owner.
func (w world) reader(i int) (user int, c cedarpost.Check) {
	var doc int
	for turn := i; ; turn += 1000 {
		doc = 3 * (turn * 97 % (w.docs / 3)) // published
		owner := w.owner(doc)
		user = min(owner/81*81+(owner+1)%81, w.users-1)
		if user != owner && user%100 != 99 && owner%100 != 99 { // who is active
			break
		}
	}
	return user, check(&cedarpostv1.AuthorizeRequest{
		Principal: uid("User", "u", user), Resource: uid("Doc", "d", doc), Action: &cedarpostv1.EntityUid{Type: "Files::Action", Id: "Read"},
	})
}

const clientsAtOnce = 20

// rights takes memberships away and gives them back, by the store itself: a server's
// answer waits until that server has applied it.
type rights struct {
	s        *target
	policies int64
}

func (s *target) rights() rights {
	n, err := s.DB.PolicyRevision(s.t.Context(), math.MaxInt64)
	if err != nil {
		s.t.Fatal(err)
	}
	return rights{s, n}
}

// set returns when the change was committed, or a little later.
func (r rights) set(user int, has bool) time.Time {
	kind := store.RemoveParents
	if has {
		kind = store.AddParents
	}
	_, err := r.s.DB.WriteEntities(r.s.t.Context(), store.EntityWrite{Caller: "bench", PolicyRevision: r.policies, Ops: []store.Op{{
		Kind: kind, Entity: store.Entity{UID: store.UID{Type: "Files::User", ID: fmt.Sprint("u", user)}, Parents: []store.UID{{Type: "Files::Group", ID: fmt.Sprint("team-", user/9)}}},
	}}})
	committed := time.Now()
	if err != nil {
		r.s.t.Fatal(err)
	}
	return committed
}

// lastAllow asks all clients over and over, until none allows, and returns when the
// last one did. A client without an answer does not allow.
func lastAllow(s *target, clients []*cedarpost.Client, c cedarpost.Check, pause time.Duration) func() time.Time {
	var all sync.WaitGroup
	var last atomic.Int64
	for _, client := range clients {
		all.Go(func() {
			for {
				r, err := client.Authorize(s.t.Context(), c)
				if err != nil || !r.Allowed() {
					return
				}
				now := time.Now().UnixNano()
				for old := last.Load(); now > old && !last.CompareAndSwap(old, now); old = last.Load() {
				}
				time.Sleep(pause)
			}
		})
	}
	return func() time.Time {
		all.Wait()
		return time.Unix(0, last.Load())
	}
}

// allow waits until every client allows, from its cache.
func allow(s *target, clients []*cedarpost.Client, c cedarpost.Check) {
	for _, client := range clients {
		for {
			if r, err := client.Authorize(s.t.Context(), c); err == nil && r.Allowed() && r.Reused() {
				break
			}
			time.Sleep(100 * time.Microsecond)
		}
	}
}

// revoking20 times how long a revoked right is still given by any of many clients.
func revoking20(s *target, w world) {
	var clients []*cedarpost.Client
	for range clientsAtOnce {
		clients = append(clients, s.dial())
	}
	rights := s.rights()
	var f figures
	for i := range 1000 {
		user, c := w.reader(i)
		rights.set(user, true)
		allow(s, clients, c)
		wait := lastAllow(s, clients, c, 100*time.Microsecond)
		time.Sleep(rand.N(3 * time.Millisecond))
		committed := rights.set(user, false)
		f.times = append(f.times, max(wait().Sub(committed), 0))
		rights.set(user, true)
	}
	for _, c := range clients {
		s.close(c)
	}
	slices.Sort(f.times)
	fmt.Printf("\n| from the commit of a revocation to the last allow of %d clients | p50 | p99 | max |\n|---|---:|---:|---:|\n| of %d | %s | %s | %s |\n",
		clientsAtOnce, len(f.times), ms(f.quantile(.5)), ms(f.quantile(.99)), ms(f.times[len(f.times)-1]))
}

// cutOff does the same with the network gone.
func cutOff(s *target, w world) {
	const boundOf, rounds = 2 * time.Second, 5
	network := servertest.NewProxy(s.t, s.API)
	var clients []*cedarpost.Client
	for range clientsAtOnce {
		clients = append(clients, s.dial(func(cfg *cedarpost.Config) {
			cfg.Servers, cfg.MaxStaleness, cfg.Timeout = []string{network.URL()}, boundOf, 100*time.Millisecond
		}))
	}
	rights := s.rights()
	longest := time.Duration(0)
	for i := range rounds {
		user, c := w.reader(i)
		rights.set(user, true)
		allow(s, clients, c)
		network.Blackhole(true)
		committed := rights.set(user, false)
		longest = max(longest, lastAllow(s, clients, c, time.Millisecond)().Sub(committed))
		network.Blackhole(false)
		rights.set(user, true)
	}
	fmt.Printf("\nWith the network silent, the longest that %d clients with a bound of %v allowed after the commit: %s, in %d rounds.\n", clientsAtOnce, boundOf, ms(longest), rounds)
	for _, c := range clients {
		s.close(c)
	}
}
