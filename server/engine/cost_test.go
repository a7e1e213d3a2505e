package engine

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cedar-policy/cedar-go"
)

// What costs much for its size, at the caps: each of these takes milliseconds,
// and where one would take exponential time this test would not end.
func TestCostlyShapes(t *testing.T) {
	const schema = `namespace C { entity U { s: String, sets: Set<Set<Long>>, n: Long }; action A appliesTo { principal: [U], resource: [U], context: { s: String, sets: Set<Set<Long>> } }; }`
	long := strings.Repeat("a", MaxStringBytes)
	var sets []any
	for i := range MaxArrayElements {
		var inner []any
		for j := range 10 {
			inner = append(inner, float64(i*j))
		}
		sets = append(sets, inner)
	}
	nest := func(open, body, shut string, n int) string {
		return strings.Repeat(open, n) + body + strings.Repeat(shut, n)
	}
	for name, condition := range map[string]string{
		"pattern":     `context.s like "` + strings.Repeat("*a", MaxStringBytes/2-10) + `b"`,
		"sets":        `context.sets.containsAll(principal.sets) && principal.sets.containsAny(context.sets) && principal.sets == context.sets`,
		"else if":     strings.Repeat("if principal.n == 1 then false else ", 1500) + "true",
		"ands":        "true" + strings.Repeat(" && principal.n < 5", 3000),
		"ors":         "false" + strings.Repeat(" || principal.n > 5", 3000),
		"parentheses": nest("(", "principal.n < 5", ")", MaxNesting-5),
		"nested ifs":  nest("if (principal.n < 5) then (", "true", ") else false", MaxNesting/2-5),
		"nested or":   nest("(principal.n == 1 || ", "true", " || context.s == \"x\")", MaxNesting-5),
		"sum":         "principal.n" + strings.Repeat(" + 1", 8000) + " > 0",
		"not":         nest("!(", "principal.n < 5", ")", MaxNesting/2-5),
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			set, findings := Compile([]Source{{Name: "c", Schema: schema, Policies: []PolicyText{{Text: fmt.Sprintf(`@id("p") permit (principal, action, resource) when { %s };`, condition)}}}}, nil)
			compiled := time.Since(began)
			if set == nil {
				t.Logf("refused in %s: %.100s", compiled, findings[0])
				return
			}
			attrs := map[string]any{"s": long, "sets": sets, "n": 1.0}
			u := cedar.NewEntityUID("C::U", "u")
			e, err := set.ReadEntity(RawEntity{UID: u, Attrs: attrs})
			if err != nil {
				t.Fatal(err)
			}
			began = time.Now()
			q, err := set.read(Ask{Principal: u, Action: cedar.NewEntityUID("C::Action", "A"), Resource: u, Context: map[string]any{"s": long, "sets": sets}})
			if err != nil {
				t.Fatal(err)
			}
			pool := NewPool()
			pool.Add([]cedar.EntityUID{u}, []Entity{*e})
			if _, err := set.decide(q, set.newSlice(q, pool)); err != nil {
				t.Fatal(err)
			}
			decided := time.Since(began)
			t.Logf("compiled in %s, decided in %s", compiled, decided)
		})
	}
}
