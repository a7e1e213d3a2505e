package decisionlog_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// load sends requests until stop is closed, and keeps the ids of the decisions that were answered.
type load struct {
	mu       sync.Mutex
	answered map[string]bool
	refused  map[connect.Code]int
	stop     chan struct{}
	wg       sync.WaitGroup
}

func startLoad(callers int, servers ...*servertest.Server) *load {
	l := &load{answered: map[string]bool{}, refused: map[connect.Code]int{}, stop: make(chan struct{})}
	for c := range callers {
		s := servers[c%len(servers)]
		l.wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-l.stop:
					return
				default:
				}
				r, err := s.Authorization.Authorize(context.Background(), servertest.AskShop("bob", "ViewOrder", fmt.Sprint(c*50+i%50), false))
				l.mu.Lock()
				if err != nil {
					l.refused[connect.CodeOf(err)]++
				} else {
					l.answered[r.DecisionId] = true
				}
				l.mu.Unlock()
			}
		})
	}
	return l
}

func (l *load) answers() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.answered)
}

func (l *load) refusals(codes ...connect.Code) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range codes {
		n += l.refused[c]
	}
	return n
}

func (l *load) end() {
	close(l.stop)
	l.wg.Wait()
}

// allRecorded checks that each answered decision is in the log once.
func (l *load) allRecorded(t *testing.T, url string) {
	t.Helper()
	log := servertest.DecisionIDs(t, url)
	for id := range l.answered {
		if !log[id] {
			t.Errorf("decision %s was answered and is not in the log", id)
		}
	}
	t.Logf("%d answered, %d recorded, refused: %v", len(l.answered), len(log), l.refused)
}

// Two servers write to one log. A reader never sees a leaf before all earlier ones, and the log
// verifies at the end.
func TestTwoServersOneLog(t *testing.T) {
	// Not parallel: its callers leave no processor time to other tests.
	twoServersOneLog(t, 1500)
}

func TestSoakTwoServersOneLog(t *testing.T) {
	servertest.Soak(t)
	twoServersOneLog(t, 150_000)
}

func twoServersOneLog(t *testing.T, answers int) {
	a, verifier, _ := signed(t)
	b := servertest.On(t, a.URL, func(c *server.Config) { c.Name = "second" })
	l := startLoad(16, a, b)
	conn := servertest.Session(t, a.URL)
	reads := 0
	for last := int64(-1); l.answers() < answers; reads++ {
		var top, count int64
		err := conn.QueryRow(t.Context(), "select coalesce(max(seq), -1), count(*) from audit_batches").Scan(&top, &count)
		if err != nil {
			t.Fatal(err)
		}
		if count != top+1 || top < last {
			t.Fatalf("%d leaves up to %d, after %d", count, top, last)
		}
		last = top
	}
	l.end()
	l.allRecorded(t, a.URL)
	servertest.Covered(t, a, verifier)
	done, err := decisionlog.VerifyLog(t.Context(), a.DB, decisionlog.Verification{})
	if err != nil || done.Decisions < int64(answers) || done.Unsigned > 0 {
		t.Errorf("%+v, %v", done, err)
	}
	var writers int
	if err := conn.QueryRow(t.Context(), "select count(distinct server) from decisions").Scan(&writers); err != nil || writers != 2 {
		t.Errorf("%d servers wrote, %v", writers, err)
	}
	t.Logf("%d batches, read %d times", done.Batches, reads)
}

// The database is down for a while, in both modes. When it is back, each answered decision is in
// the log.
func TestDatabaseAway(t *testing.T) {
	t.Parallel() // it takes long
	for _, mode := range []auditlog.Mode{auditlog.Strict, auditlog.Buffered} {
		t.Run(string(mode), func(t *testing.T) { databaseAway(t, mode, time.Second) })
	}
}

func TestSoakDatabaseAway(t *testing.T) {
	servertest.Soak(t)
	for _, mode := range []auditlog.Mode{auditlog.Strict, auditlog.Buffered} {
		t.Run(string(mode), func(t *testing.T) { databaseAway(t, mode, 10*time.Second) })
	}
}

func databaseAway(t *testing.T, mode auditlog.Mode, away time.Duration) {
	s, pg := servertest.OwnCluster(t, func(c *server.Config) { c.Record = mode })
	l := startLoad(8, s)
	servertest.Eventually(t, "answers", func() bool { return l.answers() > 200 })
	if err := pg.Kill(); err != nil {
		t.Fatal(err)
	}
	servertest.Eventually(t, "errors", func() bool { return l.refusals(connect.CodeUnavailable) > 20 })
	time.Sleep(away)
	during := l.answers()
	if err := pg.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	servertest.Eventually(t, "answers again", func() bool { return l.answers() > during+200 })
	l.end()
	if mode == auditlog.Buffered {
		servertest.Eventually(t, "nothing at risk", func() bool { return strings.Contains(servertest.Metrics(t, s), "cedarpost_decisions_at_risk 0") })
	}
	l.allRecorded(t, pg.URL())
	if n := l.refusals(connect.CodeUnavailable, connect.CodeDeadlineExceeded); n != l.refusals(connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeResourceExhausted, connect.CodeInternal, connect.CodeUnknown) {
		t.Errorf("refused with %v", l.refused)
	}
}

// The disk of Postgres is full: no decision is answered without a record. When there is room
// again, the server continues.
func TestDiskFull(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	conn := servertest.Session(t, s.URL)
	servertest.MustExec(t, conn, `create function full_disk() returns trigger language plpgsql as
		$$ begin raise exception 'could not extend file' using errcode = 'disk_full'; end $$`)
	servertest.MustExec(t, conn, "create trigger full_disk before insert on audit_batches execute function full_disk()")
	_, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", false))
	servertest.WantCode(t, err, connect.CodeUnavailable, "no decision was given")
	if strings.Contains(err.Error(), "extend") {
		t.Errorf("the error tells the caller about the disk: %v", err)
	}
	if _, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Delete{
		Delete: &cedarpostv1.DeleteEntity{Uid: servertest.UID(`Shop::User::"bob"`)},
	}}); err == nil {
		t.Error("a change went through without its record")
	}
	if n := len(servertest.DecisionIDs(t, s.URL)); n != 0 {
		t.Errorf("%d decisions were recorded", n)
	}
	servertest.MustExec(t, conn, "drop trigger full_disk on audit_batches")
	if _, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", false)); err != nil {
		t.Errorf("does not continue: %v", err)
	}
}

// Another implementation of RFC 6962 accepts the proofs.
func TestProofsWithAnotherLibrary(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, _ := signed(t)
	ids := servertest.DecideSome(t, s, 20)
	first, _ := servertest.Covered(t, s, verifier)
	servertest.DecideSome(t, s, 8)
	second, _ := servertest.Covered(t, s, verifier)
	for _, id := range ids {
		p, err := s.Audit.GetInclusionProof(t.Context(), &cedarpostv1.GetInclusionProofRequest{Id: id, Size: second.Size})
		if err != nil {
			t.Fatal(err)
		}
		h, err := auditlog.ParseHeader(p.Header)
		if err != nil {
			t.Fatal(err)
		}
		hasher := rfc6962.DefaultHasher
		if err := proof.VerifyInclusion(hasher, uint64(p.Row), uint64(h.Rows), hasher.HashLeaf(p.Record), p.RowProof, h.Root[:]); err != nil {
			t.Errorf("row in batch: %v", err)
		}
		if err := proof.VerifyInclusion(hasher, uint64(p.Leaf), uint64(second.Size), hasher.HashLeaf(p.Header), p.Proof, second.Root[:]); err != nil {
			t.Errorf("batch in log: %v", err)
		}
	}
	p, err := s.Audit.GetConsistencyProof(t.Context(), &cedarpostv1.GetConsistencyProofRequest{First: first.Size, Second: second.Size})
	if err != nil {
		t.Fatal(err)
	}
	err = proof.VerifyConsistency(rfc6962.DefaultHasher, uint64(first.Size), uint64(second.Size), p.Proof, first.Root[:], second.Root[:])
	if err != nil {
		t.Errorf("consistency: %v", err)
	}
}
