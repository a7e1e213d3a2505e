package engine

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

const markedSchema = `namespace M {
  type Address = { @sensitive street: String, city: String };
  entity User { @sensitive n: Long, plain: Long, @sensitive boss?: User };
  @source("request") entity Form {
    @sensitive ssn: String, home: Address, people: Set<{ name: String, @sensitive age: Long }>, @sensitive pins: Set<Long>,
    open: String, author: User
  } tags Set<Address>;
  entity FieldGroup in [FieldGroup];
  entity Field in [Field, FieldGroup];
  action A appliesTo { principal: [User], resource: [Form], context: {
    @sensitive pin: String, home: { street: String, @sensitive city: String }, list: Set<Address>, mfa: Bool,
    @sensitive who?: User, @sensitive now: datetime, deep: { a: { b: Set<{ @sensitive c: String }>, e: String } } } };
  action "A.field" appliesTo { principal: [User], resource: [Form], context: {
    pin: String, home: { @sensitive street: String, city: String }, list: Set<Address>, mfa: Bool,
    who?: User, now: datetime, deep: { a: { b: Set<{ c: String }>, @sensitive e: String } }, field: Field } };
}`

func compileMarked(t *testing.T, policies string) *Set {
	t.Helper()
	set, findings := Compile([]Source{{Name: "m", Schema: markedSchema, Policies: []PolicyText{{Text: policies}}}}, nil)
	if set == nil {
		t.Fatal(findings)
	}
	return set
}

func decoded(t *testing.T, text string) (m map[string]any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// Whatever the schema marks, at any depth, is masked, and nothing else.
func TestMask(t *testing.T) {
	set := compileMarked(t, "")
	form := cedar.NewEntityUID("M::Form", "f")
	q, err := set.read(Ask{
		Principal: cedar.NewEntityUID("M::User", "u"), Action: cedar.NewEntityUID("M::Action", "A"), Resource: form,
		Context: decoded(t, `{"pin": "SECRET", "home": {"street": "SECRET", "city": "SECRET"}, "list": [{"street": "SECRET", "city": "open"}],
			"mfa": true, "who": {"type": "M::User", "id": "SECRET"}, "deep": {"a": {"b": [{"c": "SECRET"}], "e": "SECRET"}}}`),
		Inline: []RawEntity{{UID: form,
			Attrs: decoded(t, `{"ssn": "SECRET", "home": {"street": "SECRET", "city": "open"}, "people": [{"name": "open", "age": 424242}],
				"pins": [424242], "open": "open", "author": {"type": "M::User", "id": "u"}}`),
			Tags: decoded(t, `{"b": [{"street": "SECRET", "city": "open"}], "a": [{"street": "SECRET", "city": "open"}]}`),
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	mask := func(path string, value any) any {
		paths = append(paths, path)
		if text := fmt.Sprint(value); !strings.Contains(text, "SECRET") && !strings.Contains(text, "424242") && path != "context.now" {
			t.Errorf("%s: masked %s", path, text)
		}
		return "masked"
	}
	context := set.MaskContext(q, mask)
	attrs, tags, ok := set.MaskEntity(q, form, 3, mask)
	want := []string{
		"context.deep.a.b[0].c", "context.deep.a.e", "context.home.city", "context.home.street", "context.list[0].street", "context.now", "context.pin", "context.who",
		"entities[3].attrs.home.street", "entities[3].attrs.people[0].age", "entities[3].attrs.pins", "entities[3].attrs.ssn",
		"entities[3].tags.a[0].street", "entities[3].tags.b[0].street",
	}
	if !ok || !slices.Equal(paths, want) {
		t.Errorf("masked, in this order:\n%s\nwant\n%s", strings.Join(paths, "\n"), strings.Join(want, "\n"))
	}
	all := fmt.Sprint(context, attrs, tags)
	if strings.Contains(all, "SECRET") || strings.Contains(all, "424242") || strings.Count(all, "open") != 7 || strings.Count(all, "masked") != len(want) {
		t.Errorf("after masking: %s", all)
	}
}

// What a policy says about its failure can hold its operands, so it is withheld of
// one that reads something sensitive, however it does.
func TestMessagesAreWithheld(t *testing.T) {
	const big = "9223372036854775807"
	for _, c := range []struct {
		condition string
		withheld  bool
	}{
		{"principal.plain + " + big + " > 0", false},
		{"principal.n + " + big + " > 0", true},
		{"(if context.mfa then principal else principal).n + " + big + " > 0", true},
		{"{a: principal}.a.n * " + big + " > 0", true},
		{"principal has boss && principal.boss.plain > 0", true}, // entity `M::User::"SECRET"` does not exist
		{"context has who && context.who.plain > 0", true},
	} {
		set := compileMarked(t, `@id("p") permit (principal, action == M::Action::"A", resource) when { `+c.condition+` };`)
		u, form := cedar.NewEntityUID("M::User", "u"), cedar.NewEntityUID("M::Form", "f")
		e, err := set.ReadEntity(RawEntity{UID: u, Attrs: decoded(t, `{"n": 424242, "plain": 1, "boss": {"type": "M::User", "id": "SECRET"}}`)})
		if err != nil {
			t.Fatal(err)
		}
		q, err := set.read(Ask{
			Principal: u, Action: cedar.NewEntityUID("M::Action", "A"), Resource: form,
			Context: decoded(t, `{"pin": "", "home": {"street": "", "city": ""}, "list": [], "mfa": true, "deep": {"a": {"b": [], "e": ""}}, "who": {"type": "M::User", "id": "SECRET"}}`),
		})
		if err != nil {
			t.Fatal(err)
		}
		pool := NewPool()
		pool.Add([]cedar.EntityUID{u, form, cedar.NewEntityUID("M::User", "SECRET")}, []Entity{*e})
		sl := set.newSlice(q, pool)
		res, err := set.decide(q, sl)
		if err != nil || len(res.Errors) != 1 {
			t.Fatalf("%s: %+v %v", c.condition, res, err)
		}
		x, err := set.explain(q, sl, res)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{res.Errors[0].Message, x.Policies[0].Reason} {
			if withheld := strings.Contains(text, withheldMessage); withheld != c.withheld || strings.Contains(text, "SECRET") || strings.Contains(text, "424242") {
				t.Errorf("%s: %s", c.condition, text)
			}
		}
	}
}
