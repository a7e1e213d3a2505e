package server_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A change in shadow is compared with the decisions that are made after it was asked for, and with no others.
// Answers stay as they are. The shadow ends with an edit, when its time is over, and when another version
// is published.
func TestShadowChange(t *testing.T) {
	t.Parallel()
	option, look := server.ShadowNow()
	h := newHouseOn(t, servertest.New(t, option), noRule)
	h.putPapers(4)
	ask := func(n int) {
		for i := range n {
			if r := authorize(t, h.Server, askDoc("ann", fmt.Sprint(i%4))); r.Decision != cedarpostv1.Decision_ALLOW {
				t.Fatal(r)
			}
		}
		time.Sleep(2 * time.Millisecond) // a look does not count decisions of its own millisecond yet
		look()
	}
	get := func(id string) *cedarpostv1.ImpactReport {
		res, err := h.Policies.GetImpactReport(t.Context(), &cedarpostv1.GetImpactReportRequest{Id: id})
		if err != nil {
			t.Fatal(err)
		}
		return res.Report
	}
	shadow := func(c *cedarpostv1.BundleChange, d *durationpb.Duration) *cedarpostv1.BundleChange {
		res, err := h.Policies.ShadowChange(t.Context(), &cedarpostv1.ShadowChangeRequest{Id: c.Id, Digest: c.Digest, Duration: d})
		if err != nil {
			t.Fatal(err)
		}
		return res.Change
	}
	ask(5)
	time.Sleep(2 * time.Millisecond) // decisions of the millisecond in which the shadow begins count
	c := h.create(putFile("policies.cedar", servertest.DocPolicies+"\n@id(\"no\") forbid (principal, action == Doc::Action::\"Read\", resource == Doc::Paper::\"3\");\n"))
	c = shadow(c, durationpb.New(time.Hour))
	id := c.Shadow.Report
	ask(4)
	ask(8)
	if r := get(id); r.Decisions != 12 || r.AllowToDeny != 3 || r.Unchanged != 9 || len(r.Samples) != 3 || r.Complete || !r.Shadow {
		t.Errorf("%v", r)
	}
	if again := shadow(c, durationpb.New(2*time.Hour)); again.Shadow.Report != id {
		t.Errorf("a shadow that goes on has another report: %v", again)
	}
	_, err := analyze(t, h.Policies, &cedarpostv1.AnalyzeChangeRequest{Candidate: &cedarpostv1.AnalyzeChangeRequest_Report{Report: id}})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "of a shadow, which goes on by itself")
	_, err = h.Policies.ShadowChange(t.Context(), &cedarpostv1.ShadowChangeRequest{Id: c.Id, Digest: strings.Repeat("0", 64), Duration: durationpb.New(time.Hour)})
	servertest.WantCode(t, err, connect.CodeAborted, "was edited")
	_, err = h.author.ShadowChange(t.Context(), &cedarpostv1.ShadowChangeRequest{Id: c.Id, Digest: c.Digest, Duration: durationpb.New(time.Hour)})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "")

	c = h.update(c, extra(4))
	ask(4)
	if r := get(id); r.Decisions != 12 || !r.Complete {
		t.Errorf("after an edit: %v", r)
	}
	c = shadow(c, durationpb.New(time.Hour))
	ask(4)
	shadow(c, nil)
	ask(4)
	if r := get(c.Shadow.Report); r.Decisions != 4 || !r.Complete || c.Shadow.Report == id {
		t.Errorf("after its end: %v", r)
	}
	c = shadow(c, durationpb.New(time.Hour))
	publishChange(t, h.publisher, h.create(extra(9)))
	ask(4)
	if r := get(c.Shadow.Report); r.Decisions != 0 || !r.Complete {
		t.Errorf("after another version was published: %v", r)
	}
	_, err = h.Policies.ShadowChange(t.Context(), &cedarpostv1.ShadowChangeRequest{Id: c.Id, Digest: c.Digest, Duration: durationpb.New(time.Hour)})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "--rebase")
	publishChange(t, h.publisher, h.create(extra(1)))
}

// Where bundle.yaml asks for it, a change is published only with a report of its present state against the
// live version, and an approval counts only if it names one.
func TestImpactRequired(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	h.putPapers(2)
	for range 3 {
		authorize(t, h.Server, askDoc("ann", "1"))
	}
	c := h.create(putFile("bundle.yaml", "name: doc\napprovals: 1\nimpact: required\n"), extra(1))
	approveWith := func(report string) error {
		return second(h.second.ApproveChange(t.Context(), &cedarpostv1.ApproveChangeRequest{Id: c.Id, Digest: c.Digest, Report: report}))
	}
	blocked := func(words ...string) {
		t.Helper()
		err := publish(t, h.publisher, c)
		for _, w := range words {
			servertest.WantCode(t, err, connect.CodeFailedPrecondition, w)
		}
	}
	blocked("needs a report of its impact", "needs 1 approval and has 0")
	servertest.WantCode(t, approveWith("doc-r0000000000000000"), connect.CodeFailedPrecondition, "names no report")
	if err := approveWith(""); err != nil {
		t.Fatal(err)
	}
	narrow := ofChange(c.Id)
	narrow.Caller = "bootstrap"
	mustAnalyze(t, h.Policies, narrow)
	short := ofChange(c.Id)
	short.From = timestamppb.New(time.Now().Add(-time.Hour))
	mustAnalyze(t, h.Policies, short)
	past := ofChange(c.Id) // nobody asked then
	past.From, past.To = timestamppb.New(time.Now().Add(-60*time.Hour)), timestamppb.New(time.Now().Add(-30*time.Hour))
	mustAnalyze(t, h.Policies, past)
	few := ofChange(c.Id)
	few.Sample = 0.0001
	mustAnalyze(t, h.Policies, few)
	blocked("needs a report of its impact", "1 approval that names no sufficient report")
	report := mustAnalyze(t, h.Policies, ofChange(c.Id))
	blocked("1 approval that names no sufficient report")
	if err := approveWith(report.Id); err != nil {
		t.Fatal(err)
	}
	old := c
	c = h.update(c, extra(2))
	blocked("needs a report of its impact")
	servertest.WantCode(t, approveWith(report.Id), connect.CodeFailedPrecondition, "names no report")
	c = h.update(c, extra(1))
	if c.Digest != old.Digest {
		t.Fatal("the edit was not taken back")
	}
	if err := approveWith(report.Id); err != nil {
		t.Fatal(err)
	}
	publishChange(t, h.publisher, c)
	if v := h.live(); len(v.ApprovedBy) != 1 || v.ApprovedBy[0].Report != report.Id {
		t.Errorf("%v", v.ApprovedBy)
	}
	_, err := h.Apply("doc", servertest.Files("bundle.yaml", "name: doc\n", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "need a report of their impact")
	_, err = h.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "doc"})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "need a report of their impact")
	// The next change of the rule needs a report, too.
	c = h.create(putFile("bundle.yaml", "name: doc\n"))
	if err := approveWith(""); err != nil {
		t.Fatal(err)
	}
	blocked("needs a report of its impact")
}

// A bundle without a namespace decides nothing, so its auditor learns nothing of the decisions of others.
// A change of admin-local has no impact and no shadow: no decision is about rights. No rule is shed by
// break-glass.
func TestAttackAnalyzeOthers(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	h.putPapers(1)
	authorize(t, h.Server, askDoc("ann", "0"))
	h.MustApply("flat", "schema.cedarschema", "// nothing\n")
	both := policiesOf(t, h.Server, "both", grant(access.Auditor, "flat"), grant(access.PolicyAuthor, "flat"))
	made, err := both.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "flat", Title: "t", Edits: []*cedarpostv1.FileEdit{putFile("tests.yaml", "checks: []\n")}})
	if err != nil {
		t.Fatal(err)
	}
	if r := mustAnalyze(t, both, ofChange(made.Change.Id)); r.Decisions != 0 || r.Reached != nil {
		t.Errorf("%v", r)
	}
	h.MustApply("admin-local", "schema.cedarschema", "// none\n", "policies.cedar", "@id(\"no\") forbid (principal, action == Cedarpost::Action::\"ExportDecisions\", resource);\n")
	author := policiesOf(t, h.Server, "wide", grant(access.Auditor, "*"), grant(access.PolicyAuthor, "*"))
	local, err := author.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "admin-local", Title: "t", Edits: []*cedarpostv1.FileEdit{putFile("more.cedar", "@id(\"yes\") forbid (principal, action == Cedarpost::Action::\"QueryEvents\", resource);\n")}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = analyze(t, author, ofChange(local.Change.Id))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "no decision is recorded about the rights")
	shadow := func(by cedarpostv1connect.PolicyServiceClient, c *cedarpostv1.BundleChange) error {
		return second(by.ShadowChange(t.Context(), &cedarpostv1.ShadowChangeRequest{Id: c.Id, Digest: c.Digest, Duration: durationpb.New(time.Hour)}))
	}
	servertest.WantCode(t, shadow(author, local.Change), connect.CodeFailedPrecondition, "no decision is recorded about the rights")
	one, two := h.create(extra(1)), h.create(extra(2))
	if err := shadow(author, one); err != nil {
		t.Fatal(err)
	}
	servertest.WantCode(t, shadow(author, two), connect.CodeFailedPrecondition, "is in shadow; end that first")
	broken := h.create(putFile("policies.cedar", "permit ("))
	servertest.WantCode(t, shadow(author, broken), connect.CodeFailedPrecondition, "in shadow")
	_, err = analyze(t, h.Policies, &cedarpostv1.AnalyzeChangeRequest{Candidate: ofChange(two.Id).Candidate, From: timestamppb.New(time.Now().Add(time.Hour))})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "not before now")

	strict := []string{"bundle.yaml", "name: doc\napprovals: 1\nimpact: required\n", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies}
	breakIn(t, h.Server, "doc", strict...)
	strict[1] = "name: doc\n"
	breakIn(t, h.Server, "doc", strict...)
	_, err = h.Apply("doc", servertest.Files(append(strict, "more.cedar", "// more\n")...))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "need 1 approval")
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "need a report of their impact")
	t.Log("attack: 0 decisions of others counted; 3 of 3 shadows refused; 2 of 2 rules kept after break-glass")
}
