package cedarpost_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// These tests ask a real server with a real Postgres over the network.

func user(id string) cedarpost.EntityUID  { return cedarpost.UID("Shop::User", id) }
func order(id string) cedarpost.EntityUID { return cedarpost.UID("Shop::Order", id) }

// view asks whether a user may view an order, and which of its fields.
func view(who, what string) cedarpost.Check {
	return cedarpost.Check{
		Principal: user(who), Action: cedarpost.UID("Shop::Action", "ViewOrder"), Resource: order(what),
		Context: map[string]any{"mfa": false}, AllFields: true,
	}
}

func startShop(t testing.TB, opts ...servertest.Option) *servertest.Server {
	t.Helper()
	s := servertest.New(t, opts...)
	s.MustLoadShop()
	return s
}

// dial makes a client that waits very long: on a busy machine an answer, or the answer
// to a ping, can take seconds.
func dial(t testing.TB, s *servertest.Server, opts ...func(*cedarpost.Config)) *cedarpost.Client {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	patient := &http.Transport{Protocols: protocols}
	t.Cleanup(patient.CloseIdleConnections)
	cfg := cedarpost.Config{Servers: []string{s.API}, Token: s.Token, Timeout: time.Minute, HTTPClient: &http.Client{Transport: patient}}
	for _, o := range opts {
		o(&cfg)
	}
	c, err := cedarpost.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := c.Close(ctx); err != nil {
			t.Log(err)
		}
	})
	return c
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
	}
}

func leased(t testing.TB, c *cedarpost.Client) {
	t.Helper()
	eventually(t, "a lease", func() bool { return c.Stats().Leased })
}

func mustAsk(t testing.TB, c *cedarpost.Client, check cedarpost.Check) cedarpost.Result {
	t.Helper()
	r, err := c.Authorize(t.Context(), check)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// member writes or removes a membership.
func member(t testing.TB, s *servertest.Server, who, role string, is bool) (token string) {
	t.Helper()
	uid, parents := servertest.UID(`Shop::User::"`+who+`"`), []*cedarpostv1.EntityUid{servertest.UID(`Shop::Role::"` + role + `"`)}
	op := &cedarpostv1.EntityOperation{}
	if is {
		op.Operation = &cedarpostv1.EntityOperation_AddParents{AddParents: &cedarpostv1.ChangeParents{Uid: uid, Parents: parents}}
	} else {
		op.Operation = &cedarpostv1.EntityOperation_RemoveParents{RemoveParents: &cedarpostv1.ChangeParents{Uid: uid, Parents: parents}}
	}
	res, err := s.Entities.WriteEntities(context.Background(), &cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{op}})
	if err != nil {
		t.Fatal(err)
	}
	return res.GetRevision().GetToken()
}

func TestAnswerIsKeptUntilItChanges(t *testing.T) {
	s := startShop(t)
	c := dial(t, s)
	leased(t, c)
	first := mustAsk(t, c, view("alice", "42"))
	if !first.Allowed() || first.Reused() || !first.Fields().Permits("status") || first.Fields().Permits("total") {
		t.Errorf("alice of support: %v, %v", first.Allowed(), first.Fields().Permitted())
	}
	again := mustAsk(t, c, view("alice", "42"))
	if !again.Reused() || again.DecisionID() != first.DecisionID() {
		t.Error("the same question was asked again")
	}
	if deny := mustAsk(t, c, view("bob", "99")); deny.Allowed() || deny.DeniedAt() != cedarpost.AtObject {
		t.Errorf("bob's view of another's order: %v, %v", deny.Allowed(), deny.DeniedAt())
	}
	if deny := mustAsk(t, c, view("bob", "99")); deny.Allowed() || !deny.Reused() || deny.DeniedAt() != cedarpost.AtObject {
		t.Error("a denial is not kept as an allow is")
	}
	// A check that names the revision of a write sees the write at once.
	fresh := view("alice", "42")
	fresh.AtLeastAsFresh = member(t, s, "alice", "support", false)
	if r := mustAsk(t, c, fresh); r.Allowed() {
		t.Error("alice may still after her role is gone")
	}
	// A check without it sees the write soon.
	token := member(t, s, "alice", "support", true)
	eventually(t, "alice is back", func() bool { return mustAsk(t, c, view("alice", "42")).Allowed() })
	member(t, s, "alice", "support", false)
	eventually(t, "alice is gone", func() bool { return !mustAsk(t, c, view("alice", "42")).Allowed() })
	// An older token does not bring the older answer back.
	fresh.AtLeastAsFresh = token
	if mustAsk(t, c, fresh).Allowed() {
		t.Error("alice is back by an old token")
	}
	// Changes of others leave bob's answer in the cache.
	if !mustAsk(t, c, view("bob", "99")).Reused() {
		t.Error("bob's answer fell with alice's")
	}
	full := view("bob", "99")
	full.FullyConsistent = true
	if mustAsk(t, c, full).Reused() {
		t.Error("what was to be fully consistent came from the cache")
	}
}

func TestMistakesAreTold(t *testing.T) {
	s := startShop(t)
	c := dial(t, s)
	bad := view("alice", "42")
	bad.Action.ID = "NoSuch"
	bad.FailOpen = "it must work"
	if r, err := c.Authorize(t.Context(), bad); !errors.Is(err, cedarpost.ErrInvalid) || r.Allowed() {
		t.Errorf("an unknown action: %v, %v", r.Allowed(), err)
	}
	bad = view("alice", "42")
	bad.Context = map[string]any{"mfa": nil}
	if _, err := c.Authorize(t.Context(), bad); !errors.Is(err, cedarpost.ErrInvalid) {
		t.Errorf("a value that cannot be sent: %v", err)
	}
	stranger := dial(t, s, func(cfg *cedarpost.Config) { cfg.Token = "nobody" })
	open := view("alice", "42")
	open.FailOpen = "it must work"
	if r, err := stranger.Authorize(t.Context(), open); !errors.Is(err, cedarpost.ErrUnauthenticated) || r.Allowed() {
		t.Errorf("an unknown key: %v, %v", r.Allowed(), err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := c.Authorize(gone, open); !errors.Is(err, context.Canceled) || r.Allowed() {
		t.Errorf("a caller that gave up: %v, %v", r.Allowed(), err)
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := c.Authorize(t.Context(), open); !errors.Is(err, cedarpost.ErrClosed) {
		t.Errorf("a closed client: %v", err)
	}
	for _, a := range c.AuthorizeBatch(t.Context(), []cedarpost.Check{open}) {
		if !errors.Is(a.Err, cedarpost.ErrClosed) {
			t.Errorf("a closed client's batch: %v", a.Err)
		}
	}
}

func TestBatch(t *testing.T) {
	s := startShop(t)
	c := dial(t, s)
	leased(t, c)
	mustAsk(t, c, view("alice", "42"))
	bad := view("alice", "42")
	bad.Action.ID = "NoSuch"
	unsendable := view("alice", "42")
	unsendable.Context = map[string]any{"mfa": make(chan int)}
	checks := []cedarpost.Check{view("alice", "42"), view("bob", "99"), bad, unsendable}
	for i := range 250 {
		checks = append(checks, view("bob", fmt.Sprint(1000+i)))
	}
	for round := range 2 {
		answers := c.AuthorizeBatch(t.Context(), checks)
		if a := answers[0]; a.Err != nil || !a.Allowed() || !a.Reused() {
			t.Errorf("round %d: the answer that is kept: %v, %v", round, a.Result, a.Err)
		}
		if a := answers[1]; a.Err != nil || a.Allowed() || a.Reused() != (round == 1) {
			t.Errorf("round %d: bob: %v, %v", round, a.Result, a.Err)
		}
		if !errors.Is(answers[2].Err, cedarpost.ErrInvalid) || !errors.Is(answers[3].Err, cedarpost.ErrInvalid) {
			t.Errorf("round %d: bad questions: %v, %v", round, answers[2].Err, answers[3].Err)
		}
		for i, a := range answers[4:] {
			if a.Err != nil || a.Allowed() || a.Reused() != (round == 1) {
				t.Errorf("round %d: order %d: %v, %v", round, 1000+i, a.Result, a.Err)
			}
		}
	}
}

// logged counts the decisions in the log, and how often their answers were reused.
func logged(t testing.TB, s *servertest.Server) (rows, uses int64) {
	t.Helper()
	req := &cedarpostv1.QueryDecisionsRequest{PageSize: 1000}
	for {
		page, err := s.Audit.QueryDecisions(t.Context(), req)
		if err != nil {
			t.Fatal(err)
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

// Every answer is in the log, as a decision or as a use of one, with exact counts.
func TestEveryAnswerIsAccountedFor(t *testing.T) {
	s := startShop(t)
	coalesced := func(cfg *cedarpost.Config) { cfg.Coalesce = true }
	brief := func(cfg *cedarpost.Config) { cfg.ReportInterval = 20 * time.Millisecond }
	clients := []*cedarpost.Client{dial(t, s, brief), dial(t, s, coalesced), dial(t, s, brief, coalesced)}
	for _, c := range clients {
		leased(t, c)
	}
	var answered atomic.Int64
	var all, writers sync.WaitGroup
	var stop atomic.Bool
	writers.Go(func() {
		// Each write makes answers invalid. The writer keeps pace with the other
		// goroutines, so that some answers are reused on any machine.
		for i := 0; !stop.Load(); i++ {
			member(t, s, "alice", "support", i%2 == 0)
			for next := answered.Load() + 100; answered.Load() < next && !stop.Load(); {
				time.Sleep(time.Millisecond)
			}
		}
	})
	for i, c := range clients {
		for g := range 8 {
			all.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), uint64(g)))
				for range 150 {
					if r.IntN(10) == 0 {
						for _, a := range c.AuthorizeBatch(t.Context(), []cedarpost.Check{view("alice", "42"), view("carol", fmt.Sprint(r.IntN(20)))}) {
							if a.Err == nil {
								answered.Add(1)
							}
						}
					} else if _, err := c.Authorize(t.Context(), view([]string{"alice", "bob", "erin"}[r.IntN(3)], fmt.Sprint(r.IntN(50)))); err == nil {
						answered.Add(1)
					}
				}
			})
		}
	}
	all.Wait()
	stop.Store(true)
	writers.Wait()
	var stats cedarpost.Stats
	for _, c := range clients {
		if err := c.Close(t.Context()); err != nil {
			t.Error(err)
		}
		st := c.Stats()
		stats.Decided += st.Decided
		stats.Reused += st.Reused
		stats.Reported += st.Reported
		stats.Errors += st.Errors
	}
	rows, uses := logged(t, s)
	t.Logf("%d answers: %d rows, %d uses; %+v", answered.Load(), rows, uses, stats)
	if rows+uses != answered.Load() || uses != stats.Reused || uses != stats.Reported || stats.Errors != 0 {
		t.Error("answers and log differ")
	}
	if uses < answered.Load()/2 {
		t.Error("too few came from the cache to tell anything")
	}
}

// Ten thousand concurrent calls with the same few questions send only a few of them.
func TestTenThousandAtOnce(t *testing.T) {
	s := startShop(t)
	// So many calls can take seconds, in which the client does nothing else.
	c := dial(t, s, func(cfg *cedarpost.Config) { cfg.MaxStaleness = time.Minute })
	leased(t, c)
	var all sync.WaitGroup
	start := make(chan struct{})
	var wrong atomic.Int64
	for i := range 10_000 {
		all.Go(func() {
			<-start
			who, want := "alice", true
			if i%2 == 0 {
				who, want = "carol", false
			}
			for {
				r, err := c.Authorize(t.Context(), view(who, fmt.Sprint(30+i%5)))
				if errors.Is(err, cedarpost.ErrUnavailable) {
					continue // on a busy machine the service may not answer in time
				}
				if err != nil || r.Allowed() != want {
					wrong.Add(1)
				}
				return
			}
		})
	}
	close(start)
	all.Wait()
	if n := wrong.Load(); n > 0 {
		t.Errorf("%d of 10,000 were answered wrongly, or not at all", n)
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
	st := c.Stats()
	// Ten questions are sent once each, unless the service did not answer in time.
	if st.Errors == 0 && st.Decided != 10 || st.Decided > 100 || st.Decided+st.Reused != 10_000 {
		t.Errorf("%+v", st)
	}
	if rows, uses := logged(t, s); rows != st.Decided || rows+uses != 10_000 {
		t.Errorf("the log has %d and %d", rows, uses)
	}
}
