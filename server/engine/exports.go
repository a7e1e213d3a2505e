package engine

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// This file checks that a bundle uses only those entity types of other bundles that they export. A type
// is used if the schema or a policy names it, and if a policy reads attributes, tags or groups of its
// entities.

// Export is an entity type that other bundles may use, with its place in the bundle.yaml of its own.
type Export struct {
	// Type is a name with its namespace or without, or "*" for all types of the bundle.
	Type         string
	Line, Column int
}

// exports is what a bundle exports.
type exports struct {
	all   bool
	types map[cedar.EntityType]bool
}

func (e exports) has(t cedar.EntityType) bool { return e.all || e.types[t] }

// readExports finds the types that a bundle exports.
func (s *Set) readExports(src Source, report func(e Export, msg, hint string)) {
	b := s.bundles[src.Name]
	for _, e := range src.Exports {
		if e.Type == "*" {
			b.exports.all = true
			continue
		}
		found := s.exported(b, e.Type)
		switch {
		case len(found) == 0:
			names := s.EntityTypes(src.Name)
			for i, name := range names {
				if !strings.Contains(e.Type, "::") {
					names[i] = baseName(cedar.EntityType(name))
				}
			}
			report(e, fmt.Sprintf("exports %s, and the schema of the bundle declares no such entity type", e.Type), didYouMean(e.Type, names))
			continue
		case len(found) > 1:
			report(e, fmt.Sprintf("exports %s, which is the name of several entity types", e.Type), fmt.Sprintf("write the whole name, such as %s", found[0]))
			continue
		}
		if b.exports.types == nil {
			b.exports.types = map[cedar.EntityType]bool{}
		}
		b.exports.types[found[0]] = true
	}
}

// exported lists the types of a bundle that an element of its exports can mean: that with this name, or
// those that have it in one of the namespaces of the bundle.
func (s *Set) exported(b *compiledBundle, name string) (found []cedar.EntityType) {
	declared := func(t cedar.EntityType) bool {
		_, entity := s.schema.Entities[t]
		_, enum := s.schema.Enums[t]
		return (entity || enum) && s.Owner(t) == b.name
	}
	if t := cedar.EntityType(name); declared(t) {
		return []cedar.EntityType{t}
	}
	if strings.Contains(name, "::") {
		return nil
	}
	for _, ns := range b.namespaces {
		if t := qualify(ns, name); declared(t) {
			found = append(found, t)
		}
	}
	return found
}

// exportLine is the line for the bundle.yaml of a type's bundle that exports the type.
func (s *Set) exportLine(t cedar.EntityType) string {
	name := baseName(t)
	if b := s.bundles[s.Owner(t)]; b == nil || len(s.exported(b, name)) != 1 {
		name = string(t)
	}
	return fmt.Sprintf("exports: [%s]", name)
}

// use is a use of an entity type of another bundle.
type use struct {
	// where is the declaration in the schema, or the text of the policy.
	where string
	typ   cedar.EntityType
	// reads says that the policy reads attributes, tags or groups of such entities, and does not name the
	// type.
	reads  bool
	policy *policy // nil: in the schema
}

// foreign returns a function that reports whether a bundle may not use a type: it is one of another
// bundle, which does not export it. It returns nil if there is no such type. guardrails may use all
// types, because its forbids are about the decisions of all bundles.
func (s *Set) foreign(bundle string) func(cedar.EntityType) bool {
	if bundle == Guardrails || bundle == AdminLocal || bundle == Admin {
		return nil
	}
	may := func(t cedar.EntityType) bool {
		owner := s.Owner(t)
		return owner == bundle || s.bundles[owner] == nil || s.bundles[owner].exports.has(t)
	}
	var list []cedar.EntityType
	for t := range s.schema.Entities {
		if !may(t) {
			list = append(list, t)
		}
	}
	for t := range s.schema.Enums {
		if !may(t) {
			list = append(list, t)
		}
	}
	if len(list) == 0 {
		return nil
	}
	hidden := make(map[cedar.EntityType]bool, len(list))
	for _, t := range list {
		hidden[t] = true
	}
	return func(t cedar.EntityType) bool { return hidden[t] }
}

// user finds the uses of types that other bundles do not export, by one bundle.
type user struct {
	set    *Set
	bundle string
	// hidden reports whether the bundle may not use a type; nil: it may use all types.
	hidden func(cedar.EntityType) bool
	// reaches says that a policy can come to an entity of a hidden type without naming the type.
	reaches bool
}

func (s *Set) user(bundle string) user {
	u := user{set: s, bundle: bundle, hidden: s.foreign(bundle)}
	u.reaches = u.hidden != nil && s.reaches(bundle, u.hidden)
	return u
}

// inSchema lists the uses in the schema of the bundle, by declaration.
func (u user) inSchema() (list []use) {
	if u.hidden == nil {
		return nil
	}
	s := u.set
	for t, decl := range s.schema.Entities {
		if s.Owner(t) != u.bundle {
			continue
		}
		found := map[cedar.EntityType]bool{}
		note := noteHidden(u.hidden, found)
		for _, p := range decl.ParentTypes {
			note(p)
		}
		typesIn(decl.Shape, note)
		typesIn(decl.Tags, note)
		list = addUses(list, use{where: "entity " + string(t)}, found)
	}
	for uid, decl := range s.schema.Actions {
		if s.Owner(uid.Type) != u.bundle || decl.AppliesTo == nil {
			continue
		}
		found := map[cedar.EntityType]bool{}
		note := noteHidden(u.hidden, found)
		for _, t := range slices.Concat(decl.AppliesTo.Principals, decl.AppliesTo.Resources) {
			note(t)
		}
		typesIn(decl.AppliesTo.Context, note)
		list = addUses(list, use{where: "action " + uid.String()}, found)
	}
	slices.SortFunc(list, func(a, b use) int { return cmp.Or(cmp.Compare(a.where, b.where), cmp.Compare(a.typ, b.typ)) })
	return list
}

// inPolicy lists the uses in a policy of the bundle.
func (u user) inPolicy(p *policy) (list []use) {
	if u.hidden == nil {
		return nil
	}
	var named map[cedar.EntityType]bool // few policies of a large bundle name such a type
	note := func(t cedar.EntityType) {
		if u.hidden(t) {
			if named == nil {
				named = map[cedar.EntityType]bool{}
			}
			named[t] = true
		}
	}
	note(p.principal.typ)
	note(p.resource.typ)
	literals(p.tree(), func(uid cedar.EntityUID) { note(uid.Type) })
	typesAfterIs(p.tree(), note)
	list = addUses(list, use{where: p.text, policy: p}, named)
	if !u.reaches {
		return list
	}
	read := u.set.reads(p, u.hidden)
	maps.DeleteFunc(read, func(t cedar.EntityType, _ bool) bool { return named[t] })
	return addUses(list, use{where: p.text, policy: p, reads: true}, read)
}

func addUses(list []use, u use, types map[cedar.EntityType]bool) []use {
	if len(types) == 0 {
		return list
	}
	for _, u.typ = range slices.Sorted(maps.Keys(types)) {
		list = append(list, u)
	}
	return list
}

func noteHidden(hidden func(cedar.EntityType) bool, found map[cedar.EntityType]bool) func(cedar.EntityType) {
	return func(t cedar.EntityType) {
		if hidden(t) {
			found[t] = true
		}
	}
}

// typesIn calls fn for each entity type in a type.
func typesIn(t resolved.IsType, fn func(cedar.EntityType)) {
	switch t := t.(type) {
	case resolved.EntityType:
		fn(cedar.EntityType(t))
	case resolved.SetType:
		typesIn(t.Element, fn)
	case resolved.RecordType:
		for _, a := range t {
			typesIn(a.Type, fn)
		}
	}
}

// reaches reports whether a policy of the bundle could come to an entity of a hidden type: from the
// principal, the resource or the context of one of its actions, through attributes and tags.
func (s *Set) reaches(bundle string, hidden func(cedar.EntityType) bool) bool {
	seen := map[cedar.EntityType]bool{}
	var todo []cedar.EntityType
	found := false
	visit := func(t cedar.EntityType) {
		found = found || hidden(t)
		if !seen[t] {
			seen[t] = true
			todo = append(todo, t)
		}
	}
	for _, a := range s.actions {
		if a.bundle != bundle || a.appliesTo == nil {
			continue
		}
		for _, t := range slices.Concat(a.appliesTo.Principals, a.appliesTo.Resources) {
			visit(t)
		}
		typesIn(a.appliesTo.Context, visit)
	}
	for len(todo) > 0 && !found {
		last := len(todo) - 1
		decl := s.schema.Entities[todo[last]]
		todo = todo[:last]
		typesIn(decl.Shape, visit)
		typesIn(decl.Tags, visit)
	}
	return found
}

// reads returns the hidden types whose entities a policy dereferences: it reads their attributes, tags or
// groups.
func (s *Set) reads(p *policy, hidden func(cedar.EntityType) bool) map[cedar.EntityType]bool {
	r := &reader{schema: s.schema, found: map[cedar.EntityType]bool{}, principal: &values{}, resource: &values{}, context: &values{}}
	r.note = noteHidden(hidden, r.found)
	for _, a := range s.matchedActions(p) {
		if a.appliesTo == nil {
			continue
		}
		for _, t := range a.appliesTo.Principals {
			r.principal.add(resolved.EntityType(t))
		}
		for _, t := range a.appliesTo.Resources {
			r.resource.add(resolved.EntityType(t))
		}
		r.context.add(a.appliesTo.Context)
	}
	for v, sc := range map[*values]scope{r.principal: p.principal, r.resource: p.resource} {
		if sc.hasType {
			maps.DeleteFunc(v.entities, func(t cedar.EntityType, _ bool) bool { return t != sc.typ })
		}
		if sc.in {
			r.deref(v) // their groups
		}
	}
	for _, cond := range p.tree().Conditions {
		r.expr(cond.Body)
	}
	return r.found
}

// reader finds the types of the entities that the conditions of a policy dereference. Unlike [leveler], it
// knows the types of every expression, so that a record around an entity does not hide it.
type reader struct {
	schema                       *resolved.Schema
	note                         func(cedar.EntityType)
	found                        map[cedar.EntityType]bool
	principal, resource, context *values
}

// values are the types that an expression may have, as far as entities can be reached through them:
// entities, records of the schema, and records that the policy writes.
type values struct {
	entities map[cedar.EntityType]bool
	records  map[uintptr]resolved.RecordType // by the address of the map
	fields   map[cedar.String]*values
}

func (v *values) add(t resolved.IsType) {
	switch t := t.(type) {
	case resolved.EntityType:
		if v.entities == nil {
			v.entities = map[cedar.EntityType]bool{}
		}
		v.entities[cedar.EntityType(t)] = true
	case resolved.RecordType:
		if v.records == nil {
			v.records = map[uintptr]resolved.RecordType{}
		}
		v.records[reflect.ValueOf(t).Pointer()] = t
	}
}

// merge adds the types of another expression.
func (v *values) merge(o *values) {
	for t := range o.entities {
		v.add(resolved.EntityType(t))
	}
	for _, t := range o.records {
		v.add(t)
	}
	for name, f := range o.fields {
		v.field(name).merge(f)
	}
}

// field returns the types of a field of the records that the policy writes.
func (v *values) field(name cedar.String) *values {
	if v.fields == nil {
		v.fields = map[cedar.String]*values{}
	}
	if v.fields[name] == nil {
		v.fields[name] = &values{}
	}
	return v.fields[name]
}

// deref notes that the entities that an expression may be are read.
func (r *reader) deref(v *values) {
	for t := range v.entities {
		r.note(t)
	}
}

// attribute returns the types of an attribute.
func (r *reader) attribute(v *values, name cedar.String) *values {
	out := &values{}
	for t := range v.entities {
		if a, ok := r.schema.Entities[t].Shape[name]; ok {
			out.add(a.Type)
		}
	}
	for _, shape := range v.records {
		if a, ok := shape[name]; ok {
			out.add(a.Type)
		}
	}
	if f := v.fields[name]; f != nil {
		out.merge(f)
	}
	return out
}

func (r *reader) expr(n xast.IsNode) *values {
	switch t := n.(type) {
	case xast.NodeTypeVariable:
		switch t.Name {
		case "principal":
			return r.principal
		case "resource":
			return r.resource
		case "context":
			return r.context
		}
		return &values{}
	case xast.NodeValue:
		return valuesOf(t.Value)
	case xast.NodeTypeAccess:
		v := r.expr(t.Arg)
		r.deref(v)
		return r.attribute(v, t.Value)
	case xast.NodeTypeHas:
		r.deref(r.expr(t.Arg))
		return &values{}
	case xast.NodeTypeGetTag:
		v, out := r.expr(t.Left), &values{}
		r.deref(v)
		r.expr(t.Right)
		for e := range v.entities {
			if tag := r.schema.Entities[e].Tags; tag != nil {
				out.add(tag)
			}
		}
		return out
	case xast.NodeTypeHasTag:
		r.deref(r.expr(t.Left))
		r.expr(t.Right)
		return &values{}
	case xast.NodeTypeIn:
		r.deref(r.expr(t.Left))
		r.expr(t.Right)
		return &values{}
	case xast.NodeTypeIsIn:
		r.deref(r.expr(t.Left))
		r.expr(t.Entity)
		return &values{}
	case xast.NodeTypeIfThenElse:
		r.expr(t.If)
		out := &values{}
		out.merge(r.expr(t.Then))
		out.merge(r.expr(t.Else))
		return out
	case xast.NodeTypeRecord:
		out := &values{}
		for _, e := range t.Elements {
			out.field(e.Key).merge(r.expr(e.Value))
		}
		return out
	}
	// No other expression is an entity or a record, and nothing is taken out of a set: only the operands
	// matter.
	first := true
	xast.Inspect(xast.NewNode(n), func(child xast.IsNode) bool {
		if first {
			first = false
			return true
		}
		r.expr(child)
		return false
	})
	return &values{}
}

// valuesOf returns the types of a constant.
func valuesOf(v cedar.Value) *values {
	out := &values{}
	switch v := v.(type) {
	case cedar.EntityUID:
		out.add(resolved.EntityType(v.Type))
	case cedar.Record:
		for name, e := range v.All() {
			out.field(name).merge(valuesOf(e))
		}
	}
	return out
}

// checkExports reports uses of types that other bundles do not export. A use that the published bundles
// have already, from before there were exports, is a warning: a change of something else must not fail
// because of it.
func (c *compiler) checkExports(sources []Source) {
	published := map[string]bool{}
	for _, src := range sources {
		published[src.Name] = src.Published
	}
	same := c.sameTypes()
	for _, src := range sources {
		if src.Published && (same || c.previous == nil) {
			continue // nothing changed for it, or what is published is not known
		}
		u := c.set.user(src.Name)
		uses := u.inSchema()
		for _, p := range c.set.bundles[src.Name].policies {
			if c.stopped() {
				return
			}
			if same && c.previous.parsed[parseKey{src.Name, p.text}] != nil {
				continue // it is published, and what it uses is exported as before; large bundles have many of them
			}
			uses = append(uses, u.inPolicy(p)...)
		}
		if len(uses) == 0 {
			continue
		}
		known := c.usedBefore(src.Name)
		warned := map[cedar.EntityType]bool{}
		for _, one := range uses {
			if c.stopped() {
				return
			}
			owner := c.set.Owner(one.typ)
			switch {
			case !known(one):
				c.report(c.unexportedFinding(src, one, owner))
			case warned[one.typ] || src.Published && published[owner]:
			default:
				warned[one.typ] = true
				c.report(c.keptFinding(src, one, owner))
			}
		}
	}
}

// usedBefore returns a function that reports whether the published version of a bundle has a use already.
func (c *compiler) usedBefore(bundle string) func(use) bool {
	if c.previous == nil || c.previous.bundles[bundle] == nil {
		return func(use) bool { return false }
	}
	before := c.previous.user(bundle)
	seen := map[string][]use{}
	for _, one := range before.inSchema() {
		seen[one.where] = append(seen[one.where], one)
	}
	return func(u use) bool {
		if _, looked := seen[u.where]; !looked && u.policy != nil {
			seen[u.where] = nil
			if p := c.previous.parsed[parseKey{bundle, u.where}]; p != nil {
				seen[u.where] = before.inPolicy(p)
			}
		}
		return slices.ContainsFunc(seen[u.where], func(o use) bool { return o.typ == u.typ })
	}
}

// sameTypes reports whether the previous set has the same types and the same exports.
func (c *compiler) sameTypes() bool {
	return c.previous != nil && c.previous.digest == c.set.digest &&
		maps.EqualFunc(c.previous.bundles, c.set.bundles, func(a, b *compiledBundle) bool {
			return a.exports.all == b.exports.all && maps.Equal(a.exports.types, b.exports.types)
		})
}

// unexportedFinding is the error about a use.
func (c *compiler) unexportedFinding(src Source, u use, owner string) Finding {
	verb := "uses"
	if u.reads {
		verb = "reads attributes, tags or groups of entities of"
	}
	if src.Published {
		// Nothing changed in this bundle: the one that is about to be published breaks it.
		why := "is not exported"
		if c.previous != nil && c.previous.bundles[owner] != nil && c.previous.bundles[owner].exports.has(u.typ) {
			why = "would not be exported any more"
		}
		why = fmt.Sprintf("the type %s, which %s: the bundle.yaml of its bundle needs %s", u.typ, why, c.set.exportLine(u.typ))
		return Finding{Bundle: src.Name, Message: fmt.Sprintf("%s %s %s", u.place(src.Name), verb, why), Without: fmt.Sprintf("another bundle %s %s", verb, why)}
	}
	f := Finding{
		Bundle: src.Name, Other: owner,
		Message: fmt.Sprintf("%s%s the type %s of the bundle %s, which does not export it: its bundle.yaml needs %s", u.declaration(), verb, u.typ, owner, c.set.exportLine(u.typ)),
		Without: fmt.Sprintf("%s%s the type %s of another bundle, which does not export it: its bundle.yaml needs %s", u.declaration(), verb, u.typ, c.set.exportLine(u.typ)),
	}
	c.placeUse(&f, src, u)
	return f
}

// keptFinding is the warning about a use that the published bundles have already.
func (c *compiler) keptFinding(src Source, u use, owner string) Finding {
	if src.Published {
		return Finding{
			Bundle: owner, Other: src.Name, File: c.manifests[owner], Warning: true,
			Message: fmt.Sprintf("the bundle %s uses the type %s, which is not exported", src.Name, u.typ),
			Without: fmt.Sprintf("another bundle uses the type %s, which is not exported", u.typ),
			Hint:    "export it: " + c.set.exportLine(u.typ),
		}
	}
	const live = "the live version does so, too, and only new uses are refused"
	f := Finding{
		Bundle: src.Name, Other: owner, Warning: true, Hint: live,
		Message: fmt.Sprintf("%suses the type %s of the bundle %s, which does not export it: its bundle.yaml needs %s", u.declaration(), u.typ, owner, c.set.exportLine(u.typ)),
		Without: fmt.Sprintf("%suses the type %s of another bundle, which does not export it: its bundle.yaml needs %s", u.declaration(), u.typ, c.set.exportLine(u.typ)),
	}
	c.placeUse(&f, src, u)
	return f
}

// place names the use in a message about another bundle.
func (u use) place(bundle string) string {
	if u.policy != nil {
		return fmt.Sprintf("policy %s of the bundle %s", u.policy.ref.ID, bundle)
	}
	return fmt.Sprintf("%s of the bundle %s", u.where, bundle)
}

// declaration names the declaration of a use in the schema, as the beginning of a message. A finding about a policy
// names it besides.
func (u use) declaration() string {
	if u.policy != nil {
		return ""
	}
	return u.where + ": "
}

// placeUse moves a finding to the use.
func (c *compiler) placeUse(f *Finding, src Source, u use) {
	if u.policy == nil {
		f.File, f.Line, f.Column = src.firstUse(string(u.typ))
		return
	}
	f.File, f.Line, f.Column, f.Policy = u.policy.file, u.policy.line, u.policy.column, u.policy.ref.ID
	if !u.reads {
		f.place(u.policy, string(u.typ))
	}
}
