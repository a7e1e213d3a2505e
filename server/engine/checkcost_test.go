package engine

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// has returns n guards of optional attributes, joined with &&.
func has(n int) string {
	guards := make([]string, n)
	for i := range guards {
		guards[i] = fmt.Sprintf("principal has a%d", i)
	}
	return strings.Join(guards, " && ")
}

// hasSchema has n optional attributes, and kinds types of principals and of resources.
func hasSchema(n, kinds int) string {
	var b strings.Builder
	var names []string
	for k := range kinds {
		names = append(names, fmt.Sprintf("U%d", k))
	}
	fmt.Fprintf(&b, "entity %s { ", strings.Join(names, ", "))
	for i := range n {
		fmt.Fprintf(&b, "a%d?: Long, ", i)
	}
	list := strings.Join(names, ", ")
	fmt.Fprintf(&b, "}; action act appliesTo { principal: [%s], resource: [%s] };", list, list)
	return b.String()
}

// chained returns a schema in which each of n names of a kind is in the one before.
func chained(kind string, n int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s X0;", kind)
	for i := range n {
		fmt.Fprintf(&b, "%s X%d in [X%d];", kind, i+1, i)
	}
	return b.String()
}

// What the validator would take seconds to years for is refused before it begins. The finding
// names the policy, its cost and the limit. What policies usually look like is checked.
func TestAttackCostlyPolicies(t *testing.T) {
	const used = "entity U; action act appliesTo { principal: U, resource: U };"
	var actions []string
	for i := range 400 {
		actions = append(actions, fmt.Sprintf(`Action::"X%d"`, i))
	}
	for _, c := range []struct {
		name, schema, scope, condition string
		refused                        string // part of the finding; "" if the policy is checked
	}{
		{"100 guards in 49 environments", hasSchema(100, 7), "action", has(100), ""},
		{"250 guards", hasSchema(250, 1), "action", has(250), ""},
		{"400 guards and a comparison", hasSchema(400, 1), "action", has(400) + " && 1 < 2", "takes 22 million steps to check, the limit is 20 million"},
		{"1000 guards", hasSchema(1000, 1), "action", has(1000), "takes 168 million steps to check, the limit is 20 million"},
		{"2500 guards", hasSchema(2500, 1), "action", has(2500), "million steps to check"},
		{"few guards, many conditions", hasSchema(200, 1), "action", has(200) + strings.Repeat("&&true", 1500), "million steps to check"},
		{"few guards, many alternatives", hasSchema(200, 1), "action", has(200) + " && (principal == resource" + strings.Repeat("||principal==resource", 2000) + ")", "million steps to check"},
		{"guards in 2500 environments", hasSchema(40, 50), "action", has(40), "million steps to check"},
		{"six optional records", "entity U; action act appliesTo { principal: U, resource: U, context: " + strings.Repeat("{ a?: ", 6) + "Long" + strings.Repeat("}", 6) + " };",
			"action", "context" + strings.Repeat(".a", 6) + " == 1", "unable to guarantee safety"},
		{"40 optional records", "entity U; action act appliesTo { principal: U, resource: U, context: " + strings.Repeat("{ a?: ", 40) + "Long" + strings.Repeat("}", 40) + " };",
			"action", "context" + strings.Repeat(".a", 40) + " == 1", "million steps to check"},
		{"all actions of a chain in the scope", chained("action", 400) + used, "action in [" + strings.Join(actions, ", ") + "]", "true", "million steps to check"},
		{"all actions of a chain in a condition", chained("action", 400) + used, "action", "action in [" + strings.Join(actions, ", ") + "]", "million steps to check"},
		{"many wide records", "entity U; action act appliesTo { principal: U, resource: U, context: { " + strings.Repeat("x", 1) + "0: Long, r: { " + attributes(3000) + " } } };",
			"action", "[" + strings.Repeat("context.r, ", 5000) + "context.r].isEmpty()", "million steps to check"},
	} {
		t.Run(c.name, func(t *testing.T) {
			set, findings := Compile([]Source{{Name: "b", Schema: c.schema, Policies: []PolicyText{{File: "p.cedar",
				Text: fmt.Sprintf(`@id("costly") permit (principal, %s, resource) when { %s };`, c.scope, c.condition)}}}}, nil)
			switch {
			case c.refused == "" && set == nil:
				t.Errorf("refused: %.300s", findings[0])
			case c.refused != "" && (set != nil || !strings.Contains(findings[0].Message, c.refused) || findings[0].Policy != "costly"):
				t.Errorf("want %q, got %.300v", c.refused, findings)
			case c.refused != "":
				t.Logf("%d bytes of text: %.120s", len(c.schema)+len(c.condition), findings[0].Message)
			}
		})
	}
}

func attributes(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "a%d: Long, ", i)
	}
	return b.String()
}

// A hierarchy of types is searched again for each policy that names a type in its scope.
func TestAttackDeepTypes(t *testing.T) {
	schema := chained("entity", 600) + "action act appliesTo { principal: X1, resource: X1 };"
	_, findings := Compile([]Source{{Name: "b", Schema: schema, Policies: []PolicyText{{Text: `@id("p") permit (principal in X0::"x", action, resource);`}}}}, nil)
	if len(findings) == 0 || !strings.Contains(findings[0].Message, "million steps to check") {
		t.Errorf("%.300v", findings)
	}
	_, findings = Compile([]Source{{Name: "b", Schema: chained("action", 3000)}}, nil)
	if len(findings) == 0 || !strings.Contains(findings[0].Message, "nests groups of actions too deep") {
		t.Errorf("%.300v", findings)
	}
}

// nested returns a schema with n records in one another, and a policy that reads the innermost
// attribute. The estimate doubles with each record. Checking it is cheap nevertheless, because no
// attribute is optional.
func nested(n int) (schema, condition string) {
	return "entity U; action act appliesTo { principal: U, resource: U, context: " + strings.Repeat("{ a: ", n) + "Long" + strings.Repeat("}", n) + " };",
		"context" + strings.Repeat(".a", n) + " == 1"
}

// Policies of which none is too costly can be too costly together.
func TestAttackManyCostlyPolicies(t *testing.T) {
	schema, condition := nested(22)
	b := Source{Name: "b", Schema: schema}
	for i := range 60 {
		b.Policies = append(b.Policies, PolicyText{Text: fmt.Sprintf(`@id("p%d") permit (principal, action, resource) when { %s };`, i, condition)})
	}
	_, findings := Compile([]Source{b}, nil)
	if len(findings) != 1 || findings[0].Message != "its policies take more than 200 million steps to check" {
		t.Errorf("%.300v", findings)
	}
}

// What was published by a version without limits is loaded, and does not keep others from
// publishing.
func TestCostlyPoliciesThatWerePublished(t *testing.T) {
	schema, condition := nested(50)
	b := Source{Name: "b", Schema: schema, Policies: []PolicyText{{Text: `@id("p") permit (principal, action, resource) when { ` + condition + ` };`}}}
	loaded, findings := Load([]Source{b}, nil)
	if loaded == nil {
		t.Fatalf("%.300v", findings)
	}
	if set, _ := Compile([]Source{b}, loaded); set != nil {
		t.Error("published again")
	}
	b.Published = true
	if set, findings := Compile([]Source{b, {Name: "other", Schema: "namespace Other { entity X; }"}}, loaded); set == nil {
		t.Errorf("%.300v", findings)
	}
}

// A bundle can have a bounded number of policies, bytes of policies and expressions.
func TestAttackRoomOfABundle(t *testing.T) {
	for _, c := range []struct {
		taken room
		want  string
	}{
		{room{maxBundlePolicies, maxBundlePolicyBytes, maxBundleNodes}, ""},
		{room{policies: maxBundlePolicies + 1}, "has more than 100000 policies"},
		{room{bytes: maxBundlePolicyBytes + 1}, "has policies of more than 16777216 bytes"},
		{room{nodes: maxBundleNodes + 1}, "has policies with more than 2000000 expressions"},
	} {
		if got := c.taken.full(); got != c.want {
			t.Errorf("%+v: %q, want %q", c.taken, got, c.want)
		}
	}
	long := `@id("p%d") @d("` + strings.Repeat("d", 60_000) + `") permit (principal, action, resource);`
	b := Source{Name: "b", Schema: "entity U; action act appliesTo { principal: U, resource: U };"}
	for i := range maxBundlePolicyBytes/60_000 + 1 {
		b.Policies = append(b.Policies, PolicyText{Text: fmt.Sprintf(long, i)})
	}
	if _, findings := Compile([]Source{b}, nil); len(findings) != 1 || !strings.Contains(findings[0].Message, "policies of more than") {
		t.Errorf("%.200v", findings)
	}
	if set, findings := Load([]Source{b}, nil); set == nil {
		t.Errorf("%.200v", findings)
	}
}

// A check stops between two policies when its caller has left.
func TestCompileUntil(t *testing.T) {
	gone := errors.New("gone")
	b := Source{Name: "b", Schema: hasSchema(10, 1)}
	for i := range 1000 {
		b.Policies = append(b.Policies, PolicyText{Text: fmt.Sprintf(`@id("p%d") permit (principal, action, resource) when { %s };`, i, has(10))})
	}
	for _, after := range []int{1, 500, 1500, 2500, 3000} {
		calls := 0
		set, findings, err := CompileUntil([]Source{b}, nil, func() error {
			if calls++; calls >= after {
				return gone
			}
			return nil
		})
		if !errors.Is(err, gone) || set != nil || findings != nil || calls != after {
			t.Errorf("ended at call %d: %v after %d calls", after, err, calls)
		}
	}
}

// A policy with thousands of problems has a bounded number of findings.
func TestAttackManyFindings(t *testing.T) {
	unknown := "false"
	for i := range 2000 {
		unknown += fmt.Sprintf(" || principal.x%d == 1", i)
	}
	b := Source{Name: "b", Schema: hasSchema(10, 1)}
	for i := range 22 {
		b.Policies = append(b.Policies, PolicyText{Text: fmt.Sprintf(`@id("p%d") permit (principal, action, resource) when { %s };`, i, unknown)})
	}
	_, findings := Compile([]Source{b}, nil)
	if len(findings) > maxFindings+1 || len(findings) < maxFindings {
		t.Errorf("%d findings", len(findings))
	}
	t.Logf("44000 problems: %d findings", len(findings))
}
