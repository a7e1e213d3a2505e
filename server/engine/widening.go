package engine

import (
	"cmp"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// Widening is a combination of action, principal type and resource type of which the policies alone do not
// show that nobody can do more. The analysis tools of Cedar may prove it.
type Widening struct {
	Principal cedar.EntityType
	Action    cedar.EntityUID
	Resource  cedar.EntityType
	// Before and After are the texts of the policies that can apply.
	Before, After []string
	// Failing are the forbids before that the bundle does not keep and that may fail. A forbid that fails
	// denies, and Cedar's tools ignore it: a proof needs that they never fail.
	Failing []string
	// Unprovable says why the tools cannot prove it; "" if they may.
	Unprovable string
}

// Widenings compares two states of a bundle, each compiled with the bundles beside it. Where it returns
// nothing, nobody can do more after than before: each permit was there before, and each forbid from before
// is still there. Policies are compared by their text without annotations.
func Widenings(before, after *Set, bundle string) (list []Widening) {
	for _, a := range after.actions {
		if a.appliesTo == nil || a.bundle != bundle {
			continue
		}
		for _, principal := range a.appliesTo.Principals {
			for _, resource := range a.appliesTo.Resources {
				if w, wider := widening(before, after, a, principal, resource); wider {
					list = append(list, w)
				}
			}
		}
	}
	slices.SortFunc(list, func(a, b Widening) int {
		return cmp.Or(strings.Compare(a.Action.String(), b.Action.String()), cmp.Compare(a.Principal, b.Principal), cmp.Compare(a.Resource, b.Resource))
	})
	return list
}

// applying returns the policies of the action's own bundle that can apply, by what they mean.
func (a *action) applying(principal, resource cedar.EntityType) (permits, forbids map[string]*policy) {
	permits, forbids = map[string]*policy{}, map[string]*policy{}
	a.index.each(func(p *policy) {
		if p.ref.Bundle != a.bundle || !p.principal.couldBe(principal) || !p.resource.couldBe(resource) {
			return
		}
		tree := *p.source
		tree.Annotations = nil
		key := string(cedar.NewPolicyFromAST((*ast.Policy)(&tree)).MarshalCedar())
		if p.forbid {
			forbids[key] = p
		} else {
			permits[key] = p
		}
	})
	return permits, forbids
}

func widening(before, after *Set, a *action, principal, resource cedar.EntityType) (w Widening, wider bool) {
	w = Widening{Principal: principal, Action: a.uid, Resource: resource}
	permits, forbids := a.applying(principal, resource)
	var oldPermits, oldForbids map[string]*policy
	old := before.actions[a.uid]
	if old != nil && old.appliesTo != nil && slices.Contains(old.appliesTo.Principals, principal) && slices.Contains(old.appliesTo.Resources, resource) {
		oldPermits, oldForbids = old.applying(principal, resource)
	}
	ignoresFailures := after.bundles[a.bundle].skipForbidErrors
	failuresCount := before.bundles[a.bundle] != nil && !before.bundles[a.bundle].skipForbidErrors
	for key := range permits {
		wider = wider || oldPermits[key] == nil
	}
	for _, key := range sortedKeys(oldForbids) {
		kept := forbids[key] != nil && !(failuresCount && ignoresFailures)
		p := oldForbids[key]
		mayFail := slices.ContainsFunc(p.source.Conditions, func(c xast.ConditionType) bool { return !total(c.Body) })
		if !kept && forbids[key] != nil && !mayFail {
			kept = true
		}
		if kept {
			continue
		}
		wider = true
		if failuresCount && mayFail {
			w.Failing = append(w.Failing, p.text)
		}
	}
	sameFields := a.fieldOf == nil || old == nil || before.sameCatalogue(after, resource)
	switch {
	case len(permits) == 0:
		return w, false
	case !sameFields:
		wider, w.Unprovable = true, "fields.yaml has other fields or groups, which the tools do not look at"
	case old != nil && !sameParents(before, after, a.uid) && mentionsAction(permits, forbids, oldPermits, oldForbids):
		wider, w.Unprovable = true, "the action is in other groups, and conditions of policies look at the action"
	}
	texts := func(lists ...map[string]*policy) (out []string) {
		for _, list := range lists {
			for _, key := range sortedKeys(list) {
				out = append(out, list[key].text)
			}
		}
		return out
	}
	w.Before, w.After = texts(oldPermits, oldForbids), texts(permits, forbids)
	return w, wider
}

// sameCatalogue reports whether two sets have the same fields of a type, in the same groups.
func (s *Set) sameCatalogue(o *Set, t cedar.EntityType) bool {
	a, b := s.catalogues[t], o.catalogues[t]
	if a == nil || b == nil {
		return a == b
	}
	return slices.EqualFunc(a.leaves, b.leaves, func(x, y leaf) bool {
		return x.uid == y.uid && s.static[x.uid].Parents.Equal(o.static[y.uid].Parents)
	})
}

func sameParents(before, after *Set, action cedar.EntityUID) bool {
	return before.static[action].Parents.Equal(after.static[action].Parents)
}

// mentionsAction reports whether a condition of a policy looks at the action.
func mentionsAction(lists ...map[string]*policy) bool {
	for _, list := range lists {
		for _, p := range list {
			if slices.ContainsFunc(p.source.Conditions, func(c xast.ConditionType) bool { return mentions(c.Body, "action") }) {
				return true
			}
		}
	}
	return false
}
