package engine

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"pgregory.net/rapid"
)

// orgSchema is the schema of a bundle that exports some of its types.
const orgSchema = `namespace Org {
  entity Team;
  entity User in [Team] { boss?: Chief, name: String, box: { chief?: Chief } } tags Chief;
  entity Chief in [Team] { salary: Long, next?: User, deep: { very: { salary: Long } } } tags String;
  entity Level enum ["low", "high"];
  type Ref = { to: Chief };
  action Enter appliesTo { principal: [User], resource: [User] };
}`

func org(types ...string) Source {
	src := Source{Name: "org", SchemaFile: "schema.cedarschema", Schema: orgSchema, ManifestFile: "bundle.yaml"}
	for i, t := range types {
		src.Exports = append(src.Exports, Export{t, 1, i + 1})
	}
	return src
}

// app is a bundle of other people, who use types of org.
func app(schema string, policies ...string) Source {
	src := Source{Name: "app", SchemaFile: "schema.cedarschema", Schema: schema, ManifestFile: "bundle.yaml"}
	for i, p := range policies {
		src.Policies = append(src.Policies, PolicyText{File: "p.cedar", Line: i + 1, Text: p})
	}
	return src
}

func texts(list []Finding) (out []string) {
	for _, f := range list {
		text := f.Bundle + " " + f.String()
		if f.Warning {
			text = "warning " + text
		}
		out = append(out, text)
	}
	return out
}

const appSchema = `namespace App { entity Doc { owner: Org::User }; action Read appliesTo { principal: [Org::User], resource: [Doc], context: { by: Org::User } }; }`

// when makes a policy of app with a condition.
func when(condition string) string {
	return `@id("p") permit (principal, action == App::Action::"Read", resource) when { ` + condition + ` };`
}

// A bundle uses types that another one does not export, in each place where a schema or a policy can name
// a type, or read an entity. The other bundle exports User, and not Chief, whom a user refers to.
func TestAttackUseTypesThatAreNotExported(t *testing.T) {
	schema := func(text string) Source { return app("namespace App { " + text + " }") }
	uses, reads := "uses the type Org::%s of the bundle org", "reads attributes, tags or groups of entities of the type Org::%s of the bundle org"
	cases := []struct {
		name string
		src  Source
		want string // how; "" if it is permitted
		typ  string
	}{
		{"a member of a group", schema("entity Bot in [Org::Team];"), uses, "Team"},
		{"an attribute", schema("entity Doc { by: Org::Chief };"), uses, "Chief"},
		{"an attribute in a record in a set", schema("entity Doc { by: Set<{ who?: Org::Chief }> };"), uses, "Chief"},
		{"a tag", schema("entity Doc tags Set<Org::Chief>;"), uses, "Chief"},
		{"an enumerated type", schema("entity Doc { level: Org::Level };"), uses, "Level"},
		{"a principal", schema("entity Doc; action A appliesTo { principal: [Org::Chief], resource: [Doc] };"), uses, "Chief"},
		{"a resource", schema("entity Doc; action A appliesTo { principal: [Doc], resource: [Org::Chief] };"), uses, "Chief"},
		{"the context", schema("entity Doc; action A appliesTo { principal: [Doc], resource: [Doc], context: { a: { b: Org::Chief } } };"), uses, "Chief"},
		{"a common type of the other bundle", schema("entity Doc { ref: Org::Ref };"), uses, "Chief"},
		{"a common type of its own", schema("type R = { c: Org::Chief }; entity Doc { ref: R };"), uses, "Chief"},

		{"is in the scope", app(appSchema, `@id("p") permit (principal is Org::Chief, action == App::Action::"Read", resource);`), uses, "Chief"},
		{"in the scope", app(appSchema, `@id("p") permit (principal in Org::Team::"x", action == App::Action::"Read", resource);`), uses, "Team"},
		{"is in, in the scope", app(appSchema, `@id("p") permit (principal is Org::User in Org::Team::"x", action == App::Action::"Read", resource);`), uses, "Team"},
		{"equal in the scope", app(appSchema, `@id("p") permit (principal == Org::Chief::"x", action == App::Action::"Read", resource);`), uses, "Chief"},
		{"a literal", app(appSchema, when(`principal in Org::Team::"x"`)), uses, "Team"},
		{"a literal in a set", app(appSchema, when(`principal in [Org::Team::"a", Org::Team::"x"]`)), uses, "Team"},
		{"a literal in a record", app(appSchema, when(`{ a: Org::Team::"x" } == { a: Org::Team::"x" }`)), uses, "Team"},
		{"is", app(appSchema, when(`principal has boss && principal.boss is Org::Chief`)), uses, "Chief"},
		{"a value of an enumerated type", app(appSchema, when(`Org::Level::"low" == Org::Level::"low"`)), uses, "Level"},

		{"an attribute of an attribute", app(appSchema, when(`principal has boss && principal.boss.salary > 1`)), reads, "Chief"},
		{"through the resource", app(appSchema, when(`resource.owner has boss && resource.owner.boss.deep.very.salary > 1`)), reads, "Chief"},
		{"through the context", app(appSchema, when(`context.by has boss && context.by.boss.salary > 1`)), reads, "Chief"},
		{"through a record of the schema", app(appSchema, when(`principal.box has chief && principal.box.chief.salary > 1`)), reads, "Chief"},
		{"has", app(appSchema, when(`principal has boss && principal.boss has next`)), reads, "Chief"},
		{"has with a path", app(appSchema, when(`principal has boss.next`)), reads, "Chief"},
		{"a tag", app(appSchema, when(`principal.hasTag("x") && principal.getTag("x").salary > 1`)), reads, "Chief"},
		{"has a tag", app(appSchema, when(`principal has boss && principal.boss.hasTag("x")`)), reads, "Chief"},
		{"a value of a tag", app(appSchema, when(`principal has boss && principal.boss.hasTag("x") && principal.boss.getTag("x") == "y"`)), reads, "Chief"},
		{"its groups", app(appSchema, when(`principal has boss && principal.boss in principal`)), reads, "Chief"},
		{"in a record around it", app(appSchema, when(`principal has boss && { a: principal.boss }.a.salary > 1`)), reads, "Chief"},
		{"in a branch", app(appSchema, when(`principal has boss && context.by has boss && (if principal == context.by then principal.boss else context.by.boss).salary > 1`)), reads, "Chief"},
		{"in a branch of records", app(appSchema, when(`principal has boss && (if principal == context.by then { a: principal.boss } else { a: principal.boss }).a.salary > 1`)), reads, "Chief"},
		{"in a condition of a branch", app(appSchema, when(`principal has boss && (if principal.boss.salary > 1 then true else false)`)), reads, "Chief"},
		{"in a set", app(appSchema, when(`principal has boss && [principal.boss.salary].contains(1)`)), reads, "Chief"},
		{"after unless", app(appSchema, `@id("p") permit (principal, action == App::Action::"Read", resource) unless { principal has boss && principal.boss.salary > 1 };`), reads, "Chief"},
		{"and on from it", app(appSchema, when(`principal has boss && principal.boss has next && principal.boss.next.name == "x"`)), reads, "Chief"},

		{"the exported type", app(appSchema, when(`principal.name == resource.owner.name && principal is Org::User && principal != Org::User::"x"`)), "", ""},
		{"its attribute of the other type", app(appSchema, when(`principal has boss && context.by has boss && principal.boss == context.by.boss`)), "", ""},
		{"an own type of the same name", app(`namespace App { entity Chief { salary: Long }; action Read appliesTo { principal: [Chief], resource: [Chief] }; }`, when(`principal.salary > resource.salary`)), "", ""},
	}
	refused := 0
	for _, c := range cases {
		set, findings := Compile([]Source{org("User"), c.src}, nil)
		var errors []string
		for _, f := range findings {
			if !f.Warning {
				errors = append(errors, f.Message)
			}
		}
		if c.want == "" {
			if set == nil || len(errors) > 0 {
				t.Errorf("%s: %q", c.name, texts(findings))
			}
			continue
		}
		want := fmt.Sprintf(c.want, c.typ) + ", which does not export it: its bundle.yaml needs exports: [" + c.typ + "]"
		if len(c.src.Policies) == 0 { // the message begins with the declaration
			declared := "entity App::Doc: "
			switch {
			case strings.Contains(c.src.Schema, "action A "):
				declared = `action App::Action::"A": `
			case strings.Contains(c.src.Schema, "entity Bot"):
				declared = "entity App::Bot: "
			}
			want = declared + want
		}
		if set != nil || len(errors) != 1 || errors[0] != want || findings[0].Other != "org" || strings.Contains(findings[0].Without, "bundle org") {
			t.Errorf("%s: %q, want %q", c.name, texts(findings), want)
			continue
		}
		refused++
		for _, exports := range [][]string{{"*"}, {"User", "Chief", "Team", "Level"}, {"Org::User", "Org::Chief", "Org::Team", "Org::Level"}} {
			if set, findings := Compile([]Source{org(exports...), c.src}, nil); set == nil {
				t.Errorf("%s, with exports %q: %q", c.name, exports, texts(findings))
			}
		}
		if set, findings := Load([]Source{org(), c.src}, nil); set == nil {
			t.Errorf("%s, of a version from before there were exports: %q", c.name, texts(findings))
		}
	}
	t.Logf("attack: uses of types that another bundle does not export: %d of %d refused", refused, len(cases)-3)
}

// The rule finds each entity that an evaluation reads: whatever the expression is, an entity of a type that
// is not exported is read only by policies that are refused.
func TestEveryReadIsFound(t *testing.T) {
	const schema = `namespace %s { entity Door { flag: Bool, a: %s, b: %s } tags %s; action Open appliesTo { principal: [Door], resource: [Door] }; }`
	rapid.Check(t, func(rt *rapid.T) {
		all := []string{"App", "Org", "Hid"}
		var sources []Source
		to := map[string][]string{} // the namespaces of a, b and of tags
		for _, ns := range all {
			for range 3 {
				to[ns] = append(to[ns], rapid.SampledFrom(all).Draw(rt, "type"))
			}
			src := Source{Name: strings.ToLower(ns), Schema: fmt.Sprintf(schema, ns, to[ns][0]+"::Door", to[ns][1]+"::Door", to[ns][2]+"::Door")}
			if ns == "Org" {
				src.Exports = []Export{{Type: "Door"}}
			}
			sources = append(sources, src)
		}
		var condition, entity func(depth int) string
		entity = func(depth int) string {
			if depth == 0 {
				return rapid.SampledFrom([]string{"principal", "resource"}).Draw(rt, "variable")
			}
			x := func() string { return entity(depth - 1) }
			switch rapid.IntRange(0, 5).Draw(rt, "entity") {
			case 0:
				return x() + ".a"
			case 1:
				return x() + ".b"
			case 2:
				return x() + `.getTag("t")`
			case 3:
				return "(if " + condition(depth-1) + " then " + x() + " else " + x() + ")"
			case 4:
				return "{ k: " + x() + ", l: " + x() + " }.k"
			}
			return "(if " + condition(depth-1) + " then { k: " + x() + " } else { k: " + x() + " }).k"
		}
		condition = func(depth int) string {
			x := func() string { return entity(max(depth-1, 0)) }
			switch rapid.IntRange(0, 6).Draw(rt, "condition") {
			case 0:
				return x() + ".flag"
			case 1:
				return "(" + x() + " has a)"
			case 2:
				return x() + `.hasTag("u")`
			case 3:
				return "(" + x() + " in " + x() + ")"
			case 4:
				return "(" + x() + " == " + x() + ")"
			case 5:
				return "[" + x() + ".flag].contains(true)"
			}
			return "(" + x() + ".flag || " + x() + " is App::Door in " + x() + ")"
		}
		// Only the conditions of policies are of interest here, so their schemas may use all types.
		for i := range 20 {
			sources[0].Policies = append(sources[0].Policies, PolicyText{File: "p.cedar", Text: fmt.Sprintf(`@id("%d") permit (principal, action == App::Action::"Open", resource) when { %s };`, i, condition(3))})
		}
		set, findings := Load(sources, nil)
		if set == nil {
			rt.Fatalf("%q", texts(findings))
		}
		found := map[string]bool{} // by the text of the policy
		for _, p := range set.bundles["app"].policies {
			for _, u := range set.user("app").inPolicy(p) {
				found[u.where] = found[u.where] || u.typ == "Hid::Door"
			}
		}
		// Entities of all types, each with a flag that is drawn.
		entities := getter{entities: cedar.EntityMap{}, read: map[cedar.EntityType]bool{}}
		ref := func(ns string) cedar.EntityUID { return cedar.NewEntityUID(cedar.EntityType(ns+"::Door"), "d") }
		for _, ns := range all {
			entities.entities[ref(ns)] = cedar.Entity{
				UID:        ref(ns),
				Attributes: cedar.NewRecord(cedar.RecordMap{"flag": cedar.Boolean(rapid.Bool().Draw(rt, "flag")), "a": ref(to[ns][0]), "b": ref(to[ns][1])}),
				Tags:       cedar.NewRecord(cedar.RecordMap{"t": ref(to[ns][2])}),
			}
		}
		for _, text := range sources[0].Policies {
			var p cedar.Policy
			if err := p.UnmarshalCedar([]byte(text.Text)); err != nil {
				rt.Fatal(err)
			}
			policies := cedar.NewPolicySet()
			policies.Add("p", &p)
			clear(entities.read)
			_, d := cedar.Authorize(policies, entities, cedar.Request{Principal: ref("App"), Action: cedar.NewEntityUID("App::Action", "Open"), Resource: ref("App")})
			if len(d.Errors) > 0 {
				rt.Fatalf("%s: %v", text.Text, d.Errors)
			}
			if entities.read["Hid::Door"] && !found[text.Text] {
				rt.Errorf("it reads an entity of Hid, whose type nobody exports: %s", text.Text)
			}
		}
	})
}

// getter notes the types of the entities that are read.
type getter struct {
	entities cedar.EntityMap
	read     map[cedar.EntityType]bool
}

func (g getter) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	g.read[uid.Type] = true
	return g.entities.Get(uid)
}

// Uses that are published already are warnings, for their bundle and for the one with the type. New uses are
// errors, and so is it to stop an export that another bundle uses.
func TestExportsOfPublishedBundles(t *testing.T) {
	published := func(src Source) Source { src.Published = true; return src }
	const one = `@id("one") permit (principal, action == App::Action::"Read", resource) when { resource.owner.name == "x" };`
	const two = `@id("two") permit (principal, action == App::Action::"Read", resource) when { principal.name == "x" };`
	const more = "\n" + `namespace App { entity Doc { owner: Org::User }; entity Bot in [Org::Team]; action Read appliesTo { principal: [Org::User], resource: [Doc], context: { by: Org::User } }; }`
	other := Source{Name: "other", SchemaFile: "schema.cedarschema", Schema: "namespace Other { entity X; }", Published: true}
	inverted := Source{Name: "org", SchemaFile: "schema.cedarschema", ManifestFile: "bundle.yaml", Schema: strings.Replace(orgSchema, "name: String", "name: String, friend?: Chief", 1)}
	for _, c := range []struct {
		name   string
		before []Source
		now    []Source
		want   []string // the beginnings of the findings
	}{
		{"the same again", []Source{org(), app(appSchema, one)}, []Source{published(org()), app(appSchema, one)},
			[]string{"warning app schema.cedarschema:1:", "warning app p.cedar:1"}[:1]},
		{"another policy goes", []Source{org(), app(appSchema, one, two)}, []Source{published(org()), app(appSchema, one)},
			[]string{"warning app schema.cedarschema:1:"}},
		{"a policy moves", []Source{org(), app(appSchema, one)}, []Source{published(org()), app(appSchema, "", one)},
			[]string{"warning app schema.cedarschema:1:"}},
		{"a new policy reads", []Source{org(), app(appSchema, one)}, []Source{published(org()), app(appSchema, one, two)},
			[]string{"app p.cedar:2:1: policy two: reads attributes, tags or groups of entities of the type Org::User of the bundle org, which does not export it", "warning app schema.cedarschema"}},
		{"a new declaration", []Source{org(), app(appSchema, one)}, []Source{published(org()), app(more, one)},
			[]string{"app schema.cedarschema:2:65: entity App::Bot: uses the type Org::Team of the bundle org, which does not export it: its bundle.yaml needs exports: [Team]", "warning app schema.cedarschema:2:37"}},
		{"the bundle with the type, as before", []Source{org(), app(appSchema, one)}, []Source{org("Team"), published(app(appSchema, one))},
			[]string{"warning org bundle.yaml: the bundle app uses the type Org::User, which is not exported"}},
		{"a third bundle", []Source{org(), app(appSchema, one), other}, []Source{published(org()), published(app(appSchema, one)), {Name: "other", Schema: "namespace Other { entity Y; }"}}, nil},
		{"it begins to export", []Source{org(), app(appSchema, one)}, []Source{org("User"), published(app(appSchema, one))}, nil},
		{"it stops exporting", []Source{org("User"), app(appSchema, one)}, []Source{org(), published(app(appSchema, one))},
			[]string{`app action App::Action::"Read" of the bundle app uses the type Org::User, which would not be exported any more: the bundle.yaml of its bundle needs exports: [User]`,
				"app entity App::Doc of the bundle app uses the type Org::User, which would not", "app policy one of the bundle app reads attributes"}},
		{"it stops exporting what nobody uses", []Source{org("User", "Chief"), app(appSchema, one)}, []Source{org("User"), published(app(appSchema, one))}, nil},
		{"it exports all by name", []Source{org("*"), app(appSchema, one)}, []Source{org("User"), published(app(appSchema, one))}, nil},
		{"it has a new attribute", []Source{org("User"), app(appSchema, one)}, []Source{func() Source { s := inverted; s.Exports = org("User").Exports; return s }(), published(app(appSchema, one))}, nil},
		{"policies of guardrails", []Source{org()}, []Source{published(org()), {Name: Guardrails, Policies: []PolicyText{{File: "p.cedar", Text: `@id("g") forbid (principal, action, resource) when { principal has boss && principal.boss in Org::Team::"x" };`}}}}, nil},
	} {
		previous, findings := Load(c.before, nil)
		if previous == nil {
			t.Fatalf("%s: %q", c.name, texts(findings))
		}
		set, findings := Compile(c.now, previous)
		findings = slices.DeleteFunc(findings, func(f Finding) bool { return strings.Contains(f.Message, "no policy") })
		got := texts(findings)
		if len(got) != len(c.want) || (set == nil) != slices.ContainsFunc(findings, func(f Finding) bool { return !f.Warning }) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
			continue
		}
		for i, w := range c.want {
			if !strings.HasPrefix(got[i], w) {
				t.Errorf("%s: %q, want %q", c.name, got[i], w)
			}
		}
	}
}

// An export names a type of the bundle, in one of its namespaces.
func TestExportsName(t *testing.T) {
	schema := `namespace A { entity One; entity Both; } namespace A::B { entity Two enum ["x"]; entity Both; } `
	for _, c := range []struct{ name, want string }{
		{"One", "A::One"}, {"A::One", "A::One"}, {"Two", "A::B::Two"}, {"A::B::Both", "A::B::Both"}, {"*", ""},
		{"B::Two", "exports B::Two, and the schema of the bundle declares no such entity type"},
		{"Both", "exports Both, which is the name of several entity types"},
		{"Foreign", "exports Foreign, and the schema"}, {"F::Foreign", "exports F::Foreign, and the schema"}, {"Action", "exports Action, and the schema"},
	} {
		src := Source{Name: "a", Schema: schema, ManifestFile: "bundle.yaml", Exports: []Export{{c.name, 3, 4}}}
		foreign := Source{Name: "f", Schema: "namespace F { entity Foreign; action Act appliesTo { principal: Foreign, resource: Foreign }; }"}
		set, findings := Compile([]Source{src, foreign}, nil)
		switch {
		case strings.HasPrefix(c.want, "exports"):
			if set != nil || len(findings) != 1 || !strings.HasPrefix(findings[0].Message, c.want) || findings[0].Line != 3 {
				t.Errorf("%s: %q", c.name, texts(findings))
			}
			if set, findings := Compile([]Source{{Name: "a", Schema: schema, Exports: src.Exports, Published: true}, foreign}, nil); set == nil {
				t.Errorf("%s, published: %q", c.name, texts(findings))
			}
		case set == nil:
			t.Errorf("%s: %q", c.name, texts(findings))
		default:
			for _, typ := range []cedar.EntityType{"A::One", "A::Both", "A::B::Two", "A::B::Both"} {
				if got := set.bundles["a"].exports.has(typ); got != (c.name == "*" || string(typ) == c.want) {
					t.Errorf("%s exports %s: %v", c.name, typ, got)
				}
			}
		}
	}
}
