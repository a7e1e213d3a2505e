package engine

import (
	"fmt"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	sast "github.com/cedar-policy/cedar-go/x/exp/schema/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

const (
	fieldSuffix       = ".field"
	fieldType         = "Field"
	fieldGroupType    = "FieldGroup"
	reservedNamespace = "Cedarpost"
	// Guardrails is the reserved bundle of forbids that join every decision.
	Guardrails = "guardrails"
	// maxEnvironments caps the combinations of action, principal type and resource
	// type of one bundle.
	maxEnvironments = 20_000
	// MaxSchemaBytes caps one bundle's schema.
	MaxSchemaBytes = 1 << 20
)

// action is one declared action with everything a decision on it needs.
type action struct {
	uid       cedar.EntityUID
	bundle    string
	appliesTo *resolved.AppliesTo // nil: only a group
	// field is the ".field" action, fieldOf the action this one is the
	// ".field" of.
	field, fieldOf *action
	fillsNow       bool
	auditAlways    bool
	// sensitive is what the context has that is marked @sensitive.
	sensitive *marks
	index     *index
	// classes sorts the leaves of each resource type, for a ".field" action.
	classes map[cedar.EntityType][]int
	// leads says for which classes a policy's leading condition holds.
	leads map[cedar.EntityType]map[*policy][]uint64
}

// leaf is one field that is decided: a catalogued path with no path below it.
type leaf struct {
	index int
	path  string
	uid   cedar.EntityUID
}

// catalogue holds the fields of one resource type.
type catalogue struct {
	leaves []leaf
	below  map[string][]int // path → the leaves it stands for
}

func isActionType(t cedar.EntityType) bool {
	return t == "Action" || strings.HasSuffix(string(t), "::Action")
}

func namespaceOf(t cedar.EntityType) string {
	if i := strings.LastIndex(string(t), "::"); i >= 0 {
		return string(t[:i])
	}
	return ""
}

func baseName(t cedar.EntityType) string {
	return strings.TrimPrefix(strings.TrimPrefix(string(t), namespaceOf(t)), "::")
}

func qualify(namespace, name string) cedar.EntityType {
	if namespace == "" {
		return cedar.EntityType(name)
	}
	return cedar.EntityType(namespace + "::" + name)
}

var schemaErrorAt = regexp.MustCompile(`^[^:]*:(\d+):(\d+): (.*)$`)

// parseSchema parses one bundle's schema.
func parseSchema(text string) (*sast.Schema, *textError) {
	if len(text) > MaxSchemaBytes {
		return nil, &textError{1, 1, fmt.Sprintf("schema of %d bytes, the limit is %d", len(text), MaxSchemaBytes), ""}
	}
	if err := checkSchemaNesting(text); err != nil {
		return nil, err
	}
	var sc schema.Schema
	sc.SetFilename("schema")
	if err := sc.UnmarshalCedar([]byte(text)); err != nil {
		te := &textError{line: 1, column: 1, msg: err.Error()}
		if m := schemaErrorAt.FindStringSubmatch(err.Error()); m != nil {
			te.line, _ = strconv.Atoi(m[1])
			te.column, _ = strconv.Atoi(m[2])
			te.msg = m[3]
		}
		return nil, te
	}
	return sc.AST(), nil
}

// checkSchemaNesting bounds the depth of records and sets before parsing.
func checkSchemaNesting(text string) *textError {
	depth, line, col := 0, 1, 0
	inString, inComment := false, false
	for i := 0; i < len(text); i++ {
		c := text[i]
		col++
		switch {
		case c == '\n':
			line, col, inComment = line+1, 0, false
		case inComment:
			if c == '\r' && i+1 < len(text) && text[i+1] != '\n' {
				// Cedar ends the comment here, cedar-go does not.
				return &textError{line, col, "a carriage return without a line feed in a comment", "end lines with a line feed"}
			}
		case inString:
			switch c {
			case '\\':
				i++
			case '"':
				inString = false
			}
		case c == '"':
			inString = true
		case c == '/' && i+1 < len(text) && text[i+1] == '/':
			inComment = true
		case strings.IndexByte("({[<", c) >= 0:
			if depth++; depth > MaxNesting {
				return &textError{line, col, fmt.Sprintf("nested deeper than %d", MaxNesting), ""}
			}
		case strings.IndexByte(")}]>", c) >= 0:
			depth--
		}
	}
	return nil
}

// namespacesOf lists the namespaces that a schema declares anything in; the
// empty one only when something stands outside all others.
func namespacesOf(sc *sast.Schema) []string {
	var out []string
	if len(sc.Entities)+len(sc.Enums)+len(sc.Actions)+len(sc.CommonTypes) > 0 {
		out = append(out, "")
	}
	for ns := range sc.Namespaces {
		out = append(out, string(ns))
	}
	sort.Strings(out)
	return out
}

// builtinNames cannot be declared in the empty namespace: a name there stands for
// every namespace that does not declare it, so one bundle could change how the
// schemas of all others read.
var builtinNames = []sast.Ident{"Bool", "Boolean", "Long", "String", "ipaddr", "decimal", "datetime", "duration", "Set", "Record", "Entity", "Extension"}

// declaredBuiltins lists the built-in names that a schema declares in the empty
// namespace.
func declaredBuiltins(sc *sast.Schema) []sast.Ident {
	var out []sast.Ident
	for _, name := range builtinNames {
		_, entity := sc.Entities[name]
		_, enum := sc.Enums[name]
		_, common := sc.CommonTypes[name]
		if entity || enum || common {
			out = append(out, name)
		}
	}
	return out
}

// maxSchemaNodes caps the types of a schema after its common types are written
// out, which doubles with every line of "type B = { x: A, y: A };".
const maxSchemaNodes = 100_000

// sizer counts the nodes of types with common types written out.
type sizer struct {
	common map[types.Path]sast.CommonType
	known  map[types.Path]int
}

// schemaNodes counts all nodes of a schema, up to a little more than the cap.
func schemaNodes(sc *sast.Schema) int {
	z := sizer{map[types.Path]sast.CommonType{}, map[types.Path]int{}}
	total := 0
	each := func(fn func(ns string, e sast.Entities, a sast.Actions, c sast.CommonTypes)) {
		fn("", sc.Entities, sc.Actions, sc.CommonTypes)
		for ns, d := range sc.Namespaces {
			fn(string(ns), d.Entities, d.Actions, d.CommonTypes)
		}
	}
	each(func(ns string, _ sast.Entities, _ sast.Actions, c sast.CommonTypes) {
		for name, t := range c {
			z.common[types.Path(qualify(ns, string(name)))] = t
		}
	})
	each(func(ns string, e sast.Entities, a sast.Actions, c sast.CommonTypes) {
		for _, ent := range e {
			total += z.size(ns, ent.Shape) + z.size(ns, ent.Tags)
		}
		for _, act := range a {
			if act.AppliesTo != nil {
				total += z.size(ns, act.AppliesTo.Context)
			}
		}
		for name := range c {
			total += z.named(types.Path(qualify(ns, string(name))))
		}
	})
	return total
}

func (z sizer) size(ns string, t sast.IsType) int {
	n := 1
	switch t := t.(type) {
	case nil:
		return 0
	case sast.RecordType:
		for _, a := range t {
			n = min(n+z.size(ns, a.Type), maxSchemaNodes+1)
		}
	case sast.SetType:
		n += z.size(ns, t.Element)
	case sast.TypeRef:
		name := types.Path(qualify(ns, string(t)))
		if _, ok := z.common[name]; !ok {
			name = types.Path(t)
		}
		n += z.named(name)
	}
	return min(n, maxSchemaNodes+1)
}

func (z sizer) named(name types.Path) int {
	t, ok := z.common[name]
	if !ok {
		return 0
	}
	n, ok := z.known[name]
	if !ok {
		z.known[name] = 0 // a circle, which resolving refuses, ends here
		n = z.size(namespaceOf(types.EntityType(name)), t.Type)
		z.known[name] = n
	}
	return n
}

// mergeSchemas joins the schemas of all bundles, each namespace having one
// owner.
func mergeSchemas(all []*sast.Schema) *sast.Schema {
	out := &sast.Schema{Namespaces: sast.Namespaces{}}
	for _, sc := range all {
		if len(sc.Entities)+len(sc.Enums)+len(sc.Actions)+len(sc.CommonTypes) > 0 {
			out.Entities, out.Enums, out.Actions, out.CommonTypes = sc.Entities, sc.Enums, sc.Actions, sc.CommonTypes
		}
		for ns, decl := range sc.Namespaces {
			out.Namespaces[ns] = decl
		}
	}
	return out
}

// namesOnly is a schema without what its declarations refer to.
func namesOnly(sc *sast.Schema) *sast.Schema {
	strip := func(entities sast.Entities, actions sast.Actions) (sast.Entities, sast.Actions) {
		e, a := sast.Entities{}, sast.Actions{}
		for name := range entities {
			e[name] = sast.Entity{}
		}
		for name := range actions {
			a[name] = sast.Action{}
		}
		return e, a
	}
	out := *sc
	out.Entities, out.Actions = strip(sc.Entities, sc.Actions)
	out.Namespaces = sast.Namespaces{}
	for ns, decl := range sc.Namespaces {
		decl.Entities, decl.Actions = strip(decl.Entities, decl.Actions)
		out.Namespaces[ns] = decl
	}
	return &out
}

// knowsType says whether some schema declares the entity type.
func (s *Set) knowsType(t cedar.EntityType) bool {
	_, entity := s.schema.Entities[t]
	_, enum := s.schema.Enums[t]
	return entity || enum || s.actionTypes[t]
}

// requestOnly says whether the type is marked @source("request").
func (s *Set) requestOnly(t cedar.EntityType) bool { return s.requestTypes[t] }

// readSchema fills the tables that come from the schema alone and reports what
// the service's own rules refuse.
func (s *Set) readSchema(report func(bundle, msg, hint string)) {
	owner := func(t cedar.EntityType) string { return s.owners[namespaceOf(t)] }
	for name, e := range s.schema.Entities {
		switch source := e.Annotations["source"]; source {
		case "":
		case "request":
			s.requestTypes[name] = true
		default:
			report(owner(name), fmt.Sprintf("entity %s: @source(%q) is not known", name, source), `the one source there is: @source("request")`)
		}
	}
	for name, e := range s.schema.Entities {
		if s.requestTypes[name] {
			continue
		}
		for _, p := range e.ParentTypes {
			if s.requestTypes[p] {
				report(owner(name), fmt.Sprintf(`entity %s: its parent type %s is marked @source("request"), which is never stored`, name, p), "")
			}
		}
	}
	environments := map[string]int{}
	for uid, decl := range s.schema.Actions {
		if decl.AppliesTo != nil {
			environments[owner(uid.Type)] += len(decl.AppliesTo.Principals) * len(decl.AppliesTo.Resources)
		}
		a := &action{uid: uid, bundle: owner(uid.Type), appliesTo: decl.AppliesTo, index: newIndex()}
		if decl.AppliesTo != nil {
			if now, ok := decl.AppliesTo.Context["now"]; ok {
				ext, isExt := now.Type.(resolved.ExtensionType)
				a.fillsNow = isExt && ext == "datetime"
			}
		}
		switch audit := decl.Annotations["audit"]; audit {
		case "":
		case "always":
			a.auditAlways = true
		default:
			report(a.bundle, fmt.Sprintf("action %s: @audit(%q) is not known", uid, audit), `the one value there is: @audit("always")`)
		}
		s.actions[uid] = a
		s.actionTypes[uid.Type] = true
		s.static[uid] = cedar.Entity{UID: uid, Parents: cedar.NewEntityUIDSet(s.actionAncestors(uid)...)}
	}
	for bundle, n := range environments {
		if n > maxEnvironments {
			report(bundle, fmt.Sprintf("its actions apply to %d combinations of principal and resource types, the limit is %d", n, maxEnvironments), "a policy is checked for each of them")
		}
	}
	s.pairFieldActions(report)
	s.readSensitive()
}

// actionAncestors returns all groups an action is in.
func (s *Set) actionAncestors(uid cedar.EntityUID) []cedar.EntityUID {
	seen := map[cedar.EntityUID]bool{}
	var out []cedar.EntityUID
	var walk func(cedar.EntityUID)
	walk = func(u cedar.EntityUID) {
		for p := range s.schema.Actions[u].Entity.Parents.All() {
			if !seen[p] {
				seen[p] = true
				out = append(out, p)
				walk(p)
			}
		}
	}
	walk(uid)
	return out
}

// pairFieldActions ties each action "X.field" to X. Both must take the same
// principals, resources and context, but for the required attribute "field" of
// the namespace's Field type, so that a question about X is a question about
// its fields.
func (s *Set) pairFieldActions(report func(bundle, msg, hint string)) {
	for uid, f := range s.actions {
		name, isField := strings.CutSuffix(string(uid.ID), fieldSuffix)
		if !isField {
			continue
		}
		x, ok := s.actions[cedar.NewEntityUID(uid.Type, cedar.String(name))]
		if !ok {
			report(f.bundle, fmt.Sprintf("action %s: there is no action %q beside it", uid, name), `"X.field" decides the fields of the action "X"`)
			continue
		}
		namespace := namespaceOf(uid.Type)
		want := qualify(namespace, fieldType)
		if why := fieldActionMismatch(x, f, want); why != "" {
			report(f.bundle, fmt.Sprintf("action %s: %s", uid, why),
				fmt.Sprintf("it must have the principals, resources and context of %q, and the required context attribute \"field\" of type %s", name, want))
			continue
		}
		decl, ok := s.schema.Entities[want]
		group := qualify(namespace, fieldGroupType)
		if !ok || len(decl.Shape) > 0 || decl.Tags != nil {
			report(f.bundle, fmt.Sprintf("entity %s must have no attributes and no tags", want), "")
			continue
		}
		for _, t := range f.appliesTo.Resources {
			if namespaceOf(t) != namespace {
				report(f.bundle, fmt.Sprintf("action %s: resource type %s is of another namespace, whose fields this one cannot catalogue", uid, t), "")
			}
		}
		if g, ok := s.schema.Entities[group]; ok && len(g.Shape) > 0 {
			report(f.bundle, fmt.Sprintf("entity %s must have no attributes", group), "")
		}
		x.field, f.fieldOf = f, x
	}
	for t := range s.schema.Entities {
		base, ns := baseName(t), namespaceOf(t)
		// The two names are reserved wherever a namespace uses them for fields.
		if base == fieldType || base == fieldGroupType {
			if _, ok := s.schema.Entities[qualify(ns, fieldType)]; ok {
				s.fieldTypes[t] = true
			}
		}
	}
}

func fieldActionMismatch(x, f *action, want cedar.EntityType) string {
	if x.appliesTo == nil || f.appliesTo == nil {
		return "one of the two applies to nothing"
	}
	if !sameTypes(x.appliesTo.Principals, f.appliesTo.Principals) {
		return "its principals differ"
	}
	if !sameTypes(x.appliesTo.Resources, f.appliesTo.Resources) {
		return "its resources differ"
	}
	field, ok := f.appliesTo.Context["field"]
	if !ok || field.Optional || field.Type != resolved.IsType(resolved.EntityType(want)) {
		return `its context has no required "field" of type ` + string(want)
	}
	if _, ok := x.appliesTo.Context["field"]; ok {
		return `the other's context has "field" too`
	}
	if len(f.appliesTo.Context) != len(x.appliesTo.Context)+1 {
		return "its context differs"
	}
	for name, a := range x.appliesTo.Context {
		b, ok := f.appliesTo.Context[name]
		if !ok || a.Optional != b.Optional || !sameType(a.Type, b.Type) {
			return fmt.Sprintf("its context differs in %q", name)
		}
	}
	return ""
}

func sameTypes(a, b []types.EntityType) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}

func sameType(a, b resolved.IsType) bool {
	switch a := a.(type) {
	case resolved.SetType:
		b, ok := b.(resolved.SetType)
		return ok && sameType(a.Element, b.Element)
	case resolved.RecordType:
		b, ok := b.(resolved.RecordType)
		if !ok || len(a) != len(b) {
			return false
		}
		for k, x := range a {
			y, ok := b[k]
			if !ok || x.Optional != y.Optional || !sameType(x.Type, y.Type) {
				return false
			}
		}
		return true
	}
	if _, ok := b.(resolved.RecordType); ok {
		return false
	}
	if _, ok := b.(resolved.SetType); ok {
		return false
	}
	return a == b
}

// readFields turns a bundle's catalogue into Field and FieldGroup entities and
// the leaves that are decided.
func (s *Set) readFields(b Source, report func(line, column int, msg, hint string)) {
	parents := map[cedar.EntityUID]map[cedar.EntityUID]bool{}
	link := func(child, parent cedar.EntityUID) {
		if parents[child] == nil {
			parents[child] = map[cedar.EntityUID]bool{}
		}
		parents[child][parent] = true
	}
	paths := map[cedar.EntityType][]string{}
	uidOf := func(t cedar.EntityType, path string) cedar.EntityUID {
		id := baseName(t)
		if path != "" {
			id += "." + path
		}
		return cedar.NewEntityUID(qualify(namespaceOf(t), fieldType), cedar.String(id))
	}
	for _, f := range b.Fields {
		t := cedar.EntityType(f.Type)
		ns := namespaceOf(t)
		group := qualify(ns, fieldGroupType)
		if s.owners[ns] != b.Name {
			report(f.Line, f.Column, fmt.Sprintf("type %s is not of a namespace that this bundle owns", t), "")
			continue
		}
		if !s.knowsType(t) {
			report(f.Line, f.Column, fmt.Sprintf("type %s is not declared in the schema", t), "")
			continue
		}
		if _, ok := s.schema.Entities[qualify(ns, fieldType)]; !ok {
			report(f.Line, f.Column, fmt.Sprintf("namespace %s declares no entity type %s", ns, fieldType), "entity FieldGroup in [FieldGroup]; entity Field in [Field, FieldGroup];")
			continue
		}
		if _, ok := s.schema.Entities[group]; !ok && len(f.Groups) > 0 {
			report(f.Line, f.Column, fmt.Sprintf("namespace %s declares no entity type %s", ns, fieldGroupType), "entity FieldGroup in [FieldGroup];")
			continue
		}
		var child cedar.EntityUID
		if t == group {
			child = cedar.NewEntityUID(group, cedar.String(f.Path))
		} else {
			child = uidOf(t, f.Path)
			paths[t] = append(paths[t], f.Path)
			for path := f.Path; path != ""; {
				up := ""
				if i := strings.LastIndexByte(path, '.'); i >= 0 {
					up = path[:i]
				}
				link(uidOf(t, path), uidOf(t, up))
				path = up
			}
		}
		if parents[child] == nil {
			parents[child] = map[cedar.EntityUID]bool{}
		}
		for _, g := range f.Groups {
			link(child, cedar.NewEntityUID(group, cedar.String(g)))
		}
	}
	for t, list := range paths {
		s.catalogues[t] = newCatalogue(list, func(path string) cedar.EntityUID { return uidOf(t, path) })
	}
	for uid := range parents {
		closed, cyclic := closeOver(uid, parents)
		if cyclic {
			report(0, 0, fmt.Sprintf("%s is in itself", uid), "field groups must not form a circle")
			return
		}
		s.static[uid] = cedar.Entity{UID: uid, Parents: cedar.NewEntityUIDSet(closed...)}
		for _, p := range closed {
			if _, ok := s.static[p]; !ok {
				s.static[p] = cedar.Entity{UID: p}
			}
		}
	}
}

func closeOver(uid cedar.EntityUID, parents map[cedar.EntityUID]map[cedar.EntityUID]bool) (out []cedar.EntityUID, cyclic bool) {
	seen := map[cedar.EntityUID]bool{}
	queue := []cedar.EntityUID{uid}
	for len(queue) > 0 {
		u := queue[0]
		queue = queue[1:]
		for p := range parents[u] {
			if p == uid {
				return nil, true
			}
			if !seen[p] {
				seen[p] = true
				out = append(out, p)
				queue = append(queue, p)
			}
		}
	}
	return out, false
}

// newCatalogue sorts paths into leaves and what stands above them.
func newCatalogue(paths []string, uid func(string) cedar.EntityUID) *catalogue {
	c := &catalogue{below: map[string][]int{}}
	interior := map[string]bool{}
	for _, p := range paths {
		for i := strings.LastIndexByte(p, '.'); i >= 0; i = strings.LastIndexByte(p[:i], '.') {
			interior[p[:i]] = true
		}
	}
	for _, p := range paths {
		if interior[p] {
			continue
		}
		n := len(c.leaves)
		c.leaves = append(c.leaves, leaf{n, p, uid(p)})
		c.below[p] = []int{n}
		for i := strings.LastIndexByte(p, '.'); i >= 0; i = strings.LastIndexByte(p[:i], '.') {
			c.below[p[:i]] = append(c.below[p[:i]], n)
		}
	}
	return c
}
