package engine

import (
	"fmt"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// Dates and times of day before 1970 are Cedar's: dates round down, times of day
// are never negative.
func TestDatesBefore1970(t *testing.T) {
	const schema = `entity U; action A appliesTo { principal: [U], resource: [U], context: { t: datetime } };`
	for _, c := range []struct{ time, condition string }{
		{"1969-12-31T23:00:00Z", `context.t.toDate() == datetime("1969-12-31") && context.t.toTime() == duration("23h")`},
		{"1969-12-31T00:00:00Z", `context.t.toDate() == datetime("1969-12-31") && context.t.toTime() == duration("0s")`},
		{"0001-01-01T00:00:01Z", `context.t.toDate() == datetime("0001-01-01") && context.t.toTime() == duration("1s")`},
		{"1970-01-01T00:00:00Z", `context.t.toDate() == datetime("1970-01-01") && context.t.toTime() == duration("0s")`},
		{"2024-02-29T12:34:56.789Z", `context.t.toDate() == datetime("2024-02-29") && context.t.toTime() == duration("12h34m56s789ms")`},
		{"1969-12-31T23:00:00Z", `[context.t.toDate()].contains(datetime("1969-12-31")) && {a: if true then context.t.toDate() else context.t}.a.toTime() == duration("0s")`},
	} {
		set, findings := Compile([]Source{{Name: "d", Schema: schema, Policies: []PolicyText{{Text: fmt.Sprintf(`@id("p") permit (principal, action, resource) when { %s };`, c.condition)}}}}, nil)
		if set == nil {
			t.Fatal(findings)
		}
		u := cedar.NewEntityUID("U", "u")
		q, err := set.Read(Ask{Principal: u, Action: cedar.NewEntityUID("Action", "A"), Resource: u, Context: map[string]any{"t": c.time}})
		if err != nil {
			t.Fatal(err)
		}
		pool := NewPool()
		pool.Put(u, nil)
		res, err := set.Decide(q, set.NewSlice(q, pool))
		if err != nil || !res.Allowed {
			t.Errorf("%s: %s is not so: %+v %v", c.time, c.condition, res, err)
		}
	}
}
