package engine

import (
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// mangle changes one place in a JSON tree: it takes away, renames, adds, repeats and exchanges.
func mangle(r *rand.Rand, v any, names []string, spare func() any) any {
	name := func() string { return names[r.IntN(len(names))] }
	switch v := v.(type) {
	case map[string]any:
		keys := sortedKeys(v)
		if len(keys) > 0 && r.IntN(4) > 0 { // deeper
			key := keys[r.IntN(len(keys))]
			v[key] = mangle(r, v[key], names, spare)
			return v
		}
		switch op := r.IntN(6); {
		case op == 0 && len(keys) > 0:
			delete(v, keys[r.IntN(len(keys))])
		case op == 1 && len(keys) > 0:
			key := keys[r.IntN(len(keys))]
			other := []string{strings.ToUpper(key), strings.ToLower(key), key + "s", name()}[r.IntN(4)]
			v[other] = v[key]
			if other != key {
				delete(v, key)
			}
		case op == 2:
			v[name()] = spare()
		case op == 4 && len(keys) > 0:
			v[keys[r.IntN(len(keys))]] = nil
		case op == 3 && len(keys) > 1:
			a, b := keys[r.IntN(len(keys))], keys[r.IntN(len(keys))]
			v[a], v[b] = v[b], v[a]
		default:
			return []any{nil, true, "", v, []any{v}, map[string]any{name(): v}, map[string]any{"Value": v}}[r.IntN(7)]
		}
		return v
	case []any:
		if len(v) > 0 && r.IntN(2) == 0 {
			i := r.IntN(len(v))
			v[i] = mangle(r, v[i], names, spare)
			return v
		}
		return slices.Insert(v, r.IntN(len(v)+1), spare())
	}
	return []any{nil, spare(), name(), false, map[string]any{}, []any{}, []any{v}}[r.IntN(7)]
}

// plainPolicy writes a policy in JSON as it is written of its text: values written out, and parts that may be
// left out there.
func plainPolicy(t *testing.T, in string) any {
	t.Helper()
	tree, err := readTree([]byte(in))
	if err != nil {
		t.Fatal(err)
	}
	p := tree.(map[string]any)
	unescape := func(v any) any {
		if m, ok := v.(map[string]any); ok && m["__entity"] != nil {
			return m["__entity"]
		}
		return v
	}
	for _, part := range []string{"principal", "action", "resource"} {
		scope := p[part].(map[string]any)
		for _, s := range []any{scope, scope["in"]} {
			if s, ok := s.(map[string]any); ok && s["entity"] != nil {
				s["entity"] = unescape(s["entity"])
			}
		}
		if list, ok := scope["entities"].([]any); ok {
			for i := range list {
				list[i] = unescape(list[i])
			}
		}
	}
	if p["conditions"] == nil {
		p["conditions"] = []any{}
	}
	for _, c := range p["conditions"].([]any) {
		c.(map[string]any)["body"] = expressionWritten(c.(map[string]any)["body"])
	}
	if annotations, ok := p["annotations"].(map[string]any); ok {
		for key, value := range annotations {
			if value == nil {
				annotations[key] = ""
			}
		}
	}
	return tree
}

// An author hides a part of a policy in its JSON: in a member of a misspelled name, in a scope or an entity
// that does not use it, or as null. What is accepted has all of its parts in the text that decides.
func TestAttackHideInJSON(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 2))
	seeds := []string{
		`@id("a") forbid (principal == U::"u", action in [Action::"a", Action::"b"], resource is U in G::"g") when { principal.a == 1 && !(context has b) } unless { principal is U in G::"h" };`,
		`@id("a") @note("n") permit (principal is U, action == Action::"a", resource in G::"g") when { if context.b then resource["x y"] like "a*b" else [1, 2].contains(principal.n - 3) };`,
		`@id("a") permit (principal, action, resource) when { {x: 1, y: [U::"u"]} == context.r || resource.tags.isEmpty() || ip(context.ip).isLoopback() };`,
	}
	names := []string{"op", "entity", "entities", "entity_type", "in", "type", "id", "slot", "effect", "kind", "body", "conditions", "annotations", "left", "right", "arg", "attr", "pattern",
		"if", "then", "else", "Value", "Var", "Set", "Record", "!", "neg", "==", "&&", "is", "has", ".", "__entity", "__extn", "Unknown", "ip", "x", "templates"}
	const tries = 2000
	accepted := 0
	for range tries {
		tree := jsonOf(t, seeds[r.IntN(len(seeds))])
		spare := func() any {
			v, _ := readTree([]byte([]string{`{"op": "All"}`, `{"Value": true}`, `{"type": "U", "id": "v"}`, `{"__entity": {"type": "U", "id": "v"}}`, `"x"`, "null", "1"}[r.IntN(7)]))
			return v
		}
		var mangled any = tree
		for range 1 + r.IntN(2) {
			mangled = mangle(r, mangled, names, spare)
		}
		in := written(t, mangled)
		text, err := policyFromJSON(in, "")
		if err != nil {
			continue
		}
		accepted++
		var p cedar.Policy
		if err := p.UnmarshalCedar([]byte(text)); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		again, jerr := p.MarshalJSON()
		if jerr != nil {
			t.Fatal(jerr)
		}
		if want, got := plainPolicy(t, in), plainPolicy(t, string(again)); !reflect.DeepEqual(want, got) {
			t.Errorf("seed %d: %s became %s", seed, in, text)
		}
	}
	if accepted < tries/100 {
		t.Errorf("only %d of %d were accepted", accepted, tries)
	}
	t.Logf("attack: parts of policies hidden in %d mangled ones in JSON: %d refused, %d accepted with all of their parts, 0 left out", tries, tries-accepted, accepted)
}
