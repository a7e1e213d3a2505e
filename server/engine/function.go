package engine

import (
	"iter"

	"github.com/cedar-policy/cedar-go"
)

// deniedAtFunction says whether a denied question was denied for every
// resource of its type: the principal has no use of the action at all.
//
// It holds when a forbid that looks at no particular resource fired (or failed,
// where failing denies): the same forbid fires for all of them. It also holds
// when each permit that could match this action and resource type is shut for a
// reason that no resource can change: its scope excludes the principal, or one
// of its conjuncts that does not mention the resource is false or fails. A
// conjunction needs each of its parts to be true, so one such part decides,
// whatever the parts before it say.
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
		if !p.shut(q.request, e) {
			return false
		}
	}
	return true
}

// permitsFor yields the permits whose scope does not exclude the principal, for
// any resource; of permits that no principal can tell apart, one.
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
			if !each(n.doors) {
				return
			}
			if len(n.doorsIn) == 0 {
				continue
			}
			if !each(n.doorsIn[principal]) {
				return
			}
			for a := range e.ancestors(principal) {
				if a != principal && !each(n.doorsIn[a]) {
					return
				}
			}
		}
	}
}

// shut says whether some conjunct that does not mention the resource is not
// true.
func (p *policy) shut(req cedar.Request, e *entities) bool {
	for _, c := range p.conjuncts {
		if d, _ := cedar.Authorize(single{c}, e, req); d != cedar.Allow {
			return true
		}
	}
	return false
}

// single is one policy that cedar.Authorize can run.
type single struct{ p *cedar.Policy }

// All implements cedar.PolicyIterator.
func (s single) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) { yield("", s.p) }
}
