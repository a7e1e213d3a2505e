package engine

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"pgregory.net/rapid"
)

// joinParts are declarations that can stand in one file or in several.
var joinParts = []struct{ ns, text string }{
	{"W", `entity Group in [Group];`},
	{"W", `entity User in [Group] { n: Long, boss: User, tag?: String, at: Address, since?: datetime };`},
	{"W", `entity Box in [Box] { owner: User, open: Bool, kinds: Set<Kind> };`},
	{"W", `entity Kind enum ["a", "b"];`},
	{"W", `type Address = { "street name": String, net: ipaddr, };`},
	{"W", `@doc("x") action All;`},
	{"W", `action Look, "look again" in [All] appliesTo { principal: [User], resource: [Box], context: { ok: Bool } };`},
	{"W::Inner", `@audit("always") action Open in [W::Action::"All"] appliesTo { principal: W::User, resource: Door };`},
	{"W::Inner", `entity Door tags Set<Long>;`},
	{"", `entity Plain { x: Thing };`},
	{"", `type Thing = Set<{ a: W::User }>;`},
}

// parts makes the text of a schema of declarations.
func parts(list []int) string {
	byNS := map[string]string{}
	for _, i := range list {
		byNS[joinParts[i].ns] += joinParts[i].text + "\n"
	}
	text := ""
	for _, ns := range slices.Sorted(maps.Keys(byNS)) {
		if ns == "" {
			text += byNS[ns]
		} else {
			text += "namespace " + ns + " {\n" + byNS[ns] + "}\n"
		}
	}
	return text
}

// However the declarations of a schema are spread over files, in either form, the schema is the same.
func TestSchemaInAnyFiles(t *testing.T) {
	all := make([]int, len(joinParts))
	for i := range all {
		all[i] = i
	}
	want, found := JoinSchemas([]SchemaText{{File: "all", Text: parts(all)}})
	if len(found) > 0 {
		t.Fatal(found)
	}
	whole, findings := Compile([]Source{{Name: "w", SchemaFile: "all", Schema: parts(all)}}, nil)
	if whole == nil {
		t.Fatal(findings)
	}
	rapid.Check(t, func(rt *rapid.T) {
		spread := make([][]int, 4)
		for _, i := range rapid.Permutation(all).Draw(rt, "order") {
			at := rapid.IntRange(0, len(spread)-1).Draw(rt, "file")
			spread[at] = append(spread[at], i)
		}
		src := Source{Name: "w"}
		for i, list := range spread {
			f := SchemaText{File: fmt.Sprintf("%d.cedarschema", i), Text: parts(list)}
			if rapid.Bool().Draw(rt, "json") {
				var sc schema.Schema
				if err := sc.UnmarshalCedar([]byte(f.Text)); err != nil {
					rt.Fatal(err)
				}
				b, err := sc.MarshalJSON()
				if err != nil {
					rt.Fatal(err)
				}
				f = SchemaText{File: f.File + ".json", Text: string(b), JSON: true}
			}
			src.Schemas = append(src.Schemas, f)
		}
		got, found := JoinSchemas(src.Schemas)
		if len(found) > 0 || got != want {
			rt.Fatalf("%v\n%s\nwant\n%s", found, got, want)
		}
		set, findings := Compile([]Source{src}, nil)
		if set == nil {
			rt.Fatal(findings)
		}
		if changed := set.ChangedTypes(whole); len(changed) > 0 {
			rt.Fatalf("%v changed", changed)
		}
	})
}

func TestSchemaFileRefusals(t *testing.T) {
	const a = "namespace W {\n  entity User;\n  entity Box;\n  type T = Long;\n  action Look, \"a b\" appliesTo { principal: [User], resource: [Box] };\n}\n"
	text := func(file, text string) SchemaText { return SchemaText{File: file, Text: text} }
	inJSON := func(ns string) SchemaText {
		return SchemaText{File: "b.cedarschema.json", Text: "{\"W\":\n " + ns + "}", JSON: true}
	}
	for _, tt := range []struct {
		name string
		with SchemaText
		want []string
	}{
		{"an entity type twice", text("b.cedarschema", "namespace W {\n  entity A,\n    User;\n}\n"), []string{"b.cedarschema:3:5: entity W::User is declared already, at a.cedarschema:2"}},
		{"an enumerated type of the name", text("b.cedarschema", "namespace W { @doc(\"entity User\")\n entity Box enum [\"x\"]; }"), []string{"b.cedarschema:2:9: entity W::Box is declared already, at a.cedarschema:3"}},
		{"a common type and actions twice", text("b.cedarschema", "namespace W { type T = String;\n action \"a b\", Look; }"), []string{
			"b.cedarschema:1:20: type W::T is declared already, at a.cedarschema:4", `b.cedarschema:2:16: action W::"Look" is declared already, at a.cedarschema:5`, `b.cedarschema:2:9: action W::"a b" is declared already, at a.cedarschema:5`}},
		{"in JSON", inJSON(`{"entityTypes": {"User": {}}, "actions": {}}`), []string{"b.cedarschema.json:2:19: entity W::User is declared already, at a.cedarschema:2"}},
		{"a namespace twice in one file", text("b.cedarschema", "namespace V { entity X; }\nnamespace V { entity Y; }\n"), []string{`b.cedarschema:3:1: namespace "V" is declared twice`}},
		{"a text that does not parse", text("b.cedarschema", "namespace V {\n  entity;\n}\n"), []string{"b.cedarschema:2:9: expected identifier, got \";\""}},
		{"a name that no file declares", text("b.cedarschema", "namespace V {\n  entity X { a: Gone };\n}\n"), []string{`b.cedarschema:2:17: entity "V::X" shape: attribute "a": undefined type "Gone"`}},
		{"a name that no file declares, in JSON", inJSON(`{"actions": {},` + "\n" + ` "entityTypes": {"X": {"tags": {"type": "Gone"}}}}`), []string{`b.cedarschema.json:3:41: entity "W::X" tags: undefined type "Gone"`}},
		{"an annotation without effect", text("b.cedarschema", "namespace W { @audit(\"always\") entity X; }"), []string{"b.cedarschema: entity W::X: @audit has no effect at an entity type"}},
		{"a source that is not known", text("b.cedarschema", "namespace W { @source(\"x\") entity X; }"), []string{`b.cedarschema: entity W::X: @source("x") is not known`}},
		{"the namespace of the service", text("b.cedarschema", "namespace Cedarpost { entity X; }"), []string{"b.cedarschema: namespace Cedarpost belongs to the service itself"}},
		{"two values of an annotation", text("b.cedarschema", "@doc(\"x\") namespace W { entity X; }"), []string{"c.cedarschema: namespace W has @doc with another value in another file"}},
		{"a bidi character", text("b.cedarschema", "// \u202e\n"), []string{"b.cedarschema:1:4: has the character U+202E, which changes the order in which text is shown"}},

		{"not JSON", inJSON("}"), []string{"b.cedarschema.json:2:2: is not valid JSON: invalid character '}' looking for beginning of value"}},
		{"a namespace twice in JSON", inJSON(`{}, "W": {}`), []string{`b.cedarschema.json:2:11: member "W" stands twice`}},
		{"a type twice in JSON", inJSON(`{"entityTypes": {"X": {}, "X": {}}, "actions": {}}`), []string{`b.cedarschema.json:2:18: /W/entityTypes: duplicate member "X"`}},
		{"an unknown member", inJSON(`{"entityTypes": {"X": {"shap": {}}}, "actions": {}}`), []string{`b.cedarschema.json:2:24: /W/entityTypes/X: unknown member "shap"`}},
		{"no actions", inJSON(`{"entityTypes": {}}`), []string{`b.cedarschema.json:2:2: /W: "actions" is missing or null`}},
		{"a shape that is a common type", inJSON(`{"entityTypes": {"X": {"shape": {"type": "T"}}}, "actions": {}}`), []string{`b.cedarschema.json:2:34: the shape of "X" is not a record`}},
		{"no types of resources", inJSON(`{"entityTypes": {}, "actions": {"X": {"appliesTo": {"principalTypes": []}}}}`), []string{`b.cedarschema.json:2:53: appliesTo of "X" has no resourceTypes`}},
		{"null", inJSON(`{"entityTypes": {"X": {"tags": null}}, "actions": {}}`), []string{"b.cedarschema.json:2:33: null says nothing here"}},
		{"an entity type that a common type hides", inJSON(`{"entityTypes": {"T": {}, "X": {"tags": {"type": "Entity", "name": "T"}}}, "actions": {}}`), []string{"b.cedarschema.json:2:19: T is another type here than type W::T, which a.cedarschema declares"}},
		{"a type of Cedar that an entity type hides", inJSON(`{"entityTypes": {"ipaddr": {}, "X": {"tags": {"type": "Extension", "name": "ipaddr"}}}, "actions": {}}`), []string{"b.cedarschema.json:2:19: ipaddr is another type here than entity W::ipaddr, which b.cedarschema.json declares"}},
		{"a name that is no name", inJSON(`{"entityTypes": {"X; entity Y": {}}, "actions": {}}`), []string{"b.cedarschema.json: the schema cannot be written in Cedar's schema syntax"}},
		{"deep", inJSON(strings.Repeat("[", 1000)), []string{fmt.Sprintf("b.cedarschema.json:2:%d: nested deeper than %d", MaxJSONNesting+1, MaxJSONNesting)}},
		{"large", text("b.cedarschema", "// "+strings.Repeat("x", MaxSchemaBytes)), []string{"b.cedarschema:1:1: schema of 1048579 bytes, the limit is 1048576"}},
		{"very large in JSON", SchemaText{File: "b.cedarschema.json", JSON: true, Text: "{}" + strings.Repeat(" ", 4*MaxSchemaBytes)}, []string{"b.cedarschema.json: the schema files have more than 4194304 bytes together"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src := Source{Name: "w", Schemas: []SchemaText{text("a.cedarschema", a), tt.with}}
			if tt.name == "two values of an annotation" {
				src.Schemas = append(src.Schemas, text("c.cedarschema", "@doc(\"y\") namespace W { entity Y; }"))
			}
			set, findings := Compile([]Source{src}, nil)
			var got []string
			for _, f := range findings {
				if f.Bundle != "w" {
					t.Errorf("of bundle %q", f.Bundle)
				}
				got = append(got, f.String())
			}
			slices.Sort(got)
			slices.Sort(tt.want)
			if set != nil || !slices.Equal(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}

// An action in JSON that applies to no types is one that only groups others.
func TestActionOfNoTypes(t *testing.T) {
	got, found := JoinSchemas([]SchemaText{{File: "a", JSON: true, Text: `{"W": {"entityTypes": {"U": {}}, "actions": {"A": {"appliesTo": {"principalTypes": [], "resourceTypes": ["U"]}}}}}`}})
	if want := "namespace W {\n\tentity U;\n\n\taction A;\n}\n"; len(found) > 0 || got != want {
		t.Errorf("%v, %q", found, got)
	}
}

// FuzzSchemaJSON feeds JSON to the reader of schemas. What it makes of them is a schema text that it reads as
// the same schema.
func FuzzSchemaJSON(f *testing.F) {
	for i := range joinParts {
		var sc schema.Schema
		if err := sc.UnmarshalCedar([]byte(parts([]int{i, (i + 1) % len(joinParts)}))); err != nil {
			f.Fatal(err)
		}
		b, err := sc.MarshalJSON()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	for _, seed := range []string{"", "{}", `{"":{"entityTypes":{},"actions":{}}}`, `{"A":{"entityTypes":{"B":{"shape":{"type":"Record","attributes":{"a":{"type":"Boolean","annotations":{"doc":null}}}}}},"actions":{"x":{"memberOf":[{"id":"y","type":"A::Action"}]}}}}`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		text, findings := JoinSchemas([]SchemaText{{File: "a.cedarschema.json", Text: in, JSON: true}})
		if len(findings) > 0 {
			for _, x := range findings {
				if x.Message == "" || x.File == "" {
					t.Errorf("%+v", x)
				}
			}
			return
		}
		again, findings := JoinSchemas([]SchemaText{{File: "a.cedarschema", Text: text}})
		if len(findings) > 0 || again != text {
			t.Fatalf("%v, %q became %q", findings, text, again)
		}
	})
}
