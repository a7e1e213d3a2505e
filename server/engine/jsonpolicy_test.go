package engine

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/server/corpustest"
)

// jsonOf returns the JSON of a policy as a tree.
func jsonOf(t testing.TB, text string) map[string]any {
	t.Helper()
	var p cedar.Policy
	if err := p.UnmarshalCedar([]byte(text)); err != nil {
		t.Fatal(err)
	}
	b, err := p.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	tree, err := readTree(b)
	if err != nil {
		t.Fatal(err)
	}
	return tree.(map[string]any)
}

func written(t testing.TB, tree any) string {
	t.Helper()
	b, err := json.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The same policies decide the same as Cedar text, as policy sets in JSON, whose keys or annotations name
// the policies, and as policies in JSON that stand alone.
func TestJSONDecidesAsText(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		text := Source{Name: "w", Schema: worldSchema, Fields: worldFields}
		inJSON := text
		set := map[string]any{}
		for i := range rapid.IntRange(1, 6).Draw(rt, "policies") {
			policy := worldPolicy(rt, i)
			text.Policies = append(text.Policies, PolicyText{File: "p.cedar", Text: policy})
			tree, id := jsonOf(t, policy), fmt.Sprintf("p%d", i)
			switch rapid.IntRange(0, 3).Draw(rt, "form") {
			case 0:
				inJSON.Policies = append(inJSON.Policies, PolicyText{File: id + ".cedar.json", Text: written(t, tree), JSON: true})
			case 1: // the key is the id
				delete(tree, "annotations")
				set[id] = tree
			case 2: // as Cedar's tools write it
				set[fmt.Sprintf("policy%d", 100-i)] = tree
			default:
				set[id] = tree
			}
		}
		inJSON.Policies = append(inJSON.Policies, PolicyText{File: "set.cedar.json", JSON: true,
			Text: written(t, map[string]any{"staticPolicies": set, "templates": map[string]any{}, "templateLinks": []any{}})})
		one, found := Compile([]Source{text}, nil)
		other, foundJSON := Compile([]Source{inJSON}, nil)
		foundJSON = slices.DeleteFunc(foundJSON, func(f Finding) bool { return f.Message == "holds no policy" })
		if (one == nil) != (other == nil) || len(found) != len(foundJSON) {
			rt.Fatalf("as text: %v, in JSON: %v", found, foundJSON)
		}
		if one == nil {
			rt.SkipNow()
		}
		stored := worldEntities(rt)
		for range 3 {
			ask := worldAsk(rt)
			want, got := decideWith(rt, one, stored, ask), decideWith(rt, other, stored, ask)
			if got.Allowed != want.Allowed || !slices.Equal(got.Permitted, want.Permitted) || !slices.Equal(got.Denied, want.Denied) || !reflect.DeepEqual(got.Policies, want.Policies) {
				rt.Fatalf("%+v: %+v as text, %+v in JSON", ask, want, got)
			}
		}
	})
}

// Each spelling of a condition that is a policy as text is the same policy in JSON, and its text is the same at
// each reading.
func TestJSONOfOddSpellings(t *testing.T) {
	n := 0
	for _, condition := range strings.Split(strings.TrimSpace(syntaxConditions), "\n") {
		text := `@id("a") @note permit (principal, action, resource) when { ` + condition + ` };`
		var p cedar.Policy
		if p.UnmarshalCedar([]byte(text)) != nil {
			continue
		}
		in, err := p.MarshalJSON()
		if err != nil {
			continue
		}
		n++
		again, jerr := policyFromJSON(string(in), "")
		if jerr != nil || !sameMeaning(&p, []byte(again)) {
			t.Errorf("%s became %s, %v", condition, again, jerr)
		}
		for range 3 {
			if third, _ := policyFromJSON(string(in), ""); third != again {
				t.Errorf("%s: two readings differ: %s and %s", condition, again, third)
			}
		}
	}
	if n < 80 {
		t.Errorf("only %d conditions are policies", n)
	}
}

// noContext matches an empty context: the reference leaves it out in JSON.
var noContext = regexp.MustCompile(`,\n\t+context: \{\}`)

// The JSON that the reference writes of the policies and schemas of its corpus says what their text says. It is
// a sample, another one in each run.
func TestJSONOfTheReference(t *testing.T) {
	const oneIn = 60
	policies, schemas := corpustest.Forms(t, oneIn, rand.IntN(oneIn))
	read := 0
	for _, f := range policies {
		list, err := cedar.NewPolicyListFromBytes("", []byte(f.Text))
		if err != nil {
			t.Fatal(err)
		}
		members, jerr := policiesInJSON(f.JSON)
		if jerr != nil {
			t.Errorf("%s: %+v", f.Name, jerr)
			continue
		}
		for _, m := range members {
			var number int
			if _, err := fmt.Sscanf(m.key, "policy%d", &number); err != nil {
				t.Fatal(err)
			}
			tree, _ := readTree([]byte(m.text))
			annotations, _ := tree.(map[string]any)["annotations"].(map[string]any)
			if annotations == nil {
				annotations = map[string]any{}
			}
			annotations["id"] = "x"
			tree.(map[string]any)["annotations"] = annotations
			text, jerr := policyFromJSON(written(t, tree), m.key)
			if jerr != nil {
				t.Errorf("%s, %s: %+v", f.Name, m.key, jerr)
				continue
			}
			source := (*xast.Policy)(list[number].AST())
			if in, ok := source.Action.(xast.ScopeTypeInSet); ok && len(in.Entities) == 1 {
				source.Action = xast.Scope{}.In(in.Entities[0]) // as the reference writes it
			}
			named := cedar.NewPolicyFromAST((*ast.Policy)(source.Annotate("id", "x")))
			if !sameMeaning(named, []byte(text)) {
				t.Errorf("%s, %s: %s is not %s", f.Name, m.key, text, list[number].MarshalCedar())
			}
			read++
		}
	}
	for _, f := range schemas {
		// The corpus has actions of other namespaces than their own, and the like: what the text is refused
		// for is not asked of the JSON.
		one, found := JoinSchemas([]SchemaText{{File: "a", Text: f.Text}})
		other, foundJSON := JoinSchemas([]SchemaText{{File: "a", Text: f.JSON, JSON: true}})
		if len(found) > 0 || len(foundJSON) > 0 {
			t.Errorf("%s: %v as text, %v in JSON", f.Name, found, foundJSON)
		} else if one = noContext.ReplaceAllString(one, ""); one != noContext.ReplaceAllString(other, "") {
			t.Errorf("%s: the text is\n%s\nand the JSON is\n%s", f.Name, one, other)
		}
		read++
	}
	t.Logf("%d policies and schemas", read)
	if read < 100 {
		t.Errorf("only %d policies and schemas", read)
	}
}

func TestJSONRefusals(t *testing.T) {
	const scope = `"effect": "permit", "principal": {"op": "All"}, "action": {"op": "All"}, "resource": {"op": "All"}`
	policy := func(more string) string {
		return "{" + scope + ",\n \"annotations\": {\"id\": \"a\"},\n \"conditions\": [{\"kind\": \"when\", \"body\":\n" + more + "}]}"
	}
	with := func(part, value string) string {
		tree, err := readTree([]byte("{" + scope + `, "annotations": {"id": "a"}, "conditions": []}`))
		if err != nil {
			t.Fatal(err)
		}
		tree.(map[string]any)[part] = json.RawMessage(value)
		return written(t, tree)
	}
	or := func(n int) string {
		return strings.Repeat(`{"||": {"left": `, n) + `{"Value": true}` + strings.Repeat(`, "right": {"Value": true}}}`, n)
	}
	for _, tt := range []struct{ name, in, want string }{
		{"nothing", "", "1:1: is not valid JSON: unexpected end of JSON input"},
		{"not JSON", "{\n  permit\n}", "2:3: is not valid JSON: invalid character 'p' looking for beginning of object key string"},
		{"two values", "{}\n{}", "2:1: is not valid JSON: invalid character '{' after top-level value"},
		{"a list", "[]", "1:1: a policy or a policy set must be a JSON object"},
		{"neither", "{}", "1:1: is neither a policy nor a policy set"},
		{"both", `{"staticPolicies": {}, "effect": "permit"}`, "1:34: has members of a policy (effect) and of a policy set (staticPolicies)"},
		{"no policies", `{"templates": {}}`, "1:1: has no staticPolicies"},
		{"policies in a list", `{"staticPolicies": []}`, "1:20: staticPolicies must be a JSON object"},
		{"another member of a set", "{\"staticPolicies\": {},\n \"policies\": {}}", `2:14: unknown member "policies"`},
		{"a template", `{"staticPolicies": {}, "templates": {"t": {}}}`, "1:37: templates is not empty, and templates are not supported"},
		{"a link", `{"staticPolicies": {}, "templateLinks": [{}]}`, "1:41: templateLinks is not empty, and templates are not supported"},
		{"a slot in the scope", with("principal", `{"op": "==", "slot": "?principal"}`), `/principal: unknown member "slot"`},
		{"a slot in a condition", policy(`{"Slot": "?principal"}`), "4:10: /conditions/0/body/Slot: unexpected JSON string"},
		{"a key twice", `{"staticPolicies": {"a": {}, "a": {}}}`, `1:35: member "a" stands twice`},
		{"a set twice", `{"staticPolicies": {}, "staticPolicies": {}}`, `1:42: member "staticPolicies" stands twice`},
		{"an effect twice", "{" + scope + `, "effect": "forbid"}`, `member "effect" stands twice`},
		{"a member of an expression twice", policy(`{"==": {"left": {"Value": 1}, "left": {"Value": 1}, "right": {"Value": 1}}}`), `/conditions/0/body/==: duplicate member "left"`},
		{"a member of a value twice", policy(`{"Value": {"a": 1, "a": 1}}`), `/conditions/0/body/Value: duplicate member "a"`},
		{"a misspelled condition", strings.Replace(policy(`{"Value": true}`), `"conditions"`, `"condition"`, 1), `unknown member "condition"`},
		{"other letters", strings.Replace(policy(`{"Value": true}`), `"conditions"`, `"Conditions"`, 1), `unknown member "Conditions"`},
		{"null for a condition", with("conditions", "null"), "must not be null"},
		{"null in a condition", policy(`{"is": {"left": {"Var": "principal"}, "entity_type": "A", "in": null}}`), "null says nothing here"},
		{"null in a scope", with("principal", `{"op": "is", "entity_type": "A", "in": null}`), "null says nothing here"},
		{"an entity that All does not need", with("principal", `{"op": "All", "entity": {"type": "A", "id": "b"}}`), `a scope of "All" cannot have these members: entity, op`},
		{"an entity and a list", with("action", `{"op": "in", "entity": {"type": "Action", "id": "b"}, "entities": []}`), `a scope of "in" cannot have these members: entities, entity, op`},
		{"a list of nothing", with("action", `{"op": "in"}`), `a scope of "in" cannot have these members: op`},
		{"an entity with more", with("resource", `{"op": "==", "entity": {"type": "A", "id": "b", "x": 1}}`), "an entity has type and id, and nothing else"},
		{"an entity in a value with more", policy(`{"Value": {"__entity": {"type": "A", "id": "b", "x": 1}}}`), "4:11: __entity stands alone, and has type and id"},
		{"an extension value with more", policy(`{"Value": {"__extn": {"fn": "ip", "arg": "::1", "x": 1}}}`), "4:11: __extn stands alone, and has fn and arg"},
		{"text in a type", with("principal", `{"op": "==", "entity": {"type": "A::\"x\" || principal == B", "id": "b"}}`), ""},
		{"text in an annotation", with("annotations", `{"id": "a", "x(\"y\") permit": ""}`), "invalid annotation key"},
		{"an unknown function", policy(`{"exec": [{"Value": "x"}]}`), "exec is not a known extension function or method"},
		{"a fraction", policy(`{"Value": 1.5}`), "long out of range"},
		{"half a character", policy(`{"Value": "\ud800"}`), "invalid surrogate pair"},
		{"no id", "{" + scope + "}", "1:1: policy without an id"},
		{"an empty id", "{" + scope + `, "annotations": {"id": ""}}`, "1:1: policy without an id"},
		{"no id in a set", `{"staticPolicies": {"policy0": {` + scope + "}}}", `1:32: policy without an id: its key "policy0" only counts the policies`},
		{"two names", `{"staticPolicies": {"b": {` + scope + `, "annotations": {"id": "a"}}}}`, `1:26: its key is "b" and its annotation id "a"`},
		{"an id that is too long", `{"staticPolicies": {"` + strings.Repeat("x", 257) + `": {` + scope + "}}}", "1:282: @id is longer than 256 bytes or has control characters"},
		{"deep", strings.Repeat("[", 100_000), fmt.Sprintf("1:%d: nested deeper than %d", MaxJSONNesting+1, MaxJSONNesting)},
		{"a long chain", policy(or(250)), fmt.Sprintf("nested deeper than %d", MaxJSONNesting)},
		{"deep as text", policy(strings.Repeat(`{"!": {"arg": `, 120) + `{"Value": true}` + strings.Repeat("}}", 120)), fmt.Sprintf("1:1: nested deeper than %d", MaxNesting)},
		{"large", policy(`{"Value": "` + strings.Repeat("x", MaxPolicyJSONBytes) + `"}`), "bytes of JSON, the limit is 1048576"},
		{"large as text", policy(`{"isEmpty": {"arg": {"Set": [{"Value": 10000}` + strings.Repeat(`, {"Value": 10000}`, 12_000) + `]}}}`), "the limit is 65536"},
		{"not UTF-8", "{\"\xff\": 1}", "not valid UTF-8"},
		{"a bidi character", policy("{\"==\": {\"left\": {\"Value\": \"\u202e\"}, \"right\": {\"Value\": \"x\"}}}"), "U+202E"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src := Source{Name: "w", Schema: worldSchema, Policies: []PolicyText{{File: "p.cedar.json", Text: tt.in, JSON: true}}}
			set, findings := Compile([]Source{src}, nil)
			if set != nil || len(findings) == 0 {
				t.Fatalf("%v", findings)
			}
			f := findings[0]
			if got := strings.TrimPrefix(f.String(), "p.cedar.json:"); f.File != "p.cedar.json" || f.Line == 0 || !strings.Contains(got, tt.want) || strings.Contains(got, " Go ") || strings.Contains(got, "jsontext") {
				t.Errorf("%s, want %s", f, tt.want)
			}
		})
	}
	// A chain of moderate length is fine, and so is a policy that is also one as text.
	for _, in := range []string{policy(or(200)), policy(`{"Var": "context"}`), "{\"staticPolicies\": {}}"} {
		if _, errs := splitJSON(in, func() bool { return false }); len(errs) > 0 {
			t.Errorf("%v", errs)
		}
	}
}

// A policy set in JSON has one policy for each text, at its line.
func TestJSONPlaces(t *testing.T) {
	in := "{\n \"staticPolicies\": {\n  \"é\": {\"effect\": \"permit\", \"principal\": {\"op\": \"All\"}, \"action\": {\"op\": \"==\", \"entity\": {\"type\": \"W::Action\", \"id\": \"Burn\"}}, \"resource\": {\"op\": \"All\"}},\n" +
		"  \"policy7\":\n   {\"effect\": \"forbid\", \"principal\": {\"op\": \"All\"}, \"action\": {\"op\": \"All\"}, \"resource\": {\"op\": \"All\"},\n   \"annotations\": {\"z\": \"1\", \"id\": \"b\", \"a\": null},\n   \"conditions\": [{\"kind\": \"when\", \"body\": {\"==\": {\"left\": {\"Record\": {\"b\": {\"Value\": [2, 1]}, \"a\": {\"Value\": {\"__extn\": {\"fn\": \"decimal\", \"arg\": \"1.50\"}}}}}, \"right\": {\"Value\": {}}}}}]}\n }\n}\n"
	list, errs := splitJSON(in, func() bool { return false })
	want := []statement{
		{"@id(\"é\")\npermit (\n    principal,\n    action == W::Action::\"Burn\",\n    resource\n);", 3, 8},
		{"@a(\"\")\n@id(\"b\")\n@z(\"1\")\nforbid ( principal, action, resource )\nwhen { {\"a\":decimal(\"1.5\"), \"b\":[1, 2]} == {} };", 5, 4},
	}
	if len(errs) > 0 || !slices.Equal(list, want) {
		t.Errorf("%v, %+v, want %+v", errs, list, want)
	}
	src := Source{Name: "w", Schema: worldSchema, Policies: []PolicyText{{File: "p.cedar.json", JSON: true, Text: in}}}
	_, findings := Compile([]Source{src}, nil)
	if i := slices.IndexFunc(findings, func(f Finding) bool { return f.Policy == "b" }); i < 0 || findings[i].Line != 5 || findings[i].Column != 4 {
		t.Errorf("%v", findings)
	}
}

// FuzzPolicyJSON feeds JSON to the reader of policies. What it makes of them is Cedar text that says the same,
// at each reading.
func FuzzPolicyJSON(f *testing.F) {
	for _, condition := range strings.Split(strings.TrimSpace(syntaxConditions), "\n") {
		var p cedar.Policy
		if p.UnmarshalCedar([]byte(`@id("a") forbid (principal == U::"u", action in [Action::"act"], resource is U in G::"g") unless { `+condition+` };`)) == nil {
			if in, err := p.MarshalJSON(); err == nil {
				f.Add(string(in))
				f.Add(`{"staticPolicies":{"a":` + string(in) + `}}`)
			}
		}
	}
	for _, seed := range []string{"", "{}", "[", `{"staticPolicies":{"policy0":{}},"templates":{},"templateLinks":[]}`, `{"effect":null}`, `{"a":{"b":[{"c":"\ud800"}]}}`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		list, errs := splitJSON(in, func() bool { return false })
		for _, e := range errs {
			if e.line < 1 || e.column < 1 || e.msg == "" {
				t.Errorf("%+v", e)
			}
		}
		for _, st := range list {
			var p cedar.Policy
			if err := p.UnmarshalCedar([]byte(st.text)); err != nil {
				t.Fatal(err)
			}
			again, err := p.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			if text, jerr := policyFromJSON(string(again), ""); jerr != nil || text != st.text {
				t.Fatalf("%q became %q, %v", st.text, text, jerr)
			}
		}
	})
}
