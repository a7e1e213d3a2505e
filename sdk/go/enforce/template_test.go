package enforce_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

func TestTemplates(t *testing.T) {
	values := map[string]string{"id": "42", "line": "7", "quote": `x" || "`, "brace": "{line}", "slash": "a/b", "long": strings.Repeat("x", 1025)}
	for _, c := range []struct{ template, id string }{
		{`Shop::Order::"{id}"`, "42"},
		{`Order::"{id}"`, "42"},
		{`Shop::Store::"main"`, "main"},
		{`Shop::Line::"{id}/{line}"`, "42/7"},
		{`Shop::Line::"order {id}"`, "order 42"},
		{`Shop::Line::"{id}.{slash}"`, "42.a/b"},
		{`Shop::Line::"{id}/{slash}"`, "42/a/b"},
		{`Shop::Line::"{slash}!"`, "a/b!"},
		// Values are not read as Cedar text.
		{`Shop::Order::"{quote}"`, `x" || "`},
		{`Shop::Order::"{brace}"`, "{line}"},
		// Escapes in the template are.
		{`Shop::Order::"\u{7b}{id}\u{7d}"`, "{42}"},
		{`Shop::Order::"\"{id}\""`, `"42"`},
		{`Shop::Order::"\n"`, "\n"},
		// Values that make no valid id.
		{`Shop::Order::"{none}"`, ""},
		{`Shop::Order::"x{none}"`, ""},
		{`Shop::Order::"{long}"`, ""},
		{`Shop::Line::"{slash}/{line}"`, ""}, // a, b/7 or a/b, 7?
	} {
		template, err := enforce.ParseTemplate(c.template)
		if err != nil {
			t.Errorf("%s: %v", c.template, err)
			continue
		}
		uid, err := template.Fill(func(name string) string { return values[name] })
		refused, _ := errors.AsType[*enforce.Refusal](err)
		if uid.ID != c.id || (err != nil) != (c.id == "") || err != nil && (refused == nil || refused.Kind != enforce.Malformed) {
			t.Errorf("%s: %q, %v; want %q", c.template, uid.ID, err, c.id)
		}
	}
	for _, text := range []string{
		``, `{id}`, `Shop::Order`, `Shop::Order::{id}`, `Shop::Order::""`, `Shop::Order::"{id}`, `{type}::"{id}"`, `Shop::{type}::"{id}"`,
		`::"{id}"`, `Shop:Order::"{id}"`, `Shop::Order::"{id}{line}"`, `Shop::Order::"{}"`, `Shop::Order::"{id"`, `Shop::Order::"id}"`,
		`Shop::Order::"{a b}"`, `Shop::Order::"{1}"`, `Shop::Order::"{a..b}"`, `Shop::Order::"\q"`, `Shop::Order::"\u{7b"`, `Shop::Order::"\u{110000}"`,
		`Shop::Order::"a"b"`, `Shop::Order::"{id}"::"{id}"`, `Shop::Order::"\"`, `Shop::Order::"` + "\x00" + `"`, `Shop::Order::"` + "\xff" + `"`,
	} {
		if template, err := enforce.ParseTemplate(text); err == nil {
			t.Errorf("%q is taken for a template: %+v", text, template)
		}
	}
}

// For any template and values: the type is that of the template, and two different
// lists of values never make one id.
func FuzzTemplate(f *testing.F) {
	for _, text := range []string{
		`Shop::Order::"{id}"`, `Shop::Line::"{a}/{b}"`, `A::"\u{7b}{x}\u{7d}"`, `A::"{a.b}--{c}-"`, `A::"aa{a}aa{b}aa"`, `A::"\\{a}\"{b}"`, `A::"x"`,
	} {
		f.Add(text, "42", "a/b", "a", "b/42")
		f.Add(text, `"`, "-", "a-", "--a")
	}
	f.Fuzz(func(t *testing.T, text, a, b, c, d string) {
		template, err := enforce.ParseTemplate(text)
		if err != nil {
			return
		}
		names := template.Names()
		fill := func(values ...string) (cedarpost.EntityUID, []string) {
			var used []string
			uid, err := template.Fill(func(name string) string {
				v := values[len(used)%len(values)]
				used = append(used, v)
				return v
			})
			if err != nil {
				return cedarpost.EntityUID{}, nil
			}
			if typ, _, _ := strings.Cut(text, `::"`); uid.Type != typ {
				t.Fatalf("%s: the type is %q", text, uid.Type)
			}
			if len(used) != len(names) {
				t.Fatalf("%s: asked for %d values of %d", text, len(used), len(names))
			}
			return uid, used
		}
		one, first := fill(a, b)
		other, second := fill(c, d)
		if first == nil || second == nil {
			return
		}
		same := strings.Join(first, "\x00") == strings.Join(second, "\x00")
		if (one == other) != same {
			t.Fatalf("%s: %q makes %s, %q makes %s", text, first, one, second, other)
		}
		if back, err := cedarpost.ParseUID(one.String()); err != nil || back != one {
			t.Fatalf("%s: %s, %v", text, one, err)
		}
	})
}
