package engine

import (
	"fmt"
	"maps"
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
		q, err := set.read(Ask{Principal: u, Action: cedar.NewEntityUID("Action", "A"), Resource: u, Context: map[string]any{"t": c.time}})
		if err != nil {
			t.Fatal(err)
		}
		pool := NewPool()
		pool.Put(u, nil)
		res, err := set.decide(q, set.newSlice(q, pool))
		if err != nil || !res.Allowed {
			t.Errorf("%s: %s is not so: %+v %v", c.time, c.condition, res, err)
		}
	}
}

const embargoSchema = `entity U; entity Doc { embargo: datetime }; action Read appliesTo { principal: [U], resource: [Doc], context: { now: datetime, least?: duration } };`

// A year with a sign is no date: not of an entity, in a context, or in a policy.
// cedar-go would take it, and some for a date before the year -100,000,000.
func TestYearsWithSign(t *testing.T) {
	u, doc, read := cedar.NewEntityUID("U", "u"), cedar.NewEntityUID("Doc", "d"), cedar.NewEntityUID("Action", "Read")
	source := func(text string) []Source {
		return []Source{{Name: "d", Schema: embargoSchema, SkipForbidErrors: true, Policies: []PolicyText{{File: "p.cedar", Text: text}}}}
	}
	set, findings := Compile(source(`@id("p") permit (principal, action, resource) when { context.now >= resource.embargo };`), nil)
	if set == nil {
		t.Fatal(findings)
	}
	for _, year := range []string{"+999999999", "+000009999", "-000000001", "+000002024"} {
		date := year + "-12-31"
		_, err := set.ReadEntity(RawEntity{UID: doc, Attrs: map[string]any{"embargo": date}})
		if want := fmt.Sprintf("entity Doc::\"d\".embargo: %q is not a datetime", date); err == nil || err.Error() != want {
			t.Errorf("entity: %v, want %s", err, want)
		}
		_, err = set.read(Ask{Principal: u, Action: read, Resource: doc, Context: map[string]any{"now": date}, Recorded: true})
		if want := fmt.Sprintf("context.now: %q is not a datetime", date); err == nil || err.Error() != want {
			t.Errorf("context: %v, want %s", err, want)
		}
		policy := fmt.Sprintf(`@id("p")
permit (principal, action, resource)
when { datetime(%q) <= context.now || datetime(%q) > context.now };`, date, date)
		_, findings := Compile(source(policy), nil)
		if want := fmt.Sprintf("p.cedar:3:17: policy p: %q is not a datetime", date); len(findings) == 0 || findings[0].String() != want {
			t.Errorf("policy: %v, want %s", findings, want)
		}
		// One that an earlier version published fails.
		old, findings := Load(source(policy), nil)
		if old == nil {
			t.Fatal(findings)
		}
		q, err := old.read(Ask{Principal: u, Action: read, Resource: doc, Context: map[string]any{"now": "2024-01-01"}, Recorded: true})
		if err != nil {
			t.Fatal(err)
		}
		res, err := decideFrom(old, q, nil)
		if err != nil || res.Allowed || len(res.Errors) != 1 {
			t.Errorf("published before: %+v, %v", res, err)
		}
	}
}

// An explanation evaluates as the decision does, and writes values that Cedar reads.
func TestExplanationsAreExact(t *testing.T) {
	set, findings := Compile([]Source{{Name: "d", Schema: embargoSchema, Policies: []PolicyText{{Text: `
@id("day") permit (principal, action, resource) when { resource.embargo.toDate() == datetime("1969-12-31") };
@id("late") permit (principal, action, resource) when { context has least && [context.now, resource.embargo].contains(datetime("2024-01-01")) && context.least > duration("1ms") };
@id("least") permit (principal, action, resource) when { context has least && context.least > duration("-9223372036854775808ms") };`}}}}, nil)
	if set == nil {
		t.Fatal(findings)
	}
	u, doc := cedar.NewEntityUID("U", "u"), cedar.NewEntityUID("Doc", "d")
	for _, c := range []struct {
		embargo, now string
		allowed      bool
		values       map[string]string // of the policies whose conditions are false
	}{
		{"1969-12-31T23:00:00Z", "2024-01-01", true, map[string]string{"context.least": `duration("-9223372036854775808ms")`}},
		{"0000-01-01T00:00:00+2359", "9999-12-31T23:59:59-2359", false, map[string]string{
			"context.least": `duration("-9223372036854775808ms")`, "context.now": `datetime("9999-12-31T23:59:59.000-2359")`, "resource.embargo": `datetime("0000-01-01T00:00:00.000+2359")`,
		}},
	} {
		q, err := set.read(Ask{
			Principal: u, Action: cedar.NewEntityUID("Action", "Read"), Resource: doc, Recorded: true,
			Context: map[string]any{"now": c.now, "least": "-106751991167d7h12m55s808ms"},
		})
		if err != nil {
			t.Fatal(err)
		}
		e, err := set.ReadEntity(RawEntity{UID: doc, Attrs: map[string]any{"embargo": c.embargo}})
		if err != nil {
			t.Fatal(err)
		}
		pool := NewPool()
		pool.Add([]cedar.EntityUID{u}, []Entity{*e})
		sl := set.newSlice(q, pool)
		res, err := set.decide(q, sl)
		if err != nil || res.Allowed != c.allowed {
			t.Fatalf("%s: %+v %v", c.embargo, res, err)
		}
		x, err := set.explain(q, sl, res)
		if err != nil {
			t.Fatal(err)
		}
		values := map[string]string{}
		for _, p := range x.Policies {
			if (p.Outcome == Satisfied) != (c.allowed && p.Policy.ID == "day") {
				t.Errorf("%s: the explanation says %+v", c.embargo, p)
			}
			for _, v := range p.Values {
				values[v.Expression] = v.Value
			}
		}
		if !maps.Equal(values, c.values) {
			t.Errorf("%s: values %v, want %v", c.embargo, values, c.values)
		}
	}
}
