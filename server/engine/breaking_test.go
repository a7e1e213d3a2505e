package engine

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"pgregory.net/rapid"
)

// callersBefore is the schema that callers ask by; its catalogue has the fields id, who.name and who.mail.
const callersBefore = `namespace B {
  entity User; entity Robot;
  entity Color enum ["red", "blue"];
  @source("request") entity Draft { size: Long, note?: String };
  entity Doc;
  entity FieldGroup in [FieldGroup];
  entity Field in [Field, FieldGroup];
  action View appliesTo { principal: [User, Robot], resource: [Doc], context: { mfa: Bool, ip?: ipaddr, place?: { city: String, zip?: Long }, tags?: Set<String>, color?: Color, by?: User, now: datetime } };
  action "View.field" appliesTo { principal: [User, Robot], resource: [Doc], context: { mfa: Bool, ip?: ipaddr, place?: { city: String, zip?: Long }, tags?: Set<String>, color?: Color, by?: User, now: datetime, field: Field } };
  action Write appliesTo { principal: [User], resource: [Draft] };
  action Paint appliesTo { principal: [User], resource: [Color] };
  action Group;
}`

// schemaOf compiles a schema with the catalogue of the tests.
func schemaOf(t testing.TB, schema string, fields ...string) *Set {
	t.Helper()
	var list []Field
	for _, f := range fields {
		list = append(list, Field{Type: "B::Doc", Path: f})
	}
	set, findings := Compile([]Source{{Name: "b", Schema: schema, Fields: list}}, nil)
	if set == nil {
		t.Fatalf("%v\n%s", findings, schema)
	}
	return set
}

// Each kind of a difference breaks callers, or it does not, and the message says of which action.
func TestBreakingKinds(t *testing.T) {
	before := schemaOf(t, callersBefore, "id", "who.name", "who.mail")
	const view = `action B::Action::"View": `
	for _, c := range []struct {
		says     string
		old, new string // texts of the schema, replaced everywhere
		want     []string
	}{
		{"a comment", "action Group;", "action Group; // no", nil},
		{"a new optional attribute", "mfa: Bool", "mfa: Bool, more?: String", nil},
		{"a required attribute becomes optional", "mfa: Bool", "mfa?: Bool", nil},
		{"a new principal type", "[User, Robot]", "[User, Robot, Doc]", nil},
		{"a new action", "action Group;", "action Group; action More appliesTo { principal: [User], resource: [Doc] };", nil},
		{"a group of actions is gone", "action Group;", "", nil},
		{"more values", `enum ["red", "blue"]`, `enum ["red", "blue", "green"]`, nil},
		{"the server does not fill in the time any more", ", now: datetime", "", nil},
		{"a new optional attribute of an entity in requests", "note?: String", "note?: String, more?: Long", nil},

		{"an attribute is removed", "mfa: Bool, ", "", []string{view + `the context does not have the attribute "mfa" any more`}},
		{"an attribute is new and required", "mfa: Bool", "mfa: Bool, reason: String", []string{view + `the context requires the attribute "reason" now, which is new`}},
		{"an optional attribute is required", "ip?: ipaddr", "ip: ipaddr", []string{view + `the context requires the attribute "ip" now, which was optional`}},
		{"an attribute has another type", "mfa: Bool", "mfa: String", []string{view + `the attribute "mfa" of the context is a String now, and was a Bool`}},
		{"an extension type is another one", "ip?: ipaddr", "ip?: decimal", []string{view + `the attribute "ip" of the context is a value of type decimal now, and was a value of type ipaddr`}},
		{"an entity is of another type", "by?: User", "by?: Robot", []string{view + `the attribute "by" of the context is an entity of type B::Robot now, and was an entity of type B::User`}},
		{"an attribute within a record is removed", "zip?: Long", "street?: String", []string{view + `the context does not have the attribute "place.zip" any more`}},
		{"an attribute within a record is required", "zip?: Long", "zip: Long", []string{view + `the context requires the attribute "place.zip" now, which was optional`}},
		{"elements of a set have another type", "Set<String>", "Set<Long>", []string{view + `the attribute "tags[]" of the context is a Long now, and was a String`}},
		{"a set becomes one value", "Set<String>", "String", []string{view + `the attribute "tags" of the context is a String now, and was a Set`}},
		{"callers have to send what the server filled in", "now: datetime", "now: Long", []string{view + `the context requires the attribute "now" now, which is new`}},
		{"a principal type is removed", "[User, Robot]", "[User]", []string{view + "the principal type B::Robot is removed"}},
		{"a resource type is removed", "resource: [Draft]", "resource: [Doc]", []string{`action B::Action::"Write": the resource type B::Draft is removed`}},
		{"an action is removed", "action Paint appliesTo { principal: [User], resource: [Color] };", "", []string{`action B::Action::"Paint": it is removed`}},
		{"an action becomes a group", "action Paint appliesTo { principal: [User], resource: [Color] };", "action Paint;", []string{`action B::Action::"Paint": it applies to nothing any more`}},
		{"an action has no fields any more", `action "View.field"`, `action "Other.field"`, nil}, // see below
		{"a value of an enumerated type is removed", `enum ["red", "blue"]`, `enum ["red"]`, []string{
			`action B::Action::"Paint": the resource type B::Color does not have B::Color::"blue" any more`,
			view + `in the attribute "color" of the context, the type B::Color does not have B::Color::"blue" any more`}},
		{"an attribute of an entity in requests is removed", ", note?: String", "", []string{`action B::Action::"Write": the resource type B::Draft does not have the attribute "note" any more`}},
		{"an attribute of an entity in requests is required", "note?: String", "note: String", []string{`action B::Action::"Write": the resource type B::Draft requires the attribute "note" now, which was optional`}},
		{"an entity does not come with requests any more", `@source("request") `, "", []string{`action B::Action::"Write": entities of the resource type B::Draft cannot come with a request any more: it is not marked @source("request")`}},
		{"the namespace has another name", "namespace B ", "namespace C ", []string{`action B::Action::"Paint": it is removed`, `action B::Action::"View": it is removed`, `action B::Action::"Write": it is removed`}},
	} {
		fields := []string{"id", "who.name", "who.mail"}
		schema := strings.ReplaceAll(callersBefore, c.old, c.new)
		switch {
		case schema == callersBefore:
			t.Fatalf("%s: replaces nothing", c.says)
		case strings.HasPrefix(c.new, "namespace C"):
			fields = nil
		case strings.HasPrefix(c.new, `action "Other`): // without the action of the fields
			head, rest, _ := strings.Cut(callersBefore, "\n  action \"View.field\"")
			_, tail, _ := strings.Cut(rest, "\n")
			schema = head + "\n" + tail
			c.want = []string{view + `its fields cannot be asked for any more: there is no action "View.field"`}
		}
		got := schemaOf(t, schema, fields...).Breaks(before)
		wantBreaks(t, c.says, got, c.want...)
		for _, b := range got {
			if b.Bundle != "b" || len(b.Actions) != 1 || !strings.Contains(b.Message, b.Actions[0].String()) || b.Field {
				t.Errorf("%s: %+v", c.says, b)
			}
		}
	}
	for _, c := range []struct {
		says   string
		fields []string
		want   []string
	}{
		{"a new field", []string{"id", "who.name", "who.mail", "total"}, nil},
		{"a field has parts", []string{"id.a", "who.name", "who.mail"}, nil},
		{"a field is removed", []string{"who.name", "who.mail"}, []string{`the field "id" of B::Doc is not in the catalogue any more, for B::Action::"View"`}},
		{"a part is removed", []string{"id", "who.name"}, []string{`the field "who.mail" of B::Doc is not in the catalogue any more, for B::Action::"View"`}},
	} {
		got := schemaOf(t, callersBefore, c.fields...).Breaks(before)
		wantBreaks(t, c.says, got, c.want...)
		if len(got) > 0 && (!got[0].Field || got[0].Bundle != "b") {
			t.Errorf("%s: %+v", c.says, got[0])
		}
	}
	empty, findings := Compile(nil, nil)
	if empty == nil {
		t.Fatal(findings)
	}
	wantBreaks(t, "the first version", before.Breaks(empty))
	wantBreaks(t, "the bundle is gone", empty.Breaks(before), `action B::Action::"Paint": it is removed`, `action B::Action::"View": it is removed`, `action B::Action::"Write": it is removed`)
}

func wantBreaks(t *testing.T, says string, got []Break, want ...string) {
	t.Helper()
	var texts []string
	for _, b := range got {
		texts = append(texts, b.Message)
	}
	if !slices.Equal(texts, want) {
		t.Errorf("%s:\n got %q\nwant %q", says, texts, want)
	}
}

// A change with thousands of differences has a bounded list, whose end says that there are more.
func TestBreaksAreBounded(t *testing.T) {
	var attrs strings.Builder
	for i := range 2 * maxBreaks {
		fmt.Fprintf(&attrs, "a%d?: Long, ", i)
	}
	const format = "namespace B { entity Doc; action View appliesTo { principal: [Doc], resource: [Doc], context: { %s } }; }"
	list := schemaOf(t, fmt.Sprintf(format, "")).Breaks(schemaOf(t, fmt.Sprintf(format, attrs.String())))
	if len(list) != maxBreaks+1 || !strings.Contains(list[maxBreaks].Message, "left out") {
		t.Errorf("%d, %+v", len(list), list[len(list)-1])
	}
}

// wholeSchema is a schema as the property tests draw and change it.
type wholeSchema map[string]*wholeAction

type wholeAction struct {
	principals []string
	context    map[string]string // name, with a question mark if it is optional → type
}

var wholeTypes = []string{"Long", "String", "Bool", "Set<Long>", "Set<String>", "User", "Robot", "{ x: Long }", "{ x?: Long }", "{ x: Long, y?: String }", "{ y: Set<{ z?: Bool }> }"}

func drawAction(t *rapid.T) *wholeAction {
	a := &wholeAction{principals: []string{"User"}, context: map[string]string{}}
	if rapid.Bool().Draw(t, "robots") {
		a.principals = append(a.principals, "Robot")
	}
	for _, name := range []string{"a", "b", "c"} {
		switch rapid.IntRange(0, 2).Draw(t, name) {
		case 1:
			a.context[name] = rapid.SampledFrom(wholeTypes).Draw(t, "type")
		case 2:
			a.context[name+"?"] = rapid.SampledFrom(wholeTypes).Draw(t, "type")
		}
	}
	return a
}

func (w wholeSchema) text() string {
	var b strings.Builder
	b.WriteString("namespace B { entity User, Robot, Doc;\n")
	for _, name := range slices.Sorted(maps.Keys(w)) {
		var attrs []string
		for _, k := range slices.Sorted(maps.Keys(w[name].context)) {
			attrs = append(attrs, k+": "+w[name].context[k])
		}
		fmt.Fprintf(&b, "action %s appliesTo { principal: [%s], resource: [Doc], context: { %s } };\n", name, strings.Join(w[name].principals, ", "), strings.Join(attrs, ", "))
	}
	return b.String() + "}"
}

func drawSchema(t *rapid.T) wholeSchema {
	w := wholeSchema{}
	for _, name := range []string{"One", "Two", "Three"} {
		if rapid.IntRange(0, 3).Draw(t, "there") > 0 {
			w[name] = drawAction(t)
		}
	}
	return w
}

// drawValue draws a value as JSON has it of a type of the tests.
func drawValue(t *rapid.T, typ string) any {
	switch typ {
	case "Long":
		return float64(rapid.IntRange(0, 2).Draw(t, "n"))
	case "String":
		return rapid.SampledFrom([]string{"", "s"}).Draw(t, "s")
	case "Bool":
		return rapid.Bool().Draw(t, "b")
	case "Set<Long>", "Set<String>":
		return slices.Repeat([]any{drawValue(t, typ[4:len(typ)-1])}, rapid.IntRange(0, 1).Draw(t, "len"))
	case "User", "Robot":
		return map[string]any{"type": "B::" + typ, "id": "u"}
	case "{ y: Set<{ z?: Bool }> }":
		inner := map[string]any{}
		if rapid.Bool().Draw(t, "z") {
			inner["z"] = true
		}
		return map[string]any{"y": []any{inner}}
	}
	m := map[string]any{}
	if !strings.Contains(typ, "x?") || rapid.Bool().Draw(t, "x") {
		m["x"] = float64(1)
	}
	if strings.Contains(typ, "y?") && rapid.Bool().Draw(t, "y") {
		m["y"] = "s"
	}
	return m
}

// A question that a set accepts and a later one refuses, or finds inapplicable, is about an action that
// the list of breaks names. So a list without an action means that all its callers can go on.
func TestBreaksNameWhatIsRefused(t *testing.T) {
	refused, kept := 0, 0
	rapid.Check(t, func(rt *rapid.T) {
		before, after := drawSchema(rt), drawSchema(rt)
		for name, a := range before { // mostly small changes
			if rapid.IntRange(0, 2).Draw(rt, "same") > 0 {
				copied := &wholeAction{a.principals, maps.Clone(a.context)}
				if k := rapid.SampledFrom([]string{"", "a", "b?", "d?"}).Draw(rt, "changed"); k != "" && a.context[strings.TrimSuffix(k, "?")] == "" {
					copied.context[k] = rapid.SampledFrom(wholeTypes).Draw(rt, "type")
					if other := k + "?"; a.context[other] != "" {
						delete(copied.context, other)
					}
				}
				if rapid.IntRange(0, 3).Draw(rt, "no robots") == 0 {
					copied.principals = []string{"User"}
				}
				after[name] = copied
			}
		}
		old, now := schemaOf(t, before.text()), schemaOf(t, after.text())
		list := now.Breaks(old)
		for name, a := range before {
			context := map[string]any{}
			for k, typ := range a.context {
				if plain := strings.TrimSuffix(k, "?"); plain == k || rapid.Bool().Draw(rt, "sent") {
					context[plain] = drawValue(rt, typ)
				}
			}
			action := cedar.NewEntityUID("B::Action", cedar.String(name))
			ask := Ask{Action: action, Principal: cedar.NewEntityUID(cedar.EntityType("B::"+rapid.SampledFrom(a.principals).Draw(rt, "principal")), "u"), Resource: cedar.NewEntityUID("B::Doc", "d"), Context: context}
			if q, err := old.read(ask); err != nil || q.inapplicable {
				rt.Fatalf("%v\n%s", err, before.text())
			}
			q, err := now.read(ask)
			named := slices.ContainsFunc(list, func(b Break) bool { return slices.Contains(b.Actions, action) })
			if err != nil || q.inapplicable {
				if refused++; !named {
					rt.Fatalf("%s breaks (%v), and is not in %+v\n%s%s", action, err, list, before.text(), after.text())
				}
			} else if !named {
				kept++
			}
		}
	})
	if refused == 0 || kept == 0 {
		t.Errorf("%d questions refused, %d kept: the schemas drawn are too much alike, or too little", refused, kept)
	}
}

// No difference breaks nobody, also if it is written otherwise, and neither does what callers need not use.
func TestAdditionsBreakNobody(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := drawSchema(rt)
		before := schemaOf(t, w.text())
		for _, a := range w {
			for i := range rapid.IntRange(0, 2).Draw(rt, "more") {
				a.context[fmt.Sprintf("new%d?", i)] = rapid.SampledFrom(wholeTypes).Draw(rt, "type")
			}
			if !slices.Contains(a.principals, "Robot") {
				a.principals = append(a.principals, "Robot")
			}
			slices.Reverse(a.principals)
		}
		w["Four"] = drawAction(rt)
		if list := schemaOf(t, "// Another text.\n"+w.text()).Breaks(before); len(list) > 0 {
			rt.Fatalf("%+v\n%s", list, w.text())
		}
	})
}
