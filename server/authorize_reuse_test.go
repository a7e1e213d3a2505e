package server_test

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

var noon = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)

// used returns a report of uses, from some seconds after noon on, for ten seconds.
func used(decision string, hits int64, second int) *cedarpostv1.Reuse {
	first := noon.Add(time.Duration(second) * time.Second)
	return &cedarpostv1.Reuse{DecisionId: decision, Hits: hits, First: timestamppb.New(first), Last: timestamppb.New(first.Add(10 * time.Second))}
}

func letThrough(count int64) *cedarpostv1.FailOpen {
	return &cedarpostv1.FailOpen{
		Principal: servertest.UID(`Shop::User::"bob"`), Action: servertest.UID(`Shop::Action::"ViewOrder"`), Resource: servertest.UID(`Shop::Order::"42"`),
		Reason: "catalogue pages stay up", Code: "unavailable", Count: count, First: timestamppb.New(noon), Last: timestamppb.New(noon),
	}
}

func report(reuses ...*cedarpostv1.Reuse) *cedarpostv1.ReportReuseRequest {
	return &cedarpostv1.ReportReuseRequest{ReportId: uuid.NewString(), Reuses: reuses}
}

func mustReport(t testing.TB, s *servertest.Server, req *cedarpostv1.ReportReuseRequest) *cedarpostv1.ReportReuseResponse {
	t.Helper()
	res, err := s.Authorization.ReportReuse(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// uses returns the uses of a decision as text: "5 from 0 to 10".
func uses(t testing.TB, s *servertest.Server, id string) string {
	t.Helper()
	got, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: id})
	if err != nil {
		t.Fatal(err)
	}
	page, err := s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{PageSize: 100})
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got.Uses, page.Uses[id]) {
		t.Errorf("decision %s: %v by itself, %v on a page", id, got.Uses, page.Uses[id])
	}
	if got.Uses == nil {
		return ""
	}
	return fmt.Sprintf("%d from %v to %v", got.Uses.Hits, got.Uses.First.AsTime().Sub(noon).Seconds(), got.Uses.Last.AsTime().Sub(noon).Seconds())
}

// The reported uses of a decision are read with the decision. Each report counts once.
func TestReportReuse(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	ids := servertest.DecideSome(t, s, 6)
	if got := uses(t, s, ids[0]); got != "" {
		t.Errorf("unused: %s", got)
	}
	first := report(used(ids[0], 3, 20), used(strings.ToUpper(ids[1]), 1, 0))
	for range 3 { // as a caller that gets no answer
		if res := mustReport(t, s, first); res.Refused != 0 {
			t.Error(res)
		}
	}
	mustReport(t, s, report(used(ids[0], 2, 0)))
	mustReport(t, s, report(used(ids[0], math.MaxInt64, 5), used(ids[2], 1, 0)))
	for id, want := range map[string]string{
		ids[0]: fmt.Sprint(int64(math.MaxInt64), " from 0 to 30"), ids[1]: "1 from 0 to 10", ids[2]: "1 from 0 to 10", ids[3]: "",
	} {
		if got := uses(t, s, id); got != want {
			t.Errorf("decision %s: %q, want %q", id, got, want)
		}
	}
	if n := len(events(t, s, "reuse")); n != 5 {
		t.Errorf("%d records", n)
	}

	// Uses and fail-opens in one report.
	both := report()
	both.Lost, both.FailOpens = 7, []*cedarpostv1.FailOpen{letThrough(4), letThrough(5)}
	mustReport(t, s, both)
	reused, failed := events(t, s, "reuse"), events(t, s, "failed_open")
	last := reused[len(reused)-1]
	if r := last.GetReuse(); r.ReportId != both.ReportId || r.Lost != 7 || last.Subject != both.ReportId || last.Caller != "bootstrap" {
		t.Errorf("recorded %v", last)
	}
	if len(failed) != 1 || failed[0].Subject != both.ReportId || failed[0].GetFailedOpen().ReportId != both.ReportId ||
		len(failed[0].GetFailedOpen().FailOpens) != 2 || !proto.Equal(failed[0].GetFailedOpen().FailOpens[1], both.FailOpens[1]) {
		t.Errorf("recorded %v", failed)
	}
	found, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{Kind: cedarpostv1.EventRecord_FAILED_OPEN, Subject: both.ReportId})
	if err != nil || len(found.Events) != 1 {
		t.Errorf("found %v, %v", found, err)
	}
	text := servertest.Metrics(t, s)
	for _, want := range []string{"cedarpost_fail_open_reported_total 9", "cedarpost_reuse_lost_total 7", "cedarpost_watchers 0"} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("metrics lack %q", want)
		}
	}
	if _, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, s.URL), decisionlog.Verification{}); err != nil {
		t.Error(err)
	}
}

// idAt returns the id of a decision of a time.
func idAt(at time.Time) string {
	id := uuid.Must(uuid.NewV7())
	binary.BigEndian.PutUint64(id[:8], uint64(at.UnixMilli())<<16|0x7000)
	return id.String()
}

func TestReportsThatAreRefused(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	id := servertest.DecideSome(t, s, 4)[0]
	now := time.Now()
	good := used(id, 2, 0)
	old := uuid.Must(uuid.NewUUID()) // of the current time, but of a version of UUID that has another layout
	mixed := report(good, used(old.String(), 1, 0), used(idAt(now.Add(-25*time.Hour)), 1, 0), used(idAt(now.Add(2*time.Minute)), 1, 0), used(uuid.NewString(), 1, 0))
	if res := mustReport(t, s, mixed); res.Refused != 4 {
		t.Error(res)
	}
	if got := uses(t, s, id); got != "2 from 0 to 10" {
		t.Errorf("beside bad ones: %s", got)
	}
	if r := events(t, s, "reuse")[0].GetReuse(); r.Refused != 4 || len(r.Reuses) != 1 {
		t.Errorf("recorded %v", r)
	}
	if res := mustReport(t, s, report(used(uuid.NewString(), 1, 0))); res.Refused != 1 || len(events(t, s, "reuse")) != 2 {
		t.Error("what is refused is not recorded")
	}
	with := func(change func(*cedarpostv1.Reuse)) *cedarpostv1.ReportReuseRequest {
		r := used(id, 1, 0)
		change(r)
		return report(r)
	}
	open := func(change func(*cedarpostv1.FailOpen)) *cedarpostv1.ReportReuseRequest {
		f, req := letThrough(1), report()
		change(f)
		req.FailOpens = append(req.FailOpens, f)
		return req
	}
	many := report()
	for range 101 {
		many.Reuses = append(many.Reuses, used(idAt(now), 1, 0))
	}
	for name, c := range map[string]struct {
		req  *cedarpostv1.ReportReuseRequest
		want string
	}{
		"nothing":           {report(), "says nothing"},
		"no id":             {&cedarpostv1.ReportReuseRequest{Lost: 1}, "report_id"},
		"less than nothing": {&cedarpostv1.ReportReuseRequest{ReportId: uuid.NewString(), Lost: -1}, "lost"},
		"no decision":       {report(used("x", 1, 0)), "decision_id"},
		"one twice":         {report(used(id, 1, 0), used(strings.ToUpper(id), 1, 0)), "twice"},
		"no uses":           {with(func(r *cedarpostv1.Reuse) { r.Hits = 0 }), "hits"},
		"no first":          {with(func(r *cedarpostv1.Reuse) { r.First = nil }), "first"},
		"last before first": {with(func(r *cedarpostv1.Reuse) { r.Last = timestamppb.New(noon.Add(-time.Second)) }), "last is before first"},
		"no time":           {with(func(r *cedarpostv1.Reuse) { r.Last = &timestamppb.Timestamp{Seconds: math.MaxInt64} }), ""},
		"too many":          {many, "reuses"},
		"no reason":         {open(func(f *cedarpostv1.FailOpen) { f.Reason = "" }), "reason"},
		"no resource":       {open(func(f *cedarpostv1.FailOpen) { f.Resource = nil }), "resource"},
		"none let through":  {open(func(f *cedarpostv1.FailOpen) { f.Count = 0 }), "count"},
		"through before":    {open(func(f *cedarpostv1.FailOpen) { f.Last = timestamppb.New(noon.Add(-time.Second)) }), "last is before first"},
	} {
		_, err := s.Authorization.ReportReuse(t.Context(), c.req)
		if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if n := len(events(t, s, "reuse")) + len(events(t, s, "failed_open")); n != 2 {
		t.Errorf("%d records", n)
	}
}

// A caller cannot report uses of another caller's decisions. The log keeps the report, and it
// does not count.
func TestReportsOfOthers(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	ids := servertest.DecideSome(t, s, 4)
	token := "cedarpost_0123456789012345678901234567890123456789"
	servertest.AddCaller(t, s.DB, "other", token)
	other := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, token))
	servertest.Eventually(t, "the other's key", func() bool {
		_, err := other.ReportReuse(t.Context(), report(used(ids[0], 5, 0)))
		return err == nil
	})
	// Not even with the same report id.
	mine := report(used(ids[0], 1, 0))
	if _, err := other.ReportReuse(t.Context(), mine); err != nil {
		t.Fatal(err)
	}
	mustReport(t, s, mine)
	res, err := other.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", false))
	if err != nil {
		t.Fatal(err)
	}
	mustReport(t, s, report(used(res.DecisionId, 9, 0), used(ids[1], 2, 0)))
	for id, want := range map[string]string{ids[0]: "1 from 0 to 10", ids[1]: "2 from 0 to 10", res.DecisionId: ""} {
		if got := uses(t, s, id); got != want {
			t.Errorf("decision %s: %q, want %q", id, got, want)
		}
	}
}

// Many callers report at once, some of them twice, and the sum of the uses is exact.
func TestUsesAreExact(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	ids := servertest.DecideSome(t, s, 12)
	var mu sync.Mutex
	want := map[string]int64{}
	var callers sync.WaitGroup
	for c := range 8 {
		callers.Go(func() {
			for round := range 10 {
				var list []*cedarpostv1.Reuse
				for i := c % 3; i < len(ids); i += 3 {
					hits := int64(1 + (c+round+i)%5)
					list = append(list, used(ids[i], hits, round))
					mu.Lock()
					want[ids[i]] += hits
					mu.Unlock()
				}
				r := report(list...)
				for range 1 + round%2 {
					if _, err := s.Authorization.ReportReuse(t.Context(), r); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	callers.Wait()
	page, err := s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{})
	if err != nil || len(page.Uses) != len(want) {
		t.Fatalf("%d of %d, %v", len(page.Uses), len(want), err)
	}
	for id, hits := range want {
		if got := page.Uses[id]; got.GetHits() != hits || got.Incomplete || !got.First.AsTime().Equal(noon) || !got.Last.AsTime().Equal(noon.Add(19*time.Second)) {
			t.Errorf("decision %s: %v, want %d", id, got, hits)
		}
	}
}

// While the log is not available, reports are refused. A report that is sent again counts once.
func TestReportWhileTheLogIsAway(t *testing.T) {
	t.Parallel() // it takes long
	proxy := servertest.NewProxy(t, storetest.New(t))
	s := servertest.On(t, proxy.URL())
	s.MustLoadShop()
	id := servertest.DecideSome(t, s, 4)[0]
	r := report(used(id, 3, 0))
	r.FailOpens = append(r.FailOpens, letThrough(1))
	proxy.Refuse(true)
	proxy.Cut()
	_, err := s.Authorization.ReportReuse(t.Context(), r)
	servertest.WantCode(t, err, connect.CodeUnavailable, "")
	proxy.Refuse(false)
	servertest.Eventually(t, "the report", func() bool {
		_, err := s.Authorization.ReportReuse(t.Context(), r)
		return err == nil
	})
	servertest.Eventually(t, "its uses", func() bool {
		_, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: id})
		return err == nil
	})
	if got := uses(t, s, id); got != "3 from 0 to 10" {
		t.Errorf("counted %q", got)
	}
	if a, b := len(events(t, s, "reuse")), len(events(t, s, "failed_open")); a != b {
		t.Errorf("%d records of reuse, %d of failing open", a, b)
	}
}

// A verification finds a report whose column names other decisions than its record.
func TestVerifyFindsOtherUses(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	mustReport(t, s, report(used(servertest.DecideSome(t, s, 4)[0], 3, 0)))
	servertest.Tamper(t, s.URL, "update events set decisions = '{}' where kind = 'reuse'")
	_, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, s.URL), decisionlog.Verification{})
	if err == nil || !strings.Contains(err.Error(), "column decisions") {
		t.Errorf("got %v", err)
	}
}
