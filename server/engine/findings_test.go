package engine

import (
	"strings"
	"testing"
)

// What Cedar refuses is refused with its place and what to do; what Cedar warns of is
// a warning.
func TestFindingsLikeCedar(t *testing.T) {
	const schema = `entity G; entity Color enum ["red", "blue"]; entity Alone; entity U in [G];
action act appliesTo { principal: U, resource: U, context: { n: Long } };`
	for _, c := range []struct{ policy, want string }{
		{"permit (principal == ?principal, action, resource);", `p.cedar:2:22: templates are not supported: ?principal and ?resource have no value`},
		{"permit (principal, action, resource is U in ?resource);", `p.cedar:2:45: templates are not supported: ?principal and ?resource have no value`},
		{`permit (principal, action, resource) when { principal == ?principal };`, `p.cedar:2:58: templates are not supported: ?principal and ?resource have no value`},
		{"permit (principal, action, resource) when { principal == U::\"é\" ||\n\"é?\" == \"principal\" || principal == ?principal };", `p.cedar:3:37: templates are not supported: ?principal and ?resource have no value`},
		{"permit (principal, action, resource)\n  when { true || !!!!true || !!!!!true };", "p.cedar:3:34: policy p: more than 4 of ! or - in a row"},
		{"permit (principal, action, resource) when { 1 -----context.n == 2 };", ""},
		{"permit (principal, action, resource) when { 1 ------context.n == 2 };", "p.cedar:2:52: policy p: more than 4 of ! or - in a row"},
		{`permit (principal is Alone, action, resource);`, "warning p.cedar:1:1: policy p: unable to find an applicable action given the policy scope constraints"},
		{`permit (principal is Alone, action, resource) when { principal is Aloen };`, "p.cedar:2:67: policy p: unrecognized entity type `Aloen`"},
		{`permit (principal is Alone, action, resource) when { action == Action::"atc" };`, "p.cedar:2:64: policy p: unrecognized action `Action::\"atc\"`"},
		{`permit (principal, action, resource) when { (if context.n > 1 then Color::"red" else Color::"blue") in Color::"red" };`, ""},
		{`permit (principal, action, resource) when { G::"g" in G::"g" };`, `p.cedar:1:1: policy p: dereferences the literal G::"g", which is not part of any request`},
	} {
		_, findings := Compile([]Source{{Name: "b", Schema: schema, Policies: []PolicyText{{File: "p.cedar", Text: "@id(\"p\")\n" + c.policy}}}}, nil)
		var got []string
		for _, f := range findings {
			s := f.String()
			if f.Warning {
				s = "warning " + s
			}
			got = append(got, s)
		}
		if len(findings) > 0 && strings.HasPrefix(findings[0].Message, "templates") && findings[0].Hint == "" {
			t.Errorf("%s: no hint", c.policy)
		}
		if strings.Join(got[:min(len(got), 1)], "") != c.want {
			t.Errorf("%s\n got %q\nwant %q", c.policy, got, c.want)
		}
	}
	// What an earlier version published is loaded.
	set, findings := Load([]Source{{Name: "b", Schema: schema, Policies: []PolicyText{{Text: `@id("p") permit (principal, action, resource) when { !!!!!false };`}}}}, nil)
	if set == nil {
		t.Error(findings)
	}
}

// A message names an action in Cedar text, with escapes in its id.
func TestAttributeOfAnActionWithAQuote(t *testing.T) {
	const schema = `entity U; action "say \"hi\"" appliesTo { principal: U, resource: U, context: { volume: Long } };`
	_, findings := Compile([]Source{{Name: "b", Schema: schema, Policies: []PolicyText{
		{File: "p.cedar", Text: `@id("p") permit (principal, action, resource) when { context.volmue > 1 };`}}}}, nil)
	if len(findings) != 1 || findings[0].Hint != "did you mean volume?" {
		t.Errorf("%+v", findings)
	}
}
