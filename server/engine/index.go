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
	// parts hold the policies: one those that are about this action, the others
	// are shared with all actions of a group, or all of a bundle.
	parts []*part
	own   *part
	// level is how deep the policies dereference entities, at least 1.
	level int
}

func newIndex() *index { return &index{level: 1} }

func (ix *index) share(pt *part) { ix.parts = append(ix.parts, pt) }

// add puts in a policy that is about this action.
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
	// Each policy stands in exactly one node: of the entity its principal scope
	// names (== or in), or of no principal; and there under the entity its
	// resource scope names, or under none.
	byPrincipal  map[cedar.EntityUID]*node
	anyPrincipal node
	// level is how deep the policies dereference entities, at least 1.
	level int
}

// node holds the policies of one principal scope.
type node struct {
	byResource map[cedar.EntityUID][]*policy
	rest       []*policy
	// doors are permits for the function check, which must look past the one
	// resource asked about: of those that no principal can tell apart, one.
	// Those that ask whether the principal is in some entity stand under it.
	doors   []*policy
	doorsIn map[cedar.EntityUID][]*policy
	seen    map[doorKey]bool // while compiling
}

// doorKey is all that the function check looks at.
type doorKey struct {
	conjuncts    string
	principal    scope
	resourceType cedar.EntityType
}

func newPart() *part {
	return &part{byPrincipal: map[cedar.EntityUID]*node{}, level: 1}
}

func (ix *part) add(p *policy) {
	ix.level = max(ix.level, p.level)
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
	key := doorKey{p.conjunctText, p.principal, ""}
	if p.resource.hasType {
		key.resourceType = p.resource.typ
	}
	if n.seen[key] {
		return
	}
	if n.seen == nil {
		n.seen = map[doorKey]bool{}
	}
	n.seen[key] = true
	if p.within != nil {
		if n.doorsIn == nil {
			n.doorsIn = map[cedar.EntityUID][]*policy{}
		}
		n.doorsIn[*p.within] = append(n.doorsIn[*p.within], p)
		return
	}
	n.doors = append(n.doors, p)
}

// done drops what only compiling needs.
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
		for a := range e.ancestors(resource) {
			if a != resource {
				keep(n.byResource[a])
			}
		}
	}
	for n := range ix.nodes(principal, e) {
		look(n)
	}
	slices.SortFunc(out, comparePolicies)
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
		for a := range e.ancestors(principal) {
			if a == principal {
				continue
			}
			if n := ix.byPrincipal[a]; n != nil && !yield(n) {
				return
			}
		}
	}
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
