package cedarpost

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// ledger accepts reports as the service does: each one counts once, even if it arrives
// several times.
type ledger struct {
	mu   sync.Mutex
	seen map[string]bool
	uses map[string]int64
	open int64
	// fail says what happens to a report: "" means that it is accepted, "lost" that it
	// is accepted and the caller gets no answer, "away" that it is not accepted.
	fail func() string
}

func (l *ledger) send(_ context.Context, req *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	how := ""
	if l.fail != nil {
		how = l.fail()
	}
	if how != "away" && !l.seen[req.GetReportId()] {
		l.seen[req.GetReportId()] = true
		for _, u := range req.GetReuses() {
			l.uses[u.GetDecisionId()] += u.GetHits()
		}
		for _, o := range req.GetFailOpens() {
			l.open += o.GetCount()
		}
	}
	if how != "" {
		return nil, connect.NewError(connect.CodeUnavailable, "away")
	}
	return &cedarpostv1.ReportReuseResponse{}, nil
}

func newLedger() *ledger { return &ledger{seen: map[string]bool{}, uses: map[string]int64{}} }

func entryOf(r *cedarpostv1.AuthorizeResponse) *entry {
	return &entry{response: r, uses: &uses{id: r.GetDecisionId()}}
}

func answer(i int) *entry {
	return entryOf(&cedarpostv1.AuthorizeResponse{DecisionId: fmt.Sprint("decision ", i)})
}

// Each use counts once, even if reports or their answers are lost.
func TestReportsCountOnce(t *testing.T) {
	l := newLedger()
	turn := 0
	l.fail = func() string {
		turn++
		return []string{"", "lost", "away", "lost", ""}[turn%5]
	}
	r := newReporter()
	r.send = l.send
	const answers, askers, each = 350, 8, 4000
	var list []*entry
	for i := range answers {
		list = append(list, answer(i))
	}
	var all sync.WaitGroup
	for a := range askers {
		all.Go(func() {
			for i := range each {
				if !r.use(list[(i*7+a)%answers], realClock()) {
					t.Error("a use was refused")
				}
			}
		})
	}
	stop := make(chan struct{})
	var flushing sync.WaitGroup
	flushing.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = r.flush(t.Context())
			}
		}
	})
	all.Wait()
	close(stop)
	flushing.Wait()
	if err := r.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	var sum int64
	for _, n := range l.uses {
		sum += n
	}
	if sum != askers*each || r.reported.Load() != sum || r.lost.Load() != 0 || r.unreported.Load() != 0 {
		t.Errorf("%d of %d uses; %d reported, %d lost, %d left", sum, askers*each, r.reported.Load(), r.lost.Load(), r.unreported.Load())
	}
}

// An answer is not reused if its use could not be reported.
func TestUsesAreBounded(t *testing.T) {
	l := newLedger()
	l.fail = func() string { return "away" }
	r := newReporter()
	r.send = l.send
	for i, bytes := 0, int64(0); bytes < maxUnreported; i++ {
		a := answer(i)
		a.id += strings.Repeat("x", i%2000) // of any length
		if !r.use(a, realClock()) {
			t.Fatalf("use %d was refused", i)
		}
		bytes += bytesOf(a.id)
	}
	if r.use(answer(0), realClock()) {
		t.Error("an answer was used beyond what can be reported")
	}
	if r.flush(t.Context()) == nil || r.use(answer(0), realClock()) {
		t.Error("an answer was used beyond what can be reported, after a try to report")
	}
	l.fail = nil
	if err := r.flush(t.Context()); err != nil || !r.use(answer(0), realClock()) {
		t.Errorf("after the report: %v", err)
	}
}

// A part of a report that the service always refuses does not delay the other parts,
// and counts as lost.
func TestRefusedReport(t *testing.T) {
	l := newLedger()
	r := newReporter()
	r.send = func(ctx context.Context, req *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
		for _, u := range req.GetReuses() {
			if u.GetDecisionId() == "decision 42" {
				return nil, connect.NewError(connect.CodeInvalidArgument, "no report")
			}
		}
		return l.send(ctx, req)
	}
	for i := range 150 {
		r.use(answer(i), realClock())
	}
	if err := r.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r.lost.Load() != 1 || r.reported.Load() != 149 || len(l.uses) != 149 {
		t.Errorf("%d lost, %d reported, %d taken", r.lost.Load(), r.reported.Load(), len(l.uses))
	}
}

func TestFailOpensAreReported(t *testing.T) {
	l := newLedger()
	r := newReporter()
	r.send = l.send
	check := hitCheck
	check.FailOpen = "reads may go on\x00\xff"
	for i := range 2 * maxFailOpens {
		check.Resource.ID = fmt.Sprint(i % (maxFailOpens + 10))
		r.letThrough(&check, connect.CodeUnavailable, realClock())
	}
	if err := r.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := l.open + r.lost.Load(); got != 2*maxFailOpens || l.open < 2*maxFailOpens-20 {
		t.Errorf("%d reported, %d lost", l.open, r.lost.Load())
	}
}
