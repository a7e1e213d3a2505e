package server_test

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/jackc/pgx/v5"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/localpg"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// ownCluster starts a server on a Postgres that the test may kill.
func ownCluster(t *testing.T, opts ...servertest.Option) (*servertest.Server, *localpg.Server) {
	t.Helper()
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	s := servertest.On(t, pg.URL(), opts...)
	s.MustLoadShop()
	return s, pg
}

// recorded reads the ids in the table itself.
func recorded(t *testing.T, url string) map[string]bool {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), `select decision_id::text from decisions`)
	if err != nil {
		t.Fatal(err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, id := range ids {
		if out[id] {
			t.Errorf("decision %s is in the log twice", id)
		}
		out[id] = true
	}
	return out
}

// Postgres dies under load and comes back. Meanwhile every answer is an error
// and never a decision; before and after, every answered decision is in the log.
func TestPostgresDiesUnderLoad(t *testing.T) {
	s, pg := ownCluster(t)
	var (
		mu       sync.Mutex
		answered = map[string]bool{}
		failures atomic.Int64
		stop     = make(chan struct{})
		wg       sync.WaitGroup
	)
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				req := withAllFields(ask("bob", "ViewOrder", fmt.Sprint(w*50+i%50), false))
				r, err := s.Authorization.Authorize(context.Background(), req)
				if err != nil {
					failures.Add(1)
					if code := connect.CodeOf(err); code != connect.CodeUnavailable && code != connect.CodeDeadlineExceeded {
						t.Errorf("got %v, want unavailable", err)
					}
					continue
				}
				mu.Lock()
				answered[r.DecisionId] = true
				mu.Unlock()
			}
		})
	}
	answers := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(answered)
	}
	waitFor := func(what string, ok func() bool) {
		t.Helper()
		for range 3000 {
			if ok() {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("never happened: %s", what)
	}
	waitFor("answers", func() bool { return answers() > 200 })
	if err := pg.Kill(); err != nil {
		t.Fatal(err)
	}
	waitFor("errors", func() bool { return failures.Load() > 20 })
	waitFor("not ready", func() bool {
		res, err := http.Get(s.Ops + "/readyz")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusServiceUnavailable
	})
	if err := pg.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := answers()
	waitFor("answers after the restart", func() bool { return answers() > before+200 })
	close(stop)
	wg.Wait()
	log := recorded(t, pg.URL())
	for id := range answered {
		if !log[id] {
			t.Errorf("decision %s was answered and is not in the log", id)
		}
	}
	t.Logf("%d answered, %d recorded, %d refused", len(answered), len(log), failures.Load())
}

// A server that cannot learn whether its data is current stops deciding when the
// bound is over, even if recording would still work.
func TestStalenessBound(t *testing.T) {
	s, pg := ownCluster(t, func(c *server.Config) { c.MaxStaleness = 1500 * time.Millisecond })
	if err := pg.Stop(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	_, err := s.Authorization.Authorize(t.Context(), ask("bob", "ViewOrder", "42", false))
	wantCode(t, err, connect.CodeUnavailable, "older than this server may use")
	if err := pg.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if _, err = s.Authorization.Authorize(t.Context(), ask("bob", "ViewOrder", "42", false)); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("did not recover: %v", err)
}

// As many rows as answered checks, after 10,000 of them.
func TestCountOfRecords(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	const total, callers, batch = 10_000, 16, 50
	var wg sync.WaitGroup
	var answered atomic.Int64
	for c := range callers {
		wg.Go(func() {
			for i := c; i < total/2; i += callers {
				if _, err := s.Authorization.Authorize(t.Context(), ask("alice", "ViewOrder", fmt.Sprint(i%500), i%2 == 0)); err != nil {
					t.Error(err)
					return
				}
				answered.Add(1)
			}
		})
	}
	wg.Go(func() {
		for range total / 2 / batch {
			req := &cedarpostv1.AuthorizeBatchRequest{}
			for i := range batch {
				req.Checks = append(req.Checks, ask("bob", "ViewOrder", fmt.Sprint(i), false))
			}
			res, err := s.Authorization.AuthorizeBatch(t.Context(), req)
			if err != nil {
				t.Error(err)
				return
			}
			answered.Add(int64(len(res.Results)))
		}
	})
	wg.Wait()
	if n := len(recorded(t, s.URL)); n != total || answered.Load() != total {
		t.Errorf("%d answered, %d recorded, want %d of both", answered.Load(), n, total)
	}
}

// A second server on the same database sees a revocation, and a token from the
// first gives read-your-writes on it.
func TestTwoServers(t *testing.T) {
	a := docServer(t)
	b := servertest.On(t, a.URL)
	a.MustPut(
		entity(t, `{"uid":{"type":"Doc::Paper","id":"p"},"attrs":{"readers":{"type":"Doc::Group","id":"staff"}}}`))
	for i := range 20 {
		for _, step := range []struct {
			groups []string
			want   cedarpostv1.Decision
		}{{[]string{"staff"}, cedarpostv1.Decision_ALLOW}, {nil, cedarpostv1.Decision_DENY}} {
			rev := a.MustPut(user(t, "ann", step.groups...))
			fresh := &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: rev}}
			if got := read(t, b, "ann", fresh); got != step.want {
				t.Fatalf("round %d: %s, want %s", i, got, step.want)
			}
		}
	}
	// A bundle published on one decides on the other.
	res := a.MustApply("doc", "schema.cedarschema", docSchema, "p.cedar", `@id("all") permit (principal, action == Doc::Action::"Read", resource);`)
	fresh := &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: res.Revision}}
	if got := read(t, b, "nobody", fresh); got != cedarpostv1.Decision_ALLOW {
		t.Errorf("the new bundle does not decide on the other server: %s", got)
	}
}

// A group two levels up leaves another group: its members' members lose at once
// what came with it, on a server whose cache is warm, and gain it again.
func TestGroupTwoLevelsUp(t *testing.T) {
	a := docServer(t)
	b := servertest.On(t, a.URL)
	a.MustPut(
		entity(t, `{"uid":{"type":"Doc::Group","id":"staff"}}`),
		entity(t, `{"uid":{"type":"Doc::Group","id":"dept"}}`),
		entity(t, `{"uid":{"type":"Doc::Group","id":"team"},"parents":[{"type":"Doc::Group","id":"dept"}]}`),
		entity(t, `{"uid":{"type":"Doc::Paper","id":"p"},"attrs":{"readers":{"type":"Doc::Group","id":"staff"}}}`),
		user(t, "ann", "team"))
	change := &cedarpostv1.ChangeParents{Uid: servertest.UID(`Doc::Group::"dept"`), Parents: []*cedarpostv1.EntityUid{servertest.UID(`Doc::Group::"staff"`)}}
	for range 10 {
		for _, step := range []struct {
			op   *cedarpostv1.EntityOperation
			want cedarpostv1.Decision
		}{
			{&cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_AddParents{AddParents: change}}, cedarpostv1.Decision_ALLOW},
			{&cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_RemoveParents{RemoveParents: change}}, cedarpostv1.Decision_DENY},
		} {
			res, err := write(t, a, step.op)
			if err != nil {
				t.Fatal(err)
			}
			fresh := &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: res.Revision}}
			for name, s := range map[string]*servertest.Server{"writer": a, "other": b} {
				for range 3 { // cold, then warm
					if got := read(t, s, "ann", fresh); got != step.want {
						t.Fatalf("%s: %s, want %s", name, got, step.want)
					}
				}
			}
		}
	}
}
