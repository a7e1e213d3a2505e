package engine

import (
	"reflect"
	"slices"

	"github.com/cedar-policy/cedar-go"
)

// Reach says which principals and resources a policy can concern, by its scope, and by a condition
// "principal in X" of a permit.
type Reach struct {
	// Policy is empty if the reach is not that of one policy.
	Policy              PolicyRef
	Principal, Resource ReachOf
}

// ReachOf is the part of a reach about principals or resources. The zero value is any entity.
type ReachOf struct {
	Type cedar.EntityType // "": of any type
	// UID is the entity itself, or if In is set, a group that it is in; the zero value: any.
	UID cedar.EntityUID
	In  bool
}

// Types returns the types of principals and of resources that an action applies to; none if the action
// is not declared, or is a group.
func (s *Set) Types(action cedar.EntityUID) (principals, resources []cedar.EntityType) {
	a := s.actions[action]
	if a == nil || a.appliesTo == nil {
		return nil, nil
	}
	return a.appliesTo.Principals, a.appliesTo.Resources
}

// HasFields reports whether fields can be asked for with an action.
func (s *Set) HasFields(action cedar.EntityUID) bool {
	a := s.actions[action]
	return a != nil && a.field != nil
}

// Differences returns the reaches of the policies about an action, and about its fields, that only one of
// two sets has. If something else than policies differs that can change the outcome, such as the schema,
// all can be concerned, and there is one reach of everything.
func (s *Set) Differences(other *Set, action cedar.EntityUID) []Reach {
	a, b := s.actions[action], other.actions[action]
	if a == nil || b == nil {
		return []Reach{{}}
	}
	if !sameRules(s, other, a, b) {
		return []Reach{{}}
	}
	mine, theirs := policiesOf(a), policiesOf(b)
	var list []Reach
	for text, p := range mine {
		if theirs[text] == nil {
			list = append(list, p.reach())
		}
	}
	for text, p := range theirs {
		if mine[text] == nil {
			list = append(list, p.reach())
		}
	}
	slices.SortFunc(list, func(a, b Reach) int { return a.Policy.compare(b.Policy) })
	return list
}

// sameRules reports whether everything about an action is the same in two sets, except policies.
func sameRules(s, other *Set, a, b *action) bool {
	if s.digest != other.digest && (len(s.ChangedTypes(other)) > 0 || !reflect.DeepEqual(a.appliesTo, b.appliesTo) || !reflect.DeepEqual(s.catalogues, other.catalogues)) {
		return false
	}
	if !reflect.DeepEqual(s.static[a.uid].Parents, other.static[b.uid].Parents) || (a.field == nil) != (b.field == nil) || a.field != nil && !reflect.DeepEqual(a.field.appliesTo, b.field.appliesTo) {
		return false
	}
	skips := func(s *Set, bundle string) bool { c := s.bundles[bundle]; return c != nil && c.skipForbidErrors }
	return skips(s, a.bundle) == skips(other, b.bundle) && skips(s, Guardrails) == skips(other, Guardrails)
}

// policiesOf returns the policies about an action and its fields, by bundle, id and text.
func policiesOf(a *action) map[[3]string]*policy {
	list := map[[3]string]*policy{}
	add := func(p *policy) { list[[3]string{p.ref.Bundle, p.ref.ID, p.text}] = p }
	a.index.each(add)
	if a.field != nil {
		a.field.index.each(add)
	}
	return list
}

func (p *policy) reach() Reach {
	r := Reach{Policy: p.ref, Principal: p.principal.reach(), Resource: p.resource.reach()}
	if p.within != nil && r.Principal.UID == (cedar.EntityUID{}) {
		r.Principal.UID, r.Principal.In = *p.within, true
	}
	return r
}

func (s scope) reach() (r ReachOf) {
	if s.hasType {
		r.Type = s.typ
	}
	if s.hasUID {
		r.UID, r.In = s.uid, s.in
	}
	return r
}
