package engine

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// What looks different from what it is, is refused if it changes the order of text, and else
// warned of. Ordinary text in any language is neither.
func TestAttackTextThatLooksDifferent(t *testing.T) {
	const permit = `permit (principal, action, resource)`
	const use = `namespace A { entity U; action act appliesTo { principal: U, resource: U, context: { s: String } }; }`
	for _, c := range []struct{ name, file, schema, text, want string }{
		{"bidi in a comment", "p.cedar", use, "@id(\"a\")\n" + permit + "; // \u202e } etirw {", "p.cedar:2:42: has the character U+202E, which changes the order in which text is shown"},
		{"bidi in a string", "p.cedar", use, `@id("a") ` + permit + " when { context.s == \"\u2066\" };", "p.cedar:1:68: has the character U+2066, which changes the order in which text is shown"},
		{"bidi in a schema", "p.cedar", use + "// \u202a", `@id("a") ` + permit + ";", "s.cedarschema:1:105: has the character U+202A, which changes the order in which text is shown"},
		{"bidi in an escape of an id", "p.cedar", use, `@id("a\u{202e}b") ` + permit + ";", "p.cedar:1:1: policy a\u202eb: its @id \"a\\u202eb\" has a character that changes the order in which text is shown"},
		{"bidi in the name of a file", "p\u202e.cedar", use, `@id("a") ` + permit + ";", "the name of the file \"p\\u202e.cedar\" has a character that changes the order in which text is shown"},
		{"bidi in an escape of an entity", "p.cedar", use, `@id("a") permit (principal == A::U::"\u{200f}", action, resource);`, "warning p.cedar:1:1: policy a: the id of the A::U \"\\u200f\" has a character that changes the order in which text is shown"},
		{"invisible in a comment", "p.cedar", use, `@id("a") ` + permit + "; // a\u200bb", "warning p.cedar:1:52: has the invisible character U+200B"},
		{"invisible in an escape of an entity", "p.cedar", use, `@id("a") permit (principal == A::U::"r\u{200b}oot", action, resource);`, "warning p.cedar:1:1: policy a: the id of the A::U \"r\\u200boot\" has an invisible character"},
		{"Cyrillic in a Latin id", "p.cedar", use, `@id("reаd") ` + permit + ";", "warning p.cedar:1:1: policy reаd: its @id \"re\\u0430d\" mixes Latin with Cyrillic or Greek letters, many of which look alike"},
		{"Greek in a Latin entity", "p.cedar", use, `@id("a") permit (principal == A::U::"rοot", action, resource);`, "warning p.cedar:1:1: policy a: the id of the A::U \"r\\u03bfot\" mixes Latin with Cyrillic or Greek letters, many of which look alike"},
		{"Cyrillic in a Latin file", "reаd.cedar", use, `@id("a") ` + permit + ";", "warning the name of the file \"re\\u0430d.cedar\" mixes Latin with Cyrillic or Greek letters, many of which look alike"},
		{"two ids that look alike", "p.cedar", use, `@id("cop") ` + permit + ";\n" + `@id("сор") ` + permit + ";", "warning p.cedar:2:1: policy сор: its @id \"\\u0441\\u043e\\u0440\" looks like \"cop\", at p.cedar:1"},
		{"two ids that differ in an ell", "p.cedar", use, `@id("ru1e") ` + permit + ";\n" + `@id("rule") ` + permit + ";", "warning p.cedar:2:1: policy rule: its @id \"rule\" looks like \"ru1e\", at p.cedar:1"},
		{"byte order mark", "p.cedar", use, "// ordinary\n" + `@id("a") ` + permit + ";", ""},
		{"other languages", "правила.cedar", use, `@id("читать") permit (principal == A::U::"Ωμέγα", action, resource); // 日本語, עברית, العربية, Größe`, ""},
		{"ids that differ in case", "p.cedar", use, `@id("readAll") ` + permit + ";\n" + `@id("readall") ` + permit + ";", ""},
		{"full width", "p.cedar", use, `@id("read") ` + permit + ";\n" + `@id("ｒead") ` + permit + ";", "warning p.cedar:2:1: policy ｒead: its @id \"\\uff52ead\" looks like \"read\", at p.cedar:1"},
		{"emoji in a comment", "p.cedar", use, "// ⚠\ufe0f 👩\u200d🔧\n" + `@id("a") ` + permit + ";", ""},
		{"a joiner in an id", "p.cedar", use, `@id("a\u{200d}") ` + permit + ";", "warning p.cedar:1:1: policy a\u200d: its @id \"a\\u200d\" has an invisible character"},
		{"ids with numbers", "p.cedar", use, `@id("rule-1") ` + permit + ";\n" + `@id("rule-2") ` + permit + ";", ""},
	} {
		b := Source{Name: "b", SchemaFile: "s.cedarschema", Schema: c.schema, Policies: []PolicyText{{File: c.file, Text: c.text}}}
		set, findings := Compile([]Source{b}, nil)
		var got []string
		for _, f := range findings {
			if strings.Contains(f.Message, "permits everybody") {
				continue
			}
			s := f.String()
			if f.Warning {
				s = "warning " + s
			}
			got = append(got, s)
		}
		if strings.Join(got, "\n") != c.want || (set == nil) != (c.want != "" && !strings.HasPrefix(c.want, "warning ")) {
			t.Errorf("%s:\n got %q\nwant %q", c.name, got, c.want)
		}
		if set, findings := Load([]Source{b}, nil); set == nil {
			t.Errorf("%s: what was published is not loaded: %v", c.name, findings)
		}
	}
}

// No character that changes the order of text gets into a policy, wherever it is and whatever is
// around it.
func TestBidiIsRefused(t *testing.T) {
	const schema = `entity U; action act appliesTo { principal: U, resource: U };`
	rapid.Check(t, func(t *rapid.T) {
		mark := rapid.SampledFrom([]rune("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")).Draw(t, "mark")
		pieces := []string{`@id("p")`, `@d("`, `x`, `")`, "\n// c\n", `permit (principal, action, resource) when { "`, `" == "" };`}
		at := rapid.IntRange(0, len(pieces)).Draw(t, "at")
		text := strings.Join(pieces[:at], "") + string(mark) + strings.Join(pieces[at:], "")
		if set, _ := Compile([]Source{{Name: "b", Schema: schema, Policies: []PolicyText{{Text: text}}}}, nil); set != nil {
			t.Fatalf("published: %+q", text)
		}
	})
}

// A bundle can have a namespace neither inside of nor around the namespace of another. Bundles that
// have one already are loaded, and can be published again.
func TestAttackNamespaceInsideOfAnother(t *testing.T) {
	bundle := func(name string, namespaces ...string) Source {
		s := Source{Name: name, SchemaFile: "s.cedarschema"}
		for _, ns := range namespaces {
			s.Schema += fmt.Sprintf("namespace %s { entity E; }\n", ns)
		}
		return s
	}
	published := func(s Source) Source { s.Published = true; return s }
	shop, thief := bundle("shop", "Shop"), bundle("thief", "Shop::Sub")
	for _, c := range []struct {
		name    string
		sources []Source
		want    string
	}{
		{"inside", []Source{published(shop), thief}, "namespace Shop::Sub is inside of namespace Shop, which is owned by bundle shop"},
		{"around", []Source{shop, published(thief)}, "namespace Shop is around namespace Shop::Sub, which is owned by bundle thief"},
		{"deep inside", []Source{published(shop), bundle("thief", "Shop::A::B")}, "namespace Shop::A::B is inside of namespace Shop, which is owned by bundle shop"},
		{"one bundle", []Source{bundle("shop", "Shop", "Shop::Sub")}, ""},
		{"a longer name", []Source{published(shop), bundle("shops", "Shops")}, ""},
		{"siblings", []Source{published(bundle("a", "Org::A")), bundle("b", "Org::B")}, ""},
		{"another is published", []Source{published(shop), published(thief), bundle("c", "C")}, ""},
	} {
		set, findings := Compile(c.sources, nil)
		if c.want == "" && set == nil || c.want != "" && (set != nil || len(findings) != 1 || findings[0].Message != c.want) {
			t.Errorf("%s: %v, want %q", c.name, findings, c.want)
		}
	}
	loaded, findings := Load([]Source{shop, thief}, nil)
	if loaded == nil {
		t.Fatal(findings)
	}
	set, findings := Compile([]Source{shop, published(thief)}, loaded)
	if set == nil || len(findings) != 1 || !findings[0].Warning {
		t.Errorf("published again: %v", findings)
	}
}
