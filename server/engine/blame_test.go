package engine

import "testing"

// An error in a schema is reported for the bundle that has it, also if that is a cycle of common
// types, and if another bundle uses them.
func TestCycleOfTypesIsBlamedOnItsBundle(t *testing.T) {
	pad := Source{Name: "pad", Schema: `namespace Pad { entity User; entity Doc { of: Zoo::Animal }; action read appliesTo { principal: User, resource: Doc, context: Zoo::Context }; }`, Published: true}
	for name, schema := range map[string]string{
		"a cycle":           `namespace Zoo { type A = B; type B = A; type Animal = { name: String }; type Context = { a: Long }; }`,
		"an unknown type":   `namespace Zoo { type Animal = Nothing; type Context = { a: Long }; }`,
		"an unknown parent": `namespace Zoo { entity E in [Nothing]; type Animal = { name: String }; type Context = { a: Long }; }`,
	} {
		set, findings := Compile([]Source{pad, {Name: "zoo", Schema: schema}}, nil)
		if set != nil || len(findings) == 0 || findings[0].Bundle != "zoo" {
			t.Errorf("%s: %v", name, findings)
		}
	}
}
