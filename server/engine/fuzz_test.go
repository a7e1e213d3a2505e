package engine

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// FuzzPolicies feeds text to everything between a bundle's file and a compiled
// Set. What compiles must also be decidable.
func FuzzPolicies(f *testing.F) {
	for _, seed := range []string{
		`@id("a") permit (principal, action, resource);`,
		`@id("a") forbid (principal == W::User::"u", action in [W::Action::"Look"], resource is W::Box in W::Box::"b") when { resource.open } unless { context.ok };`,
		`@id("a") permit (principal, action == W::Action::"Look.field", resource) when { context.field in [W::FieldGroup::"g1"] || !(context.field == W::Field::"Box.a") };`,
		"// only a comment", `"`, `@id("\u{0}") permit`, strings.Repeat("!", 5000), strings.Repeat("(", 5000), `@id("a") permit (principal, action, resource) when { if true then false else principal.n like "*" };`,
		"@id(\"x\")\n\npermit(principal,action,resource)when{principal.boss.boss.boss.boss.n==1};", "permit(principal,action,resource);;;", "\xff",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		src := Source{Name: "w", Schema: worldSchema, Fields: worldFields, Policies: []PolicyText{{File: "p.cedar", Text: text}}}
		set, findings := Compile([]Source{src}, nil)
		for _, x := range findings {
			if x.Message == "" || x.Line < 0 {
				t.Errorf("a finding without words or place: %+v", x)
			}
		}
		if set == nil {
			if len(findings) == 0 {
				t.Error("refused without a finding")
			}
			return
		}
		a := Ask{Principal: uid("User", "u"), Action: uid("Action", "Look"), Resource: uid("Box", "b"),
			Context: map[string]any{"ok": true, "n": 1.0}, FieldsAsked: true, All: true}
		q, err := set.read(a)
		if err != nil {
			t.Fatal(err)
		}
		pool := NewPool()
		sl := set.newSlice(q, pool)
		for m := sl.toLoad(); len(m) > 0; m = sl.toLoad() {
			pool.Add(m, nil)
		}
		res, err := set.decide(q, sl)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := set.explain(q, sl, res); err != nil {
			t.Fatal(err)
		}
		// A policy as stored compiles to the same policy as in its file.
		again := Source{Name: "w", Schema: worldSchema, Fields: worldFields}
		for _, p := range set.Policies("w") {
			again.Policies = append(again.Policies, PolicyText{File: p.File, Line: p.Line, Text: p.Text})
		}
		set2, findings := Compile([]Source{again}, nil)
		if set2 == nil {
			t.Fatalf("stored policies do not compile: %v", findings)
		}
		if got, want := set2.Policies("w"), set.Policies("w"); len(got) != len(want) {
			t.Fatalf("%d policies became %d", len(want), len(got))
		}
	})
}

// FuzzSchema feeds text to the schema parser and everything the Set reads off a
// schema.
func FuzzSchema(f *testing.F) {
	for _, seed := range []string{
		worldSchema, "", "namespace A { entity B; }", "entity A in [A]; action x;", "namespace A { type T = T; entity B { t: T }; }",
		`namespace A { @source("request") entity B; entity C in [B]; }`, "action a in [b]; action b in [a];", strings.Repeat("{", 3000),
		"entity A { x: " + strings.Repeat("Set<", 300) + "Long" + strings.Repeat(">", 300) + " };", `action "x.field" appliesTo { principal: [A], resource: [A], context: { field: A } }; entity A;`,
		`entity E enum ["a", "b"];`, "namespace Cedarpost { entity X; }",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		set, findings := Compile([]Source{{Name: "x", SchemaFile: "s", Schema: text, Policies: []PolicyText{{Text: `@id("p") permit (principal, action, resource);`}}}}, nil)
		if set == nil && len(findings) == 0 {
			t.Error("refused without a finding")
		}
	})
}

// FuzzValues feeds JSON to the reader of contexts and entities. What it accepts
// must come back equal after being written and read once more.
func FuzzValues(f *testing.F) {
	const schema = `namespace V { entity E enum ["x"]; entity U in [U] { a?: Long, b?: String, c?: Bool, d?: Set<Set<Long>>, e?: { x: Long, y?: U }, f?: U, g?: ipaddr, h?: decimal, i?: datetime, j?: duration, k?: E } tags String; }`
	set, findings := Compile([]Source{{Name: "v", Schema: schema}}, nil)
	if set == nil {
		f.Fatal(findings)
	}
	for _, seed := range []string{
		`{}`, `{"a":1,"b":"x","c":true}`, `{"a":1e3}`, `{"a":"9223372036854775807"}`, `{"a":9007199254740993}`, `{"d":[[1,2],[],[2,1]]}`, `{"e":{"x":1,"y":{"type":"V::U","id":"q"}}}`,
		`{"f":{"__entity":{"type":"V::U","id":"\u0000"}}}`, `{"g":"10.0.0.0/8","h":"1.23","i":"2024-01-01","j":"1d2h"}`, `{"g":{"__extn":{"fn":"ip","arg":"::1"}}}`, `{"k":{"type":"V::E","id":"x"}}`,
		`{"g":"::ffff:102:304"}`, `{"g":"::ffff:a:b/100"}`, `{"a":null}`, `{"a":-0}`, `{"z":1}`, `{"i":"0000-01-01T00:00:00Z"}`, `{"j":"-1ms"}`,
		`{"i":"9999-12-31T23:59:59.999-2359"}`, `{"i":"0000-01-01T00:00:00+2359"}`, `{"i":"+999999999-12-31"}`, `{"j":"-9223372036854775808ms"}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d := json.NewDecoder(strings.NewReader(text))
		d.UseNumber()
		var attrs map[string]any
		if d.Decode(&attrs) != nil {
			return
		}
		raw := RawEntity{UID: cedar.NewEntityUID("V::U", "u"), Attrs: attrs}
		e, err := set.ReadEntity(raw)
		if err != nil {
			var bad *RequestError
			if !errors.As(err, &bad) || bad.Message == "" {
				t.Errorf("not a request error: %v", err)
			}
			return
		}
		stored, err := json.Marshal(PlainRecord(e.Attrs))
		if err != nil {
			t.Fatal(err)
		}
		d = json.NewDecoder(strings.NewReader(string(stored)))
		d.UseNumber()
		var back map[string]any
		if err := d.Decode(&back); err != nil {
			t.Fatal(err)
		}
		again, err := set.ReadEntity(RawEntity{UID: raw.UID, Attrs: back})
		if err != nil {
			t.Fatalf("%s was accepted, and what was stored of it is refused: %v", text, err)
		}
		if !again.Attrs.Equal(e.Attrs) {
			t.Fatalf("%s became %s", e.Attrs, again.Attrs)
		}
	})
}
