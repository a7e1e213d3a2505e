package engine

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"pgregory.net/rapid"
)

// The world of the property tests: small, so that everything meets everything.
const worldSchema = `
namespace W {
  entity Group in [Group];
  entity User in [Group] { n: Long, boss: User, tag?: String };
  entity Box in [Box] { owner: User, open: Bool, n: Long };
  entity Lid { owner: User };
  entity FieldGroup in [FieldGroup];
  entity Field in [Field, FieldGroup];
  action All;
  action Look in [All] appliesTo { principal: [User], resource: [Box, Lid], context: { ok: Bool, n: Long } };
  action "Look.field" in [All] appliesTo { principal: [User], resource: [Box, Lid], context: { ok: Bool, n: Long, field: Field } };
  action Burn appliesTo { principal: [User], resource: [Box], context: { ok: Bool, n: Long } };
}`

var worldFields = []Field{
	{Type: "W::Box", Path: "a", Groups: []string{"g1"}},
	{Type: "W::Box", Path: "b", Groups: []string{"g1", "g2"}},
	{Type: "W::Box", Path: "c.d", Groups: []string{"g2"}},
	{Type: "W::Box", Path: "c.e"},
	{Type: "W::Box", Path: "c", Groups: []string{"g3"}},
	{Type: "W::Box", Path: "f", Groups: []string{"g1"}},
	{Type: "W::Box", Path: "h"},
	{Type: "W::FieldGroup", Path: "g1", Groups: []string{"g2"}},
	{Type: "W::FieldGroup", Path: "g2", Groups: []string{"g4"}},
}

func pick(t *rapid.T, label string, from ...string) string {
	return rapid.SampledFrom(from).Draw(t, label)
}

// condition draws a well-typed Boolean expression. Some of them fail to evaluate
// (overflow), which must be the same wherever they are evaluated.
func condition(t *rapid.T, depth int, box, field bool) string {
	atoms := []string{
		"true", "false", "context.ok", "principal.n > 2", "context.n == 1", `principal in W::Group::"x"`,
		`principal.boss in W::Group::"y"`, "principal has tag", "principal.n * 9223372036854775807 > 0", "principal.boss.n < 3",
		"principal.boss == principal",
	}
	resource := []string{"resource.owner == principal", "resource.owner in W::Group::\"x\"", "resource.owner.n > 1", `resource == W::Box::"b1"`, `resource in W::Box::"b2"`}
	if box {
		resource = append(resource, "resource.open", "resource.n + 9223372036854775807 > 0", "resource.n < principal.n")
	}
	fields := []string{
		`context.field in W::FieldGroup::"g1"`, `context.field in W::FieldGroup::"g4"`, `context.field == W::Field::"Box.b"`, `W::Field::"Box.h" == context.field`, `context.field == W::Field::"Box.c"`,
		`context.field in W::Field::"Box.c"`, `context.field in [W::FieldGroup::"g2", W::Field::"Box.a"]`, `context.field != W::Field::"Box.f"`,
		`[W::Field::"Box.a", W::Field::"Box.h"].contains(context.field)`,
	}
	list := slices.Concat(atoms, resource)
	if field {
		list = slices.Concat(list, fields, fields)
	}
	if depth == 0 {
		return pick(t, "atom", list...)
	}
	sub := func() string { return condition(t, depth-1, box, field) }
	switch rapid.IntRange(0, 5).Draw(t, "op") {
	case 0:
		return "(" + sub() + " && " + sub() + ")"
	case 1:
		return "(" + sub() + " || " + sub() + ")"
	case 2:
		return "!(" + sub() + ")"
	case 3:
		return "(if " + sub() + " then " + sub() + " else " + sub() + ")"
	}
	return pick(t, "atom", list...)
}

func worldPolicy(t *rapid.T, id int) string {
	effect := pick(t, "effect", "permit", "permit", "forbid")
	principal := pick(t, "principal", "principal", "principal is W::User", `principal == W::User::"u1"`, `principal in W::Group::"x"`, `principal is W::User in W::Group::"z"`)
	action := pick(t, "action", `action == W::Action::"Look"`, `action == W::Action::"Look"`, `action == W::Action::"Look.field"`, `action == W::Action::"Look.field"`,
		"action", `action in W::Action::"All"`, `action == W::Action::"Burn"`, `action in [W::Action::"Look", W::Action::"Burn"]`)
	resource := pick(t, "resource", "resource", "resource is W::Box", "resource is W::Box", "resource is W::Lid", `resource == W::Box::"b1"`, `resource in W::Box::"b2"`)
	if strings.Contains(action, "Burn") && resource == "resource is W::Lid" {
		resource = "resource"
	}
	box := strings.Contains(resource, "Box") || strings.HasSuffix(action, `"Burn"`)
	field := strings.HasSuffix(action, `"Look.field"`)
	text := fmt.Sprintf("@id(\"p%d\") %s (%s, %s, %s)", id, effect, principal, action, resource)
	for range rapid.IntRange(0, 2).Draw(t, "conditions") {
		text += fmt.Sprintf(" %s { %s }", pick(t, "kind", "when", "when", "unless"), condition(t, 2, box, field))
	}
	return text + ";"
}

// world draws a compiled set.
func world(t *rapid.T) *Set {
	var texts []string
	for i := range rapid.IntRange(1, 12).Draw(t, "policies") {
		texts = append(texts, worldPolicy(t, i))
	}
	src := Source{Name: "w", Schema: worldSchema, Fields: worldFields, SkipForbidErrors: rapid.Bool().Draw(t, "skip"), Exports: []Export{{Type: "*"}}}
	// Guardrails join; a neighbour's permits must not.
	rails := Source{Name: Guardrails, Policies: []PolicyText{{Text: `@id("calm") forbid (principal, action, resource);`}}}
	if rapid.Bool().Draw(t, "calm") {
		rails.Policies[0].Text = `@id("calm") forbid (principal in W::Group::"z", action, resource) when { principal is W::User && principal.n > 3 };`
	}
	if rapid.Bool().Draw(t, "no rails") {
		rails.Policies = nil
	}
	open := Source{Name: "open", Schema: "namespace O { entity E; action A appliesTo { principal: [W::User], resource: [W::Box] }; }",
		Policies: []PolicyText{{Text: `@id("all") permit (principal, action, resource);`}}}
	for _, text := range texts {
		src.Policies = append(src.Policies, PolicyText{File: "p.cedar", Text: text})
	}
	sources := []Source{src, rails, open}
	set, findings := Compile(sources, nil)
	if set == nil {
		// Some draws do not validate, for example a condition that is false for
		// every type; they say nothing here.
		t.Logf("%v", findings)
		t.SkipNow()
	}
	// A server loads what another one checked; it decides the same.
	switch rapid.IntRange(0, 2).Draw(t, "loaded") {
	case 1:
		set, findings = Load(sources, nil)
	case 2:
		set, findings = Load(sources, set)
	}
	if set == nil {
		t.Fatalf("checked and not loaded: %v", findings)
	}
	return set
}

func uid(typ, id string) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType("W::"+typ), cedar.String(id))
}

// worldEntities draws stored entities by uid.
func worldEntities(t *rapid.T) map[cedar.EntityUID]Entity {
	out := map[cedar.EntityUID]Entity{}
	some := func(typ string, ids ...string) []cedar.EntityUID {
		var list []cedar.EntityUID
		for _, id := range ids {
			if rapid.Bool().Draw(t, typ+id) {
				list = append(list, uid(typ, id))
			}
		}
		return list
	}
	user := func() cedar.EntityUID { return uid("User", pick(t, "user", "u1", "u2", "u3")) }
	long := func() cedar.Long { return cedar.Long(rapid.Int64Range(0, 4).Draw(t, "n")) }
	for i, g := range []string{"x", "y", "z"} {
		if rapid.Bool().Draw(t, "stored "+g) {
			out[uid("Group", g)] = Entity{UID: uid("Group", g), Parents: some("Group", []string{"x", "y", "z", "top"}[i+1:]...)}
		}
	}
	for _, u := range []string{"u1", "u2", "u3"} {
		attrs := cedar.RecordMap{"n": long(), "boss": user()}
		if rapid.Bool().Draw(t, "tag") {
			attrs["tag"] = cedar.String("t")
		}
		out[uid("User", u)] = Entity{UID: uid("User", u), Attrs: cedar.NewRecord(attrs), Parents: some("Group", "x", "y", "z")}
	}
	for _, b := range []string{"b1", "b2", "b3"} {
		if rapid.IntRange(0, 5).Draw(t, "stored "+b) > 0 {
			parents := some("Box", "b2")
			if b == "b2" {
				parents = nil
			}
			out[uid("Box", b)] = Entity{UID: uid("Box", b), Parents: parents, Attrs: cedar.NewRecord(cedar.RecordMap{
				"owner": user(), "open": cedar.Boolean(rapid.Bool().Draw(t, "open")), "n": long()})}
		}
	}
	out[uid("Lid", "l1")] = Entity{UID: uid("Lid", "l1"), Attrs: cedar.NewRecord(cedar.RecordMap{"owner": user()})}
	return out
}

// withAncestors is what a store answers: the entities asked for and all their
// stored ancestors.
func withAncestors(stored map[cedar.EntityUID]Entity, asked []cedar.EntityUID) []Entity {
	var out []Entity
	seen := map[cedar.EntityUID]bool{}
	queue := slices.Clone(asked)
	for len(queue) > 0 {
		u := queue[0]
		queue = queue[1:]
		e, ok := stored[u]
		if seen[u] || !ok {
			continue
		}
		seen[u] = true
		out = append(out, e)
		queue = append(queue, e.Parents...)
	}
	return out
}

func worldAsk(t *rapid.T) Ask {
	typ := pick(t, "type", "Box", "Box", "Lid")
	a := Ask{
		Principal: uid("User", pick(t, "who", "u1", "u2", "u3", "stranger")),
		Action:    uid("Action", pick(t, "what", "Look", "Look", "Burn")),
		Resource:  uid(typ, pick(t, "which", "b1", "b2", "b3", "l1")),
		Context:   map[string]any{"ok": rapid.Bool().Draw(t, "ok"), "n": float64(rapid.IntRange(0, 2).Draw(t, "n"))},
	}
	if a.Action.ID == "Look" && rapid.Bool().Draw(t, "fields") {
		a.FieldsAsked, a.All = true, rapid.Bool().Draw(t, "all")
		a.RequireAll = rapid.IntRange(0, 3).Draw(t, "require") == 0
		if !a.All {
			a.Paths = []string{"a", "c", "nope", "h"}
		}
	}
	return a
}

// decideWith loads what the slice asks for, and nothing else, and decides.
func decideWith(t *rapid.T, set *Set, stored map[cedar.EntityUID]Entity, a Ask) *Result {
	pool, rounds := NewPool(), 0
	e, err := set.Prepare(a, pool, func(missing []cedar.EntityUID) error {
		if rounds++; rounds > MaxLevel+2 {
			t.Fatalf("still missing after %d rounds: %v", rounds-1, missing)
		}
		pool.Add(missing, withAncestors(stored, missing))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	res, err := e.Decide()
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// full is the whole store as Cedar sees it without slicing, closing or leaving
// anything out.
func full(set *Set, stored map[cedar.EntityUID]Entity) cedar.EntityMap {
	out := cedar.EntityMap{}
	for u, e := range set.static {
		out[u] = e
	}
	for u, e := range stored {
		out[u] = cedar.Entity{UID: u, Attributes: e.Attrs, Tags: e.Tags, Parents: cedar.NewEntityUIDSet(e.Parents...)}
	}
	return out
}

// Index, slice and closure change nothing: the object decision equals Cedar's
// own over all policies and all entities.
func TestSlicedEqualsFull(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, stored := world(t), worldEntities(t)
		for range 8 {
			a := worldAsk(t)
			a.FieldsAsked = false
			got := decideWith(t, set, stored, a)
			q, _ := set.read(a)
			if q.inapplicable {
				continue
			}
			all := cedar.NewPolicySet()
			skip := map[cedar.PolicyID]bool{}
			for _, p := range slices.Concat(set.bundles["w"].policies, set.bundles[Guardrails].policies) {
				all.Add(p.name, p.compiled)
				skip[p.name] = set.bundles[p.ref.Bundle].skipForbidErrors
			}
			decision, diag := cedar.Authorize(all, full(set, stored), q.request)
			var reasons, failed []string
			for _, r := range diag.Reasons {
				reasons = append(reasons, string(r.PolicyID))
			}
			for _, e := range diag.Errors {
				failed = append(failed, string(e.PolicyID))
				if all.Get(e.PolicyID).Effect() == cedar.Forbid && !skip[e.PolicyID] {
					if decision == cedar.Allow {
						reasons = nil
					}
					decision = cedar.Deny
					reasons = append(reasons, string(e.PolicyID))
				}
			}
			// Over all policies "decision" may have turned to deny halfway through
			// the loop; permits are no reasons of a deny.
			if decision == cedar.Deny {
				reasons = slices.DeleteFunc(reasons, func(id string) bool { return all.Get(cedar.PolicyID(id)).Effect() == cedar.Permit })
			}
			var gotReasons, gotFailed []string
			for _, p := range got.Policies {
				gotReasons = append(gotReasons, p.String())
			}
			for _, e := range got.Errors {
				gotFailed = append(gotFailed, e.Policy.String())
			}
			slices.Sort(reasons)
			slices.Sort(failed)
			slices.Sort(gotFailed)
			slices.Sort(gotReasons)
			if got.Allowed != bool(decision) || !slices.Equal(gotReasons, reasons) || !slices.Equal(gotFailed, failed) {
				t.Fatalf("%v:\ngot  %v %v %v\nwant %v %v %v", a, got.Allowed, gotReasons, gotFailed, decision, reasons, failed)
			}
		}
	})
}

// Deciding by class of fields equals deciding field by field.
func TestClassesEqualPlainLoop(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, stored := world(t), worldEntities(t)
		plain := *set
		plain.plainFields = true
		for range 8 {
			a := worldAsk(t)
			got, want := decideWith(t, set, stored, a), decideWith(t, &plain, stored, a)
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("%v:\nby class %+v\nplain    %+v", a, got, want)
			}
		}
	})
}

// When a denial says FUNCTION, no resource of that type in the store, nor one
// that is not stored, is allowed to the same principal and action.
func TestFunctionMeansNoResource(t *testing.T) {
	functions := 0
	rapid.Check(t, func(t *rapid.T) {
		set, stored := world(t), worldEntities(t)
		for range 4 {
			a := worldAsk(t)
			a.FieldsAsked = false
			if res := decideWith(t, set, stored, a); res.DeniedAt != AtFunction {
				continue
			}
			functions++
			candidates := []cedar.EntityUID{cedar.NewEntityUID(a.Resource.Type, "unheard of")}
			for u := range stored {
				if u.Type == a.Resource.Type {
					candidates = append(candidates, u)
				}
			}
			for _, u := range candidates {
				other := a
				other.Resource = u
				if decideWith(t, set, stored, other).Allowed {
					t.Fatalf("%v was denied at FUNCTION, and %s is allowed", a, u)
				}
			}
		}
	})
	if functions == 0 {
		t.Error("no denial at FUNCTION was drawn")
	}
}
