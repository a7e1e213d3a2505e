package server_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// analyze makes a report, and returns the last message.
func analyze(t *testing.T, by cedarpostv1connect.PolicyServiceClient, req *cedarpostv1.AnalyzeChangeRequest) (*cedarpostv1.ImpactReport, error) {
	t.Helper()
	stream, err := by.AnalyzeChange(t.Context(), req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = stream.Close() }()
	for report := (*cedarpostv1.ImpactReport)(nil); ; {
		res, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return report, nil
		}
		if err != nil {
			return nil, err
		}
		report = res.Report
	}
}

func mustAnalyze(t *testing.T, by cedarpostv1connect.PolicyServiceClient, req *cedarpostv1.AnalyzeChangeRequest) *cedarpostv1.ImpactReport {
	t.Helper()
	report, err := analyze(t, by, req)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func ofChange(id string) *cedarpostv1.AnalyzeChangeRequest {
	return &cedarpostv1.AnalyzeChangeRequest{Candidate: &cedarpostv1.AnalyzeChangeRequest_Change{Change: id}}
}

// kindsOf returns the kinds of differences between two answers to one question.
func kindsOf(before, after *cedarpostv1.AuthorizeResponse) (kinds []string) {
	allowed := func(r *cedarpostv1.AuthorizeResponse) bool { return r.Decision == cedarpostv1.Decision_ALLOW }
	lacks := func(list, other []string) bool {
		return slices.ContainsFunc(list, func(s string) bool { return !slices.Contains(other, s) })
	}
	switch {
	case allowed(before) && !allowed(after):
		kinds = append(kinds, "allow to deny")
	case !allowed(before) && allowed(after):
		kinds = append(kinds, "deny to allow")
	case allowed(before):
		if lacks(after.GetFields().GetPermitted(), before.GetFields().GetPermitted()) {
			kinds = append(kinds, "gained")
		}
		if lacks(before.GetFields().GetPermitted(), after.GetFields().GetPermitted()) {
			kinds = append(kinds, "lost")
		}
	}
	if slices.ContainsFunc(after.Errors, func(e *cedarpostv1.PolicyError) bool {
		return !slices.ContainsFunc(before.Errors, func(b *cedarpostv1.PolicyError) bool { return proto.Equal(b.Policy, e.Policy) })
	}) {
		kinds = append(kinds, "errors")
	}
	if len(kinds) > 0 {
		return kinds
	}
	texts := func(r *cedarpostv1.AuthorizeResponse) string {
		out := fmt.Sprint(r.GetDeniedAt(), len(r.Errors))
		for _, o := range r.Obligations {
			out += "|" + o.Text
		}
		for _, a := range r.Advice {
			out += "|" + a.Text + fmt.Sprint(a.Paths)
		}
		return out
	}
	if texts(before) != texts(after) {
		return []string{"other"}
	}
	return []string{"unchanged"}
}

// The report of a change says what callers get when it is published: every question that was recorded is
// asked again after the publish.
func TestAnalyzeChangeIsWhatHappens(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	l := lab{rand.New(rand.NewPCG(seed, 1)), t, s}
	draw := func() (edits []*cedarpostv1.FileEdit) {
		var text strings.Builder
		for i, p := range labPolicies {
			if l.IntN(3) > 0 {
				fmt.Fprintf(&text, "@id(\"p%d\") %s\n", i, strings.ReplaceAll(p, "SOON", "2999-01-01T00:00:00.000Z"))
			}
		}
		return []*cedarpostv1.FileEdit{putFile("p.cedar", text.String()), putFile("bundle.yaml", "name: lab\non_forbid_error: "+l.pick("deny", "skip")+"\n")}
	}
	first := draw()
	s.MustApply("lab", "schema.cedarschema", labSchema, "fields.yaml", labFields, "p.cedar", string(first[0].GetContent()), "bundle.yaml", string(first[1].GetContent()))
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Lab::Team","id":"t1"},"attrs":{},"parents":[]}`))
	for range 12 {
		l.changeLab()
	}
	var questions []*cedarpostv1.AuthorizeRequest
	var before []*cedarpostv1.AuthorizeResponse
	ask := func(req *cedarpostv1.AuthorizeRequest) *cedarpostv1.AuthorizeResponse { return authorize(t, s, req) }
	for len(questions) < 150 {
		q := l.question()
		if strings.HasPrefix(q.Action.Type, "Shop") {
			continue
		}
		questions, before = append(questions, q), append(before, ask(q))
	}
	c, err := s.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "lab", Title: "others", Edits: draw()})
	if err != nil {
		t.Fatal(err)
	}
	report := mustAnalyze(t, s.Policies, ofChange(c.Change.Id))
	recorded := mustAnalyze(t, s.Policies, &cedarpostv1.AnalyzeChangeRequest{Candidate: ofChange(c.Change.Id).Candidate, Data: cedarpostv1.ImpactData_IMPACT_DATA_RECORDED})
	if !report.Complete || report.Decisions != int32(len(questions)) || report.Digest != c.Change.Digest || report.LiveVersion != 1 {
		t.Errorf("%v", report)
	}
	publishChange(t, s.Policies, c.Change)
	want := map[string]int32{}
	for i, q := range questions {
		for _, kind := range kindsOf(before[i], ask(q)) {
			want[kind]++
		}
	}
	for _, r := range []*cedarpostv1.ImpactReport{report, recorded} {
		got := map[string]int32{}
		for kind, n := range map[string]int32{
			"allow to deny": r.AllowToDeny, "deny to allow": r.DenyToAllow, "gained": r.FieldsGained, "lost": r.FieldsLost,
			"errors": r.NewErrors, "other": r.OtherChanges, "unchanged": r.Unchanged, "unknown": r.Unknown,
		} {
			if n > 0 {
				got[kind] = n
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: reported %v, happened %v", r.Data, got, want)
		}
	}
	t.Log(want)
}

// changeLab writes an entity of the lab.
func (l lab) changeLab() {
	if l.IntN(2) == 0 {
		l.s.MustPut(servertest.Entity(l.t, fmt.Sprintf(`{"uid":{"type":"Lab::Item","id":%q},"attrs":{"owner":{"type":"Lab::User","id":%q},"n":%d},"parents":[{"type":"Lab::Item","id":"all"}]}`,
			l.pick("i1", "i2", "i3"), l.user(), l.IntN(3))))
		return
	}
	l.s.MustPut(servertest.Entity(l.t, fmt.Sprintf(`{"uid":{"type":"Lab::User","id":%q},"attrs":{"level":%d,"boss":{"type":"Lab::User","id":%q}},"tags":{"x":%d},"parents":[{"type":"Lab::Team","id":%q}]}`,
		l.pick("ann", "ben", "cat"), l.IntN(4), l.user(), l.IntN(4), l.pick("t1", "t2"))))
}

func publishChange(t *testing.T, by cedarpostv1connect.PolicyServiceClient, c *cedarpostv1.BundleChange) {
	t.Helper()
	if err := publish(t, by, c); err != nil {
		t.Fatal(err)
	}
}

const cardSchema = `namespace Card {
  entity User;
  @source("request") entity Cart { @sensitive number?: String, total: Long };
  action Pay appliesTo { principal: [User], resource: [Cart], context: { @sensitive pin: String, amount: Long } };
}`

// A decision with masked values is unknown if a policy of either side that could apply reads one, and
// otherwise it is not.
func TestAnalyzeChangeOfMaskedDecisions(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("card", "schema.cedarschema", cardSchema, "p.cedar", `@id("all") permit (principal, action == Card::Action::"Pay", resource) when { context.amount < 10 };`)
	for i := range 20 {
		cart := servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Card::Cart","id":"c"},"attrs":{"number":"4111","total":%d}}`, i))
		authorize(t, s, &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Card::User::"u` + fmt.Sprint(i%2) + `"`), Action: servertest.UID(`Card::Action::"Pay"`), Resource: cart.Uid,
			Entities: []*cedarpostv1.Entity{cart}, Context: structOf(t, fmt.Sprintf(`{"pin":"12%d4","amount":%d}`, i, i)),
		})
	}
	for _, c := range []struct {
		policy  string
		unknown int32
		changed int32
	}{
		{`when { context.amount < 5 }`, 0, 5},
		{`when { context.amount < 10 && resource.total < 5 }`, 0, 5},
		{`when { context.amount < 10 && context.pin == "1204" }`, 20, 0},
		{`when { context.amount < 10 && resource has number }`, 20, 0},
		{`when { [context].contains(context) }`, 20, 0},
		// The other policy needs no masked value for half of the principals.
		{"when { context.amount < 5 };\n@id(\"one\") permit (principal == Card::User::\"u1\", action == Card::Action::\"Pay\", resource) when { context.pin like \"1*\" }", 10, 2},
	} {
		report := mustAnalyze(t, s.Policies, &cedarpostv1.AnalyzeChangeRequest{Candidate: &cedarpostv1.AnalyzeChangeRequest_Edits{Edits: &cedarpostv1.AnalyzeChangeRequest_ProposedEdits{
			Bundle: "card", BaseVersion: 1, Edits: []*cedarpostv1.FileEdit{putFile("p.cedar", `@id("all") permit (principal, action == Card::Action::"Pay", resource) `+c.policy+";")},
		}}})
		if report.Unknown != c.unknown || report.AllowToDeny != c.changed || report.Decisions != 20 {
			t.Errorf("%s: %d unknown, %d denied of %d", c.policy, report.Unknown, report.AllowToDeny, report.Decisions)
		}
		if c.unknown > 0 && (len(report.UnknownReasons) != 1 || !strings.Contains(report.UnknownReasons[0].Reason, "masked")) {
			t.Errorf("%v", report.UnknownReasons)
		}
	}
}

// An analysis whose time is over is gone on with, also by another server, and the report is the same as
// that of one analysis. Complete reports of a change are named by it, until the change is edited.
func TestAnalyzeChangeGoesOn(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	h.putPapers(7)
	batch := &cedarpostv1.AuthorizeBatchRequest{}
	for i := range 100 {
		batch.Checks = append(batch.Checks, askDoc("ann", fmt.Sprint(i%7)))
	}
	for range 11 {
		if _, err := h.Authorization.AuthorizeBatch(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	c := h.create(putFile("policies.cedar", servertest.DocPolicies+"\n@id(\"no\") forbid (principal, action == Doc::Action::\"Read\", resource == Doc::Paper::\"3\");\n"))
	whole := mustAnalyze(t, h.Policies, ofChange(c.Id))
	short := ofChange(c.Id)
	short.Budget = durationpb.New(1)
	short.To = whole.To
	part := mustAnalyze(t, h.Policies, short)
	other := servertest.On(t, h.URL)
	pages := 1
	for !part.Complete {
		if pages++; pages > 5 {
			t.Fatal("it never ends")
		}
		if part.Reached == nil || part.Decisions == 0 {
			t.Fatalf("%v", part)
		}
		id := part.Id
		if part = mustAnalyze(t, other.Policies, &cedarpostv1.AnalyzeChangeRequest{Candidate: &cedarpostv1.AnalyzeChangeRequest_Report{Report: id}, Budget: durationpb.New(1)}); part.Id != id {
			t.Fatalf("%s went on as %s", id, part.Id)
		}
	}
	if pages < 3 {
		t.Errorf("%d pages", pages)
	}
	for _, r := range []*cedarpostv1.ImpactReport{whole, part} {
		r.Id, r.CreatedAt, r.UpdatedAt, r.From, r.Revision, r.PolicyRevision, r.Reached = "", nil, nil, nil, nil, 0, nil
	}
	if !proto.Equal(whole, part) {
		t.Errorf("in parts:\n%v\nat once:\n%v", part, whole)
	}
	if whole.AllowToDeny == 0 || len(whole.Samples) != 10 || whole.ByPolicy[0].Name != "doc/no" || whole.ByCaller[0].AllowToDeny != whole.AllowToDeny {
		t.Errorf("%v", whole)
	}
	reports := h.get(c.Id).Change.Reports
	if len(reports) != 2 || reports[1].Digest != c.Digest || reports[1].Decisions != 1100 || len(reports[1].Sha256) != 64 {
		t.Fatalf("%v", reports)
	}
	narrow := ofChange(c.Id)
	narrow.Principal = servertest.UID(`Doc::User::"ann"`)
	narrow.Sample = 0.25
	if r := mustAnalyze(t, h.Policies, narrow); r.Decisions < 150 || r.Decisions > 450 || r.Sample != 0.25 {
		t.Errorf("a quarter of 1,100 decisions are %d", r.Decisions)
	}
	if last := h.get(c.Id).Change.Reports[2]; !last.Narrowed || last.Sample != 0.25 {
		t.Errorf("%v", last)
	}

	unfinished := mustAnalyze(t, h.Policies, short)
	h.update(c, extra(2))
	goOn := &cedarpostv1.AnalyzeChangeRequest{Candidate: &cedarpostv1.AnalyzeChangeRequest_Report{Report: unfinished.Id}}
	_, err := analyze(t, h.Policies, goOn)
	servertest.WantCode(t, err, connect.CodeAborted, "the change was edited since the report")
	_, err = analyze(t, h.Policies, &cedarpostv1.AnalyzeChangeRequest{Candidate: ofChange(c.Id).Candidate, Digest: c.Digest})
	servertest.WantCode(t, err, connect.CodeAborted, "the change doc-1 was edited")
	goOn.Candidate = &cedarpostv1.AnalyzeChangeRequest_Report{Report: reports[0].Id}
	_, err = analyze(t, h.Policies, goOn)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "is complete")
	goOn.Candidate = &cedarpostv1.AnalyzeChangeRequest_Report{Report: "doc-r0000000000000000"}
	_, err = analyze(t, h.Policies, goOn)
	servertest.WantCode(t, err, connect.CodeNotFound, "there is no report")
	h.update(c, putFile("policies.cedar", "permit (principal, action, resource"))
	_, err = analyze(t, h.Policies, ofChange(c.Id))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "")
}

// putPapers stores ann, and papers that she may read.
func (h *house) putPapers(n int) {
	h.t.Helper()
	list := []*cedarpostv1.Entity{servertest.DocUser(h.t, "ann", "g")}
	for i := range n {
		list = append(list, servertest.Entity(h.t, fmt.Sprintf(`{"uid":{"type":"Doc::Paper","id":"%d"},"attrs":{"readers":{"type":"Doc::Group","id":"g"}},"parents":[]}`, i)))
	}
	h.MustPut(list...)
}

func askDoc(user, document string) *cedarpostv1.AuthorizeRequest {
	return &cedarpostv1.AuthorizeRequest{Principal: servertest.UID(`Doc::User::"` + user + `"`), Action: servertest.UID(`Doc::Action::"Read"`), Resource: servertest.UID(`Doc::Paper::"` + document + `"`)}
}

// The policies of a change could be made to find out what recorded decisions depended on, so an analysis
// needs the right to read them. Others get the counts of a report, and nothing that names who asked what.
func TestAttackAnalyzeWithoutReadingDecisions(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	h.putPapers(7)
	authorize(t, h.Server, askDoc("ann", "1"))
	c := h.create(putFile("policies.cedar", servertest.DocPolicies+"\n@id(\"no\") forbid (principal, action == Doc::Action::\"Read\", resource == Doc::Paper::\"1\");\n"))
	edits := &cedarpostv1.AnalyzeChangeRequest{Candidate: &cedarpostv1.AnalyzeChangeRequest_Edits{Edits: &cedarpostv1.AnalyzeChangeRequest_ProposedEdits{Bundle: "doc", BaseVersion: 1, Edits: []*cedarpostv1.FileEdit{extra(3)}}}}
	refused := 0
	for _, by := range []cedarpostv1connect.PolicyServiceClient{h.author, h.approver, h.publisher, policiesOf(t, h.Server, "elsewhere", grant(access.Auditor, "shop"), grant(access.PolicyAuthor, "doc"))} {
		for _, req := range []*cedarpostv1.AnalyzeChangeRequest{ofChange(c.Id), edits} {
			_, err := analyze(t, by, req)
			servertest.WantCode(t, err, connect.CodePermissionDenied, "")
			refused++
		}
	}
	both := policiesOf(t, h.Server, "both", grant(access.Auditor, "doc"), grant(access.PolicyAuthor, "doc"))
	report := mustAnalyze(t, both, ofChange(c.Id))
	if report.AllowToDeny+report.OtherChanges+report.Unchanged != 1 {
		t.Fatalf("%v", report)
	}
	get := func(by cedarpostv1connect.PolicyServiceClient) *cedarpostv1.ImpactReport {
		res, err := by.GetImpactReport(t.Context(), &cedarpostv1.GetImpactReportRequest{Id: report.Id})
		if err != nil {
			t.Fatal(err)
		}
		return res.Report
	}
	if seen := get(h.approver); !seen.Hidden || len(seen.Samples)+len(seen.ByCaller) > 0 || seen.Decisions != 1 {
		t.Errorf("an approver sees %v", seen)
	}
	if seen := get(both); seen.Hidden || !slices.EqualFunc(seen.Samples, report.Samples, func(a, b *cedarpostv1.ImpactSample) bool { return proto.Equal(a, b) }) {
		t.Errorf("an auditor sees %v", seen)
	}
	_, err := policiesOf(t, h.Server, "shopper", grant(access.PolicyApprover, "shop")).GetImpactReport(t.Context(), &cedarpostv1.GetImpactReportRequest{Id: report.Id})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "")
	t.Logf("%d of 8 analyses by callers who may not read decisions are refused", refused)
}

// Who gains and who loses is what all pairs of stored principals and resources would say, asked before and
// after the publish.
func TestAnalyzeChangeWhoGains(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	rnd := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	const users, papers, groups = 12, 9, 4
	group := func() string { return fmt.Sprintf("g%d", rnd.IntN(groups)) }
	var list []*cedarpostv1.Entity
	for i := range groups - 1 {
		list = append(list, servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Doc::Group","id":"g%d"},"attrs":{},"parents":[{"type":"Doc::Group","id":"g%d"}]}`, i, i+1)))
	}
	for i := range users {
		list = append(list, servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Doc::User","id":"u%d"},"attrs":{"level":%d},"parents":[{"type":"Doc::Group","id":%q}]}`, i, rnd.IntN(5), group())))
	}
	for i := range papers {
		list = append(list, servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Doc::Paper","id":"p%d"},"attrs":{"readers":{"type":"Doc::Group","id":%q}},"parents":[]}`, i, group())))
	}
	h.MustPut(list...)
	outcome := func() (allowed map[string]bool) {
		allowed = map[string]bool{}
		for u := range users {
			for p := range papers {
				q := askDoc(fmt.Sprint("u", u), fmt.Sprint("p", p))
				allowed[q.Principal.Id+q.Resource.Id] = authorize(t, h.Server, q).Decision == cedarpostv1.Decision_ALLOW
			}
		}
		return allowed
	}
	before := outcome()
	c := h.create(putFile("more/extra.cedar", `
@id("one") forbid (principal in Doc::Group::"g1", action == Doc::Action::"Read", resource) when { principal.level > 2 };
@id("two") permit (principal, action == Doc::Action::"Read", resource == Doc::Paper::"p3") when { principal in Doc::Group::"g3" };
@id("three") forbid (principal == Doc::User::"u0", action, resource);
@id("new") permit (principal, action == Doc::Action::"Publish", resource);
`))
	req := ofChange(c.Id)
	req.Who = []*cedarpostv1.EntityUid{servertest.UID(`Doc::Action::"Read"`)}
	report := mustAnalyze(t, h.Policies, req)
	publishChange(t, h.publisher, c)
	type change struct{ gained, lost int32 }
	want := map[string]change{}
	for pair, is := range outcome() {
		user := pair[:strings.IndexByte(pair, 'p')]
		w := want[user]
		if is && !before[pair] {
			w.gained++
		}
		if !is && before[pair] {
			w.lost++
		}
		if w != (change{}) {
			want[user] = w
		}
	}
	got := map[string]change{}
	for _, w := range report.Who {
		got[w.Principal.Id] = change{w.Gained, w.Lost}
		if int(w.Gained) < len(w.GainedResources) || w.Lost > 0 && len(w.LostResources) == 0 {
			t.Errorf("%v", w)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || len(report.WhoLeftOut) > 0 {
		t.Errorf("reported %v, happened %v; not tried: %v", got, want, report.WhoLeftOut)
	}
	if report.WhoPairs > users*papers {
		t.Errorf("%d pairs tried, there are %d", report.WhoPairs, users*papers)
	}
	t.Logf("%d of %d pairs tried, %d principals", report.WhoPairs, users*papers, len(got))

	// A pair of which nothing differs is not tried.
	narrow := h.create(putFile("more/extra.cedar", "@id(\"two\") permit (principal == Doc::User::\"u5\", action == Doc::Action::\"Read\", resource == Doc::Paper::\"p3\");\n"), putFile("policies.cedar", servertest.DocPolicies))
	req = ofChange(narrow.Id)
	req.Who = []*cedarpostv1.EntityUid{servertest.UID(`Doc::Action::"Publish"`), servertest.UID(`Doc::Action::"Gone"`)}
	if report = mustAnalyze(t, h.Policies, req); report.WhoPairs != 0 || len(report.WhoLeftOut) != 3 || !strings.Contains(strings.Join(report.WhoLeftOut, "|"), "does not declare the action|policy doc/new: resources of the type Doc::Draft, which are never stored") {
		t.Errorf("%d pairs, %v", report.WhoPairs, report.WhoLeftOut)
	}
}

// An analysis says what it cannot compare, and why: decisions whose revision was swept, and a damaged row. A candidate whose policies fail for every question gives new errors only.
func TestAnalyzeChangeCountsWhatIsUnknown(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	h.putPapers(3)
	for i := range 6 {
		authorize(t, h.Server, askDoc("ann", fmt.Sprint(i%3)))
	}
	c := h.create(putFile("policies.cedar", servertest.DocPolicies+"\n@id(\"fails\") forbid (principal, action == Doc::Action::\"Read\", resource) when { principal.level + 9223372036854775807 > 0 };\n"))
	if r := mustAnalyze(t, h.Policies, ofChange(c.Id)); r.NewErrors != 6 || r.AllowToDeny != 6 || r.Unchanged != 0 || len(r.Samples) != 12 || r.Samples[11].Error == "" || r.ByPolicy[0].Name != "doc/fails" {
		t.Errorf("%v", r)
	}
	h.update(c, putFile("schema.cedarschema", strings.Replace(servertest.DocSchema, "action Read appliesTo { principal: [User], resource: [Paper], context: {} }", "action Read appliesTo { principal: [User], resource: [Paper], context: { why: String } }", 1)),
		putFile("policies.cedar", servertest.DocPolicies))
	if r := mustAnalyze(t, h.Policies, ofChange(c.Id)); r.NewErrors != 6 || r.AllowToDeny != 0 || !strings.Contains(r.Samples[0].Error, `required attribute "why" is missing`) {
		t.Errorf("%v", r)
	}
	recorded := ofChange(h.create(extra(7)).Id)
	recorded.Data = cedarpostv1.ImpactData_IMPACT_DATA_RECORDED
	if r := mustAnalyze(t, h.Policies, recorded); r.Unchanged+r.OtherChanges+r.DenyToAllow != 6 {
		t.Errorf("%v", r)
	}
	// Now all decisions are older than history, and one of them is damaged.
	conn := servertest.Session(t, h.URL)
	var revision int64
	if err := conn.QueryRow(t.Context(), "select max(revision) from decisions").Scan(&revision); err != nil {
		t.Fatal(err)
	}
	servertest.MustExec(t, conn, fmt.Sprintf("update history set oldest = %d", revision+1))
	servertest.Tamper(t, h.URL, "update decisions set caller = 'somebody' where decision_id = (select max(decision_id::text)::uuid from decisions)")
	r := mustAnalyze(t, h.Policies, recorded)
	var reasons []string
	for _, u := range r.UnknownReasons {
		reasons = append(reasons, fmt.Sprint(u.Decisions, " ", u.Reason))
	}
	if r.Unknown != 6 || strings.Join(reasons, "|") != "5 history no longer goes back to its revision|1 the row is damaged; verify the log (cedarpost audit verify)" {
		t.Errorf("%v", reasons)
	}
}
