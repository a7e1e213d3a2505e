package engine

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"pgregory.net/rapid"
)

const lintSchema = `namespace L {
  type Unused = { a: Long };
  type Used = { b: Long };
  entity Group in [Group];
  entity User in [Group] { n: Long, u: Used };
  entity Robot;
  entity Orphan in [Orphan];
  entity Box in [Box] { owner: User };
  entity FieldGroup in [FieldGroup];
  entity Field in [Field, FieldGroup];
  action All, Nothing;
  action Look in [All] appliesTo { principal: [User, Robot], resource: [Box], context: {} };
  action "Look.field" in [All] appliesTo { principal: [User, Robot], resource: [Box], context: { field: Field } };
  action Burn appliesTo { principal: [User], resource: [Box], context: {} };
  action Lend in [All] appliesTo { principal: [User], resource: [Box], context: {} };
}`

var lintFields = []Field{
	{Type: "L::Box", Path: "a", Groups: []string{"g"}, Line: 2, Column: 3},
	{Type: "L::Box", Path: "b", Groups: []string{"g"}, Line: 3, Column: 3},
	{Type: "L::Box", Path: "c", Line: 4, Column: 3},
	{Type: "L::FieldGroup", Path: "g"},
}

// lint returns the findings about policies of the schema above, one to a line.
func lint(t *testing.T, policies, rails string) string {
	t.Helper()
	sources := []Source{{Name: "l", SchemaFile: "schema", FieldsFile: "fields", Schema: lintSchema, Fields: lintFields, Policies: []PolicyText{{File: "p", Text: policies}}}}
	if rails != "" {
		sources = append(sources, Source{Name: Guardrails, Policies: []PolicyText{{File: "r", Text: rails}}})
	}
	set, findings := Compile(sources, nil)
	if set == nil {
		t.Fatal(findings)
	}
	var lines []string
	for _, f := range set.Lint("l", sources) {
		severity := "info"
		if f.Warning {
			severity = "warning"
		}
		lines = append(lines, fmt.Sprintf("%s %s:%d %s %s: %s", severity, f.File, f.Line, f.Rule, f.Policy, f.Message))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestLint(t *testing.T) {
	t.Parallel()
	const used = `@id("used") permit (principal in L::Group::"g", action in L::Action::"All", resource) when { principal has n && principal is L::User || context has field };
@id("burns") permit (principal in L::Group::"g", action == L::Action::"Burn", resource) when { resource.owner == principal };
`
	quiet := []string{
		`info schema:2 unused-type : no declaration names the type L::Unused`,
		`info schema:7 unused-type : no action, attribute, parent or policy names the entity type L::Orphan`,
		`warning schema:11 unused-action : L::Action::"Nothing" applies to nothing and groups no actions`,
	}
	for _, c := range []struct {
		name, policies, rails string
		want                  []string
	}{
		{"the declarations", used, "", nil},
		{"a scope that matches nothing", used + `@id("x") forbid (principal is L::Robot, action == L::Action::"Burn", resource);`, "", []string{
			"warning p:3 never-applies x: can never determine a decision: no action in its scope takes this principal and resource",
		}},
		{"a condition that is false", used + `@id("x") permit (principal, action == L::Action::"Look", resource) when { principal has n } unless { 1 < 2 };`, "", []string{
			"warning p:3 never-applies x: can never determine a decision: its conditions are false for every question",
		}},
		{"a forbid that fails before it is false, and so denies", used + `@id("x") forbid (principal in L::Group::"g", action == L::Action::"Burn", resource) when { principal.n * 9223372036854775807 > 0 && false };`, "", nil},
		{"a forbid that is false before it could fail", used + `@id("x") forbid (principal in L::Group::"g", action == L::Action::"Burn", resource) when { principal is L::Robot && principal.n == 1 };`, "", []string{
			"warning p:3 never-applies x: can never determine a decision: its conditions are false for every question",
		}},
		{"a permit under a forbid of all", used + `@id("x") permit (principal == L::User::"u", action == L::Action::"Burn", resource in L::Box::"b");
@id("no") forbid (principal, action in [L::Action::"Burn", L::Action::"Nothing"], resource is L::Box);`, "", []string{
			`warning p:2 shadowed burns: can never permit anything: a forbid without a condition covers its scope: l/no`,
			`warning p:3 shadowed x: can never permit anything: a forbid without a condition covers its scope: l/no`,
			`warning schema:14 unused-action : no policy can permit L::Action::"Burn", so every question about it is denied`,
		}},
		{"a permit under a guardrail", used + `@id("x") permit (principal in L::Group::"x", action == L::Action::"Burn", resource) when { resource.owner == principal };`,
			`@id("no") forbid (principal in L::Group::"x", action, resource) when { true };`, []string{
				`warning p:3 shadowed x: can never permit anything: a forbid without a condition covers its scope: guardrails/no`,
			}},
		{"a permit under two forbids together", used + `@id("x") permit (principal == L::User::"u", action in [L::Action::"Burn", L::Action::"Lend"], resource);
@id("no1") forbid (principal == L::User::"u", action == L::Action::"Burn", resource); @id("no2") forbid (principal is L::User, action == L::Action::"Lend", resource);`, "", []string{
			`warning p:3 shadowed x: can never permit anything: 2 forbids without a condition cover its scope together, among them l/no1, l/no2`,
		}},
		{"forbids that do not cover a permit", used + `@id("x") permit (principal in L::Group::"x", action == L::Action::"Burn", resource in L::Box::"b");
@id("no1") forbid (principal == L::Group::"x", action, resource);
@id("no2") forbid (principal in L::Group::"y", action, resource);
@id("no3") forbid (principal, action == L::Action::"Burn", resource) when { principal has n };
@id("no4") forbid (principal, action == L::Action::"Burn", resource == L::Box::"b");
@id("no5") forbid (principal is L::Robot, action in L::Action::"All", resource);`, "", []string{
			"warning p:4 never-applies no1: can never determine a decision: no action in its scope takes this principal and resource",
		}},
		{"a policy twice", used + `@id("x") @why("?") permit (principal in L::Group::"g", action == L::Action::"Burn", resource) when { resource.owner  ==  principal };`, "", []string{
			"warning p:3 duplicate x: does the same as burns, at p:2",
		}},
		{"policies that differ in an obligation", used + `@id("x") @obligation("log") permit (principal in L::Group::"g", action == L::Action::"Burn", resource) when { resource.owner == principal };`, "", nil},
		{"a condition that is true", used + `@id("x") permit (principal in L::Group::"g", action == L::Action::"Burn", resource) when { principal is L::User && resource.owner == principal };`, "", []string{
			"warning p:3 constant-condition x: a part of its conditions is always true: principal is L::User",
		}},
		{"a permit for everybody", used + `@id("x") permit (principal is L::User, action == L::Action::"Burn", resource);`, "", []string{
			"info p:3 permits-everybody x: permits every L::User, without a condition",
		}},
		{"fields for everybody", used + `@id("x") permit (principal, action == L::Action::"Look.field", resource) when { context.field in L::FieldGroup::"g" && !(context.field == L::Field::"Box.b") };`, "", []string{
			`info p:3 field-open x: permits fields of L::Box to everybody who may use L::Action::"Look": a`,
		}},
		{"fields that nobody may see", `@id("x") permit (principal in L::Group::"g", action in L::Action::"All", resource) when { context has field && context.field == L::Field::"Box.b" };
@id("looks") permit (principal in L::Group::"g", action in [L::Action::"Look", L::Action::"Burn", L::Action::"Lend"], resource) when { principal has n };`, "", []string{
			"warning fields:2 field-hidden : no policy can permit the fields a, c of L::Box, with any action",
		}},
		{"an action that nobody may use", strings.ReplaceAll(used, `"Burn"`, `"Lend"`), "", []string{
			`warning schema:14 unused-action : no policy can permit L::Action::"Burn", so every question about it is denied`,
		}},
		{"what is switched off", used + `@id("x") @lint_ignore("permits-everybody, shadow") permit (principal is L::User, action == L::Action::"Burn", resource);`, "", []string{
			`warning p:3 unknown-rule x: @lint_ignore names "shadow", and there is no such rule`,
		}},
	} {
		want := slices.Concat(c.want, quiet)
		slices.Sort(want)
		if got := lint(t, c.policies, c.rails); got != strings.Join(want, "\n") {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, strings.Join(want, "\n"))
		}
	}
}

// What lint says is true in drawn worlds: a policy that it calls shadowed or never applying determines
// nothing, duplicates determine the same, a field that it calls hidden is not permitted, and an action that
// it calls unused is not allowed.
func TestLintIsSound(t *testing.T) {
	sources := []Source{{Name: "w", Schema: worldSchema, Fields: worldFields}}
	found := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		set, stored := world(t), worldEntities(t)
		var list []LintFinding
		for _, f := range set.Lint("w", sources) {
			list = append(list, f)
			found[f.Rule]++
		}
		for range 8 {
			a := worldAsk(t)
			res := decideWith(t, set, stored, a)
			determines := func(id string) bool {
				return slices.Contains(res.Policies, PolicyRef{"w", id}) || slices.Contains(res.FieldForbids, "w/"+id)
			}
			for _, f := range list {
				wrong := false
				switch f.Rule {
				case RuleNeverApplies, RuleShadowed:
					wrong = determines(f.Policy)
				case RuleDuplicate:
					other, _, _ := strings.Cut(strings.TrimPrefix(f.Message, "does the same as "), ",")
					wrong = determines(f.Policy) != determines(other)
				case RuleFieldHidden:
					_, hidden, _ := strings.Cut(f.Message, " field")
					hidden, _, _ = strings.Cut(hidden, " of ")
					for _, path := range res.Permitted {
						wrong = wrong || slices.Contains(strings.FieldsFunc(hidden, func(r rune) bool { return r == ',' || r == ' ' }), path)
					}
				case RuleUnusedAction:
					wrong = res.Allowed && strings.Contains(f.Message, a.Action.String())
				}
				if wrong {
					t.Fatalf("%s %s: %s\n%v: %+v", f.Rule, f.Policy, f.Message, a, res)
				}
			}
		}
	})
	t.Logf("findings: %v", found)
	for _, rule := range []string{RuleNeverApplies, RuleShadowed, RuleFieldHidden, RuleUnusedAction} {
		if found[rule] == 0 {
			t.Errorf("no finding of the rule %s was drawn", rule)
		}
	}
}

// A part of a condition whose value lint knows has this value for every question, and does not fail.
func TestKnownConditionsAreConstant(t *testing.T) {
	known := 0
	rapid.Check(t, func(t *rapid.T) {
		set, stored := world(t), worldEntities(t)
		all := full(set, stored)
		for range 4 {
			a := worldAsk(t)
			a.FieldsAsked = false
			q, err := set.read(a)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range set.bundles["w"].policies {
				parts, f, _ := set.conditionsOf(p)
				if q.inapplicable || !slices.Contains(set.matchedActions(p), q.action) || !p.principal.couldBe(a.Principal.Type) || !p.resource.couldBe(a.Resource.Type) {
					continue
				}
				for _, part := range parts {
					want, ok := f.value(part)
					if !ok {
						continue
					}
					known++
					if !want {
						part = xast.NodeTypeNot{UnaryNode: xast.UnaryNode{Arg: part}}
					}
					one := cedar.NewPolicyFromAST((*ast.Policy)(&xast.Policy{
						Effect: xast.EffectPermit, Principal: xast.ScopeTypeAll{}, Action: xast.ScopeTypeAll{}, Resource: xast.ScopeTypeAll{},
						Conditions: []xast.ConditionType{{Condition: xast.ConditionWhen, Body: part}},
					}))
					if d, diag := cedar.Authorize(single{one}, all, q.request); d != cedar.Allow {
						t.Fatalf("%s is not always true: %v, %v", cedarText(part), a, diag.Errors)
					}
				}
			}
		}
	})
	if known == 0 {
		t.Error("no part with a known value was drawn")
	}
}
