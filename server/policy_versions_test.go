package server_test

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// policiesOf returns a client with the key of a new caller.
func policiesOf(t *testing.T, s *servertest.Server, name string, grants ...*cedarpostv1.Grant) cedarpostv1connect.PolicyServiceClient {
	t.Helper()
	return cedarpostv1connect.NewPolicyServiceClient(s.Client(s.Admin, newCaller(t, s, name, grants...)))
}

// version reads a version with its files.
func version(t *testing.T, s *servertest.Server, name string, n int64) (v *cedarpostv1.BundleVersion, files []bundle.File) {
	t.Helper()
	stream, err := s.Policies.GetVersion(t.Context(), &cedarpostv1.GetVersionRequest{Bundle: name, Version: n})
	if err != nil {
		t.Fatal(err)
	}
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return v, files
		}
		if err != nil {
			t.Fatal(err)
		}
		if f := msg.GetFile(); f == nil {
			v = msg.GetVersion()
		} else if k := len(files); k > 0 && files[k-1].Path == f.Path {
			files[k-1].Content = append(files[k-1].Content, f.Data...)
		} else {
			files = append(files, bundle.File{Path: f.Path, Content: f.Data})
		}
	}
}

// mustVerify verifies the whole log, and the stored history with it.
func mustVerify(t *testing.T, url string) {
	t.Helper()
	done, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, url), decisionlog.Verification{History: true})
	if err != nil || done.History == nil || done.History.Revisions == 0 {
		t.Errorf("the log is not proven: %v, %+v", err, done)
	}
}

// lastChange returns the newest event of a change.
func lastChange(t *testing.T, s *servertest.Server) *cedarpostv1.EventRecord {
	t.Helper()
	list := events(t, s, "change")
	return slices.MaxFunc(list, func(a, b *cedarpostv1.EventRecord) int { return int(a.Revision - b.Revision) })
}

// Each version is kept as it was uploaded, with who published it and why. Pages and differences are
// those of the files.
func TestVersions(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	const long = 3 << 20 // bytes of a file, which comes in parts
	texts := []string{servertest.DocPolicies, servertest.DocPolicies + "// two\n", "", servertest.DocPolicies}
	for i, text := range texts {
		files := []string{"schema.cedarschema", servertest.DocSchema, "README.md", "is not kept"}
		if text != "" {
			files = append(files, "policies.cedar", text)
		}
		if i == 2 {
			files = append(files, "tests.yaml", "# "+strings.Repeat("x", long/8))
		}
		res, err := applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "doc", Message: fmt.Sprint("reason ", i+1)}, files...)
		if err != nil || res.Bundle.Version != int64(i+1) || res.Bundle.Message != fmt.Sprint("reason ", i+1) {
			t.Fatalf("%v, %v", res, err)
		}
		if e := lastChange(t, s); e.GetChange().GetReason() != res.Bundle.Message || string(e.GetChange().GetAfter()) != res.Bundle.Digest {
			t.Errorf("%v", e)
		}
	}
	var got []*cedarpostv1.BundleVersion
	req := &cedarpostv1.ListVersionsRequest{Bundle: "doc", PageSize: 3}
	for {
		res, err := s.Policies.ListVersions(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, res.Versions...)
		if req.PageToken = res.NextPageToken; req.PageToken == "" {
			break
		}
	}
	for i, v := range got {
		b := v
		if n := int64(4 - i); b.Version != n || v.Live != (i == 0) || b.PublishedBy != "bootstrap" || b.PublishedAt == nil || b.Message != fmt.Sprint("reason ", n) || b.Revision == nil {
			t.Errorf("%v", v)
		}
	}
	if len(got) != 4 || got[0].Digest != got[3].Digest {
		t.Errorf("%d versions", len(got))
	}
	v, files := version(t, s, "doc", 2)
	if v.Version != 2 || len(files) != 2 || string(files[0].Content) != texts[1] || bundle.Digest(files) != v.Digest {
		t.Errorf("%v with %d files", v, len(files))
	}
	diff := func(from, to int64) string {
		t.Helper()
		res, err := s.Policies.DiffVersions(t.Context(), &cedarpostv1.DiffVersionsRequest{Bundle: "doc", From: from, To: to})
		if err != nil {
			t.Fatal(err)
		}
		text := ""
		for _, f := range res.Files {
			text += fmt.Sprintf("%s %s %d\n", f.Path, f.Kind, strings.Count(f.Text, "\n"))
		}
		return text
	}
	for _, c := range []struct {
		from, to int64
		want     string
	}{
		{1, 1, ""}, {1, 4, ""}, {4, 1, ""},
		{1, 2, "policies.cedar CHANGED 7\n"}, {2, 1, "policies.cedar CHANGED 7\n"},
		{1, 3, "policies.cedar REMOVED 6\ntests.yaml ADDED 5\n"}, {3, 1, "policies.cedar ADDED 6\ntests.yaml REMOVED 5\n"},
	} {
		if got := diff(c.from, c.to); got != c.want {
			t.Errorf("from %d to %d: %q, want %q", c.from, c.to, got, c.want)
		}
	}
	_, err := s.Policies.ListVersions(t.Context(), &cedarpostv1.ListVersionsRequest{Bundle: "none"})
	servertest.WantCode(t, err, connect.CodeNotFound, `"none"`)
	_, err = s.Policies.DiffVersions(t.Context(), &cedarpostv1.DiffVersionsRequest{Bundle: "doc", From: 1, To: 9})
	servertest.WantCode(t, err, connect.CodeNotFound, "version 9")
	_, err = s.Policies.ListVersions(t.Context(), &cedarpostv1.ListVersionsRequest{Bundle: "other", PageToken: "AAAA"})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "page_token")

	// A publish can name the version that it replaces.
	expect := func(n int64, name string) error {
		_, err := applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: name, ExpectVersion: &n},
			"schema.cedarschema", strings.ReplaceAll(servertest.DocSchema, "namespace Doc", "namespace "+strings.ToUpper(name[:1])+name[1:]))
		return err
	}
	servertest.WantCode(t, expect(3, "doc"), connect.CodeAborted, "version 4 of the bundle doc is live, not 3")
	servertest.WantCode(t, expect(0, "doc"), connect.CodeAborted, "version 4")
	servertest.WantCode(t, expect(1, "new"), connect.CodeAborted, "version 0")
	if err := expect(0, "new"); err != nil {
		t.Error(err)
	}
	if err := expect(4, "doc"); err != nil {
		t.Error(err)
	}
	mustVerify(t, s.URL)
}

// A rollback publishes an earlier version again and freezes the bundle. Then a pipeline cannot publish
// the bad version, until somebody ends the freeze.
func TestRollback(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann", "staff"), servertest.Entity(t, `{"uid":{"type":"Doc::Paper","id":"p"},"attrs":{"readers":{"__entity":{"type":"Doc::Group","id":"staff"}}}}`))
	bad := []string{"schema.cedarschema", servertest.DocSchema, "policies.cedar", `@id("open") permit (principal, action, resource);`}
	s.MustApply("doc", bad...)
	publish := policiesOf(t, s, "pipeline", grant(access.PolicyPublisher, "doc"))
	author := policiesOf(t, s, "author", grant(access.PolicyAuthor, "doc"))

	_, err := author.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: "r"})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "no right to RollbackVersion")
	_, err = publish.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "reason")
	_, err = publish.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 9, Reason: "r"})
	servertest.WantCode(t, err, connect.CodeNotFound, "version 9")
	_, err = publish.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 2, Reason: "r"})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "the same files as version 2")

	res, err := publish.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: "everybody may do everything"})
	if err != nil || res.Bundle.Version != 3 || res.Bundle.RollbackOf != 1 || res.Bundle.Message != "everybody may do everything" {
		t.Fatalf("%v, %v", res, err)
	}
	if got := read(t, s, "eve", nil); got != cedarpostv1.Decision_DENY {
		t.Errorf("after the rollback: %v", got)
	}
	v1, files1 := version(t, s, "doc", 1)
	v3, files3 := version(t, s, "doc", 3)
	if v1.Digest != v3.Digest || bundle.Digest(files1) != bundle.Digest(files3) || !v3.Live || v1.Live {
		t.Errorf("%v, %v", v1, v3)
	}
	log := events(t, s, "change")
	last := log[len(log)-2:] // the publish and the freeze
	slices.SortFunc(last, func(a, b *cedarpostv1.EventRecord) int { return int(a.Revision - b.Revision) })
	for i, e := range last {
		c := e.GetChange()
		if c.Operation != "RollbackVersion" || e.Caller != "pipeline" || c.Reason != "everybody may do everything" || len(c.After) == 0 ||
			e.Subject != []string{"doc", `Cedarpost::BundleFreeze::"doc"`}[i] || (len(c.Before) > 0) != (i == 0) {
			t.Errorf("%v", e)
		}
	}

	// The pipeline applies the bad version again, and anything else; so does an author with a dry run.
	pipeline := *s
	pipeline.Policies = publish
	for _, again := range [][]string{bad, {"schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies}} {
		_, err = applyOnce(t.Context(), &pipeline, &cedarpostv1.BundleHeader{Name: "doc"}, again...)
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, "the bundle doc is frozen, since 20")
	}
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "by pipeline: everybody may do everything; `cedarpost unfreeze doc` ends that")
	dry, err := applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "doc", DryRun: true}, bad...)
	if err != nil || len(dry.Warnings) == 0 || !strings.Contains(dry.Warnings[len(dry.Warnings)-1].Message, "it cannot be published now: the bundle doc is frozen") {
		t.Errorf("%v, %v", dry, err)
	}
	servertest.Eventually(t, "an event of the refusal", func() bool { return len(events(t, s, "publish_refused")) > 0 })

	// A rollback is possible while the bundle is frozen.
	if res, err := publish.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 2, Reason: "no, that was right"}); err != nil || res.Bundle.Version != 4 {
		t.Errorf("%v, %v", res, err)
	}
	list, err := s.Policies.ListBundles(t.Context(), &cedarpostv1.ListBundlesRequest{})
	if err != nil || list.Bundles[0].GetFreeze().GetReason() != "no, that was right" || list.Bundles[0].GetFreeze().GetCaller() != "pipeline" {
		t.Errorf("%v, %v", list, err)
	}
	_, err = author.UnfreezeBundle(t.Context(), &cedarpostv1.UnfreezeBundleRequest{Bundle: "doc"})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "UnfreezeBundle")
	for _, want := range []bool{true, false} {
		if un, err := publish.UnfreezeBundle(t.Context(), &cedarpostv1.UnfreezeBundleRequest{Bundle: "doc"}); err != nil || un.Changed != want {
			t.Errorf("%v, %v", un, err)
		}
	}
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	mustVerify(t, s.URL)
}

// A rollback is refused if stored entities do not fit the schema of the earlier version, also entities
// that are written while it is checked. It names them, and then nothing is changed.
func TestRollbackThatDoesNotFit(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustApply("doc", "schema.cedarschema", strings.Replace(servertest.DocSchema, "nick?: String", "nick?: String, badge?: Long", 1), "policies.cedar", servertest.DocPolicies)
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Doc::User","id":"ann"},"attrs":{"level":1,"badge":7}}`))
	before := revision(t, s)
	_, err := s.Policies.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: "r"})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "1 stored entities do not fit the new schema")
	if found := findings(t, err); len(found) != 1 || !strings.Contains(found[0].Message, `Doc::User::"ann"`) || !strings.Contains(found[0].Message, "badge") {
		t.Errorf("%v", found)
	}
	list, err := s.Policies.ListBundles(t.Context(), &cedarpostv1.ListBundlesRequest{})
	if err != nil || revision(t, s) != before || list.Bundles[0].Freeze != nil || list.Bundles[0].Version != 2 {
		t.Errorf("a refused rollback changed something: %v, %v", list, err)
	}
}

// A freeze keeps the reason of the one who froze the bundle first.
func TestFreeze(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	for i, want := range []bool{true, false} {
		res, err := s.Policies.FreezeBundle(t.Context(), &cedarpostv1.FreezeBundleRequest{Bundle: "doc", Reason: fmt.Sprint("reason ", i)})
		if err != nil || res.Changed != want || res.Freeze.Reason != "reason 0" || res.Freeze.Caller != "bootstrap" || res.Freeze.At == nil {
			t.Errorf("%v, %v", res, err)
		}
	}
	_, err := s.Policies.FreezeBundle(t.Context(), &cedarpostv1.FreezeBundleRequest{Bundle: "none"})
	servertest.WantCode(t, err, connect.CodeNotFound, `"none"`)
	// What the service stores about itself is not for readers of entities.
	_, err = s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Cedarpost::BundleFreeze::"doc"`)})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "Cedarpost::BundleFreeze")
	all, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{})
	if err != nil || len(all.Entities) > 0 {
		t.Errorf("%v, %v", all, err)
	}
}

// A pipeline applies again and again while somebody freezes the bundle. What is published after the
// freeze was committed is nothing.
func TestAttackPublishRacesFreeze(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	published, refused := 0, 0
	for round := range 4 {
		done := make(chan error, 1)
		go func() {
			for i := 0; ; i++ {
				_, err := s.Apply("doc", servertest.Files("schema.cedarschema", servertest.DocSchema, "policies.cedar", fmt.Sprintf("%s// %d %d\n", servertest.DocPolicies, round, i)))
				if err != nil {
					done <- err
					return
				}
			}
		}()
		at := revision(t, s)
		servertest.Eventually(t, "a publish", func() bool { return revision(t, s) > at })
		frozen, err := s.Policies.FreezeBundle(t.Context(), &cedarpostv1.FreezeBundleRequest{Bundle: "doc"})
		if err != nil {
			t.Fatal(err)
		}
		err = <-done
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, "frozen")
		list, err := s.Policies.ListVersions(t.Context(), &cedarpostv1.ListVersionsRequest{Bundle: "doc"})
		if err != nil {
			t.Fatal(err)
		}
		if list.Versions[0].Revision.Number > frozen.Revision.Number {
			t.Errorf("version %d was published at revision %d, after the freeze at %d", list.Versions[0].Version, list.Versions[0].Revision.Number, frozen.Revision.Number)
		}
		published, refused = len(list.Versions), refused+1
		if _, err := s.Policies.UnfreezeBundle(t.Context(), &cedarpostv1.UnfreezeBundleRequest{Bundle: "doc"}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("attack: a pipeline publishes %d versions while the bundle is frozen %d times; after a freeze: 0 published", published, refused)
}
