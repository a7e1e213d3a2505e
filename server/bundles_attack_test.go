package server_test

import (
	"strings"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// applyAs uploads a bundle with a key.
func applyAs(t *testing.T, s *servertest.Server, secret string, dryRun bool, name string, pathsAndContents ...string) (*cedarpostv1.ApplyBundleResponse, error) {
	t.Helper()
	stream, err := cedarpostv1connect.NewPolicyServiceClient(s.Client(s.Admin, secret)).ApplyBundle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// If the server refuses in mid-stream, the error is that of the answer.
	_ = stream.Send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_Header{Header: &cedarpostv1.BundleHeader{Name: name, DryRun: dryRun, AllowBreaking: true}}})
	for _, f := range servertest.Files(pathsAndContents...) {
		_ = stream.Send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_File{File: &cedarpostv1.FilePart{Path: f.Path, Data: f.Content}}})
	}
	return stream.CloseAndReceive()
}

// bundleOf returns the files of a small bundle that owns a namespace.
func bundleOf(ns string) []string {
	return []string{
		"schema.cedarschema", "namespace " + ns + " { entity Door; action Open appliesTo { principal: [Door], resource: [Door] }; }",
		"policies.cedar", `@id("all") permit (principal, action == ` + ns + `::Action::"Open", resource);`,
	}
}

// Policies of one bundle read entities of another one, and an enforcer of the first asks for
// explanations. They show no attribute of these entities, and no error names them.
func TestAttackExplainForeignEntities(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustApply("doc", "bundle.yaml", "exports: [User]", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	s.MustPut(servertest.DocUser(t, "ann"))
	s.MustApply("spy", "schema.cedarschema", `namespace Spy { entity Door { owner: Doc::User }; action Open appliesTo { principal: [Doc::User], resource: [Door] }; }`,
		"policies.cedar", `
		@id("level") permit (principal, action == Spy::Action::"Open", resource) when { principal.level == 4711 };
		@id("owner") permit (principal, action == Spy::Action::"Open", resource) when { resource.owner.level == 4711 };
		@id("level2") permit (principal, action == Spy::Action::"Open", resource) when { principal.level - 9223372036854775807 - 9 == 3 };`)
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Spy::Door","id":"d"},"attrs":{"owner":{"type":"Doc::User","id":"ann"}}}`))
	ask := func(principal, secret string) string {
		res, err := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, secret)).Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Doc::User::"` + principal + `"`), Action: servertest.UID(`Spy::Action::"Open"`), Resource: servertest.UID(`Spy::Door::"d"`), Explain: true})
		if err != nil {
			t.Fatal(err)
		}
		return res.String()
	}
	spy := newCaller(t, s, "spy", grant(access.Enforcer, "spy"))
	reader := newCaller(t, s, "reader", grant(access.Enforcer, "spy"), grant(access.Auditor, "doc"))
	const value, withheld = `value:"1"`, "withheld: about an entity that this caller may not read"
	if text := ask("ann", spy); strings.Contains(text, value) || strings.Count(text, withheld) < 3 {
		t.Errorf("%s", text)
	}
	if text := ask("ann", reader); strings.Contains(text, withheld) || strings.Count(text, value) < 2 {
		t.Errorf("a reader of both: %s", text)
	}
	// An entity that is not stored: the errors of its evaluation name it.
	text := ask("nobody", spy)
	if _, errors, found := strings.Cut(text, "errors:"); !found || !strings.Contains(errors, withheld) || strings.Contains(errors, "entity `Doc::User") {
		t.Errorf("%s", text)
	}
	t.Log("attack: explanations of policies that read entities of another bundle: 3 of 3 values and 2 of 2 errors are withheld")
}

// A caller that may check a bundle, and may not read entities, learns neither which stored entities do not fit a
// schema, nor how many.
func TestAttackFindEntitiesByDryRuns(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann"), servertest.DocUser(t, "bob"))
	changed := []string{"schema.cedarschema", strings.Replace(servertest.DocSchema, "level: Long", "level: String", 1), "policies.cedar", servertest.DocPolicies}
	for _, dryRun := range []bool{true, false} {
		_, err := applyAs(t, s, newCaller(t, s, map[bool]string{true: "author", false: "publisher"}[dryRun], grant(access.PolicyPublisher, "doc")), dryRun, "doc", changed...)
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, "that this caller may not read")
		if text := err.Error(); strings.Contains(text, "ann") || strings.Contains(text, "2 ") {
			t.Errorf("%s", text)
		}
	}
	_, err := applyAs(t, s, newCaller(t, s, "both", grant(access.PolicyAuthor, "doc"), grant(access.Auditor, "doc")), true, "doc", changed...)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "2 stored entities do not fit the new schema")
	t.Log("attack: a policy author without a right to read entities looks for them with dry runs: 0 of 2 found")
}

// A policy author looks for other bundles by their namespaces: with its own dry runs, it does not learn
// their names.
func TestAttackFindBundlesByDryRuns(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("hidden", bundleOf("Hidden::Deep")...)
	author := newCaller(t, s, "author", grant(access.PolicyAuthor, "aaa"), grant(access.PolicyAuthor, "zzz"))
	tries := 0
	for _, name := range []string{"aaa", "zzz"} { // before and after it in the order of names
		for _, ns := range []string{"Hidden::Deep", "Hidden", "Hidden::Deep::Deeper"} {
			_, err := applyAs(t, s, author, true, name, bundleOf(ns)...)
			if err == nil || strings.Contains(err.Error(), "bundle hidden") || ns == "Hidden" && strings.Contains(err.Error(), "Hidden::Deep") {
				t.Errorf("%s of %s: %v", ns, name, err)
			}
			tries++
		}
	}
	_, err := applyAs(t, s, newCaller(t, s, "reader", grant(access.PolicyAuthor, "*")), true, "zzz", bundleOf("Hidden")...)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "around namespace Hidden::Deep, which is owned by bundle hidden")
	t.Logf("attack: an author of one bundle looks for others by their namespaces: 0 of %d dry runs name one", tries)
}

// A publisher takes a namespace over that another bundle gave up, and with it the history of its
// entities and decisions. It also takes the namespace without a name, which blocks names of others.
func TestAttackTakeANamespaceOver(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("old", bundleOf("Shared")...)
	s.MustApply("old", bundleOf("Other")...)
	own := newCaller(t, s, "own", grant(access.PolicyPublisher, "new"))
	both := newCaller(t, s, "both", grant(access.PolicyPublisher, "new"), grant(access.PolicyPublisher, "old"))
	flat := []string{"schema.cedarschema", flatSchema, "policies.cedar", flatPolicies}
	refused := 0
	for _, dryRun := range []bool{true, false} {
		_, shared := applyAs(t, s, own, dryRun, "new", bundleOf("Shared")...)
		servertest.WantCode(t, shared, connect.CodePermissionDenied, "a namespace that another bundle had before")
		_, unnamed := applyAs(t, s, both, dryRun, "new", flat...)
		servertest.WantCode(t, unnamed, connect.CodePermissionDenied, "types and actions without a namespace")
		if shared != nil && unnamed != nil {
			refused += 2
		}
	}
	for what, err := range map[string]error{
		"a new namespace":            second(applyAs(t, s, own, false, "new", bundleOf("Fresh")...)),
		"the same namespace again":   second(applyAs(t, s, own, false, "new", bundleOf("Fresh")...)),
		"by a publisher of both":     second(applyAs(t, s, both, false, "new", bundleOf("Shared")...)),
		"a namespace that it owns":   second(applyAs(t, s, own, false, "new", append(bundleOf("Shared"), "bundle.yaml", "name: new\ndescription: x\n")...)),
		"no namespace, by root":      second(s.Apply("flat", servertest.Files(flat...))),
		"no namespace, by its owner": second(applyAs(t, s, newCaller(t, s, "flat", grant(access.PolicyPublisher, "flat")), false, "flat", append(flat, "bundle.yaml", "name: flat\ndescription: x\n")...)),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	t.Logf("attack: a publisher of one bundle takes a namespace of another one, and the one without a name: %d of 4 refused", refused)
}

// A data-writer deletes an entity with cascade, whose members are of types that it may not write.
func TestAttackCascadeIntoOtherTypes(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustPut(docGroup(t, "team", "all"), docGroup(t, "all", "world"), servertest.DocUser(t, "ann", "team"))
	narrowed := &cedarpostv1.Grant{Role: access.DataWriter, Bundle: "doc", EntityTypes: []string{"Doc::Group"}}
	entities := entitiesOf(s, newCaller(t, s, "groups", narrowed))
	remove := func(id string) error {
		return second(entities.WriteEntities(t.Context(), &cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{{
			Operation: &cedarpostv1.EntityOperation_Delete{Delete: &cedarpostv1.DeleteEntity{Uid: &cedarpostv1.EntityUid{Type: "Doc::Group", Id: id}, Cascade: true}}}}}))
	}
	servertest.WantCode(t, remove("team"), connect.CodePermissionDenied, "all members of an entity that is deleted with cascade")
	if err := remove("all"); err != nil { // its member is a group
		t.Error(err)
	}
	got, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"ann"`)})
	if err != nil || len(got.GetEntity().GetEntity().GetParents()) != 1 {
		t.Errorf("%v, %v", got, err)
	}
	t.Log("attack: a cascade that changes members of a type of no right: 1 of 1 refused")
}
