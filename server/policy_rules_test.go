package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// breakIn publishes a bundle with the key of the server, whatever its rules say.
func breakIn(t *testing.T, s *servertest.Server, name string, pathsAndContents ...string) *cedarpostv1.ApplyBundleResponse {
	t.Helper()
	why := "the test begins here"
	res, err := applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: name, BreakGlass: &why}, pathsAndContents...)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// blockedBy returns the rules in the detail of a refused publish.
func blockedBy(t *testing.T, err error) (rules []string) {
	t.Helper()
	e, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return nil
	}
	for _, d := range e.Details() {
		m, derr := connectproto.UnmarshalErrorDetail(d)
		if derr != nil {
			t.Fatal(derr)
		}
		if list, ok := m.(*cedarpostv1.PublishBlocked); ok {
			for _, b := range list.Blocks {
				if !strings.Contains(err.Error(), b.Message) {
					t.Errorf("%v does not say %q", err, b.Message)
				}
				rules = append(rules, b.Rule)
			}
		}
	}
	return rules
}

const alwaysFrozen = "freeze: [{at: '* * * * *', for: 1h, reason: holidays}]\n"

// windowEnd is the end of a freeze window in a refusal. It moves with the clock if the window never ends.
var windowEnd = regexp.MustCompile(`does not end before [^\]]*`)

func withoutEnds(blockedBy []string) string {
	return windowEnd.ReplaceAllString(fmt.Sprint(blockedBy), "")
}

// Each way to publish meets each rule: of the live version, of the new one, and of what callers said.
func TestEachWayMeetsEachRule(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	author := policiesOf(t, s, "author", grant(access.PolicyAuthor, "*"))
	approver := policiesOf(t, s, "approver", grant(access.PolicyApprover, "*"))
	publisher := policiesOf(t, s, "publisher", grant(access.PolicyPublisher, "*"), grant(access.PolicyAuthor, "*"))
	breaker := policiesOf(t, s, "breaker", grant(access.PolicyPublisher, "*"), grant(access.BreakGlass, "*"), grant(access.PolicyAuthor, "*"))
	why := "production is down"
	const plain, two, none = "", "approvals: 2\n", "approvals: 0\n"
	rules := []struct {
		name, live, candidate string // rules in bundle.yaml
		approvals             int    // of the change
		frozen, declined      bool
		blocks                string // the rule that is in the way; "": none
		only                  string // the way that it is about; "": all
	}{
		{name: "no rule", approvals: 0},
		{name: "frozen", frozen: true, blocks: "frozen"},
		{name: "window of the live version", live: alwaysFrozen, blocks: "freeze_window"},
		{name: "window of the new version", candidate: alwaysFrozen, blocks: "freeze_window"},
		{name: "approvals of the live version", live: two, candidate: two, blocks: "approvals"},
		{name: "approvals of the live version, and a candidate that says 0", live: two, candidate: none, blocks: "approvals"},
		{name: "approvals of the new version", candidate: two, blocks: "approvals"},
		{name: "one approval of two", live: two, candidate: two, approvals: 1, blocks: "approvals"},
		{name: "declined", declined: true, blocks: "declined", only: "change"},
	}
	n := 0
	for _, r := range rules {
		for _, way := range []string{"apply", "change", "rollback", "apply with break-glass", "change with break-glass"} {
			kind, glass := strings.CutSuffix(way, " with break-glass")
			if r.only != "" && r.only != kind {
				continue
			}
			n++
			name := fmt.Sprintf("b%d", n)
			files := func(rules string, level int) []string {
				return []string{"bundle.yaml", "name: " + name + "\n" + rules, "schema.cedarschema", modelSchema(name),
					"p.cedar", fmt.Sprintf("@id(\"p\") permit (principal, action, resource) when { principal.level > %d };\n", level)}
			}
			if kind == "rollback" { // the version that it restores
				breakIn(t, s, name, files(r.candidate, 2)...)
			}
			breakIn(t, s, name, files(r.live, 1)...)
			by, reason := publisher, (*string)(nil)
			if glass {
				by, reason = breaker, &why
			}
			if r.frozen {
				if _, err := publisher.FreezeBundle(t.Context(), &cedarpostv1.FreezeBundleRequest{Bundle: name}); err != nil {
					t.Fatal(err)
				}
			}
			var err error
			var says []string // what a look at the change says
			switch kind {
			case "apply":
				one := *s
				one.Policies = by
				_, err = applyOnce(t.Context(), &one, &cedarpostv1.BundleHeader{Name: name, BreakGlass: reason}, files(r.candidate, 2)...)
				dry, dryErr := applyOnce(t.Context(), &one, &cedarpostv1.BundleHeader{Name: name, DryRun: true}, files(r.candidate, 2)...)
				if warned := fmt.Sprint(dry.GetWarnings()); dryErr != nil || !glass && (r.blocks != "") != strings.Contains(warned, "it cannot be published now") {
					t.Errorf("%s, dry run: %v, %v", r.name, warned, dryErr)
				}
			case "change":
				to := files(r.candidate, 2)
				made, cerr := author.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: name, Title: "t", Edits: []*cedarpostv1.FileEdit{putFile(to[0], to[1]), putFile(to[4], to[5])}})
				if cerr != nil {
					t.Fatal(cerr)
				}
				c := made.Change
				if r.approvals > 0 {
					if err := approve(t, approver, c); err != nil {
						t.Fatal(err)
					}
				}
				if r.declined {
					if _, err := approver.DeclineChange(t.Context(), &cedarpostv1.DeclineChangeRequest{Id: c.Id, Digest: c.Digest, Reason: "no"}); err != nil {
						t.Fatal(err)
					}
				}
				shown, gerr := author.GetChange(t.Context(), &cedarpostv1.GetChangeRequest{Id: c.Id})
				checked, kerr := author.CheckChange(t.Context(), &cedarpostv1.CheckChangeRequest{Id: c.Id})
				listed, lerr := author.ListChanges(t.Context(), &cedarpostv1.ListChangesRequest{Bundle: name})
				if gerr != nil || kerr != nil || lerr != nil || withoutEnds(shown.BlockedBy) != withoutEnds(checked.BlockedBy) {
					t.Fatal(gerr, kerr, lerr, shown.BlockedBy, checked.BlockedBy)
				}
				needs := int32(0)
				if r.live == two || r.candidate == two {
					needs = 2
				}
				for what, got := range map[string]int32{"made": c.ApprovalsNeeded, "GetChange": shown.ApprovalsNeeded, "CheckChange": checked.Change.ApprovalsNeeded, "ListChanges": listed.Changes[0].ApprovalsNeeded} {
					if got != needs {
						t.Errorf("%s, %s says %d approvals, want %d", r.name, what, got, needs)
					}
				}
				says = shown.BlockedBy
				_, err = by.PublishChange(t.Context(), &cedarpostv1.PublishChangeRequest{Id: c.Id, Digest: c.Digest, BreakGlass: reason})
			case "rollback":
				_, err = by.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: name, Version: 1, Reason: "r"})
			}
			if kind == "change" && len(says) != map[bool]int{true: 0, false: 1}[r.blocks == ""] {
				t.Errorf("%s: the change says %q", r.name, says)
			}
			want := r.blocks
			if glass || kind == "rollback" {
				want = ""
			}
			switch {
			case want == "" && err != nil:
				t.Errorf("%s, %s: %v", r.name, way, err)
			case want != "":
				servertest.WantCode(t, err, connect.CodeFailedPrecondition, "")
				if got := blockedBy(t, err); len(got) != 1 || got[0] != want {
					t.Errorf("%s, %s: blocked by %q, want %q: %v", r.name, way, got, want, err)
				}
			}
			list, lerr := publisher.ListVersions(t.Context(), &cedarpostv1.ListVersionsRequest{Bundle: name, PageSize: 1})
			if lerr != nil {
				t.Fatal(lerr)
			}
			if got := list.Versions[0].BreakGlass; got != "" && got != why && got != "the test begins here" || (got == why) != (glass && r.blocks != "") {
				t.Errorf("%s, %s: the version says break-glass %q", r.name, way, got)
			}
		}
	}
	t.Logf("%d ways and rules", n)
	mustVerify(t, s.URL)
}

// A new bundle that asks for approvals needs them for its first version.
func TestNewBundleNeedsItsApprovals(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	const name = "fresh"
	files := []string{"bundle.yaml", "name: fresh\napprovals: 2\n", "schema.cedarschema", modelSchema(name), "p.cedar", `@id("p") permit (principal, action, resource);`}
	_, err := h.Apply(name, servertest.Files(files...))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "changes of the bundle fresh need 2 approvals")
	author := policiesOf(t, h.Server, "fresh-author", grant(access.PolicyAuthor, name))
	var edits []*cedarpostv1.FileEdit
	for i := 0; i < len(files); i += 2 {
		edits = append(edits, putFile(files[i], files[i+1]))
	}
	made, err := author.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: name, Title: "t", Edits: edits, Source: "here"})
	if err != nil || made.Change.ApprovalsNeeded != 2 || made.Change.Source != "here" {
		t.Fatalf("%v, %v", made, err)
	}
	for i := range 2 {
		servertest.WantCode(t, publish(t, h.Policies, made.Change), connect.CodeFailedPrecondition, fmt.Sprintf("needs 2 approvals and has %d", i))
		if err := approve(t, policiesOf(t, h.Server, fmt.Sprint("fresh-", i), grant(access.PolicyApprover, name)), made.Change); err != nil {
			t.Fatal(err)
		}
	}
	if err := publish(t, h.Policies, made.Change); err != nil {
		t.Error(err)
	}
}

// A rollback to a version without windows keeps the windows, as it keeps the number of approvals.
func TestRollbackKeepsWindows(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	doc := func(manifest, more string) []string {
		return []string{"bundle.yaml", manifest, "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies + more}
	}
	breakIn(t, h.Server, "doc", doc("name: doc\n"+alwaysFrozen, "")...)
	if _, err := h.publisher.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: "r"}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.publisher.UnfreezeBundle(t.Context(), &cedarpostv1.UnfreezeBundleRequest{Bundle: "doc"}); err != nil {
		t.Fatal(err)
	}
	_, err := h.Apply("doc", servertest.Files(doc(noRule, "// more\n")...))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "freeze window * * * * * for 1h, UTC (holidays)")
	breakIn(t, h.Server, "doc", doc(noRule, "// more\n")...)
	if _, err = h.Apply("doc", servertest.Files(doc(noRule, "// less\n")...)); err != nil {
		t.Errorf("the windows outlive a version that is no rollback: %v", err)
	}
	mustVerify(t, h.URL)
}

// Break-glass takes a right of its own, publishes past rules alone, and is loud.
func TestBreakGlass(t *testing.T) {
	t.Parallel()
	var lines bytes.Buffer
	var mu sync.Mutex
	s := servertest.New(t, func(c *server.Config) {
		c.Log = slog.New(slog.NewTextHandler(lockedWriter{&mu, &lines}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	})
	files := func(more string) []string {
		return []string{"bundle.yaml", twoRule, "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies + more}
	}
	breakIn(t, s, "doc", files("")...)
	by := func(c cedarpostv1connect.PolicyServiceClient, reason, more string) error {
		one := *s
		one.Policies = c
		return second(applyOnce(t.Context(), &one, &cedarpostv1.BundleHeader{Name: "doc", BreakGlass: &reason}, files(more)...))
	}
	publisher := policiesOf(t, s, "publisher", grant(access.PolicyPublisher, "*"), grant(access.BreakGlass, "other"), grant(access.PolicyAuthor, "*"))
	breaker := policiesOf(t, s, "breaker", grant(access.PolicyPublisher, "doc"), grant(access.BreakGlass, "doc"), grant(access.PolicyAuthor, "doc"))
	alone := policiesOf(t, s, "alone", grant(access.BreakGlass, "*"))

	servertest.WantCode(t, by(publisher, "now", "// 1\n"), connect.CodePermissionDenied, "the bundle doc")
	servertest.WantCode(t, by(alone, "now", "// 1\n"), connect.CodePermissionDenied, "ApplyBundle")
	servertest.WantCode(t, by(breaker, "", "// 1\n"), connect.CodeInvalidArgument, "break_glass")
	servertest.WantCode(t, by(breaker, " \n", "// 1\n"), connect.CodeInvalidArgument, "break_glass: it needs a reason")
	servertest.WantCode(t, by(breaker, "now", "permit (nobody);"), connect.CodeInvalidArgument, "policies.cedar")
	if err := by(breaker, "the pager rang", "// 1\n"); err != nil {
		t.Fatal(err)
	}
	made, err := breaker.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "t", Edits: []*cedarpostv1.FileEdit{putFile("more.cedar", "// 2\n")}})
	if err != nil {
		t.Fatal(err)
	}
	stale, err := breaker.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "t", Edits: []*cedarpostv1.FileEdit{putFile("more.cedar", "// 3\n")}})
	if err != nil {
		t.Fatal(err)
	}
	why := "the pager rang again"
	past := func(c cedarpostv1connect.PolicyServiceClient, change *cedarpostv1.BundleChange) error {
		return second(c.PublishChange(t.Context(), &cedarpostv1.PublishChangeRequest{Id: change.Id, Digest: change.Digest, BreakGlass: &why}))
	}
	servertest.WantCode(t, past(publisher, made.Change), connect.CodePermissionDenied, "the bundle doc")
	if _, err := breaker.FreezeBundle(t.Context(), &cedarpostv1.FreezeBundleRequest{Bundle: "doc", Reason: "quiet"}); err != nil {
		t.Fatal(err)
	}
	if err := past(breaker, made.Change); err != nil {
		t.Fatal(err)
	}
	// What would undo the version that was published meanwhile is not a rule to go past.
	servertest.WantCode(t, past(breaker, stale.Change), connect.CodeFailedPrecondition, "is of version 2 of the bundle doc, and version 3 is live")

	list := events(t, s, "break_glass")
	if len(list) != 3 {
		t.Fatalf("%v", list)
	}
	last := list[2]
	if g := last.GetBreakGlass(); last.Caller != "breaker" || last.Subject != "doc" || last.Revision == 0 || g.Bundle != "doc" || g.Version != 3 || g.Change != made.Change.Id || g.Reason != why ||
		len(g.Rules) != 2 || !strings.Contains(g.Rules[0], "is frozen") || !strings.Contains(g.Rules[1], "needs 2 approvals and has 0") {
		t.Errorf("%v", last)
	}
	res, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{Kind: cedarpostv1.EventRecord_BREAK_GLASS})
	if err != nil || len(res.Events) != 3 {
		t.Errorf("%v, %v", res, err)
	}
	if v, _ := version(t, s, "doc", 2); v.BreakGlass != "the pager rang" {
		t.Errorf("%v", v)
	}
	page, err := http.Get(s.Ops + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer page.Body.Close()
	if text, err := io.ReadAll(page.Body); err != nil || !regexp.MustCompile(`(?m)^cedarpost_break_glass_total 3$`).Match(text) {
		t.Errorf("no metric: %v", err)
	}
	mu.Lock()
	logged := lines.String()
	mu.Unlock()
	if !strings.Contains(logged, "level=WARN") || !strings.Contains(logged, "break-glass") || !strings.Contains(logged, why) {
		t.Errorf("log: %s", logged)
	}

	// Without a rule in the way, it is a publish like others.
	if _, err := breaker.UnfreezeBundle(t.Context(), &cedarpostv1.UnfreezeBundleRequest{Bundle: "doc"}); err != nil {
		t.Fatal(err)
	}
	s.MustApply("calm", "schema.cedarschema", modelSchema("calm"), "p.cedar", `@id("p") permit (principal, action, resource);`)
	why = "nothing is wrong"
	plain, err := applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "calm", BreakGlass: &why}, "schema.cedarschema", modelSchema("calm"), "p.cedar", `@id("q") permit (principal, action, resource);`)
	if err != nil || plain.Bundle.BreakGlass != "" || len(events(t, s, "break_glass")) != 3 {
		t.Errorf("%v, %v", plain, err)
	}

	// The rules of the organization can forbid it, and nothing else of what the caller may do.
	s.MustApply("admin-local", "schema.cedarschema", "", "p.cedar", `@id("never") forbid (principal, action == Cedarpost::Action::"BreakGlass", resource);`)
	servertest.WantCode(t, by(breaker, "now", "// 4\n"), connect.CodePermissionDenied, "admin-local/never")
	_, err = breaker.CheckChange(t.Context(), &cedarpostv1.CheckChangeRequest{Id: stale.Change.Id})
	if err != nil {
		t.Error(err)
	}
	mustVerify(t, s.URL)
	exec(t, s.URL, `update bundles set break_glass = '' where version = 2`)
	if _, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, s.URL), decisionlog.Verification{History: true}); err == nil {
		t.Error("somebody took the mark of break-glass away, and the log does not show it")
	}
}

// lockedWriter lets several goroutines write.
type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.w.Write(p)
}

// An approval that has expired is shown as expired, does not count, and can be given again.
func TestExpiredApprovalIsGivenAgain(t *testing.T) {
	t.Parallel()
	h := newHouse(t, "name: doc\napprovals: 1\n")
	c := h.create(extra(1))
	if err := approve(t, h.approver, c); err != nil {
		t.Fatal(err)
	}
	// As if it had been given years ago.
	exec(t, h.URL, `update entities set attrs = jsonb_set(attrs, '{approvals,0,at}', '"2020-01-02T03:04:05Z"') where type = 'Cedarpost::Change' and until is null`)
	shown := h.get(c.Id)
	if v := shown.Change.Approvals; len(v) != 1 || !v[0].Expired || v[0].ExpiresAt.AsTime().Year() != 2020 || len(shown.BlockedBy) != 1 || !strings.Contains(shown.BlockedBy[0], "has 0, and 1 approval that expired after 30d") {
		t.Errorf("%v", shown)
	}
	servertest.WantCode(t, publish(t, h.publisher, c), connect.CodeFailedPrecondition, "has 0, and 1 approval that expired after 30d")
	if err := approve(t, h.approver, c); err != nil {
		t.Fatal(err)
	}
	if v := h.get(c.Id).Change.Approvals; len(v) != 1 || v[0].Expired {
		t.Errorf("%v", v)
	}
	if err := publish(t, h.publisher, c); err != nil {
		t.Error(err)
	}
}

// An author with another key, and without the role of an author, is an author nevertheless.
func TestAttackApproveWithAnotherKey(t *testing.T) {
	t.Parallel()
	h := newHouse(t, "name: doc\napprovals: 1\n")
	c := h.create(extra(1))
	key, err := accessOf(h.Server, h.Token).RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: "author"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := accessOf(h.Server, h.Token).DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "author", Role: access.PolicyAuthor, Bundle: "doc"}); err != nil {
		t.Fatal(err)
	}
	again := cedarpostv1connect.NewPolicyServiceClient(h.Client(h.Admin, key.Secret))
	servertest.WantCode(t, approve(t, again, c), connect.CodeFailedPrecondition, "author edited the change doc-1, and its authors cannot approve it")
	servertest.WantCode(t, publish(t, h.publisher, c), connect.CodeFailedPrecondition, "needs 1 approval and has 0")
	t.Log("attack: an author approves the own change with another key: 1 of 1 refused")
}

// With approvals switched off, as in development, the other rules stay.
func TestNoApprovals(t *testing.T) {
	t.Parallel()
	s := servertest.New(t, func(c *server.Config) { c.NoApprovals = true })
	files := func(n int) []string {
		return []string{"bundle.yaml", twoRule, "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies + fmt.Sprintf("// %d\n", n)}
	}
	s.MustApply("doc", files(1)...)
	if res := s.MustApply("doc", files(2)...); res.Bundle.BreakGlass != "" || res.Bundle.Approvals != 2 {
		t.Errorf("%v", res)
	}
	c, err := s.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "t", Edits: []*cedarpostv1.FileEdit{putFile("more.cedar", "//\n")}})
	if err != nil || c.Change.ApprovalsNeeded != 0 {
		t.Fatalf("%v, %v", c, err)
	}
	if _, err := s.Policies.DeclineChange(t.Context(), &cedarpostv1.DeclineChangeRequest{Id: c.Change.Id, Digest: c.Change.Digest}); err != nil {
		t.Fatal(err)
	}
	servertest.WantCode(t, publish(t, s.Policies, c.Change), connect.CodeFailedPrecondition, "was declined")
	// A server that asks for approvals does so for what was published without.
	strict := servertest.On(t, s.URL)
	strict.UseKey(s.Token)
	_, err = strict.Apply("doc", servertest.Files(files(3)...))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "need 2 approvals")
}
