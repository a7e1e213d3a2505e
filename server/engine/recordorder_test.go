package engine

import (
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// The message of a policy in which several members of a record fail is that of the first
// one by name, as in Cedar, in every evaluation and in every explanation.
func TestFirstMemberByNameFails(t *testing.T) {
	const largest = "9223372036854775807"
	for name, c := range map[string]struct{ condition, want string }{
		"two members":     {`{ b: 1 + ` + largest + `, a: 2 + ` + largest + ` }.a == 1`, "`2`"},
		"the last fails":  {`{ c: 1 + ` + largest + `, b: 1 + 1, a: 2 + 2 }.a == 1`, "`1`"},
		"the second":      {`{ c: 1 + ` + largest + `, b: 3 + ` + largest + `, a: 2 + 2 }.a == 1`, "`3`"},
		"nested":          {`{ b: 1 + ` + largest + `, a: { d: 2 + ` + largest + `, c: 3 + ` + largest + ` } }.b == 1`, "`3`"},
		"in a set":        {`[{ b: 1 + ` + largest + `, a: 2 + ` + largest + ` }].contains({ a: 1, b: 1 })`, "`2`"},
		"only one can":    {`{ b: 1 + ` + largest + `, a: 2 }.a == 2`, "`1`"},
		"an earlier part": {`4 + ` + largest + ` == 0 && { b: 1 + ` + largest + `, a: 2 + ` + largest + ` }.a == 1`, "`4`"},
	} {
		t.Run(name, func(t *testing.T) {
			set := sliceSet(t, `@id("a") forbid (principal, action, resource) when { `+c.condition+` };`)
			pool := NewPool()
			e, err := set.Prepare(roleless(), pool, func(missing []cedar.EntityUID) error { pool.Add(missing, nil); return nil })
			if err != nil {
				t.Fatal(err)
			}
			for range 200 {
				res, err := e.Decide()
				if err != nil || len(res.Errors) != 1 || !strings.Contains(res.Errors[0].Message, c.want) {
					t.Fatalf("want %s: %+v, %v", c.want, res, err)
				}
				x, err := e.Explain(res)
				if err != nil || !strings.Contains(x.Policies[0].Reason, res.Errors[0].Message) {
					t.Fatalf("%q explained as %+v, %v", res.Errors[0].Message, x, err)
				}
			}
		})
	}
}

// A policy that nests such records deep has one message, and takes no longer to evaluate.
func TestDeeplyNestedRecordsFail(t *testing.T) {
	record := `{ a: 1 + 1, b: 1 + 9223372036854775807 }`
	for range 40 {
		record = `{ a: ` + record + `, b: 1 + 1 }`
	}
	set := sliceSet(t, `@id("a") forbid (principal, action, resource) when { [`+record+`].isEmpty() };`)
	pool := NewPool()
	e, err := set.Prepare(roleless(), pool, func(missing []cedar.EntityUID) error { pool.Add(missing, nil); return nil })
	if err != nil {
		t.Fatal(err)
	}
	res, err := e.Decide()
	if err != nil || len(res.Errors) != 1 || res.Errors[0].Message != anyOrderMessage {
		t.Fatalf("%+v, %v", res, err)
	}
}

func roleless() Ask {
	return Ask{Principal: cedar.NewEntityUID("User", "u"), Action: cedar.NewEntityUID("Action", "view"), Resource: cedar.NewEntityUID("Doc", "d"),
		Context: map[string]any{"roles": []any{}}}
}
