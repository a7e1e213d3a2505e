package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// findings returns the findings in the error of a refused bundle.
func findings(t testing.TB, err error) []*cedarpostv1.Finding {
	t.Helper()
	var ce *connect.Error
	if !errors.As(err, &ce) || len(ce.Details()) == 0 {
		t.Fatalf("no findings in %v", err)
	}
	m, derr := connectproto.UnmarshalErrorDetail(ce.Details()[0])
	if derr != nil {
		t.Fatal(derr)
	}
	return m.(*cedarpostv1.BundleFindings).Findings
}

func revision(t testing.TB, s *servertest.Server) int64 {
	t.Helper()
	r, err := s.Authorization.GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Revision.Number
}

func TestBundlesThatAreRefused(t *testing.T) {
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann"))
	before := revision(t, s)
	with := func(old, now string) []bundle.File {
		return servertest.Files("schema.cedarschema", strings.ReplaceAll(servertest.DocSchema, old, now), "policies.cedar", servertest.DocPolicies)
	}
	policy := func(text string, more ...string) []bundle.File {
		return servertest.Files(append([]string{"schema.cedarschema", servertest.DocSchema, "p.cedar", text}, more...)...)
	}
	permit := `permit (principal, action == Doc::Action::"Read", resource)`
	for _, c := range []struct {
		name  string
		files []bundle.File
		code  connect.Code
		at    string // file:line:column
		text  string
	}{
		{"no schema", servertest.Files("p.cedar", servertest.DocPolicies), connect.CodeInvalidArgument, "", "schema"},
		{"broken schema", with("entity Group", "entty Group"), connect.CodeInvalidArgument, "schema.cedarschema:2:3", ""},
		{"unknown type", with("readers: Group", "readers: Grp"), connect.CodeInvalidArgument, "", "Grp"},
		{"broken policy", policy("@id(\"a\")\n" + permit + " when { principal. };"), connect.CodeInvalidArgument, "p.cedar:2:79", "expected a name"},
		{"missing semicolon", policy(`@id("a") ` + permit), connect.CodeInvalidArgument, "p.cedar:1", ""},
		{"no id", policy(permit + ";"), connect.CodeInvalidArgument, "p.cedar:1:1", "@id"},
		{"same id", policy(`@id("a") ` + permit + ";\n" + `@id("a") ` + permit + ";"), connect.CodeInvalidArgument, "p.cedar:2:1", "used already"},
		{"attribute", policy(`@id("a") ` + permit + " when { resource.owner == principal };"), connect.CodeInvalidArgument, "p.cedar:1:85", "owner"},
		{"foreign action", policy(`@id("a") permit (principal, action == Shop::Action::"ViewOrder", resource);`), connect.CodeInvalidArgument, "p.cedar:1:1", ""},
		{"literal dereference", policy(`@id("a") ` + permit + ` when { Doc::User::"root".level > 1 };`), connect.CodeInvalidArgument, "p.cedar:1:1", "literal"},
		{"nesting", policy(`@id("a") ` + permit + " when { " + strings.Repeat("(", 200) + "true" + strings.Repeat(")", 200) + " };"), connect.CodeInvalidArgument, "p.cedar:1", "nested deeper"},
		{"many !", policy(`@id("a") ` + permit + " when { " + strings.Repeat("!", 60_000) + "true };"), connect.CodeInvalidArgument, "p.cedar:1", "nested deeper"},
		{"megabyte of !", policy(`@id("a") ` + permit + " when { " + strings.Repeat("!", 1<<20) + "true };"), connect.CodeInvalidArgument, "p.cedar:1", ""},
		{"mixed comparison", policy(`@id("a") ` + permit + ` when { principal.level < datetime("2020-01-01") };`), connect.CodeInvalidArgument, "p.cedar:1", "different types"},
		{"long pattern", policy(`@id("a") ` + permit + ` when { principal has nick && principal.nick like "` + strings.Repeat("*a", 3000) + `" };`), connect.CodeInvalidArgument, "p.cedar:1", "more than 4096 bytes"},
		{"request type as parent", with("entity User in [Group]", "entity User in [Group, Draft]"), connect.CodeInvalidArgument, "", "never stored"},
		{"name of Cedar's own", servertest.Files("schema.cedarschema", "entity String;"), connect.CodeInvalidArgument, "schema.cedarschema", "name of Cedar's own"},
		{"types that double", servertest.Files("schema.cedarschema", doubling(30)), connect.CodeInvalidArgument, "", "common types are written out"},
		{"types in a circle", servertest.Files("schema.cedarschema", "namespace A { type T = { a: U }; type U = { b: T }; entity E { t: T }; }"), connect.CodeInvalidArgument, "schema.cedarschema", ""},
		{"too many combinations", servertest.Files("schema.cedarschema", combinations(150)), connect.CodeInvalidArgument, "schema.cedarschema", "limit is 20000"},
		{"reserved namespace", servertest.Files("schema.cedarschema", "namespace Cedarpost { entity X; }"), connect.CodeInvalidArgument, "", "belongs to the service"},
		{"approvals", policy(servertest.DocPolicies, "bundle.yaml", "name: doc\napprovals: two\n"), connect.CodeInvalidArgument, "bundle.yaml:2:12", "whole number"},
		{"hidden policy", policy(servertest.DocPolicies, ".old/f.cedar", "forbid (principal, action, resource);"), connect.CodeInvalidArgument, ".old/f.cedar", "would not be read"},
		{"annotation that is not enforced", with("level: Long", `@velocity("attempts") level: Long`), connect.CodeInvalidArgument, "schema.cedarschema", "@velocity is not enforced"},
		{"annotation at the wrong place", policy(`@id("a") @sensitive ` + permit + ";"), connect.CodeInvalidArgument, "p.cedar:1:1", "@sensitive has no effect at a policy"},
		{"failing test", policy(servertest.DocPolicies, "tests.yaml", `checks: [{name: t, principal: 'Doc::User::"a"', action: 'Doc::Action::"Read"', resource: 'Doc::Paper::"p"', expect: allow}]`), connect.CodeInvalidArgument, "tests.yaml:1", "expected allow, got deny"},
		{"typo in file name", policy(servertest.DocPolicies, "field.yaml", "{}"), connect.CodeInvalidArgument, "field.yaml", ""},
		{"path", policy(servertest.DocPolicies, "../../etc/x.cedar", ""), connect.CodeInvalidArgument, "", ""},
		{"stored entity does not fit", with("level: Long", "level: String"), connect.CodeFailedPrecondition, "", `Doc::User::"ann"`},
		{"stored type is gone", servertest.Files("schema.cedarschema", "namespace Doc { entity Other; }"), connect.CodeFailedPrecondition, "", `Doc::User::"ann"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.Apply("doc", c.files)
			servertest.WantCode(t, err, c.code, "")
			if err == nil {
				return
			}
			var all strings.Builder
			found := false
			for _, f := range findings(t, err) {
				at := fmt.Sprintf("%s:%d:%d", f.File, f.Line, f.Column)
				found = found || strings.HasPrefix(at, c.at)
				fmt.Fprintf(&all, "%s: %s (%s)\n", at, f.Message, f.Hint)
			}
			if !found || !strings.Contains(all.String(), c.text) {
				t.Errorf("want %q at %s, got:\n%s", c.text, c.at, all.String())
			}
		})
	}
	if after := revision(t, s); after != before {
		t.Errorf("refused bundles moved the revision from %d to %d", before, after)
	}
	if r := read(t, s, "ann", nil); r != cedarpostv1.Decision_DENY {
		t.Errorf("the old bundle should still decide: %s", r)
	}
}

// doubling returns a schema whose types double with each line.
func doubling(lines int) string {
	s := "namespace A { type T0 = Long;"
	for i := range lines {
		s += fmt.Sprintf(" type T%d = { a: T%d, b: T%d };", i+1, i, i)
	}
	return s + fmt.Sprintf(" entity E { t: T%d }; }", lines)
}

// combinations returns a schema with an action on n types of principals and resources.
func combinations(n int) string {
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("E%d", i))
	}
	list := strings.Join(names, ", ")
	return "namespace A { entity " + list + "; action X appliesTo { principal: [" + list + "], resource: [" + list + "] }; }"
}

// An address that is correct only in hexadecimal is stored so that it can be read again.
func TestMappedAddressComesBack(t *testing.T) {
	s := servertest.New(t)
	const schema = `namespace I { entity U { ip: ipaddr }; action A appliesTo { principal: [U], resource: [U] }; }`
	s.MustApply("i", "schema.cedarschema", schema, "p.cedar", `@id("p") permit (principal, action, resource) when { principal.ip == ip("::ffff:102:304") };`)
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"I::U","id":"u"},"attrs":{"ip":"::ffff:102:304"}}`))
	r, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`I::U::"u"`), Action: servertest.UID(`I::Action::"A"`), Resource: servertest.UID(`I::U::"u"`),
	})
	if err != nil || r.Decision != cedarpostv1.Decision_ALLOW {
		t.Fatalf("got %v %v", r, err)
	}
	s.MustApply("i", "schema.cedarschema", strings.Replace(schema, "ip: ipaddr", "ip: ipaddr, more?: Long", 1))
}

// A check that requires all fields is denied if the type has no catalogue.
func TestRequireAllWithoutCatalogue(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("n", "schema.cedarschema", `namespace N { entity FieldGroup in [FieldGroup]; entity Field in [Field, FieldGroup]; entity U;
		action A appliesTo { principal: [U], resource: [U], context: {} }; action "A.field" appliesTo { principal: [U], resource: [U], context: { field: Field } }; }`,
		"p.cedar", `@id("p") permit (principal, action, resource);`)
	r, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`N::U::"u"`), Action: servertest.UID(`N::Action::"A"`), Resource: servertest.UID(`N::U::"u"`),
		Fields: &cedarpostv1.FieldSelection{All: true, RequireAll: true},
	})
	if err != nil || r.Decision != cedarpostv1.Decision_DENY || r.GetDeniedAt() != cedarpostv1.DeniedAt_FIELD {
		t.Errorf("got %v %v", r, err)
	}
}

// Each bundle decides only actions of its own namespaces, and guardrails apply to all bundles.
func TestSeveralBundles(t *testing.T) {
	s := docServer(t)
	s.MustApply("org", "bundle.yaml", "exports: [User]", "schema.cedarschema", `namespace Org { entity User { blocked: Bool }; action Enter appliesTo { principal: [User], resource: [User] }; }`,
		"p.cedar", `@id("all") permit (principal, action, resource);`)
	s.MustApply("wiki", "schema.cedarschema", `namespace Wiki { entity Page; action Edit appliesTo { principal: [Org::User], resource: [Page] }; }`,
		"p.cedar", `@id("none") forbid (principal, action, resource) when { false };`)
	enter := func(action, resource string) *cedarpostv1.AuthorizeResponse {
		t.Helper()
		r, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Org::User::"u"`), Action: servertest.UID(action), Resource: servertest.UID(resource),
		})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	// The open permit of Org does not allow anything in Wiki.
	if r := enter(`Org::Action::"Enter"`, `Org::User::"u"`); r.Decision != cedarpostv1.Decision_ALLOW || r.DeterminingPolicies[0].Bundle != "org" {
		t.Errorf("got %v", r)
	}
	if r := enter(`Wiki::Action::"Edit"`, `Wiki::Page::"p"`); r.Decision != cedarpostv1.Decision_DENY {
		t.Errorf("another bundle's permit opened it: %v", r)
	}
	// A type that another bundle uses cannot be removed.
	_, err := s.Apply("org", servertest.Files("schema.cedarschema", `namespace Org { entity Person; }`))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "Org::User")
	// A namespace belongs to one bundle.
	_, err = s.Apply("thief", servertest.Files("schema.cedarschema", `namespace Org { entity Loot; }`))
	if err == nil || !strings.Contains(err.Error(), "owned by") {
		t.Errorf("got %v", err)
	}
	// Guardrails may have forbids only, and apply to all principals.
	_, err = s.Apply("guardrails", servertest.Files("schema.cedarschema", "", "g.cedar", `@id("open") permit (principal, action, resource);`))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "only forbid")
	s.MustApply("guardrails", "schema.cedarschema", "", "g.cedar",
		`@id("blocked") forbid (principal, action, resource) when { principal is Org::User && principal.blocked };`)
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Org::User","id":"u"},"attrs":{"blocked":true}}`))
	r := enter(`Org::Action::"Enter"`, `Org::User::"u"`)
	if r.Decision != cedarpostv1.Decision_DENY || r.DeterminingPolicies[0].Bundle != "guardrails" || r.GetDeniedAt() != cedarpostv1.DeniedAt_FUNCTION {
		t.Errorf("guardrail did not fire: %v", r)
	}
	list, err := s.Policies.ListBundles(t.Context(), &cedarpostv1.ListBundlesRequest{})
	if err != nil || len(list.Bundles) != 4 {
		t.Errorf("got %v %v", list, err)
	}
}

// A forbid that fails denies, unless the bundle says skip.
func TestForbidThatFails(t *testing.T) {
	const schema = `namespace E { entity U { n?: Long, big: Long }; action A appliesTo { principal: [U], resource: [U] }; }`
	const text = `@id("p") permit (principal, action, resource); @id("f") forbid (principal, action, resource) when { principal.big + 1 > 0 && false };`
	for mode, want := range map[string]cedarpostv1.Decision{"deny": cedarpostv1.Decision_DENY, "skip": cedarpostv1.Decision_ALLOW} {
		t.Run(mode, func(t *testing.T) {
			s := servertest.New(t)
			s.MustApply("e", "bundle.yaml", "on_forbid_error: "+mode, "schema.cedarschema", schema, "p.cedar", text)
			s.MustPut(servertest.Entity(t, `{"uid":{"type":"E::U","id":"u"},"attrs":{"big":9223372036854775807}}`))
			r, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
				Principal: servertest.UID(`E::U::"u"`), Action: servertest.UID(`E::Action::"A"`), Resource: servertest.UID(`E::U::"u"`),
			})
			if err != nil || r.Decision != want || len(r.Errors) != 1 || r.Errors[0].Policy.Id != "f" || len(r.DeterminingPolicies) != 1 {
				t.Errorf("got %v %v", r, err)
			}
		})
	}
}

// The server sets context.now and records it. Callers must not send it.
func TestServerTime(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("clock", "schema.cedarschema", `namespace T { entity U; action A appliesTo { principal: [U], resource: [U], context: { now: datetime } }; }`,
		"p.cedar", `@id("p") permit (principal, action, resource) when { context.now > datetime("2020-01-01") };`)
	req := &cedarpostv1.AuthorizeRequest{Principal: servertest.UID(`T::U::"u"`), Action: servertest.UID(`T::Action::"A"`), Resource: servertest.UID(`T::U::"u"`)}
	r, err := s.Authorization.Authorize(t.Context(), req)
	if err != nil || r.Decision != cedarpostv1.Decision_ALLOW {
		t.Fatalf("got %v %v", r, err)
	}
	rec, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: r.DecisionId})
	if err != nil || rec.Decision.Context.Fields["now"] == nil {
		t.Errorf("now is not in the record: %v %v", rec, err)
	}
	req.Context, _ = structpb.NewStruct(map[string]any{"now": "2030-01-01"})
	_, err = s.Authorization.Authorize(t.Context(), req)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "filled by the server")
}

// A bundle is returned byte for byte as it was uploaded, and another upload of it changes
// nothing.
func TestBundleComesBack(t *testing.T) {
	s := servertest.New(t)
	files := servertest.ShopFiles(t)
	first, err := s.Apply("shop", files)
	if err != nil || !first.Published || first.Bundle.Version != 1 {
		t.Fatalf("got %v %v", first, err)
	}
	again, err := s.Apply("shop", files)
	if err != nil || again.Published || again.Revision.Number != first.Revision.Number {
		t.Errorf("the same again: %v %v", again, err)
	}
	stream, err := s.Policies.GetBundle(t.Context(), &cedarpostv1.GetBundleRequest{Name: "shop"})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if f := msg.GetFile(); f != nil {
			got[f.Path] += string(f.Data)
		}
	}
	if len(got) != len(files) {
		t.Errorf("%d files came back of %d", len(got), len(files))
	}
	for _, f := range files {
		if got[f.Path] != string(f.Content) {
			t.Errorf("%s came back changed", f.Path)
		}
	}
}

// Many callers publish at once. Each publish is checked against the one before it, and none is
// lost.
func TestConcurrentPublishers(t *testing.T) {
	s := servertest.New(t)
	const n = 5
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			files := servertest.Files("schema.cedarschema", fmt.Sprintf("namespace N%d { entity E; action A appliesTo { principal: [E], resource: [E] }; }", i),
				"p.cedar", `@id("p") permit (principal, action, resource);`)
			for {
				_, err := s.Apply(fmt.Sprintf("b%d", i), files)
				if connect.CodeOf(err) == connect.CodeAborted && err != nil {
					continue
				}
				if err != nil {
					t.Error(err)
				}
				return
			}
		})
	}
	wg.Wait()
	list, err := s.Policies.ListBundles(context.Background(), &cedarpostv1.ListBundlesRequest{})
	if err != nil || len(list.Bundles) != n || list.Revision.Number < n {
		t.Errorf("got %v %v", list, err)
	}
}

// A bundle that an earlier version of Cedarpost accepted, and this one refuses to publish, is
// still loaded and served, and other bundles can be published.
func TestBundleOfAnEarlierVersion(t *testing.T) {
	t.Parallel() // it takes long
	first := docServer(t)
	first.MustPut(servertest.DocUser(t, "ann"))
	first.Stop()
	exec(t, first.URL, `
		update bundles set schema = replace(schema, 'entity Group', '@sensitive entity Group');
		update policies set text = replace(text, '@id', '@velocity("attempts") @id');
		insert into bundle_files select name, 'bundle.yaml', 'approvals: 2', since from bundles`)

	s := servertest.On(t, first.URL)
	if got := read(t, s, "ann", nil); got != cedarpostv1.Decision_DENY {
		t.Errorf("got %v", got)
	}
	s.MustApply("other", "schema.cedarschema", `namespace Other { entity X; action A appliesTo { principal: [X], resource: [X] }; }`,
		"p.cedar", `@id("p") permit (principal, action, resource) when { principal == resource };`)
	// The rule that it has is enforced from now on.
	_, err := s.Apply("doc", servertest.Files("schema.cedarschema", servertest.DocSchema, "p.cedar", servertest.DocPolicies))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "changes of the bundle doc need 2 approvals")
}
