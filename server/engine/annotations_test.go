package engine

import (
	"slices"
	"strings"
	"testing"
)

// An annotation of the service where it has no effect would look like protection.
func TestAnnotationsWithoutEffect(t *testing.T) {
	for _, c := range []struct{ declaration, want string }{
		{`@sensitive entity X;`, `entity N::X: @sensitive has no effect at an entity type`},
		{`@sensitive type T = String;`, `type N::T: @sensitive has no effect at a common type`},
		{`type T = { a: { @audit("always") b: String } };`, `type N::T, attribute "a", attribute "b": @audit has no effect at an attribute`},
		{`entity X { a: Set<{ @source("request") b: String }> };`, `entity N::X, attribute "a", attribute "b": @source has no effect at an attribute`},
		{`entity X tags { @obligation("o") b: String };`, `entity N::X, tags, attribute "b": @obligation has no effect at an attribute`},
		{`@source entity X;`, `entity N::X: @source has no value`},
		{`@source("request") entity X enum ["a"];`, `entity N::X: @source has no effect at an enumerated entity type`},
		{`@source("request") action X;`, `action N::"X": @source has no effect at an action`},
		{`@audit action X;`, `action N::"X": @audit has no value`},
		{`action X appliesTo { principal: [U], resource: [U], context: { @velocity("attempts") n: Long } };`, `action N::"X", attribute "n": @velocity is not enforced by this version`},
		{`action X appliesTo { principal: [U], resource: [U], context: { @new("device") n: Bool } };`, `action N::"X", attribute "n": @new is not enforced by this version`},

		{`@doc("of mine") entity X { @doc("of mine") @sensitive a: String };`, ``},
		{`@source("request") entity X; @audit("always") action X;`, ``},
	} {
		checkFindings(t, Source{Name: "n", SchemaFile: "s", Schema: "namespace N { entity U; " + c.declaration + " }"}, c.want)
	}
	checkFindings(t, Source{Name: "n", SchemaFile: "s", Schema: `@sensitive namespace N { entity U; }`}, `namespace N: @sensitive has no effect at a namespace`)

	for _, c := range []struct{ annotation, want string }{
		{`@audit("always")`, `@audit has no effect at a policy`},
		{`@sensitive`, `@sensitive has no effect at a policy`},
		{`@velocity("attempts")`, `@velocity is not enforced by this version`},
		{`@obligation("")`, `@obligation has no value`},
		{`@advice`, `@advice has no value`},
		{`@obligation("o") @advice("a") @doc @owner("me")`, ``},
	} {
		checkFindings(t, Source{
			Name: "n", SchemaFile: "s", Schema: `namespace N { entity U; action A appliesTo { principal: [U], resource: [U] }; }`,
			Policies: []PolicyText{{File: "p", Text: `@id("p") ` + c.annotation + ` permit (principal, action, resource) when { principal == resource };`}},
		}, c.want)
	}
}

// checkFindings wants one finding, or none, and in either case that the bundle is
// still loaded, and stands beside one that is published.
func checkFindings(t *testing.T, src Source, want string) {
	t.Helper()
	var got []string
	_, findings := Compile([]Source{src}, nil)
	for _, f := range findings {
		got = append(got, f.Message)
	}
	if want == "" && got != nil || want != "" && !slices.Equal(got, []string{want}) {
		t.Errorf("%s\n%v\ngot  %q\nwant %q", src.Schema, src.Policies, got, want)
	}
	loaded, findings := Load([]Source{src}, nil)
	if loaded == nil {
		t.Errorf("%s is not loaded: %v", src.Schema, findings)
	}
	src.Published = true
	if set, findings := Compile([]Source{src, {Name: "other", Schema: "namespace Other { entity X; }"}}, loaded); set == nil {
		t.Errorf("beside %s nothing can be published: %v", src.Schema, findings)
	}
}

// Somebody who cut all policies out of a file learns that none is left.
func TestFileWithoutPolicies(t *testing.T) {
	set, findings := Compile([]Source{{Name: "n", Schema: "namespace N { entity U; }", Policies: []PolicyText{{File: "p.cedar", Text: "// forbid (principal, action, resource);\n"}}}}, nil)
	if set == nil || len(findings) != 1 || !findings[0].Warning || !strings.Contains(findings[0].String(), "p.cedar: holds no policy") {
		t.Errorf("%v", findings)
	}
}
