package server_test

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// follows waits until a server has applied a revision, although nothing tells the server of it.
// A question that is asked later than bound after the write is not answered from an older
// revision.
func follows(t *testing.T, s *servertest.Server, r *cedarpostv1.Revision, bound time.Duration, question, want string) {
	t.Helper()
	written := time.Now()
	servertest.Eventually(t, fmt.Sprintf("revision %d is applied", r.Number), func() bool {
		asked := time.Now()
		got, revision, err := reads(t, s, nil, question)
		switch {
		case err != nil:
			if code := connect.CodeOf(err); code != connect.CodeUnavailable && code != connect.CodeDeadlineExceeded {
				t.Fatalf("got %v, want unavailable", err)
			}
			return false
		case revision < r.Number:
			if late := asked.Sub(written); late > bound {
				t.Fatalf("revision %d was answered, %v after %d was written", revision, late, r.Number)
			}
			return false
		case got != want:
			t.Fatalf("%s at revision %d, want %s", got, revision, want)
		}
		return true
	})
}

const defaultStaleness = 5 * time.Second

// A server without notifications finds new revisions by polling.
func TestLostNotifications(t *testing.T) {
	a := docServer(t)
	b := servertest.On(t, a.URL)
	first := a.MustPut(paper(t, "p", "staff"), servertest.DocUser(t, "ann", "staff"))
	follows(t, b, first, defaultStaleness, "ann p", "A")
	conn := servertest.Session(t, a.URL)
	servertest.MustExec(t, conn, "alter table revision disable trigger notify_revision")
	follows(t, b, a.MustPut(servertest.DocUser(t, "ann")), defaultStaleness, "ann p", "D")
	servertest.MustExec(t, conn, "alter table revision enable trigger notify_revision")
	follows(t, b, a.MustPut(servertest.DocUser(t, "ann", "staff")), defaultStaleness, "ann p", "A")
}

// Notifications that come twice, without a new revision, or with any text do no harm.
func TestNotificationsForNothing(t *testing.T) {
	a := docServer(t)
	b := servertest.On(t, a.URL)
	a.MustPut(paper(t, "p", "staff"))
	conn := servertest.Session(t, a.URL)
	for i := range 30 {
		groups, want := []string{"staff"}, "A"
		if i%2 == 1 {
			groups, want = nil, "D"
		}
		servertest.MustExec(t, conn, `select pg_notify('cedarpost_revision', (n + 1)::text) from revision`)
		r := a.MustPut(servertest.DocUser(t, "ann", groups...))
		servertest.MustExec(t, conn, `select pg_notify('cedarpost_revision', n::text || repeat('x', i)) from revision, generate_series(0, 50) as i`)
		for _, s := range []*servertest.Server{a, b} {
			if got, revision := patiently(t, s, atLeast(r), "ann p"); got != want || revision != r.Number {
				t.Fatalf("%s at revision %d, want %s at %d", got, revision, want, r.Number)
			}
		}
	}
}

// The connections to Postgres break under load, again and again, during commits, loads and
// LISTEN. Everything that was answered is stored, and the server listens again.
func TestConnectionsCutUnderLoad(t *testing.T) {
	// Not parallel: its callers leave no processor time to other tests.
	cutUnderLoad(t, 5)
}

// TestSoakConnectionsCutUnderLoad is the long form.
func TestSoakConnectionsCutUnderLoad(t *testing.T) {
	servertest.Soak(t)
	cutUnderLoad(t, 400)
}

func cutUnderLoad(t *testing.T, cuts int) {
	url := storetest.New(t)
	p := shaken(t, url, 5, time.Millisecond)
	s := servertest.On(t, p.URL())
	s.MustLoadShop()
	l := newTraffic(t, s)
	for cut := range cuts {
		servertest.Eventually(t, "answers", l.more(20+13*cut%70, 2+cut%5))
		p.Refuse(cut%4 == 3)
		p.Cut()
		if cut%4 == 3 {
			failed := l.failures.Load()
			servertest.Eventually(t, "errors", func() bool { return l.failures.Load() > failed+20 })
			p.Refuse(false)
		}
	}
	servertest.Eventually(t, "answers", l.more(100, 10))
	l.keeps(t, url)
	conn := servertest.Session(t, url)
	servertest.Eventually(t, "the server listens", func() (listens bool) {
		err := conn.QueryRow(t.Context(), `select exists (select from pg_stat_activity
			where datname = current_database() and query = 'listen cedarpost_revision')`).Scan(&listens)
		if err != nil {
			t.Fatal(err)
		}
		return listens
	})
}

// The network to Postgres drops everything silently. The server stops deciding after the
// staleness bound, and goes on when the network works again.
func TestBlackHole(t *testing.T) {
	t.Parallel() // it takes long
	const bound = 1500 * time.Millisecond
	a := docServer(t)
	p := servertest.NewProxy(t, a.URL)
	b := servertest.On(t, p.URL(), func(c *server.Config) { c.MaxStaleness = bound })
	follows(t, b, a.MustPut(paper(t, "p", "staff"), servertest.DocUser(t, "ann", "staff")), bound, "ann p", "A")

	p.Blackhole(true)
	since := time.Now()
	revoked := a.MustPut(servertest.DocUser(t, "ann"))
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() { // nothing can be recorded either
			if got, revision, err := reads(t, b, nil, "ann p"); err == nil {
				t.Errorf("%s at revision %d, recorded nowhere", got, revision)
			}
		})
	}
	time.Sleep(time.Until(since.Add(bound)))
	// The server notices that by itself: calls that wait for the database end with another
	// error.
	_, _, err := reads(t, b, nil, "ann p")
	servertest.WantCode(t, err, connect.CodeUnavailable, "older than this server may use")
	if status, reason := readyz(t, b); status != http.StatusServiceUnavailable || !strings.Contains(reason, "older than") {
		t.Errorf("readiness: %d %s", status, reason)
	}
	callers.Wait()
	if p.Connections() == 0 {
		t.Error("the server gave all its connections up, and none is half open")
	}

	p.Blackhole(false)
	p.Cut() // otherwise the server waits for what the network dropped
	follows(t, b, revoked, 0, "ann p", "D")
	servertest.Eventually(t, "ready", func() bool {
		status, _ := readyz(t, b)
		return status == http.StatusOK
	})
	follows(t, b, a.MustPut(servertest.DocUser(t, "ann", "staff")), bound, "ann p", "A")
}

// The server can record decisions, but cannot read new revisions.
func TestRevisionNotTold(t *testing.T) {
	const bound = 1500 * time.Millisecond
	a := docServer(t) // with the default bound, because the other server may exceed its own bound at any time
	s := servertest.On(t, a.URL, func(c *server.Config) { c.MaxStaleness = bound })
	follows(t, s, a.MustPut(paper(t, "p", "staff"), servertest.DocUser(t, "ann", "staff")), bound, "ann p", "A")
	conn := servertest.Session(t, a.URL)
	servertest.MustExec(t, conn, "begin; lock table revision in access exclusive mode")
	time.Sleep(bound)
	_, _, err := reads(t, s, nil, "ann p")
	servertest.WantCode(t, err, connect.CodeUnavailable, "older than this server may use")
	servertest.MustExec(t, conn, "rollback")
	servertest.Eventually(t, "an answer", func() bool {
		got, _, err := reads(t, s, nil, "ann p")
		return err == nil && got == "A"
	})
}

// The network works again, but what it dropped is lost. The server stops waiting for that and
// asks again.
func TestBlackHoleThatHeals(t *testing.T) {
	t.Parallel() // it takes long
	const bound = 1500 * time.Millisecond
	a := docServer(t)
	p := servertest.NewProxy(t, a.URL)
	b := servertest.On(t, p.URL(), func(c *server.Config) { c.MaxStaleness = bound })
	follows(t, b, a.MustPut(paper(t, "p", "staff"), servertest.DocUser(t, "ann", "staff")), bound, "ann p", "A")
	defer p.Cut() // otherwise the stop may have to wait
	p.Blackhole(true)
	time.Sleep(bound)
	_, _, err := reads(t, b, nil, "ann p")
	servertest.WantCode(t, err, connect.CodeUnavailable, "older than this server may use")
	p.Blackhole(false)
	// A server that waited for what was dropped would wait for minutes, and the test would fail.
	follows(t, b, a.MustPut(servertest.DocUser(t, "ann")), 0, "ann p", "D")
}
