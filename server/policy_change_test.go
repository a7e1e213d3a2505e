package server_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// house is a server with the bundle doc, whose changes need approvals, and a caller of each kind.
type house struct {
	*servertest.Server
	t                                          *testing.T
	author, other, approver, second, publisher cedarpostv1connect.PolicyServiceClient
}

const noRule, twoRule = "name: doc\n", "name: doc\napprovals: 2\n"

func newHouse(t *testing.T, manifest string) *house {
	t.Helper()
	return newHouseOn(t, servertest.New(t), manifest)
}

func newHouseOn(t *testing.T, s *servertest.Server, manifest string) *house {
	t.Helper()
	h := &house{Server: s, t: t}
	breakIn(t, h.Server, "doc", "bundle.yaml", manifest, "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies, "more/extra.cedar", "// nothing yet\n")
	h.author = policiesOf(t, h.Server, "author", grant(access.PolicyAuthor, "doc"), grant(access.PolicyApprover, "doc"))
	h.other = policiesOf(t, h.Server, "other", grant(access.PolicyAuthor, "doc"), grant(access.PolicyPublisher, "doc"))
	h.approver = policiesOf(t, h.Server, "approver", grant(access.PolicyApprover, "doc"), grant(access.PolicyAuthor, "doc"))
	h.second = policiesOf(t, h.Server, "second", grant(access.PolicyApprover, "doc"))
	h.publisher = policiesOf(t, h.Server, "publisher", grant(access.PolicyPublisher, "doc"))
	return h
}

func putFile(path, content string) *cedarpostv1.FileEdit {
	return &cedarpostv1.FileEdit{Path: path, Edit: &cedarpostv1.FileEdit_Content{Content: []byte(content)}}
}

func removeFile(path string) *cedarpostv1.FileEdit {
	return &cedarpostv1.FileEdit{Path: path, Edit: &cedarpostv1.FileEdit_Removed{Removed: true}}
}

// extra is a policy for more/extra.cedar.
func extra(n int) *cedarpostv1.FileEdit {
	return putFile("more/extra.cedar", fmt.Sprintf("@id(\"extra\") permit (principal, action == Doc::Action::\"Read\", resource) when { principal.level > %d };\n", n))
}

func (h *house) create(edits ...*cedarpostv1.FileEdit) *cedarpostv1.BundleChange {
	h.t.Helper()
	res, err := h.author.CreateChange(h.t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "a change", Reason: "it is needed", Edits: edits})
	if err != nil {
		h.t.Fatal(err)
	}
	return res.Change
}

func (h *house) update(c *cedarpostv1.BundleChange, edits ...*cedarpostv1.FileEdit) *cedarpostv1.BundleChange {
	h.t.Helper()
	res, err := h.author.UpdateChange(h.t.Context(), &cedarpostv1.UpdateChangeRequest{Id: c.Id, Edits: edits})
	if err != nil {
		h.t.Fatal(err)
	}
	return res.Change
}

func approve(t *testing.T, by cedarpostv1connect.PolicyServiceClient, c *cedarpostv1.BundleChange) error {
	t.Helper()
	return second(by.ApproveChange(t.Context(), &cedarpostv1.ApproveChangeRequest{Id: c.Id, Digest: c.Digest, Reason: "fine"}))
}

func publish(t *testing.T, by cedarpostv1connect.PolicyServiceClient, c *cedarpostv1.BundleChange) error {
	t.Helper()
	return second(by.PublishChange(t.Context(), &cedarpostv1.PublishChangeRequest{Id: c.Id, Digest: c.Digest}))
}

func (h *house) get(id string) *cedarpostv1.GetChangeResponse {
	h.t.Helper()
	res, err := h.author.GetChange(h.t.Context(), &cedarpostv1.GetChangeRequest{Id: id})
	if err != nil {
		h.t.Fatal(err)
	}
	return res
}

func (h *house) live() *cedarpostv1.BundleVersion {
	h.t.Helper()
	list, err := h.Policies.ListVersions(h.t.Context(), &cedarpostv1.ListVersionsRequest{Bundle: "doc", PageSize: 1})
	if err != nil {
		h.t.Fatal(err)
	}
	return list.Versions[0]
}

// dawdle makes some calls that change nothing, so that the next call meets another one at different moments.
func (h *house) dawdle(c *cedarpostv1.BundleChange, calls int) {
	for range calls {
		if _, err := h.second.GetChange(h.t.Context(), &cedarpostv1.GetChangeRequest{Id: c.Id}); err != nil {
			h.t.Error(err)
		}
	}
}

// A change is made, edited, checked, approved by two others and published. Each step is in the log with
// the digests of the states before and after.
func TestChange(t *testing.T) {
	t.Parallel()
	h := newHouse(t, twoRule)
	c := h.create(extra(5), removeFile("policies.cedar"), removeFile("not-there.cedar"))
	if c.Id != "doc-1" || c.State != cedarpostv1.BundleChange_OPEN || c.BaseVersion != 1 || !slices.Equal(c.Authors, []string{"author"}) || c.CreatedAt == nil {
		t.Errorf("%v", c)
	}
	res, err := h.author.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: c.Id, IfDigest: c.Digest, Revert: []string{"policies.cedar"}, Edits: []*cedarpostv1.FileEdit{
		extra(3), {Path: "more/extra.cedar", Edit: &cedarpostv1.FileEdit_Append{Append: []byte("// and a comment\n")}}, putFile("tests.yaml", "checks: []\n"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.author.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: c.Id, IfDigest: c.Digest, Edits: []*cedarpostv1.FileEdit{extra(1)}})
	servertest.WantCode(t, err, connect.CodeAborted, "the change doc-1 was edited")
	c = res.Change
	got := h.get(c.Id)
	if len(got.Files) != 2 || got.Files[0].Path != "more/extra.cedar" || !strings.Contains(got.Files[0].Text, "+// and a comment\n") || got.Files[1].Kind != cedarpostv1.FileDiff_ADDED ||
		got.ApprovalsNeeded != 2 || got.LiveVersion != 1 || len(got.BlockedBy) != 1 || !strings.Contains(got.BlockedBy[0], "needs 2 approvals and has 0") {
		t.Errorf("%v", got)
	}
	check, err := h.approver.CheckChange(t.Context(), &cedarpostv1.CheckChangeRequest{Id: c.Id})
	if err != nil || !check.Ok || len(check.Policies) != 1 || check.Policies[0].Id != "extra" || check.Policies[0].Kind != cedarpostv1.PolicyDiff_ADDED || check.Policies[0].Effect != "permit" || len(check.BlockedBy) != 1 {
		t.Errorf("%v, %v", check, err)
	}

	servertest.WantCode(t, publish(t, h.publisher, c), connect.CodeFailedPrecondition, "needs 2 approvals and has 0")
	_, err = h.Apply("doc", servertest.Files("schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "changes of the bundle doc need 2 approvals, so it is published from a change: `cedarpost change create DIR")
	servertest.WantCode(t, approve(t, h.author, c), connect.CodeFailedPrecondition, "author edited the change doc-1, and its authors cannot approve it")
	for range 2 { // the second time changes nothing
		if err := approve(t, h.approver, c); err != nil {
			t.Error(err)
		}
	}
	servertest.WantCode(t, publish(t, h.publisher, c), connect.CodeFailedPrecondition, "needs 2 approvals and has 1")
	if err := approve(t, h.second, c); err != nil {
		t.Error(err)
	}
	servertest.WantCode(t, publish(t, h.second, c), connect.CodePermissionDenied, "PublishChange")
	before := events(t, h.Server, "change")
	made, err := h.publisher.PublishChange(t.Context(), &cedarpostv1.PublishChangeRequest{Id: c.Id, Digest: c.Digest})
	if err != nil || made.Bundle.Version != 2 || made.Bundle.Digest != c.Digest || made.Bundle.Change != c.Id || made.Bundle.Message != "a change" || made.Change.State != cedarpostv1.BundleChange_PUBLISHED || made.Change.Version != 2 {
		t.Fatalf("%v, %v", made, err)
	}
	steps := events(t, h.Server, "change")[len(before):]
	slices.SortFunc(steps, func(a, b *cedarpostv1.EventRecord) int { return int(a.Revision - b.Revision) })
	if len(steps) != 2 || steps[0].Subject != "doc" || string(steps[0].GetChange().After) != c.Digest || steps[1].Subject != `Cedarpost::Change::"doc-1"` {
		t.Errorf("%v", steps)
	}
	var after []byte
	var names []string
	for _, e := range events(t, h.Server, "change") {
		if e.Subject != `Cedarpost::Change::"doc-1"` {
			continue
		}
		d := e.GetChange()
		if names = append(names, e.Caller+" "+d.Operation); !bytes.Equal(d.Before, after) || len(d.After) == 0 {
			t.Errorf("%s: the state before is not that after the step before it", d.Operation)
		}
		after = d.After
	}
	if want := []string{"author CreateChange", "author UpdateChange", "approver ApproveChange", "second ApproveChange", "publisher PublishChange"}; !slices.Equal(names, want) {
		t.Errorf("steps %q, want %q", names, want)
	}
	v, files := version(t, h.Server, "doc", 2)
	if len(v.ApprovedBy) != 2 || v.ApprovedBy[0].Caller != "approver" || v.ApprovedBy[1].Reason != "fine" || bundle.Digest(files) != c.Digest || len(files) != 5 {
		t.Errorf("%v with %d files", v, len(files))
	}
	// A published change is at its end.
	for what, err := range map[string]error{
		"publish": publish(t, h.publisher, c), "approve": approve(t, h.second, c),
		"edit":    second(h.author.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: c.Id, Edits: []*cedarpostv1.FileEdit{extra(1)}})),
		"discard": second(h.author.DiscardChange(t.Context(), &cedarpostv1.DiscardChangeRequest{Id: c.Id})),
	} {
		if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "was published as version 2") {
			t.Errorf("%s: %v", what, err)
		}
	}
	mustVerify(t, h.URL)
}

// Edits that make no sense are refused, and a change that is no bundle can be stored and not published.
func TestChangeEdits(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	for _, c := range []struct {
		edits []*cedarpostv1.FileEdit
		text  string
	}{
		{[]*cedarpostv1.FileEdit{putFile("README.md", "x")}, `"README.md" is not part of a bundle`},
		{[]*cedarpostv1.FileEdit{putFile("../x.cedar", "x")}, "is not a path inside a bundle"},
		{[]*cedarpostv1.FileEdit{putFile("X.CEDAR", "x")}, "would not be read"},
		{[]*cedarpostv1.FileEdit{extra(1), extra(2)}, "is edited twice"},
		{[]*cedarpostv1.FileEdit{{Path: "a.cedar", Edit: &cedarpostv1.FileEdit_Append{Append: []byte("x")}}}, "nothing can be appended"},
		{[]*cedarpostv1.FileEdit{{Path: "a.cedar"}}, "edit"},
	} {
		_, err := h.author.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "t", Edits: c.edits})
		servertest.WantCode(t, err, connect.CodeInvalidArgument, c.text)
	}
	none, zero := int64(9), int64(0)
	_, err := h.author.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "t", BaseVersion: &none})
	servertest.WantCode(t, err, connect.CodeNotFound, "version 9")
	_, err = h.author.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "t", BaseVersion: &zero})
	servertest.WantCode(t, err, connect.CodeAborted, "version 1 is live")
	_, err = h.author.GetChange(t.Context(), &cedarpostv1.GetChangeRequest{Id: "doc-7"})
	servertest.WantCode(t, err, connect.CodeNotFound, `"doc-7"`)

	c := h.create(putFile("more/extra.cedar", "@id(\"extra\") permit (nobody);\n"))
	check, err := h.author.CheckChange(t.Context(), &cedarpostv1.CheckChangeRequest{Id: c.Id})
	if err != nil || check.Ok || len(check.Findings) != 1 || check.Findings[0].File != "more/extra.cedar" || check.Findings[0].Severity != cedarpostv1.Finding_ERROR {
		t.Errorf("%v, %v", check, err)
	}
	servertest.WantCode(t, publish(t, h.publisher, c), connect.CodeInvalidArgument, "more/extra.cedar")
	c = h.update(c, putFile("schema.cedarschema", "\xff"))
	if check, err = h.author.CheckChange(t.Context(), &cedarpostv1.CheckChangeRequest{Id: c.Id}); err != nil || check.Ok || !strings.Contains(check.Findings[0].Message, "UTF-8") {
		t.Errorf("%v, %v", check, err)
	}
	c = h.update(c, putFile("schema.cedarschema", servertest.DocSchema), extra(2),
		putFile("policies.cedar", strings.Replace(servertest.DocPolicies, "resource.size < 10", "resource.size < 11", 1)),
		putFile("tests.yaml", `checks: [{name: t, principal: 'Doc::User::"a"', action: 'Doc::Action::"Read"', resource: 'Doc::Paper::"p"', expect: allow}]`))
	check, err = h.author.CheckChange(t.Context(), &cedarpostv1.CheckChangeRequest{Id: c.Id})
	if err != nil || check.Ok || len(check.Tests) != 1 || len(check.Tests[0].Failures) == 0 || !check.Findings[0].Test {
		t.Errorf("%v, %v", check, err)
	}
	if len(check.Policies) != 2 || check.Policies[0].Id != "authors" || !slices.Equal(check.Policies[0].Parts, []string{"conditions"}) {
		t.Errorf("%v", check.Policies)
	}
	servertest.WantCode(t, publish(t, h.publisher, c), connect.CodeInvalidArgument, "1 of 1 tests failed")
	c = h.update(c, removeFile("tests.yaml"))
	if err := publish(t, h.publisher, c); err != nil {
		t.Error(err)
	}
	empty := h.create()
	servertest.WantCode(t, publish(t, h.publisher, empty), connect.CodeFailedPrecondition, "the change doc-2 changes nothing")

	// A change can make a new bundle, and its files can be larger than a message.
	fresh := policiesOf(t, h.Server, "fresh", grant(access.PolicyAuthor, "new"), grant(access.PolicyPublisher, "new"))
	line := []byte("// " + strings.Repeat("x", 1<<20-4) + "\n")
	res, err := fresh.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "new", Title: "t", BaseVersion: &zero, Edits: []*cedarpostv1.FileEdit{
		putFile("schema.cedarschema", "namespace New { entity E; action A appliesTo { principal: [E], resource: [E] }; }"), putFile("a.cedar", "@id(\"p\") permit (principal, action, resource);\n"),
	}})
	for range 5 {
		if err != nil {
			t.Fatal(err)
		}
		var up *cedarpostv1.UpdateChangeResponse
		up, err = fresh.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: "new-1", IfDigest: res.Change.Digest, Edits: []*cedarpostv1.FileEdit{{Path: "a.cedar", Edit: &cedarpostv1.FileEdit_Append{Append: line}}}})
		res = &cedarpostv1.CreateChangeResponse{Change: up.GetChange()}
	}
	shown, err := fresh.GetChange(t.Context(), &cedarpostv1.GetChangeRequest{Id: "new-1"})
	if err != nil || !shown.Files[0].Omitted || shown.Files[1].Text == "" || shown.LiveVersion != 0 || len(shown.BlockedBy) > 0 {
		t.Errorf("%v, %v", shown, err)
	}
	if err := publish(t, fresh, res.Change); err != nil {
		t.Error(err)
	}
	if v, files := version(t, h.Server, "new", 1); len(files[0].Content) < 5<<20 || v.Change != "new-1" {
		t.Errorf("%v", v)
	}

	// What is listed is what the caller may see, also of bundles that are not published.
	list := func(by cedarpostv1connect.PolicyServiceClient, req *cedarpostv1.ListChangesRequest) (ids []string) {
		t.Helper()
		for {
			res, err := by.ListChanges(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range res.Changes {
				ids = append(ids, c.Id)
			}
			if req.PageToken = res.NextPageToken; req.PageToken == "" {
				return ids
			}
		}
	}
	if got, want := list(h.Policies, &cedarpostv1.ListChangesRequest{PageSize: 1}), []string{"doc-2", "doc-1", "new-1"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := list(fresh, &cedarpostv1.ListChangesRequest{}); !slices.Equal(got, []string{"new-1"}) {
		t.Errorf("%v", got)
	}
	if got := list(h.author, &cedarpostv1.ListChangesRequest{Bundle: "doc", State: cedarpostv1.BundleChange_OPEN}); !slices.Equal(got, []string{"doc-2"}) {
		t.Errorf("%v", got)
	}
	if res, err := h.author.DiscardChange(t.Context(), &cedarpostv1.DiscardChangeRequest{Id: "doc-2"}); err != nil || res.Change.State != cedarpostv1.BundleChange_DISCARDED {
		t.Errorf("%v, %v", res, err)
	}
	servertest.WantCode(t, publish(t, h.publisher, empty), connect.CodeFailedPrecondition, "was discarded")
}

// A change whose base moved is not published before it is rebased. What both sides changed is named.
func TestRebase(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	mine, theirs := h.create(extra(1)), h.create(extra(2), putFile("tests.yaml", "checks: []\n"))
	clean := h.create(putFile("clean.cedar", "// mine\n"))
	if err := publish(t, h.publisher, theirs); err != nil {
		t.Fatal(err)
	}
	servertest.WantCode(t, publish(t, h.publisher, mine), connect.CodeFailedPrecondition, "the change doc-1 is of version 1 of the bundle doc, and version 2 is live; `cedarpost change edit doc-1 --rebase`")
	rebase := func(c *cedarpostv1.BundleChange, edits ...*cedarpostv1.FileEdit) (*cedarpostv1.UpdateChangeResponse, error) {
		return h.author.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: c.Id, Rebase: true, Edits: edits})
	}
	_, err := rebase(mine)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "the change doc-1 conflicts with version 2 in 1 file: more/extra.cedar")
	if found := findings(t, err); len(found) != 1 || found[0].File != "more/extra.cedar" {
		t.Errorf("%v", found)
	}
	if got := h.get(mine.Id).Change; got.BaseVersion != 1 || got.Digest != mine.Digest {
		t.Errorf("a refused rebase changed the change: %v", got)
	}
	res, err := rebase(mine, extra(3))
	if err != nil || res.Change.BaseVersion != 2 {
		t.Fatalf("%v, %v", res, err)
	}
	if got := h.get(mine.Id); len(got.Files) != 1 || !strings.Contains(got.Files[0].Text, "> 2 };") || !strings.Contains(got.Files[0].Text, "> 3 };") {
		t.Errorf("%v", got.Files)
	}
	if err := publish(t, h.publisher, res.Change); err != nil {
		t.Error(err)
	}
	if res, err = rebase(clean); err != nil || res.Change.BaseVersion != 3 || res.Change.Digest == clean.Digest {
		t.Fatalf("%v, %v", res, err)
	}
	again, err := rebase(clean)
	if err != nil || again.Revision.Number != res.Revision.Number {
		t.Errorf("a rebase onto the base: %v, %v", again, err)
	}
	if err := publish(t, h.publisher, res.Change); err != nil {
		t.Error(err)
	}
	if _, files := version(t, h.Server, "doc", 4); len(files) != 6 || !strings.Contains(string(files[2].Content), "> 3 };") {
		t.Errorf("%d files", len(files))
	}
}

// An approval or a decline is about one state of a change. An edit voids approvals; what was declined is
// not published, also after an edit back to it.
func TestVerdictsAreAboutADigest(t *testing.T) {
	t.Parallel()
	h := newHouse(t, "name: doc\napprovals: 1\n")
	first := h.create(extra(1))
	if err := approve(t, h.approver, first); err != nil {
		t.Fatal(err)
	}
	edited := h.update(first, extra(2))
	if edited.Digest == first.Digest || len(edited.Approvals) > 0 {
		t.Errorf("%v", edited)
	}
	servertest.WantCode(t, publish(t, h.publisher, first), connect.CodeAborted, "was edited")
	servertest.WantCode(t, publish(t, h.publisher, edited), connect.CodeFailedPrecondition, "needs 1 approval and has 0")
	servertest.WantCode(t, approve(t, h.approver, first), connect.CodeAborted, "was edited")
	back := h.update(first, extra(1))
	if back.Digest != first.Digest {
		t.Fatal("the same edits have another digest")
	}
	servertest.WantCode(t, publish(t, h.publisher, back), connect.CodeFailedPrecondition, "needs 1 approval and has 0")
	if _, err := h.second.DeclineChange(t.Context(), &cedarpostv1.DeclineChangeRequest{Id: back.Id, Digest: back.Digest, Reason: "too open"}); err != nil {
		t.Fatal(err)
	}
	if err := approve(t, h.approver, back); err != nil {
		t.Fatal(err)
	}
	servertest.WantCode(t, publish(t, h.publisher, back), connect.CodeFailedPrecondition, "was declined by second: too open")
	h.update(back, extra(2))
	back = h.update(back, extra(1))
	if err := approve(t, h.approver, back); err != nil {
		t.Fatal(err)
	}
	servertest.WantCode(t, publish(t, h.publisher, back), connect.CodeFailedPrecondition, "was declined by second: too open")
	last := h.update(back, extra(3))
	if err := approve(t, h.approver, last); err != nil {
		t.Fatal(err)
	}
	// An approver who edits the title is an author from then on.
	title := "another title"
	if res, err := h.approver.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: last.Id, Title: &title}); err != nil || res.Change.Title != title || res.Change.Digest != last.Digest || len(res.Change.Approvals) != 0 {
		t.Errorf("%v, %v", res, err)
	}
	servertest.WantCode(t, publish(t, h.publisher, last), connect.CodeFailedPrecondition, "needs 1 approval and has 0")
	if err := approve(t, h.second, last); err != nil {
		t.Fatal(err)
	}
	if err := publish(t, h.publisher, last); err != nil {
		t.Error(err)
	}
}

// One caller with the roles of an author and a publisher tries to publish without the approval of
// another: each way is refused.
func TestAttackShedApprovals(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	breakIn(t, h.Server, "doc", "bundle.yaml", twoRule, "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	mallory := policiesOf(t, h.Server, "mallory", grant(access.PolicyAuthor, "doc"), grant(access.PolicyPublisher, "doc"), grant(access.PolicyApprover, "doc"))
	alone := *h.Server
	alone.Policies = mallory
	open := `@id("open") permit (principal, action, resource);`
	tries := 0
	refused := func(what string, err error) {
		t.Helper()
		if tries++; err == nil {
			t.Errorf("%s: it was published", what)
		}
	}
	apply := func(manifest string) error {
		_, err := alone.Apply("doc", servertest.Files("bundle.yaml", manifest, "schema.cedarschema", servertest.DocSchema, "open.cedar", open))
		return err
	}
	shed := func(manifest string) *cedarpostv1.BundleChange {
		res, err := mallory.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "t", Edits: []*cedarpostv1.FileEdit{putFile("bundle.yaml", manifest), putFile("open.cedar", open)}})
		if err != nil {
			t.Fatal(err)
		}
		return res.Change
	}
	for _, manifest := range []string{twoRule, noRule, "name: doc\napprovals: 0\n"} {
		refused("apply", apply(manifest))
		c := shed(manifest)
		refused("a change without approvals", publish(t, mallory, c))
		refused("own approval", approve(t, mallory, c))
		refused("a change with an own approval", publish(t, mallory, c))
	}
	// Another caller of the attacker edits the change, so that the author could approve it.
	c := shed(noRule)
	if _, err := h.author.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: c.Id, Edits: []*cedarpostv1.FileEdit{extra(1)}}); err != nil {
		t.Fatal(err)
	}
	c = h.get(c.Id).Change
	refused("approval by one author of two", approve(t, mallory, c))
	refused("approval by the other author", approve(t, h.author, c))
	// A rollback to a time before the rule keeps the rule.
	if _, err := mallory.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: "r"}); err != nil {
		t.Fatal(err)
	}
	refused("apply on the frozen bundle", apply(noRule))
	refused("a change of the frozen bundle", publish(t, mallory, shed(noRule)))
	if _, err := mallory.UnfreezeBundle(t.Context(), &cedarpostv1.UnfreezeBundleRequest{Bundle: "doc"}); err != nil {
		t.Fatal(err)
	}
	refused("apply after a rollback", apply(noRule))
	refused("a change after a rollback", publish(t, mallory, shed(noRule)))
	if n := h.live().Approvals; n != 2 {
		t.Errorf("the rule is %d approvals", n)
	}
	// Two others can lower the rule.
	c = shed("name: doc\napprovals: 0\n")
	for _, by := range []cedarpostv1connect.PolicyServiceClient{h.approver, h.second} {
		if err := approve(t, by, c); err != nil {
			t.Error(err)
		}
	}
	if err := publish(t, mallory, c); err != nil || h.live().Approvals != 0 {
		t.Errorf("%v", err)
	}
	t.Logf("attack: an author who may publish and approve tries %d ways around 2 approvals; published: 0", tries)
}

// Two authors publish changes of the same version at the same time, over two servers: one is published,
// and the other one is told of it.
func TestTwoAuthorsPublishAtOnce(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	b := servertest.On(t, h.URL)
	b.UseKey(h.Token)
	for round := range 3 {
		base := h.live().Version
		changes := []*cedarpostv1.BundleChange{h.create(extra(10 + round)), h.create(extra(20+round), putFile("tests.yaml", fmt.Sprintf("# %d\n", round)))}
		errs := make([]error, 2)
		var wg sync.WaitGroup
		for i, by := range []cedarpostv1connect.PolicyServiceClient{h.publisher, b.Policies} {
			wg.Go(func() { errs[i] = publish(t, by, changes[i]) })
		}
		wg.Wait()
		i := slices.IndexFunc(errs, func(err error) bool { return err == nil })
		if i < 0 {
			t.Fatalf("neither was published: %v", errs)
		}
		servertest.WantCode(t, errs[1-i], connect.CodeFailedPrecondition, fmt.Sprintf("version %d is live", base+1))
		if live := h.live(); live.Version != base+1 || live.Digest != changes[i].Digest || h.get(changes[1-i].Id).Change.State != cedarpostv1.BundleChange_OPEN {
			t.Errorf("%v after %v", live, errs)
		}
		if _, err := h.author.DiscardChange(t.Context(), &cedarpostv1.DiscardChangeRequest{Id: changes[1-i].Id}); err != nil {
			t.Error(err)
		}
	}
	mustVerify(t, h.URL)
}

// An approval and an edit come at the same time. Whatever comes first, the approval never counts for what
// the edit made.
func TestAttackApproveRacesEdit(t *testing.T) {
	t.Parallel()
	h := newHouse(t, "name: doc\napprovals: 1\n")
	approved, late := 0, 0
	for round := range 12 {
		c := h.create(extra(1))
		var wg sync.WaitGroup
		var approval, edit error
		var edited *cedarpostv1.UpdateChangeResponse
		wg.Go(func() {
			h.dawdle(c, round)
			approval = approve(t, h.approver, c)
		})
		wg.Go(func() {
			edited, edit = h.author.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: c.Id, Edits: []*cedarpostv1.FileEdit{extra(100 + round)}})
		})
		wg.Wait()
		if edit != nil {
			t.Fatal(edit)
		}
		if approval == nil {
			approved++
		} else {
			late++
			servertest.WantCode(t, approval, connect.CodeAborted, "was edited")
		}
		if now := h.get(c.Id); len(now.Change.Approvals) > 0 || now.Change.Digest != edited.Change.Digest {
			t.Errorf("%v", now)
		}
		servertest.WantCode(t, publish(t, h.publisher, edited.Change), connect.CodeFailedPrecondition, "needs 1 approval and has 0")
	}
	t.Logf("attack: an author edits while another approves: %d approvals before the edit, %d after it; changes with an approval of another state: 0", approved, late)
}

// A decline and a publish come at the same time: either the change is published, and the decline is told
// so, or it is declined and stays unpublished.
func TestAttackDeclineRacesPublish(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	declined, published := 0, 0
	for round := range 10 {
		c := h.create(extra(round + 1))
		var wg sync.WaitGroup
		var decline, publication error
		wg.Go(func() {
			h.dawdle(c, round)
			decline = second(h.second.DeclineChange(t.Context(), &cedarpostv1.DeclineChangeRequest{Id: c.Id, Digest: c.Digest, Reason: "no"}))
		})
		wg.Go(func() { publication = publish(t, h.publisher, c) })
		wg.Wait()
		now := h.get(c.Id).Change
		switch {
		case publication == nil && decline != nil:
			published++
			servertest.WantCode(t, decline, connect.CodeFailedPrecondition, "was published as version")
			if now.State != cedarpostv1.BundleChange_PUBLISHED || len(now.Declines) > 0 {
				t.Errorf("%v", now)
			}
		case publication != nil && decline == nil:
			declined++
			servertest.WantCode(t, publication, connect.CodeFailedPrecondition, "was declined by second: no")
			if now.State != cedarpostv1.BundleChange_OPEN || h.live().Digest == c.Digest {
				t.Errorf("%v", now)
			}
		default:
			t.Errorf("publish: %v, decline: %v", publication, decline)
		}
	}
	t.Logf("attack: a publish races a decline: %d declined, %d published before; both: 0", declined, published)
}

// Each step is one transaction. If its last statement fails, as in a crash, nothing of it is stored, and
// it succeeds when it is tried again.
func TestStepsHappenWholeOrNot(t *testing.T) {
	t.Parallel()
	h := newHouse(t, noRule)
	exec(t, h.URL, `create function break() returns trigger language plpgsql as $$ begin raise exception 'broken'; end $$`)
	c := h.create(extra(1))
	unedited := h.create(extra(2))
	state := func() string {
		var text string
		err := servertest.Session(t, h.URL).QueryRow(t.Context(), `
			select concat_ws(' ', (select n from revision), (select count(*) from bundles), (select count(*) from entities), (select count(*) from events where kind in ('change', 'break_glass')),
				(select string_agg(change || path || encode(content, 'hex'), ',' order by change, path) from change_edits))`).Scan(&text)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	for _, step := range []struct {
		name, table string
		call        func() error
	}{
		{"create", "change_edits", func() error {
			return second(h.author.CreateChange(context.Background(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "t", Edits: []*cedarpostv1.FileEdit{extra(3)}}))
		}},
		{"edit", "change_edits", func() error {
			return second(h.author.UpdateChange(context.Background(), &cedarpostv1.UpdateChangeRequest{Id: unedited.Id, Edits: []*cedarpostv1.FileEdit{extra(4)}}))
		}},
		{"approve", "entities", func() error { return approve(t, h.approver, c) }},
		{"publish", "entities", func() error { return publish(t, h.publisher, c) }},
		{"rollback", "entities", func() error {
			return second(h.publisher.RollbackVersion(context.Background(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: "r"}))
		}},
		{"break-glass", "events", func() error {
			why := "r"
			return second(applyOnce(context.Background(), h.Server, &cedarpostv1.BundleHeader{Name: "doc", BreakGlass: &why}, "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies))
		}},
		{"unfreeze", "revision_entries", func() error {
			return second(h.publisher.UnfreezeBundle(context.Background(), &cedarpostv1.UnfreezeBundleRequest{Bundle: "doc"}))
		}},
	} {
		before := state()
		exec(t, h.URL, `create trigger break before insert or update on `+step.table+` for each row execute function break()`)
		servertest.WantCode(t, step.call(), connect.CodeUnavailable, "")
		exec(t, h.URL, `drop trigger break on `+step.table)
		if after := state(); after != before {
			t.Errorf("%s left something behind: %s, before %s", step.name, after, before)
		}
		if err := step.call(); err != nil {
			t.Errorf("%s, tried again: %v", step.name, err)
		}
		if after := state(); after == before {
			t.Errorf("%s, tried again, stored nothing", step.name)
		}
	}
	exec(t, h.URL, `drop function break`) // the schema is that of the migrations again
	mustVerify(t, h.URL)
}
