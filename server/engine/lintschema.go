package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	sast "github.com/cedar-policy/cedar-go/x/exp/schema/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// maxListed bounds the names in one finding.
const maxListed = 10

func listed(names []string) string {
	if more := len(names) - maxListed; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:maxListed], ", "), more)
	}
	return strings.Join(names, ", ")
}

// ownActions lists the actions of the bundle by type and id.
func (l *linter) ownActions() (list []*action) {
	for _, a := range l.set.actions {
		if a.bundle == l.b.name {
			list = append(list, a)
		}
	}
	slices.SortFunc(list, func(a, b *action) int { return strings.Compare(a.uid.String(), b.uid.String()) })
	return list
}

// permitsField reports whether what a permit asks about the field is true for a class of fields.
func permitsField(p *policy, f *action, t cedar.EntityType, class int) bool {
	parts := f.probed[t][p]
	return !p.forbid && p.principalOf(f) && p.resource.couldBe(t) && parts.lead.has(class) && parts.when.has(class)
}

// principalOf reports whether the principal scope of a policy can match a principal of an action.
func (p *policy) principalOf(a *action) bool {
	return slices.ContainsFunc(a.appliesTo.Principals, p.principal.couldBe)
}

// fields reports the fields of each type that no policy permits, with any action.
func (l *linter) fields() {
	seen := map[cedar.EntityType][]bool{} // by leaf
	for _, f := range l.ownActions() {
		if f.fieldOf == nil {
			continue
		}
		for _, t := range f.appliesTo.Resources {
			cat := l.set.catalogues[t]
			if cat == nil {
				continue
			}
			if seen[t] == nil {
				seen[t] = make([]bool, len(cat.leaves))
			}
			permitted := map[int]bool{} // by class
			for _, class := range f.classes[t] {
				permitted[class] = false
			}
			f.index.each(func(p *policy) {
				for class := range permitted {
					if !permitted[class] && !l.dead[p] && permitsField(p, f, t, class) {
						permitted[class] = true
					}
				}
			})
			for i, class := range f.classes[t] {
				seen[t][i] = seen[t][i] || permitted[class]
			}
		}
	}
	for _, t := range sortedKeys(seen) {
		var hidden []string
		where := Finding{File: l.src.FieldsFile}
		for i, leaf := range l.set.catalogues[t].leaves {
			if seen[t][i] {
				continue
			}
			if hidden = append(hidden, leaf.path); len(hidden) == 1 {
				for _, f := range l.src.Fields {
					if f.Type == string(t) && f.Path == leaf.path {
						where.Line, where.Column = f.Line, f.Column
					}
				}
			}
		}
		switch {
		case len(hidden) == 1:
			where.Message = fmt.Sprintf("no policy can permit the field %s of %s, with any action", hidden[0], t)
		case len(hidden) > 1:
			where.Message = fmt.Sprintf("no policy can permit the fields %s of %s, with any action", listed(hidden), t)
		default:
			continue
		}
		where.Hint = "write a policy for them, or put them into a group of fields that one permits"
		l.report(RuleFieldHidden, where)
	}
}

// fieldOpen reports the fields that a permit lets everybody see who may use the action at all.
func (l *linter) fieldOpen(p *policy) {
	if p.forbid || p.principal.hasUID || p.resource.hasUID {
		return
	}
	for _, c := range p.source.Conditions {
		if _, probes := probesOnly(c.Body); !probes {
			return
		}
	}
	matched := l.set.matchedActions(p)
	slices.SortFunc(matched, func(a, b *action) int { return strings.Compare(a.uid.String(), b.uid.String()) })
	for _, f := range matched {
		if f.fieldOf == nil || !p.principalOf(f) {
			continue
		}
		for _, t := range f.appliesTo.Resources {
			var open []string
			for i, class := range f.classes[t] {
				if permitsField(p, f, t, class) {
					open = append(open, l.set.catalogues[t].leaves[i].path)
				}
			}
			if len(open) == 0 {
				continue
			}
			who := "everybody"
			if p.principal.hasType {
				who = fmt.Sprintf("every %s", p.principal.typ)
			}
			l.report(RuleFieldOpen, finding(p, fmt.Sprintf("permits fields of %s to %s who may use %s: %s", t, who, f.fieldOf.uid, listed(open)),
				"if that is not meant, name a group of principals in its scope"))
		}
	}
}

// actions reports the actions that no policy permits, and the groups of actions without actions.
func (l *linter) actions() {
	members := map[cedar.EntityUID]bool{}
	for _, a := range l.set.actions {
		for group := range l.set.static[a.uid].Parents.All() {
			members[group] = true
		}
	}
	for _, a := range l.ownActions() {
		f := Finding{File: l.src.SchemaFile}
		f.Line, f.Column = declared(l.src.Schema, strconv.Quote(string(a.uid.ID)), string(a.uid.ID))
		switch {
		case a.appliesTo == nil && !members[a.uid]:
			f.Message, f.Hint = fmt.Sprintf("%s applies to nothing and groups no actions", a.uid), "remove it, or put actions into it"
		case a.appliesTo == nil || a.fieldOf != nil || l.permitted(a):
			continue
		default:
			f.Message, f.Hint = fmt.Sprintf("no policy can permit %s, so every question about it is denied", a.uid), "write a policy for it, or remove it"
		}
		l.report(RuleUnusedAction, f)
	}
}

// permitted reports whether a permit that can determine decisions is about an action.
func (l *linter) permitted(a *action) (found bool) {
	a.index.each(func(p *policy) {
		found = found || !p.forbid && !l.dead[p] && p.principalOf(a) && slices.ContainsFunc(a.appliesTo.Resources, p.resource.couldBe)
	})
	return found
}

// types reports the entity types and common types of the bundle that nothing names.
func (l *linter) types() {
	used := map[cedar.EntityType]bool{}
	mark := func(list []types.EntityType, but cedar.EntityType) {
		for _, t := range list {
			used[t] = used[t] || t != but
		}
	}
	for name, e := range l.set.schema.Entities {
		mark(e.ParentTypes, name)
		namedTypes(e.Shape, func(t cedar.EntityType) { mark([]types.EntityType{t}, name) })
		namedTypes(e.Tags, func(t cedar.EntityType) { mark([]types.EntityType{t}, name) })
	}
	for _, a := range l.set.actions {
		if a.appliesTo != nil {
			mark(a.appliesTo.Principals, "")
			mark(a.appliesTo.Resources, "")
			namedTypes(a.appliesTo.Context, func(t cedar.EntityType) { used[t] = true })
		}
	}
	for _, b := range l.set.bundles {
		for _, p := range b.policies {
			literals(p.source, func(uid cedar.EntityUID) { used[uid.Type] = true })
			typesAfterIs(p.source, func(t cedar.EntityType) { used[t] = true })
			for _, s := range []scope{p.principal, p.resource} {
				used[s.typ] = true
			}
		}
	}
	for _, src := range l.sources {
		for _, f := range src.Fields {
			used[cedar.EntityType(f.Type)] = true
		}
		for _, t := range src.PrincipalTokens {
			used[cedar.EntityType(t.Type)] = true
		}
	}
	for _, name := range l.set.EntityTypes(l.b.name) {
		if t := cedar.EntityType(name); !used[t] && !l.set.fieldTypes[t] {
			l.unusedType("entity type", name, baseName(t), "no action, attribute, parent or policy names")
		}
	}
	l.commonTypes()
}

// commonTypes reports the common types that no schema names. A type of the same name in another namespace
// counts as this one.
func (l *linter) commonTypes() {
	named := map[string]bool{} // without namespaces
	var own []string
	for _, src := range l.sources {
		sc, err := parseSchema(src.Schema)
		if err != nil {
			return // it compiled, so this cannot be
		}
		each := func(ns string, entities sast.Entities, actions sast.Actions, common sast.CommonTypes) {
			for _, e := range entities {
				namedCommon(e.Shape, "", named)
				namedCommon(e.Tags, "", named)
			}
			for _, a := range actions {
				if a.AppliesTo != nil {
					namedCommon(a.AppliesTo.Context, "", named)
				}
			}
			for name, c := range common {
				namedCommon(c.Type, string(name), named)
				if src.Name == l.b.name {
					own = append(own, string(qualify(ns, string(name))))
				}
			}
		}
		each("", sc.Entities, sc.Actions, sc.CommonTypes)
		for ns, decl := range sc.Namespaces {
			each(string(ns), decl.Entities, decl.Actions, decl.CommonTypes)
		}
	}
	slices.Sort(own)
	for _, name := range own {
		if base := baseName(cedar.EntityType(name)); !named[base] {
			l.unusedType("type", name, base, "no declaration names")
		}
	}
}

func (l *linter) unusedType(kind, name, base, why string) {
	f := Finding{File: l.src.SchemaFile, Message: fmt.Sprintf("%s the %s %s", why, kind, name), Hint: "remove it"}
	f.Line, f.Column = declared(l.src.Schema, base)
	if len(l.sources) == 1 {
		f.Hint = "remove it, unless another bundle uses it: give lint the folders of both"
	}
	l.report(RuleUnusedType, f)
}

// namedTypes calls fn for each entity type in a type.
func namedTypes(t resolved.IsType, fn func(cedar.EntityType)) {
	switch t := t.(type) {
	case resolved.EntityType:
		fn(cedar.EntityType(t))
	case resolved.SetType:
		namedTypes(t.Element, fn)
	case resolved.RecordType:
		for _, a := range t {
			namedTypes(a.Type, fn)
		}
	}
}

// namedCommon adds the names in a type, without namespaces and without that of the type itself.
func namedCommon(t sast.IsType, self string, named map[string]bool) {
	add := func(path string) {
		if base := baseName(cedar.EntityType(path)); base != self {
			named[base] = true
		}
	}
	switch t := t.(type) {
	case sast.TypeRef:
		add(string(t))
	case sast.EntityTypeRef:
		add(string(t))
	case sast.SetType:
		namedCommon(t.Element, self, named)
	case sast.RecordType:
		for _, a := range t {
			namedCommon(a.Type, self, named)
		}
	}
}

// declared returns the place where a schema declares a name, from 1, or zeros: after the word entity, type
// or action, or in a list of names after it.
func declared(text string, names ...string) (line, column int) {
	s := scan(text)
	for i := range s.words {
		if !slices.Contains(names, s.words[i]) {
			continue
		}
		back := i - 1
		for s.word(back) == "," {
			back -= 2
		}
		if slices.Contains([]string{"entity", "type", "action"}, s.word(back)) {
			return s.lines[i], s.columns[i]
		}
	}
	return 0, 0
}

// compareLint orders findings by place.
func compareLint(a, b LintFinding) int {
	return cmp.Or(strings.Compare(a.File, b.File), a.Line-b.Line, a.Column-b.Column, strings.Compare(a.Rule, b.Rule), strings.Compare(a.Message, b.Message))
}
