package engine

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
)

// diffType is a type of a drawn schema.
type diffType struct {
	kind  string // Bool, Long, String, Set, Record, Entity or an extension's name
	elem  *diffType
	attrs []diffAttr
	name  string // of the entity type, qualified
}

type diffAttr struct {
	name     string
	typ      *diffType
	optional bool
}

type diffEntityType struct {
	name    string // qualified
	enum    []string
	parents []string
	attrs   []diffAttr
	tags    *diffType
}

type diffAction struct {
	id                    string
	groups                []string
	principals, resources []string // empty: only a group
	context               []diffAttr
}

// diffEntity and diffRequest hold JSON by decoded values; references and
// extension values are diffRef and diffExt, which have two spellings.
type diffEntity struct {
	typ, id     string
	attrs, tags map[string]any
	parents     [][2]string
}

type diffRequest struct {
	principal, action, resource [2]string
	context                     map[string]any
}

type (
	diffRef [2]string
	diffExt [2]string
)

// diffCase is one world: a schema, policies on it, entities and requests.
type diffCase struct {
	schema   string
	policies []string
	entities []diffEntity
	requests []diffRequest
}

// diffGen draws cases. It favors what is well typed, so that much of it may be
// published, and goes astray now and then in every place.
type diffGen struct {
	*rand.Rand
	ns      string
	types   []*diffEntityType
	actions []*diffAction
	astray  float64 // the share of expressions that are of a wrong type
	unguard float64 // the share of optional attributes used without looking
	p, r    string
	act     *diffAction
}

var (
	diffScalars = []string{"Bool", "Long", "Long", "String", "String", "ipaddr", "decimal", "datetime", "duration"}
	diffNames   = []string{"a", "b", "c", "d", "e f", "if"}
	diffStrings = []string{"", "x", "xy", "a*b", "é", "x\ny", "\"q\"", "\\", "10.0.0.1", "𝄞"}
	diffLongs   = []string{"0", "1", "-1", "2", "7", "9223372036854775807", "-9223372036854775808", "9007199254740993", "4611686018427387904", "3"}
	diffTags    = []string{"k", "l", ""}
	diffExts    = map[string][]string{
		"ipaddr":   {"10.0.0.1", "10.0.0.0/8", "127.0.0.1", "::1", "ff00::/8", "224.0.0.0/4", "::", "2001:db8::1/64", "0.0.0.0/0"},
		"decimal":  {"1.0", "-2.5", "0.0001", "922337203685477.5807", "-922337203685477.5808", "1.00", "0.0"},
		"datetime": {"2024-01-01", "2024-01-01T10:20:30Z", "1969-12-31T23:59:59.999Z", "2024-02-29T00:00:00.123+0530", "0001-01-01", "9999-12-31", "2024-01-01T23:00:00-0100", "9999-12-31T23:59:59-0100"},
		"duration": {"1h", "-2d3h", "5ms", "1d2h3m4s5ms", "0ms", "-1ms", "1000000d", "90m", "-9223372036854775808ms"},
	}
	// What is no such value, or may be none.
	diffBadExts = map[string][]string{
		"ipaddr":   {"10.0.0.256", "", "10.0.0.1/33", "::1/129", "010.0.0.1", "::ffff:1.2.3.4", "10.0.0.1/08", "1", "fe80::1%eth0"},
		"decimal":  {"1", "1.", ".5", "1.00000", "922337203685477.5808", "+1.0", "-0.0", "01.5", "1e3"},
		"datetime": {"2024-13-01", "2023-02-29", "2024-01-01T24:00:00Z", "2024-01-01T10:20:30", "2024-1-1", "2024-01-01T10:20:30.1Z", "2024-01-01T10:20:30+2400", "2024-01-01T10:20:60Z", "10000-01-01", "+999999999-12-31", "-000000001-01-01"},
		"duration": {"", "1", "h", "1h1d", "1.5h", "106751991168d", "+1h", "1h ", "-", "1h2h", "--1h"},
	}
	diffConstructors = map[string]string{"ipaddr": "ip", "decimal": "decimal", "datetime": "datetime", "duration": "duration"}
)

func (g *diffGen) chance(p float64) bool { return g.Float64() < p }

func oneOf[T any](g *diffGen, list ...T) T { return list[g.IntN(len(list))] }

// drawCase draws the case of a number.
func drawCase(seed, number uint64) diffCase {
	g := &diffGen{Rand: rand.New(rand.NewPCG(seed, number))}
	g.ns = oneOf(g, "", "", "N", "N::M")
	c := diffCase{schema: g.schema()}
	for range 1 + g.IntN(7) {
		c.policies = append(c.policies, g.policy())
	}
	c.entities = g.entities()
	for range 2 + g.IntN(2) {
		c.requests = append(c.requests, g.request())
	}
	return c
}

func (g *diffGen) qualify(name string) string {
	if g.ns == "" {
		return name
	}
	return g.ns + "::" + name
}

func (g *diffGen) entityType(name string) *diffEntityType {
	for _, t := range g.types {
		if t.name == name {
			return t
		}
	}
	return &diffEntityType{name: name}
}

func (g *diffGen) typeNames() []string {
	var out []string
	for _, t := range g.types {
		out = append(out, t.name)
	}
	return out
}

// typ draws a type.
func (g *diffGen) typ(depth int) *diffType {
	switch n := g.IntN(10); {
	case n < 2 && depth > 0:
		return &diffType{kind: "Set", elem: g.typ(depth - 1)}
	case n < 4 && depth > 0:
		return &diffType{kind: "Record", attrs: g.attrs(3, depth-1)}
	case n < 7:
		return &diffType{kind: "Entity", name: oneOf(g, g.typeNames()...)}
	}
	return &diffType{kind: oneOf(g, diffScalars...)}
}

func (g *diffGen) attrs(most, depth int) []diffAttr {
	var out []diffAttr
	for _, name := range diffNames {
		if len(out) < most && g.chance(0.5) {
			out = append(out, diffAttr{name, g.typ(depth), g.chance(0.35)})
		}
	}
	return out
}

func (t *diffType) cedar() string {
	switch t.kind {
	case "Set":
		return "Set<" + t.elem.cedar() + ">"
	case "Record":
		return "{" + attrsCedar(t.attrs) + "}"
	case "Entity":
		return t.name
	}
	return t.kind
}

func attrsCedar(attrs []diffAttr) string {
	var out []string
	for _, a := range attrs {
		opt := ""
		if a.optional {
			opt = "?"
		}
		out = append(out, fmt.Sprintf("%s%s: %s", strconv.Quote(a.name), opt, a.typ.cedar()))
	}
	return strings.Join(out, ", ")
}

// base is a type's name without its namespace.
func base(name string) string { return name[strings.LastIndex(name, ":")+1:] }

// schema draws a schema and returns its text.
func (g *diffGen) schema() string {
	for i := range 2 + g.IntN(4) {
		g.types = append(g.types, &diffEntityType{name: g.qualify(fmt.Sprintf("T%d", i))})
	}
	for i, t := range g.types {
		if i > 1 && g.chance(0.25) {
			t.enum = []string{"e0", "e1"}
			continue
		}
		for _, p := range g.typeNames() {
			if g.chance(0.35) {
				t.parents = append(t.parents, p)
			}
		}
		t.attrs = g.attrs(4, 2)
		if g.chance(0.3) {
			t.tags = g.typ(1)
		}
	}
	for i := range g.IntN(3) {
		group := &diffAction{id: fmt.Sprintf("g%d", i)}
		if i > 0 && g.chance(0.5) {
			group.groups = []string{"g0"}
		}
		g.actions = append(g.actions, group)
	}
	groups := len(g.actions)
	for i := range 1 + g.IntN(3) {
		a := &diffAction{id: fmt.Sprintf("a %d", i), context: g.attrs(3, 1)}
		for _, group := range g.actions[:groups] {
			if g.chance(0.4) {
				a.groups = append(a.groups, group.id)
			}
		}
		some := func() []string {
			list := []string{oneOf(g, g.typeNames()...)}
			if t := oneOf(g, g.typeNames()...); g.chance(0.4) && t != list[0] {
				list = append(list, t)
			}
			return list
		}
		a.principals, a.resources = some(), some()
		g.actions = append(g.actions, a)
	}
	return g.schemaText()
}

func (g *diffGen) schemaText() string {
	var b strings.Builder
	for _, t := range g.types {
		if t.enum != nil {
			fmt.Fprintf(&b, "entity %s enum [\"e0\", \"e1\"];\n", base(t.name))
			continue
		}
		fmt.Fprintf(&b, "entity %s", base(t.name))
		if len(t.parents) > 0 {
			fmt.Fprintf(&b, " in [%s]", strings.Join(t.parents, ", "))
		}
		fmt.Fprintf(&b, " {%s}", attrsCedar(t.attrs))
		if t.tags != nil {
			fmt.Fprintf(&b, " tags %s", t.tags.cedar())
		}
		b.WriteString(";\n")
	}
	for _, a := range g.actions {
		fmt.Fprintf(&b, "action %q", a.id)
		if len(a.groups) > 0 {
			fmt.Fprintf(&b, " in [\"%s\"]", strings.Join(a.groups, `", "`))
		}
		if len(a.principals) > 0 {
			fmt.Fprintf(&b, " appliesTo { principal: [%s], resource: [%s], context: {%s} }",
				strings.Join(a.principals, ", "), strings.Join(a.resources, ", "), attrsCedar(a.context))
		}
		b.WriteString(";\n")
	}
	text := b.String()
	// Now and then a schema that is wrong.
	if g.chance(0.02) {
		text += oneOf(g, "entity Z in [Nowhere];", "entity Z { a: Nowhere };", "type C = D; type D = C;", "entity T0;", "entity Z enum [];",
			"action z in [\"nowhere\"];", "action z1 in [z2]; action z2 in [z1];", "entity Z { a: Long, a: Long };", "action z appliesTo { principal: [Nowhere], resource: [T0] };",
			"entity Z { a: __cedar::Long };", "type Long = String;", "entity Bool;", "type C = Set<Long>; entity Z { a: C };", "entity Z = { a: Long };") + "\n"
	}
	if g.ns != "" {
		text = "namespace " + g.ns + " {\n" + text + "}\n"
	}
	return text
}

func (g *diffGen) action(id string) string { return fmt.Sprintf("%s::%q", g.qualify("Action"), id) }

func (g *diffGen) actionIDs() []string {
	var out []string
	for _, a := range g.actions {
		out = append(out, a.id)
	}
	return out
}

func (g *diffGen) id(t *diffEntityType) string {
	if t.enum != nil && g.chance(0.97) {
		return oneOf(g, t.enum...)
	}
	return fmt.Sprintf("e%d", g.IntN(4))
}

func (g *diffGen) literal(typ string) string {
	return fmt.Sprintf("%s::%q", typ, g.id(g.entityType(typ)))
}

func (g *diffGen) anyType() string {
	if g.chance(0.03) {
		return g.qualify("Nowhere")
	}
	return oneOf(g, g.typeNames()...)
}

// above draws a type that entities of typ may be in.
func (g *diffGen) above(typ string) string {
	for range g.IntN(3) {
		if p := g.entityType(typ).parents; len(p) > 0 {
			typ = oneOf(g, p...)
		}
	}
	if g.chance(0.15) {
		return g.anyType()
	}
	return typ
}

// policy draws one policy. Most are for one action and one pair of types, so
// that conditions mean something.
func (g *diffGen) policy() string {
	g.astray, g.unguard = 0, 0.02
	if g.chance(0.3) {
		g.astray, g.unguard = 0.05, 0.2
	}
	g.act = nil
	for g.act == nil || len(g.act.principals) == 0 {
		g.act = oneOf(g, g.actions...)
	}
	g.p, g.r = oneOf(g, g.act.principals...), oneOf(g, g.act.resources...)
	action := "action == " + g.action(g.act.id)
	switch g.IntN(8) {
	case 0:
		action = "action"
	case 1:
		action = "action in " + g.action(oneOf(g, g.actionIDs()...))
	case 2:
		action = fmt.Sprintf("action in [%s, %s]", g.action(g.act.id), g.action(oneOf(g, g.actionIDs()...)))
	case 3:
		if len(g.act.groups) > 0 {
			action = "action in " + g.action(oneOf(g, g.act.groups...))
		}
	}
	if g.chance(0.01) {
		action = "action == " + g.action("nowhere")
	}
	text := fmt.Sprintf("%s (%s, %s, %s)", oneOf(g, "permit", "permit", "forbid"), g.scope("principal", g.p), action, g.scope("resource", g.r))
	for range g.IntN(3) {
		text += fmt.Sprintf("\n%s { %s }", oneOf(g, "when", "when", "unless"), g.cond(3))
	}
	return text + ";"
}

func (g *diffGen) scope(what, typ string) string {
	switch g.IntN(9) {
	case 0, 1:
		return what
	case 2:
		return what + " == " + g.literal(typ)
	case 3:
		return what + " in " + g.literal(g.above(typ))
	case 4:
		return fmt.Sprintf("%s is %s in %s", what, typ, g.literal(g.above(typ)))
	case 5:
		if g.chance(0.2) {
			return what + " is " + g.anyType()
		}
	}
	return what + " is " + typ
}

// diffPath is a way to a value, and what must be asked first.
type diffPath struct {
	text   string
	typ    *diffType
	guards []string
}

func isIdent(name string) bool { return len(name) == 1 }

func access(text, name string) string {
	if isIdent(name) {
		return text + "." + name
	}
	return fmt.Sprintf("%s[%q]", text, name)
}

func hasAttr(text, name string) string {
	if isIdent(name) {
		return text + " has " + name
	}
	return fmt.Sprintf("%s has %q", text, name)
}

// path walks from a variable at random.
func (g *diffGen) path() diffPath {
	p := diffPath{text: "principal", typ: &diffType{kind: "Entity", name: g.p}}
	switch g.IntN(5) {
	case 0, 1:
		p = diffPath{text: "resource", typ: &diffType{kind: "Entity", name: g.r}}
	case 2:
		p = diffPath{text: "context", typ: &diffType{kind: "Record", attrs: g.act.context}}
	}
	for g.chance(0.75) {
		attrs := p.typ.attrs
		var tags *diffType
		if p.typ.kind == "Entity" {
			t := g.entityType(p.typ.name)
			attrs, tags = t.attrs, t.tags
		}
		switch {
		case tags != nil && g.chance(0.4):
			key := cedarString(oneOf(g, diffTags...))
			p.guards = append(slices.Clone(p.guards), fmt.Sprintf("%s.hasTag(%s)", p.text, key))
			p = diffPath{fmt.Sprintf("%s.getTag(%s)", p.text, key), tags, p.guards}
		case len(attrs) > 0:
			a := oneOf(g, attrs...)
			if a.optional || g.chance(0.03) {
				p.guards = append(slices.Clone(p.guards), hasAttr(p.text, a.name))
			}
			p = diffPath{access(p.text, a.name), a.typ, p.guards}
		default:
			return p
		}
	}
	return p
}

func sameDiffType(a, b *diffType) bool { return a.cedar() == b.cedar() }

// pathTo draws a path to a value of a type, if one is found.
func (g *diffGen) pathTo(t *diffType) (diffPath, bool) {
	for range 12 {
		if p := g.path(); sameDiffType(p.typ, t) {
			return p, true
		}
	}
	return diffPath{}, false
}

// cedarString writes a string as a Cedar literal.
func cedarString(s string) string {
	s = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "𝄞", `\u{1d11e}`).Replace(s)
	return `"` + s + `"`
}

// expr draws an expression of a type and what must be asked before it.
func (g *diffGen) expr(t *diffType, depth int) (string, []string) {
	if g.chance(g.astray) {
		t = g.typ(1)
	}
	if p, ok := g.pathTo(t); ok && g.chance(0.6) {
		return p.text, p.guards
	}
	if depth > 0 && g.chance(0.1) {
		a, ga := g.expr(t, depth-1)
		b, gb := g.expr(t, depth-1)
		return fmt.Sprintf("(if %s then %s else %s)", g.cond(depth-1), a, b), append(ga, gb...)
	}
	one := func(format string, of *diffType) (string, []string) {
		e, guards := g.expr(of, depth-1)
		return fmt.Sprintf(format, e), guards
	}
	two := func(format string, a, b *diffType) (string, []string) {
		e, ge := g.expr(a, depth-1)
		f, gf := g.expr(b, depth-1)
		return fmt.Sprintf(format, e, f), append(ge, gf...)
	}
	scalar := func(kind string) *diffType { return &diffType{kind: kind} }
	switch t.kind {
	case "Bool":
		if depth > 0 {
			return "(" + g.cond(depth-1) + ")", nil
		}
		return oneOf(g, "true", "false"), nil
	case "Long":
		if depth > 0 {
			switch g.IntN(10) {
			case 0, 1:
				return two("("+oneOf(g, "%s + %s", "%s - %s", "%s * %s")+")", t, t)
			case 2:
				return one("-(%s)", t)
			case 3:
				return one("(%s)."+oneOf(g, "toMilliseconds", "toSeconds", "toMinutes", "toHours", "toDays")+"()", scalar("duration"))
			}
		}
		n := oneOf(g, diffLongs...)
		if n[0] == '-' {
			return "(" + n + ")", nil
		}
		return n, nil
	case "String":
		return cedarString(oneOf(g, diffStrings...)), nil
	case "Set":
		if g.chance(0.02) {
			return "[]", nil
		}
		var parts, guards []string
		for range 1 + g.IntN(3) {
			e, more := g.expr(t.elem, depth-1)
			parts, guards = append(parts, e), append(guards, more...)
		}
		return "[" + strings.Join(parts, ", ") + "]", guards
	case "Record":
		var parts, guards []string
		for _, a := range t.attrs {
			if a.optional && g.chance(0.5) {
				continue
			}
			e, more := g.expr(a.typ, depth-1)
			parts, guards = append(parts, strconv.Quote(a.name)+": "+e), append(guards, more...)
		}
		return "{" + strings.Join(parts, ", ") + "}", guards
	case "Entity":
		return g.literal(t.name), nil
	case "datetime":
		if depth > 0 && g.chance(0.3) {
			if g.chance(0.5) {
				return one("(%s).toDate()", t)
			}
			return two("(%s).offset(%s)", t, scalar("duration"))
		}
	case "duration":
		if depth > 0 && g.chance(0.3) {
			if g.chance(0.5) {
				return one("(%s).toTime()", scalar("datetime"))
			}
			return two("(%s).durationSince(%s)", scalar("datetime"), scalar("datetime"))
		}
	}
	return fmt.Sprintf("%s(%s)", diffConstructors[t.kind], cedarString(g.extension(t.kind, 0.02+g.astray))), nil
}

// extension draws the text of an extension value, with some chance one that may
// be none.
func (g *diffGen) extension(kind string, bad float64) string {
	s := oneOf(g, diffExts[kind]...)
	if !g.chance(bad) {
		return s
	}
	if g.chance(0.4) {
		return oneOf(g, diffBadExts[kind]...)
	}
	// A slip of the pen.
	at := g.IntN(len(s))
	slip := string(oneOf(g, []rune("+-.,:/ 0019TZdhmsxe_%٣")...))
	switch g.IntN(3) {
	case 0:
		return s[:at] + slip + s[at:]
	case 1:
		return s[:at] + slip + s[at+1:]
	}
	return s[:at] + s[at+1:]
}

// cond draws a Boolean expression that asks first what it must.
func (g *diffGen) cond(depth int) string {
	if depth > 0 {
		switch g.IntN(9) {
		case 0, 1:
			return fmt.Sprintf("(%s && %s)", g.cond(depth-1), g.cond(depth-1))
		case 2:
			return fmt.Sprintf("(%s || %s)", g.cond(depth-1), g.cond(depth-1))
		case 3:
			return "!(" + g.cond(depth-1) + ")"
		case 4:
			return fmt.Sprintf("(if %s then %s else %s)", g.cond(depth-1), g.cond(depth-1), g.cond(depth-1))
		}
	}
	text, guards := g.atom(depth)
	if len(guards) == 0 || g.chance(g.unguard) {
		return text
	}
	var unique []string
	for _, guard := range guards {
		if !slices.Contains(unique, guard) {
			unique = append(unique, guard)
		}
	}
	switch g.IntN(6) {
	case 0:
		return fmt.Sprintf("(if %s then %s else %s)", strings.Join(unique, " && "), text, g.cond(0))
	case 1:
		if g.chance(0.2) {
			return fmt.Sprintf("(!(%s) || %s)", strings.Join(unique, " && "), text)
		}
	}
	return fmt.Sprintf("(%s && %s)", strings.Join(unique, " && "), text)
}

// atom draws one comparison or test.
func (g *diffGen) atom(depth int) (string, []string) {
	two := func(format string, a, b *diffType) (string, []string) {
		e, ge := g.expr(a, depth)
		f, gf := g.expr(b, depth)
		return fmt.Sprintf(format, e, f), append(ge, gf...)
	}
	one := func(format string, of *diffType) (string, []string) {
		e, guards := g.expr(of, depth)
		return fmt.Sprintf(format, e), guards
	}
	entity := func() diffPath {
		for {
			if p := g.path(); p.typ.kind == "Entity" {
				return p
			}
		}
	}
	t := g.path().typ
	long, str := &diffType{kind: "Long"}, &diffType{kind: "String"}
	switch g.IntN(17) {
	case 0:
		return oneOf(g, "true", "false"), nil
	case 1:
		if p, ok := g.pathTo(&diffType{kind: "Bool"}); ok {
			return p.text, p.guards
		}
		return two("%s == %s", t, t)
	case 2, 3, 4:
		return two(oneOf(g, "%s == %s", "%s != %s"), t, t)
	case 5:
		of := long
		if g.chance(0.4) {
			of = &diffType{kind: oneOf(g, "datetime", "duration")}
		}
		return two("%s "+oneOf(g, "<", "<=", ">", ">=")+" %s", of, of)
	case 6:
		return one("%s like "+oneOf(g, `"*"`, `"x*"`, `"*b"`, `"a\*b"`, `"*\**"`, `""`, `"*x*y*"`, `"?"`, `"\u{1d11e}*"`), str)
	case 7:
		p := entity()
		return fmt.Sprintf("%s in %s", p.text, g.literal(g.above(p.typ.name))), p.guards
	case 8:
		p := entity()
		above := &diffType{kind: "Entity", name: g.above(p.typ.name)}
		if g.chance(0.5) {
			above = &diffType{kind: "Set", elem: above}
		}
		e, guards := g.expr(above, depth)
		return fmt.Sprintf("%s in %s", p.text, e), append(slices.Clone(p.guards), guards...)
	case 9:
		p := entity()
		typ := p.typ.name
		if g.chance(0.3) {
			typ = g.anyType()
		}
		if g.chance(0.4) {
			return fmt.Sprintf("%s is %s in %s", p.text, typ, g.literal(g.above(p.typ.name))), p.guards
		}
		return fmt.Sprintf("%s is %s", p.text, typ), p.guards
	case 10:
		p := g.path()
		name := oneOf(g, diffNames...)
		if isIdent(name) && g.chance(0.3) {
			return fmt.Sprintf("%s has %s.%s", p.text, name, oneOf(g, diffNames[:4]...)), p.guards
		}
		if p.typ.kind != "Entity" && p.typ.kind != "Record" && g.chance(0.95) {
			return g.atom(depth)
		}
		return hasAttr(p.text, name), p.guards
	case 11:
		return two("%s."+oneOf(g, "containsAll", "containsAny")+"(%s)", &diffType{kind: "Set", elem: t}, &diffType{kind: "Set", elem: t})
	case 12:
		return two("%s.contains(%s)", &diffType{kind: "Set", elem: t}, t)
	case 13:
		return one("%s.isEmpty()", &diffType{kind: "Set", elem: t})
	case 14:
		p := entity()
		if g.entityType(p.typ.name).tags == nil && g.chance(0.9) {
			return g.atom(depth)
		}
		key, guards := g.expr(str, 0)
		return fmt.Sprintf("%s.hasTag(%s)", p.text, key), append(slices.Clone(p.guards), guards...)
	case 15:
		ip, dec := &diffType{kind: "ipaddr"}, &diffType{kind: "decimal"}
		switch g.IntN(4) {
		case 0:
			return one("%s."+oneOf(g, "isIpv4", "isIpv6", "isLoopback", "isMulticast")+"()", ip)
		case 1:
			return two("%s.isInRange(%s)", ip, ip)
		}
		return two("%s."+oneOf(g, "lessThan", "lessThanOrEqual", "greaterThan", "greaterThanOrEqual")+"(%s)", dec, dec)
	}
	a := g.action(oneOf(g, g.actionIDs()...))
	return oneOf(g, "action == "+a, "action in "+a, "action in ["+a+", "+g.action(g.act.id)+"]", "action is "+g.qualify("Action"), "action has a",
		a+" in "+g.action(oneOf(g, g.actionIDs()...))), nil
}

// value draws a value of a type.
func (g *diffGen) value(t *diffType) any {
	switch t.kind {
	case "Bool":
		return g.chance(0.5)
	case "Long":
		return json.Number(oneOf(g, diffLongs...))
	case "String":
		return oneOf(g, diffStrings...)
	case "Set":
		out := []any{}
		for range g.IntN(4) {
			out = append(out, g.value(t.elem))
		}
		return out
	case "Record":
		return g.record(t.attrs)
	case "Entity":
		return diffRef{t.name, g.id(g.entityType(t.name))}
	}
	return diffExt{diffConstructors[t.kind], g.extension(t.kind, 0.01)}
}

func (g *diffGen) record(attrs []diffAttr) map[string]any {
	out := map[string]any{}
	for _, a := range attrs {
		if a.optional && g.chance(0.4) || g.chance(0.004) {
			continue
		}
		typ := a.typ
		if g.chance(0.004) {
			typ = g.typ(1)
		}
		out[a.name] = g.value(typ)
	}
	if g.chance(0.004) {
		out["undeclared"] = true
	}
	return out
}

// entities draws entities. Parents have a higher number, so that no circle
// arises.
func (g *diffGen) entities() []diffEntity {
	var out []diffEntity
	for _, t := range g.types {
		ids := []string{"e0", "e1", "e2"}
		if t.enum != nil {
			ids = t.enum
		}
		for i, id := range ids {
			if g.chance(0.15) {
				continue
			}
			e := diffEntity{typ: t.name, id: id, attrs: g.record(t.attrs), tags: map[string]any{}}
			for _, p := range t.parents {
				for j := i + 1; j < 4; j++ {
					if g.chance(0.4) && (g.entityType(p).enum == nil || j < 2) {
						e.parents = append(e.parents, [2]string{p, fmt.Sprintf("e%d", j)})
					}
				}
			}
			if g.chance(0.005) {
				e.parents = append(e.parents, [2]string{g.anyType(), "e9"})
			}
			for _, key := range diffTags {
				if t.tags != nil && g.chance(0.5) {
					e.tags[key] = g.value(t.tags)
				} else if g.chance(0.001) {
					e.tags[key] = "none declared"
				}
			}
			out = append(out, e)
		}
	}
	return out
}

func (g *diffGen) request() diffRequest {
	var a *diffAction
	for a == nil || len(a.principals) == 0 && g.chance(0.97) {
		a = oneOf(g, g.actions...)
	}
	r := diffRequest{action: [2]string{g.qualify("Action"), a.id}, context: g.record(a.context)}
	pick := func(from []string) [2]string {
		typ := g.anyType()
		if len(from) > 0 && g.chance(0.97) {
			typ = oneOf(g, from...)
		}
		return [2]string{typ, g.id(g.entityType(typ))}
	}
	r.principal, r.resource = pick(a.principals), pick(a.resources)
	if g.chance(0.01) {
		r.action[1] = "nowhere"
	}
	return r
}
