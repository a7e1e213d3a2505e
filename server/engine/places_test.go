package engine

import (
	"fmt"
	"strings"
	"testing"
)

// Two bundles declare a namespace. The finding is about the one that is not published, whichever name comes first.
func TestNamespaceOfAnotherBundleIsRefused(t *testing.T) {
	source := func(name string) Source {
		return Source{Name: name, SchemaFile: name + ".cedarschema", Schema: "namespace Lab { entity E; }"}
	}
	live := source("lab")
	live.Published = true
	for _, name := range []string{"aaa", "zzz"} {
		_, found := Compile([]Source{live, source(name)}, nil)
		if len(found) != 1 || found[0].Bundle != name || found[0].File != name+".cedarschema" || found[0].Message != `namespace "Lab" is owned by bundle lab` || found[0].Other != "lab" {
			t.Errorf("%s: %+v", name, found)
		}
	}
}

// What breaks callers is placed at the declaration of the action, in its own file, or in the file of its namespace if
// the action is gone.
func TestBreakingPlaces(t *testing.T) {
	const types = "namespace B {\n  entity U;\n}\n"
	actions := func(context, also string) string {
		return fmt.Sprintf("namespace B {\n\n  action %q appliesTo { principal: U, resource: U, context: {%s} };\n%s}\n", "View", context, also)
	}
	const gone = "  action Gone appliesTo { principal: U, resource: U };\n"
	files := func(context, also string) Source {
		return Source{Name: "b", Schemas: []SchemaText{{File: "base.cedarschema", Text: types}, {File: "sub/actions.cedarschema", Text: actions(context, also)}}}
	}
	one := func(context, also string) Source {
		return Source{Name: "b", SchemaFile: "s.cedarschema", Schema: strings.Replace(actions(context, also), "\n", "\n  entity U;", 1)}
	}
	for _, c := range []struct {
		before, now Source
		want        []string
	}{
		{files("", gone), files("mfa: Bool", ""), []string{"base.cedarschema:0:0 Gone", "sub/actions.cedarschema:3:10 View"}},
		{one("", gone), one("mfa: Bool", ""), []string{"s.cedarschema:0:0 Gone", "s.cedarschema:3:10 View"}},
	} {
		old, found := Compile([]Source{c.before}, nil)
		now, more := Compile([]Source{c.now}, nil)
		if old == nil || now == nil {
			t.Fatal(found, more)
		}
		var got []string
		for _, b := range now.Breaks(old) {
			got = append(got, fmt.Sprintf("%s:%d:%d %s", b.File, b.Line, b.Column, b.Actions[0].ID))
		}
		if strings.Join(got, "\n") != strings.Join(c.want, "\n") {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

// A finding about a part of a policy in JSON has the place of the policy: the text that it is compiled from is in no
// file.
func TestFindingsAboutPoliciesInJSON(t *testing.T) {
	const policy = `{"effect": "permit", "principal": {"op": "All"}, "action": {"op": "All"}, "resource": {"op": "All"}, "annotations": {"id": "p"},
   "conditions": [{"kind": "when", "body": {"==": {"left": {".": {"left": {"Var": "principal"}, "attr": "title"}}, "right": {"Value": ""}}}}]}`
	src := Source{Name: "b", SchemaFile: "s", Schema: "entity U { name: String }; action act appliesTo { principal: U, resource: U };",
		Policies: []PolicyText{{File: "a.cedar.json", Text: "\n  " + policy, JSON: true}}}
	_, found := Compile([]Source{src}, nil)
	if len(found) != 1 || found[0].Policy != "p" || found[0].Line != 2 || found[0].Column != 3 {
		t.Errorf("%+v", found)
	}
}
