package server_test

import (
	"strings"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

const (
	exportsUser = "exports: [User]\n"
	wikiSchema  = `namespace Wiki { entity Page { by: Doc::User }; action Edit appliesTo { principal: [Doc::User], resource: [Page] }; }`
	wikiOwn     = `namespace Wiki { entity Page { by: Person }; entity Person { level: Long }; action Edit appliesTo { principal: [Person], resource: [Page] }; }`
	wikiPolicy  = `@id("own") permit (principal, action == Wiki::Action::"Edit", resource) when { resource.by == principal };`
)

func wiki(schema string, policies ...string) []string {
	return []string{"schema.cedarschema", schema, "policies.cedar", wikiPolicy + strings.Join(policies, "\n")}
}

func doc(manifest string) []string {
	return []string{"bundle.yaml", manifest, "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies}
}

// A bundle is refused that uses a type which another bundle does not export, and so is a publish that takes
// away an export which another bundle uses. Callers who may not read the other bundle do not learn its name.
func TestExports(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann"))
	reader := newCaller(t, s, "reader", grant(access.PolicyPublisher, "wiki"), grant(access.PolicyAuthor, "doc"))
	stranger := newCaller(t, s, "stranger", grant(access.PolicyPublisher, "wiki"))
	owner := newCaller(t, s, "owner", grant(access.PolicyPublisher, "doc"))
	before := revision(t, s)
	for _, dryRun := range []bool{true, false} {
		_, err := applyAs(t, s, reader, dryRun, "wiki", wiki(wikiSchema)...)
		servertest.WantCode(t, err, connect.CodeInvalidArgument, "schema.cedarschema:1:36: entity Wiki::Page: uses the type Doc::User of the bundle doc, which does not export it: its bundle.yaml needs exports: [User]")
		_, err = applyAs(t, s, stranger, dryRun, "wiki", wiki(wikiSchema)...)
		servertest.WantCode(t, err, connect.CodeInvalidArgument, "uses the type Doc::User of another bundle, which does not export it: its bundle.yaml needs exports: [User]")
		if strings.Contains(err.Error(), "bundle doc") {
			t.Errorf("%v", err)
		}
	}
	if now := revision(t, s); now != before {
		t.Errorf("revision %d, want %d", now, before)
	}
	s.MustApply("doc", doc(exportsUser)...)
	if _, err := applyAs(t, s, stranger, false, "wiki", wiki(wikiSchema)...); err != nil {
		t.Fatal(err)
	}
	_, err := applyAs(t, s, stranger, false, "wiki", wiki(wikiSchema, `@id("group") permit (principal in Doc::Group::"g", action == Wiki::Action::"Edit", resource);`)...)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "policy group: uses the type Doc::Group of another bundle")

	// The rule is about guardrails as users of types, too: they may.
	s.MustApply("guardrails", "schema.cedarschema", "", "g.cedar", `@id("g") forbid (principal in Doc::Group::"g", action, resource) when { principal is Doc::User && principal.level > 9 };`)

	for manifest, want := range map[string]string{"exports: [Group]\n": "", "description: x\n": "", "exports: ['*']\n": "ok", "exports: [Doc::User, Paper]\n": "ok"} {
		_, err := applyAs(t, s, owner, true, "doc", doc(manifest)...)
		if want == "ok" {
			if err != nil {
				t.Errorf("%s: %v", manifest, err)
			}
			continue
		}
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, "it would break another bundle")
		if text := err.Error(); !strings.Contains(text, "another bundle uses the type Doc::User, which would not be exported any more: the bundle.yaml of its bundle needs exports: [User]") || strings.Contains(text, "Wiki") || strings.Contains(text, "wiki") {
			t.Errorf("%v", err)
		}
		_, err = s.Apply("doc", servertest.Files(doc(manifest)...))
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, "it would break bundle wiki")
	}
	// A rollback to a version without exports is a publish, too.
	_, err = s.Policies.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: "r"})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "it would break bundle wiki")
	s.MustApply("wiki", wiki(wikiOwn)...)
	s.MustApply("doc", doc("name: doc\n")...)
	_, err = s.Policies.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "wiki", Version: 1, Reason: "r"})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "uses the type Doc::User of the bundle doc")
	t.Log("attack: uses of types that are not exported, and exports taken away: 10 of 10 refused")
}

// Bundles that used types of others before there were exports go on: after an upgrade they decide, and can
// be published again as they are. New uses are refused.
func TestExportsAfterAnUpgrade(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann"))
	s.MustApply("doc", doc(exportsUser)...)
	s.MustApply("wiki", wiki(wikiSchema)...)
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Wiki::Page","id":"p"},"attrs":{"by":{"type":"Doc::User","id":"ann"}}}`))
	// The file of a bundle.yaml from before: its exports are gone without a publish.
	conn := servertest.Session(t, s.URL)
	servertest.MustExec(t, conn, "set session_replication_role = replica; update bundle_files set content = 'name: doc' where bundle = 'doc' and path = 'bundle.yaml' and until is null")
	upgraded := servertest.On(t, s.URL)
	upgraded.UseKey(s.Token)
	s.Stop()
	s = upgraded
	ask := func() {
		t.Helper()
		res, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Doc::User::"ann"`), Action: servertest.UID(`Wiki::Action::"Edit"`), Resource: servertest.UID(`Wiki::Page::"p"`)})
		if err != nil || res.Decision != cedarpostv1.Decision_ALLOW {
			t.Errorf("%v, %v", res, err)
		}
	}
	ask()
	warned := func(res *cedarpostv1.ApplyBundleResponse, err error, want string) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, f := range res.Warnings {
			if strings.Contains(f.Message, want) && f.Severity == cedarpostv1.Finding_WARNING {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%v, want one %q", res.Warnings, want)
		}
	}
	more := wiki(wikiSchema, "\n"+`@id("nobody") forbid (principal, action == Wiki::Action::"Edit", resource) when { false };`)
	res, err := s.Apply("wiki", servertest.Files(more...))
	warned(res, err, "uses the type Doc::User of the bundle doc, which does not export it")
	res, err = s.Apply("doc", servertest.Files(doc("exports: [Group]\n")...))
	warned(res, err, "the bundle wiki uses the type Doc::User, which is not exported")
	ask()
	_, err = s.Apply("wiki", servertest.Files(wiki(wikiSchema, `@id("level") permit (principal, action == Wiki::Action::"Edit", resource) when { resource.by.level > 1 };`)...))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "policy level: reads attributes, tags or groups of entities of the type Doc::User of the bundle doc")
	s.MustApply("doc", doc(exportsUser)...)
	if res, err := s.Apply("wiki", servertest.Files(wiki(wikiSchema)...)); err != nil || len(res.Warnings) > 0 {
		t.Errorf("%v, %v", res, err)
	}
}
