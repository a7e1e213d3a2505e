package server_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A complete report that compared nothing, because a filter names what there is not or because nobody asked, says so. So
// does one that tried no pair. A report that compared something warns of nothing.
func TestAnalyzeChangeWarnsOfNothingCompared(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	h.putPapers(2)
	h.MustPut(servertest.DocUser(t, "ann"))
	authorize(t, h.Server, askDoc("ann", "0"))
	c := h.create(extra(1))
	for _, test := range []struct {
		narrow func(*cedarpostv1.AnalyzeChangeRequest)
		want   string
	}{
		{func(*cedarpostv1.AnalyzeChangeRequest) {}, ""},
		{func(r *cedarpostv1.AnalyzeChangeRequest) { r.Action = servertest.UID(`Doc::Action::"Read"`) }, ""},
		{func(r *cedarpostv1.AnalyzeChangeRequest) { r.Action = servertest.UID(`Doc::Action::"Nope"`) }, `action: the bundle doc does not declare Doc::Action::"Nope"`},
		{func(r *cedarpostv1.AnalyzeChangeRequest) { r.Principal = servertest.UID(`Doc::Usr::"ann"`) }, "principal: no action of the bundle doc takes a principal of the type Doc::Usr"},
		{func(r *cedarpostv1.AnalyzeChangeRequest) { r.Resource = servertest.UID(`Doc::User::"ann"`) }, "resource: no action of the bundle doc takes a resource of the type Doc::User"},
		{func(r *cedarpostv1.AnalyzeChangeRequest) { r.Caller = "nobody" }, "no recorded decision of this time is one that the filters ask for"},
		{func(r *cedarpostv1.AnalyzeChangeRequest) {
			r.From, r.To = timestamppb.New(time.Now().Add(-48*time.Hour)), timestamppb.New(time.Now().Add(-47*time.Hour))
		}, "no decision about an action of the bundle is recorded in this time"},
		{func(r *cedarpostv1.AnalyzeChangeRequest) {
			r.Who = []*cedarpostv1.EntityUid{servertest.UID(`Doc::Action::"Nope"`)}
		}, "who gains and who loses: no pair of a principal and a resource was tried"},
		{func(r *cedarpostv1.AnalyzeChangeRequest) {
			r.Who, r.WhoContext = []*cedarpostv1.EntityUid{servertest.UID(`Doc::Action::"Read"`)}, structOf(t, `{"zzz":1}`)
		}, "who gains and who loses: no pair of a principal and a resource was tried"},
	} {
		req := ofChange(c.Id)
		test.narrow(req)
		report := mustAnalyze(t, h.Policies, req)
		if got := strings.Join(report.Warnings, "|"); got != test.want || !report.Complete {
			t.Errorf("%v: warns %q, want %q; complete %t", req, got, test.want, report.Complete)
		}
	}
}

// The report counts all for whom the outcome changes, and not only those whom it lists.
func TestAnalyzeChangeCountsWho(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	h.putPapers(1)
	const users = 103
	var list []*cedarpostv1.Entity
	for i := range users {
		list = append(list, servertest.DocUser(t, fmt.Sprint("u", i)))
	}
	h.MustPut(list...)
	req := ofChange(h.create(putFile("more/all.cedar", "@id(\"all\") permit (principal is Doc::User, action == Doc::Action::\"Read\", resource);\n")).Id)
	req.Who = []*cedarpostv1.EntityUid{servertest.UID(`Doc::Action::"Read"`)}
	report := mustAnalyze(t, h.Policies, req)
	if report.WhoChanged != users || len(report.Who) != 100 {
		t.Errorf("%d change, %d are listed", report.WhoChanged, len(report.Who))
	}
}
