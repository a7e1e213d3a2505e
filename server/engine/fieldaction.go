package engine

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

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
