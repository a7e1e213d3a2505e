package engine

import (
	"iter"

	"github.com/cedar-policy/cedar-go"
)

// deniedAtFunction reports whether a denied question is denied for every resource of
// its type, so that the principal cannot use the action at all.
//
// This is so if a forbid that does not depend on the resource was satisfied (or failed,
// where failing denies): it is satisfied for all resources. It is also so if no permit
// for this action and resource type can be satisfied, whatever the resource: the scope
// of each excludes the principal, or one of its conjuncts that does not mention the
// resource is false or fails. A conjunction is true only if all of its parts are, so one
// false part is enough.
//
// This is a static walk over the policies, done at compile time, and an
// evaluation of whole conjuncts here. It is deliberately not partial
// evaluation, which in cedar-go disagrees with Authorize.
func (s *Set) deniedAtFunction(q *Question, object verdict, e *entities) bool {
	for _, p := range object.reasons {
		if p.forbid && p.anyResource {
			return true
		}
	}
	for p := range q.action.index.permitsFor(q.request.Principal, e) {
		if !p.resource.couldBe(q.request.Resource.Type) || !p.principal.couldBe(q.request.Principal.Type) {
			continue
		}
		if !e.meter.spend(p.cost) {
			return false
		}
		if !p.shut(q.request, e) {
			return false
		}
	}
	return true
}

// permitsFor yields the permits whose scope does not exclude the principal, for any
// resource. Of several permits that are equal for the function check it yields one.
func (ix *index) permitsFor(principal cedar.EntityUID, e *entities) iter.Seq[*policy] {
	return func(yield func(*policy) bool) {
		each := func(list []*policy) bool {
			for _, p := range list {
				// "principal == X" does not match by an ancestor.
				if p.principal.hasUID && !p.principal.in && p.principal.uid != principal {
					continue
				}
				if !yield(p) {
					return false
				}
			}
			return true
		}
		for n := range ix.nodes(principal, e) {
			if !each(n.functionPermits) {
				return
			}
			if len(n.functionPermitsIn) == 0 {
				continue
			}
			if !each(n.functionPermitsIn[principal]) || !e.meter.spend(int64(e.ancestors(principal).Len())) {
				return
			}
			for a := range e.ancestors(principal).All() {
				if a != principal && !each(n.functionPermitsIn[a]) {
					return
				}
			}
		}
	}
}

// shut reports whether a conjunct that does not mention the resource is false or fails,
// so that the permit cannot be satisfied for any resource.
func (p *policy) shut(req cedar.Request, e *entities) bool {
	for _, c := range p.conjuncts {
		if d, _ := cedar.Authorize(single{c}, e, req); d != cedar.Allow {
			return true
		}
	}
	return false
}

// single is one policy as a cedar.PolicyIterator.
type single struct{ p *cedar.Policy }

// All implements cedar.PolicyIterator.
func (s single) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) { yield("", s.p) }
}
