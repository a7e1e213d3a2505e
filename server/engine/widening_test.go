package engine

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestWidenings(t *testing.T) {
	t.Parallel()
	const base = `@id("p") permit (principal in L::Group::"g", action == L::Action::"Burn", resource) when { resource.owner == principal };
@id("f") forbid (principal, action == L::Action::"Burn", resource) when { principal.n > 3 };
@id("g") permit (principal in L::Group::"g", action == L::Action::"Look.field", resource) when { context.field in L::FieldGroup::"g" };
`
	state := func(policies string, skip bool, fields []Field) *Set {
		set, findings := Compile([]Source{{Name: "l", Schema: lintSchema, Fields: fields, SkipForbidErrors: skip, Policies: []PolicyText{{Text: policies}}}}, nil)
		if set == nil {
			t.Fatal(findings)
		}
		return set
	}
	for _, c := range []struct {
		name     string
		policies string
		skip     bool
		fields   []Field
		want     []string
	}{
		{"the same", base, false, lintFields, nil},
		{"other names and annotations", strings.ReplaceAll(base, `@id("p")`, `@id("q") @advice("x")`), false, lintFields, nil},
		{"a permit less", strings.Replace(base, "permit", "forbid", 1), false, lintFields, nil},
		{"a forbid more", base + `@id("h") forbid (principal, action, resource);`, false, lintFields, nil},
		{"a permit more", base + `@id("h") permit (principal == L::User::"u", action in L::Action::"All", resource);`, false, lintFields, []string{
			`L::Action::"Lend" L::User 0 1 0 `, `L::Action::"Look" L::User 0 1 0 `, `L::Action::"Look.field" L::User 1 2 0 `,
		}},
		{"a forbid less", strings.ReplaceAll(base, "> 3", "> 4"), false, lintFields, []string{`L::Action::"Burn" L::User 2 2 1 `}},
		{"a forbid that fails without effect", base, true, lintFields, []string{`L::Action::"Burn" L::User 2 2 1 `}},
		{"other fields", base, false, slices.Concat(lintFields, []Field{{Type: "L::Box", Path: "d", Groups: []string{"g"}}}), []string{
			`L::Action::"Look.field" L::Robot 1 1 0 fields.yaml has other fields or groups, which the tools do not look at`,
			`L::Action::"Look.field" L::User 1 1 0 fields.yaml has other fields or groups, which the tools do not look at`,
		}},
	} {
		var got []string
		for _, w := range Widenings(state(base, false, lintFields), state(c.policies, c.skip, c.fields), "l") {
			got = append(got, fmt.Sprintf("%s %s %d %d %d %s", w.Action, w.Principal, len(w.Before), len(w.After), len(w.Failing), w.Unprovable))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
		}
	}
}

// Where Widenings returns nothing, no drawn question is allowed after a drawn change that was not allowed
// before, and no field is permitted.
func TestNoWideningIsSound(t *testing.T) {
	narrower := 0
	rapid.Check(t, func(t *rapid.T) {
		var texts [2][]string
		for i := range rapid.IntRange(1, 10).Draw(t, "policies") {
			text := worldPolicy(t, i)
			switch rapid.IntRange(0, 7).Draw(t, "in") {
			case 0:
				texts[0] = append(texts[0], text)
			case 1:
				texts[1] = append(texts[1], text)
			default:
				texts[0], texts[1] = append(texts[0], text), append(texts[1], text)
			}
		}
		skip := rapid.IntRange(0, 3).Draw(t, "skip")
		var sets [2]*Set
		for i := range sets {
			src := Source{Name: "w", Schema: worldSchema, Fields: worldFields, SkipForbidErrors: skip>>i&1 == 1}
			for _, text := range texts[i] {
				src.Policies = append(src.Policies, PolicyText{Text: text})
			}
			if sets[i], _ = Compile([]Source{src}, nil); sets[i] == nil {
				t.SkipNow()
			}
		}
		wider := map[[2]string]bool{} // by action and resource type; there is one principal type
		for _, w := range Widenings(sets[0], sets[1], "w") {
			wider[[2]string{string(w.Action.ID), string(w.Resource)}] = true
		}
		stored := worldEntities(t)
		for range 8 {
			a := worldAsk(t)
			a.RequireAll = false
			before, after := decideWith(t, sets[0], stored, a), decideWith(t, sets[1], stored, a)
			typ := string(a.Resource.Type)
			if wider[[2]string{string(a.Action.ID), typ}] {
				continue
			}
			narrower++
			if after.Allowed && !before.Allowed {
				t.Fatalf("%v is allowed now: %+v", a, after)
			}
			if wider[[2]string{string(a.Action.ID + ".field"), typ}] {
				continue
			}
			for _, path := range after.Permitted {
				if !slices.Contains(before.Permitted, path) {
					t.Fatalf("%v: the field %s is permitted now", a, path)
				}
			}
		}
	})
	if narrower == 0 {
		t.Error("no change was drawn that the policies show to be narrower")
	}
}
