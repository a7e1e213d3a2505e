package cedarpost

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// Uses may be counted in another order than their clocks were read. The service refuses
// a report whose last use is before its first.
func TestFailOpensAtTheSameTime(t *testing.T) {
	r := newReporter()
	var sent *cedarpostv1.ReportReuseRequest
	r.send = func(_ context.Context, req *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
		sent = req
		return &cedarpostv1.ReportReuseResponse{}, nil
	}
	check := hitCheck
	check.FailOpen = "reads may go on"
	r.letThrough(&check, connect.CodeUnavailable, instant{wall: 5})
	r.letThrough(&check, connect.CodeUnavailable, instant{wall: 3})
	if err := r.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if f := sent.GetFailOpens()[0]; f.GetCount() != 2 || f.GetFirst().GetNanos() != 3 || f.GetLast().GetNanos() != 5 {
		t.Error(f)
	}
}

// While the service is away, waiting uses take bounded memory. In the end all of them
// are in the log or counted as lost.
func TestReportsThatWaitAreBounded(t *testing.T) {
	r := newReporter()
	away := true
	var logged int64
	r.send = func(_ context.Context, req *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
		if away {
			return nil, connect.NewError(connect.CodeUnavailable, "away")
		}
		logged += opened(req) + hits(req)
		return &cedarpostv1.ReportReuseResponse{}, nil
	}
	check := hitCheck
	check.FailOpen = "reads may go on"
	e := entryOf(allow(1))
	for i := range 100 {
		for j := range 100 {
			check.Resource.ID = fmt.Sprint(i%7, j)
			r.letThrough(&check, connect.CodeUnavailable, realClock())
		}
		r.use(e, realClock())
		if r.flush(t.Context()) == nil {
			t.Fatal("it is away")
		}
	}
	if n := len(r.pending); n > 10 {
		t.Errorf("%d reports wait", n)
	}
	if away = false; r.flush(t.Context()) != nil || logged != 100*100+100 || r.unreported.Load() != 0 {
		t.Errorf("%d are in the log, %d answers wait", logged, r.unreported.Load())
	}
	away = true
	r.use(e, realClock())
	_ = r.flush(t.Context())
	r.use(e, realClock())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.close(ctx); err == nil || r.lost.Load() != 2 {
		t.Errorf("%d lost, %v", r.lost.Load(), err)
	}
}

// If the service refuses a part of a report, the rest is accepted.
func TestRefusedPartOfAReport(t *testing.T) {
	r := newReporter()
	var uses, opens, told int64
	ids := map[string]bool{}
	r.send = func(_ context.Context, req *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
		if ids[req.GetReportId()] {
			t.Error("a report that is another has the same id")
		}
		ids[req.GetReportId()] = true
		for _, f := range req.GetFailOpens() {
			if strings.HasPrefix(f.GetResource().GetId(), "bad") {
				return nil, connect.NewError(connect.CodeInvalidArgument, "a bad name")
			}
		}
		uses, opens, told = uses+hits(req), opens+opened(req), told+req.GetLost()
		return &cedarpostv1.ReportReuseResponse{}, nil
	}
	r.lost.Add(11)
	check := hitCheck
	check.FailOpen = "reads may go on"
	for i := range 120 {
		r.use(entryOf(&cedarpostv1.AuthorizeResponse{DecisionId: fmt.Sprint(i)}), realClock())
		check.Resource.ID = fmt.Sprint(i)
		if i%40 == 7 {
			check.Resource.ID = fmt.Sprint("bad", i)
		}
		r.letThrough(&check, connect.CodeUnavailable, realClock())
	}
	for range 2 { // the second reports what was lost
		if err := r.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if uses != 120 || opens != 117 || told != 11+3 || r.reported.Load() != 120 || r.lost.Load() != 11+3 {
		t.Errorf("%d uses, %d fail-opens, %d told as lost; %d reported, %d lost", uses, opens, told, r.reported.Load(), r.lost.Load())
	}
}

// Uses that are too late for the log do not count as reported.
func TestRefusedForAge(t *testing.T) {
	r := newReporter()
	r.send = func(context.Context, *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
		return &cedarpostv1.ReportReuseResponse{Refused: 1}, nil
	}
	for id, n := range map[string]int{"0190": 7, "0192": 3, "0191": 2} {
		e := entryOf(&cedarpostv1.AuthorizeResponse{DecisionId: id})
		for range n {
			r.use(e, realClock())
		}
	}
	if err := r.flush(t.Context()); err != nil || r.reported.Load() != 5 || r.lost.Load() != 7 {
		t.Errorf("%d reported, %d lost, %v", r.reported.Load(), r.lost.Load(), err)
	}
}
