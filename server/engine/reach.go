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

// Deciders returns a function that reports whether policies of a bundle can decide questions about an action, or with
// principals and resources of some types, whoever they are; a zero value stands for any. A principal or a resource type
// can also be that of a group. Rules of admin-local are about other questions, which no set has.
func (s *Set) Deciders(action cedar.EntityUID, principal, resource cedar.EntityType) func(bundle string) bool {
	takes := func(types []cedar.EntityType, typ cedar.EntityType) bool {
		return typ == "" || slices.ContainsFunc(types, func(t cedar.EntityType) bool { return t == typ || s.TypesAbove(t)[typ] })
	}
	found := map[string]bool{}
	for uid, a := range s.actions {
		asked := action == (cedar.EntityUID{}) || uid == action || s.static[uid].Parents.Contains(action)
		if asked && !found[a.bundle] && a.appliesTo != nil && takes(a.appliesTo.Principals, principal) && takes(a.appliesTo.Resources, resource) {
			found[a.bundle] = true
		}
	}
	all := action == (cedar.EntityUID{}) && principal == "" && resource == ""
	return func(bundle string) bool {
		return all || bundle == AdminLocal || found[bundle] || bundle == Guardrails && len(found) > 0
	}
}

// DecidesFields reports whether a policy can decide about the fields of an action.
func (s *Set) DecidesFields(action cedar.EntityUID, ref PolicyRef) bool {
	a, b := s.actions[action], s.bundles[ref.Bundle]
	if a == nil || a.field == nil || b == nil {
		return false
	}
	i, found := slices.BinarySearchFunc(b.policies, ref, func(p *policy, ref PolicyRef) int { return p.ref.compare(ref) })
	return found && slices.Contains(s.matchedActions(b.policies[i]), a.field)
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
