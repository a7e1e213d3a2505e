package engine

import (
	"iter"
	"slices"

	"github.com/cedar-policy/cedar-go"
)

// index finds the policies of one action that could apply to a request. Cedar
// evaluates a policy's scope before its conditions, so a policy whose scope cannot match
// can be left out: the decision, its reasons and its errors stay the same.
type index struct {
	// parts hold the policies. The first part has those whose scope names this action.
	// The others are shared with all actions of a group, or of a bundle.
	parts []*part
	own   *part
	// level is how deep the policies dereference entities, at least 1.
	level int
}

func newIndex() *index { return &index{level: 1} }

func (ix *index) share(pt *part) { ix.parts = append(ix.parts, pt) }

// add adds a policy whose scope names this action.
func (ix *index) add(p *policy) {
	if ix.own == nil {
		ix.own = newPart()
		ix.share(ix.own)
	}
	ix.own.add(p)
}

// done ends adding.
func (ix *index) done() {
	for _, pt := range ix.parts {
		ix.level = max(ix.level, pt.level)
		pt.done()
	}
}

// each calls fn for every policy.
func (ix *index) each(fn func(*policy)) {
	for _, pt := range ix.parts {
		pt.each(fn)
	}
}

// nodes yields the nodes whose principal scope could match.
func (ix *index) nodes(principal cedar.EntityUID, e *entities) iter.Seq[*node] {
	return func(yield func(*node) bool) {
		for _, pt := range ix.parts {
			for n := range pt.nodes(principal, e) {
				if !yield(n) {
					return
				}
			}
		}
	}
}

// part is an index of policies of one action scope.
type part struct {
	// Each policy is in exactly one node: that of the entity in its principal scope
	// (== or in), or anyPrincipal if the scope has none. Within the node it is listed
	// under the entity in its resource scope, or in rest.
	byPrincipal  map[cedar.EntityUID]*node
	anyPrincipal node
	// level is how deep the policies dereference entities, at least 1.
	level int
	// always is the cost of the policies that every question evaluates.
	always int64
}

// node holds the policies of one principal scope.
type node struct {
	byResource map[cedar.EntityUID][]*policy
	rest       []*policy
	// functionPermits are the permits that the function check considers, which is about
	// all resources and not only the one in the question. Of several permits with equal
	// keys it has one. Permits with a condition "principal in X" are in
	// functionPermitsIn, under X.
	functionPermits   []*policy
	functionPermitsIn map[cedar.EntityUID][]*policy
	seen              map[permitKey]bool // used while compiling
}

// permitKey has everything about a permit that the function check depends on.
type permitKey struct {
	conjuncts    string
	principal    scope
	resourceType cedar.EntityType
}

func newPart() *part {
	return &part{byPrincipal: map[cedar.EntityUID]*node{}, level: 1}
}

func (ix *part) add(p *policy) {
	ix.level = max(ix.level, p.level)
	if p.joinsAll() {
		ix.always += p.cost
	}
	n := &ix.anyPrincipal
	if p.principal.hasUID {
		if n = ix.byPrincipal[p.principal.uid]; n == nil {
			n = &node{}
			ix.byPrincipal[p.principal.uid] = n
		}
	}
	n.add(p)
}

func (n *node) add(p *policy) {
	if p.resource.hasUID {
		if n.byResource == nil {
			n.byResource = map[cedar.EntityUID][]*policy{}
		}
		n.byResource[p.resource.uid] = append(n.byResource[p.resource.uid], p)
	} else {
		n.rest = append(n.rest, p)
	}
	if p.forbid {
		return
	}
	key := permitKey{p.conjunctText, p.principal, ""}
	if p.resource.hasType {
		key.resourceType = p.resource.typ
	}
	if n.seen[key] {
		return
	}
	if n.seen == nil {
		n.seen = map[permitKey]bool{}
	}
	n.seen[key] = true
	if p.within != nil {
		if n.functionPermitsIn == nil {
			n.functionPermitsIn = map[cedar.EntityUID][]*policy{}
		}
		n.functionPermitsIn[*p.within] = append(n.functionPermitsIn[*p.within], p)
		return
	}
	n.functionPermits = append(n.functionPermits, p)
}

// done releases what is needed only while compiling.
func (ix *part) done() {
	ix.anyPrincipal.seen = nil
	for _, n := range ix.byPrincipal {
		n.seen = nil
	}
}

// each calls fn for every policy.
func (ix *part) each(fn func(*policy)) {
	ix.anyPrincipal.each(fn)
	for _, n := range ix.byPrincipal {
		n.each(fn)
	}
}

func (n *node) each(fn func(*policy)) {
	for _, p := range n.rest {
		fn(p)
	}
	for _, list := range n.byResource {
		for _, p := range list {
			fn(p)
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
	look := func(n *node) {
		keep(n.rest)
		if len(n.byResource) == 0 {
			return
		}
		keep(n.byResource[resource])
		if !e.meter.spend(int64(e.ancestors(resource).Len())) {
			return
		}
		for a := range e.ancestors(resource).All() {
			if a != resource {
				keep(n.byResource[a])
			}
		}
	}
	for n := range ix.nodes(principal, e) {
		look(n)
	}
	slices.SortFunc(out, comparePolicies)
	e.meter.spend(stepsOfCandidate * int64(len(out)))
	return out
}

// nodes yields the nodes whose principal scope could match.
func (ix *part) nodes(principal cedar.EntityUID, e *entities) iter.Seq[*node] {
	return func(yield func(*node) bool) {
		if !yield(&ix.anyPrincipal) || len(ix.byPrincipal) == 0 {
			return
		}
		if n := ix.byPrincipal[principal]; n != nil && !yield(n) {
			return
		}
		if !e.meter.spend(int64(e.ancestors(principal).Len())) {
			return
		}
		for a := range e.ancestors(principal).All() {
			if a == principal {
				continue
			}
			if n := ix.byPrincipal[a]; n != nil && !yield(n) {
				return
			}
		}
	}
}

// policies is an ordered list of policies.
type policies []*policy

// metered is a list of policies as a cedar.PolicyIterator. It ends when the budget of the
// meter is spent.
type metered struct {
	policies
	meter *meter
}

// All implements cedar.PolicyIterator.
func (l metered) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for _, p := range l.policies {
			if !l.meter.spend(p.cost) || !yield(p.name, p.compiled) {
				return
			}
		}
	}
}

// find returns the policies that reasons names, in the order of the list.
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
