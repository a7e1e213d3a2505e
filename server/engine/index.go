package engine

import (
	"iter"
	"slices"

	"github.com/cedar-policy/cedar-go"
)

// index finds the policies of one action that could apply to a request. Cedar
// evaluates a policy's scope before its conditions, so leaving out a policy
// whose scope cannot match changes neither decision, reasons nor errors.
type index struct {
	// Each policy stands in exactly one of these, by the first that fits: the
	// entity its principal scope names (== or in), the entity its resource
	// scope names, neither.
	byPrincipal, byResource map[cedar.EntityUID][]*policy
	rest                    []*policy
	// level is how deep the policies dereference entities, at least 1.
	level int
	// permitsByResource are the permits of byResource, for the function check,
	// which must look past the one resource asked about.
	permitsByResource []*policy
}

func newIndex() *index {
	return &index{
		byPrincipal: map[cedar.EntityUID][]*policy{},
		byResource:  map[cedar.EntityUID][]*policy{},
		level:       1,
	}
}

func (ix *index) add(p *policy) {
	ix.level = max(ix.level, p.level)
	switch {
	case p.principal.hasUID:
		ix.byPrincipal[p.principal.uid] = append(ix.byPrincipal[p.principal.uid], p)
	case p.resource.hasUID:
		ix.byResource[p.resource.uid] = append(ix.byResource[p.resource.uid], p)
		if !p.forbid {
			ix.permitsByResource = append(ix.permitsByResource, p)
		}
	default:
		ix.rest = append(ix.rest, p)
	}
}

// each calls fn for every policy.
func (ix *index) each(fn func(*policy)) {
	for _, p := range ix.rest {
		fn(p)
	}
	for _, by := range []map[cedar.EntityUID][]*policy{ix.byPrincipal, ix.byResource} {
		for _, list := range by {
			for _, p := range list {
				fn(p)
			}
		}
	}
}

// candidates returns the policies that could match, in stable order.
func (ix *index) candidates(principal, resource cedar.EntityUID, e *entities) policies {
	var out policies
	keep := func(list []*policy) {
		for _, p := range list {
			if p.principal.couldBe(principal.Type) && p.resource.couldBe(resource.Type) {
				out = append(out, p)
			}
		}
	}
	keep(ix.rest)
	if len(ix.byPrincipal) > 0 {
		keep(ix.byPrincipal[principal])
		for a := range e.ancestors(principal) {
			if a != principal {
				keep(ix.byPrincipal[a])
			}
		}
	}
	if len(ix.byResource) > 0 {
		keep(ix.byResource[resource])
		for a := range e.ancestors(resource) {
			if a != resource {
				keep(ix.byResource[a])
			}
		}
	}
	slices.SortFunc(out, comparePolicies)
	return out
}

// policies is an ordered list that cedar.Authorize can run.
type policies []*policy

// All implements cedar.PolicyIterator.
func (l policies) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for _, p := range l {
			if !yield(p.name, p.compiled) {
				return
			}
		}
	}
}

func (l policies) get(id cedar.PolicyID) *policy {
	for _, p := range l {
		if p.name == id {
			return p
		}
	}
	panic("engine: Cedar named a policy that it was not given: " + string(id))
}

// find returns the policies of reasons, which come in our own order.
func (l policies) find(reasons []cedar.DiagnosticReason) []*policy {
	if len(reasons) == 0 {
		return nil
	}
	out := make([]*policy, 0, len(reasons))
	i := 0
	for _, r := range reasons {
		for l[i].name != r.PolicyID {
			i++
		}
		out = append(out, l[i])
	}
	return out
}

func comparePolicies(a, b *policy) int { return a.ref.compare(b.ref) }
