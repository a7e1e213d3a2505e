package server_test

import (
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
)

// Postgres is killed under load with SIGKILL, and restarted. While it is down, every answer is
// an error and never a decision. Everything that was answered before and after is stored:
// decisions and writes, without a gap between revisions.
func TestPostgresDiesUnderLoad(t *testing.T) {
	// Not parallel: its callers leave no processor time to other tests.
	postgresDies(t, 1)
}

// TestSoakPostgresDiesUnderLoad is the long form.
func TestSoakPostgresDiesUnderLoad(t *testing.T) {
	servertest.Soak(t)
	postgresDies(t, 25)
}

func postgresDies(t *testing.T, rounds int) {
	s, pg := servertest.OwnCluster(t)
	l := newTraffic(t, s)
	for round := range rounds {
		// Each round kills after another number of answers.
		servertest.Eventually(t, "answers", l.more(200+137*round%400, 20+13*round%40))
		failed := l.failures.Load()
		if err := pg.Kill(); err != nil {
			t.Fatal(err)
		}
		servertest.Eventually(t, "errors", func() bool { return l.failures.Load() > failed+20 })
		servertest.Eventually(t, "not ready", func() bool {
			status, _ := readyz(t, s)
			return status == http.StatusServiceUnavailable
		})
		if err := pg.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		servertest.Eventually(t, "answers after the restart", l.more(200, 20))
	}
	l.keeps(t, pg.URL())
}

// traffic is many callers that ask and write, with everything that was answered to them.
type traffic struct {
	running  sync.WaitGroup
	over     atomic.Bool
	failures atomic.Int64

	mu       sync.Mutex
	answered map[string]bool  // ids of decisions
	written  map[string]int64 // ids of users, with the revision of each
}

func newTraffic(t *testing.T, s *servertest.Server) *traffic {
	l := &traffic{answered: map[string]bool{}, written: map[string]int64{}}
	for w := range 8 {
		l.running.Go(func() { l.ask(t, s, w) })
	}
	for w := range 3 {
		l.running.Go(func() { l.write(t, s, w) })
	}
	t.Cleanup(l.end)
	return l
}

func (l *traffic) end() {
	l.over.Store(true)
	l.running.Wait()
}

// more waits for so many more answers and writes.
func (l *traffic) more(answers, writes int) func() bool {
	count := func() (int, int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.answered), len(l.written)
	}
	a, w := count()
	return func() bool {
		answered, written := count()
		return answered >= a+answers && written >= w+writes
	}
}

// keeps ends the traffic, and fails unless the database has everything that was answered.
func (l *traffic) keeps(t *testing.T, url string) {
	t.Helper()
	l.end()
	log := servertest.DecisionIDs(t, url)
	for id := range l.answered {
		if !log[id] {
			t.Errorf("decision %s was answered and is not in the log", id)
		}
	}
	stored := storedSince(t, url, "Shop::User")
	for id, n := range l.written {
		if stored[id] != n {
			t.Errorf("user %s was written at revision %d, and is there since %d", id, n, stored[id])
		}
	}
	newest := dense(t, url)
	t.Logf("%d of %d recorded decisions answered, %d of %d revisions acknowledged, %d errors",
		len(l.answered), len(log), len(l.written), newest, l.failures.Load())
}

// ask asks one question after the other. Revisions that a caller sees never go back.
func (l *traffic) ask(t *testing.T, s *servertest.Server, caller int) {
	newest := int64(0)
	for i := 0; !l.over.Load(); i++ {
		req := servertest.WithAllFields(servertest.AskShop("bob", "ViewOrder", fmt.Sprint(caller*50+i%50), false))
		r, err := s.Authorization.Authorize(t.Context(), req)
		if err != nil {
			l.failed(t, err)
			continue
		}
		if r.Revision.Number < newest {
			t.Errorf("revision %d was answered after %d", r.Revision.Number, newest)
		}
		newest = r.Revision.Number
		l.mu.Lock()
		l.answered[r.DecisionId] = true
		l.mu.Unlock()
	}
}

// write writes one user after the other.
func (l *traffic) write(t *testing.T, s *servertest.Server, caller int) {
	for i := 0; !l.over.Load(); i++ {
		id := fmt.Sprintf("new-%d-%d", caller, i)
		r, err := servertest.Write(t, s, put(servertest.Entity(t, `{"uid":{"type":"Shop::User","id":"`+id+`"},"attrs":{"region":"eu","suspended":false}}`)))
		if err != nil {
			l.failed(t, err)
			continue
		}
		l.mu.Lock()
		l.written[id] = r.Revision.Number
		l.mu.Unlock()
	}
}

func (l *traffic) failed(t *testing.T, err error) {
	l.failures.Add(1)
	if code := connect.CodeOf(err); code != connect.CodeUnavailable && code != connect.CodeDeadlineExceeded {
		t.Errorf("got %v, want unavailable", err)
	}
	time.Sleep(5 * time.Millisecond) // errors return at once
}

// storedSince returns the ids of the stored entities of a type, with the revision of each.
func storedSince(t *testing.T, url, typ string) map[string]int64 {
	t.Helper()
	rows, err := servertest.Session(t, url).Query(t.Context(), `select id, since from entities where type = $1 and until is null`, typ)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int64{}
	var id string
	var since int64
	if _, err := pgx.ForEachRow(rows, []any{&id, &since}, func() error { out[id] = since; return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

// dense fails unless every revision up to the newest exists, once.
func dense(t *testing.T, url string) (newest int64) {
	t.Helper()
	var count, first, last int64
	err := servertest.Session(t, url).QueryRow(t.Context(), `
		select n, (select count(*) from revisions), (select min(n) from revisions), (select max(n) from revisions)
		from revision`).Scan(&newest, &count, &first, &last)
	if err != nil {
		t.Fatal(err)
	}
	if first != 1 || count != newest || last != newest {
		t.Errorf("%d revisions from %d to %d, and the counter is at %d", count, first, last, newest)
	}
	return newest
}

// A server that cannot learn whether its data is current stops deciding after the staleness
// bound, even if it could still record.
func TestStalenessBound(t *testing.T) {
	t.Parallel() // it takes long
	const bound = 1500 * time.Millisecond
	a, pg := servertest.OwnCluster(t) // with the default bound, because the other server may exceed its own at any time
	s := servertest.On(t, pg.URL(), func(c *server.Config) { c.MaxStaleness = bound })
	a.Stop()
	if err := pg.Stop(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(bound)
	_, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", false))
	servertest.WantCode(t, err, connect.CodeUnavailable, "older than this server may use")
	if err := pg.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	servertest.Eventually(t, "an answer", func() bool {
		_, err = s.Authorization.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", false))
		return err == nil
	})
}

// The log has as many rows as checks were answered.
func TestCountOfRecords(t *testing.T) {
	// Not parallel: its callers leave no processor time to other tests.
	countRecords(t, 2000)
}

// TestSoakCountOfRecords is the long form.
func TestSoakCountOfRecords(t *testing.T) {
	servertest.Soak(t)
	countRecords(t, 10_000)
}

func countRecords(t *testing.T, total int) {
	s := servertest.New(t)
	s.MustLoadShop()
	const callers, batch = 16, 50
	var wg sync.WaitGroup
	var answered atomic.Int64
	for c := range callers {
		wg.Go(func() {
			for i := c; i < total/2; i += callers {
				if _, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("alice", "ViewOrder", fmt.Sprint(i%500), i%2 == 0)); err != nil {
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
				req.Checks = append(req.Checks, servertest.AskShop("bob", "ViewOrder", fmt.Sprint(i), false))
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
	if n := len(servertest.DecisionIDs(t, s.URL)); n != total || answered.Load() != int64(total) {
		t.Errorf("%d answered, %d recorded, want %d of both", answered.Load(), n, total)
	}
}

// A second server on the same database applies a revocation, and a token from the first server
// gives read-your-writes on the second.
func TestTwoServers(t *testing.T) {
	a := docServer(t)
	b := servertest.On(t, a.URL)
	a.MustPut(
		servertest.Entity(t, `{"uid":{"type":"Doc::Paper","id":"p"},"attrs":{"readers":{"type":"Doc::Group","id":"staff"}}}`))
	for i := range 20 {
		for _, step := range []struct {
			groups []string
			want   cedarpostv1.Decision
		}{{[]string{"staff"}, cedarpostv1.Decision_ALLOW}, {nil, cedarpostv1.Decision_DENY}} {
			rev := a.MustPut(servertest.DocUser(t, "ann", step.groups...))
			fresh := &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: rev}}
			if got := read(t, b, "ann", fresh); got != step.want {
				t.Fatalf("round %d: %s, want %s", i, got, step.want)
			}
		}
	}
	// A bundle that is published on one server decides on the other.
	res := a.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "p.cedar", `@id("all") permit (principal, action == Doc::Action::"Read", resource);`)
	fresh := &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: res.Revision}}
	if got := read(t, b, "nobody", fresh); got != cedarpostv1.Decision_ALLOW {
		t.Errorf("the new bundle does not decide on the other server: %s", got)
	}
}

// A group two levels up leaves another group. The members of its members lose the right at once,
// on a server whose cache is warm, and get it back when it returns.
func TestGroupTwoLevelsUp(t *testing.T) {
	a := docServer(t)
	b := servertest.On(t, a.URL)
	a.MustPut(
		servertest.Entity(t, `{"uid":{"type":"Doc::Group","id":"staff"}}`),
		servertest.Entity(t, `{"uid":{"type":"Doc::Group","id":"dept"}}`),
		servertest.Entity(t, `{"uid":{"type":"Doc::Group","id":"team"},"parents":[{"type":"Doc::Group","id":"dept"}]}`),
		servertest.Entity(t, `{"uid":{"type":"Doc::Paper","id":"p"},"attrs":{"readers":{"type":"Doc::Group","id":"staff"}}}`),
		servertest.DocUser(t, "ann", "team"))
	change := &cedarpostv1.ChangeParents{Uid: servertest.UID(`Doc::Group::"dept"`), Parents: []*cedarpostv1.EntityUid{servertest.UID(`Doc::Group::"staff"`)}}
	for range 10 {
		for _, step := range []struct {
			op   *cedarpostv1.EntityOperation
			want cedarpostv1.Decision
		}{
			{&cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_AddParents{AddParents: change}}, cedarpostv1.Decision_ALLOW},
			{&cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_RemoveParents{RemoveParents: change}}, cedarpostv1.Decision_DENY},
		} {
			res, err := servertest.Write(t, a, step.op)
			if err != nil {
				t.Fatal(err)
			}
			fresh := &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: res.Revision}}
			for name, s := range map[string]*servertest.Server{"writer": a, "other": b} {
				for range 3 { // with a cold cache, then with a warm one
					if got := read(t, s, "ann", fresh); got != step.want {
						t.Fatalf("%s: %s, want %s", name, got, step.want)
					}
				}
			}
		}
	}
}
