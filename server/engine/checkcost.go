package engine

import (
	"fmt"
	"math"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Cedar's validator cannot be stopped inside of one policy, and for some short policies it
// takes hours. So its work is estimated before it begins, in steps of about 70 ns: one step is
// one node that gets a type, or one comparison of two attributes that "has" guarantees. Each is
// counted once for each environment, which is a combination of principal type, resource type and
// action. The estimate is an upper bound, except for the work that every policy causes.
const (
	maxPolicySteps = 20_000_000  // about a second and a half
	maxBundleSteps = 200_000_000 // of all policies of a bundle, about 15 seconds
	// maxActionSteps bounds the pairs of an action and a group that it is in, also through
	// other groups.
	maxActionSteps = 1_000_000
	// stepsOfAttribute is the steps to compare the type of one attribute of two records.
	stepsOfAttribute = 4
	// maxCostly bounds the policies that are named because they cost too much.
	maxCostly = 20

	// What a server keeps in memory of the policies of a bundle grows with these. A policy whose
	// text is a few kilobytes can have thousands of nodes, and each takes some hundred bytes.
	maxBundlePolicies    = 100_000
	maxBundlePolicyBytes = 16 << 20
	maxBundleNodes       = 2_000_000
)

// room counts what the policies of a bundle take.
type room struct{ policies, bytes, nodes int64 }

// full returns why a bundle has no room for more policies, or "".
func (r *room) full() string {
	switch {
	case r.policies > maxBundlePolicies:
		return fmt.Sprintf("has more than %d policies", maxBundlePolicies)
	case r.bytes > maxBundlePolicyBytes:
		return fmt.Sprintf("has policies of more than %d bytes", maxBundlePolicyBytes)
	case r.nodes > maxBundleNodes:
		return fmt.Sprintf("has policies with more than %d expressions", maxBundleNodes)
	}
	return ""
}

// take counts one more policy.
func (r *room) take(p *policy) {
	r.policies++
	r.bytes += int64(len(p.text))
	for _, c := range p.tree().Conditions {
		r.nodes += nodes(c.Body)
	}
}

// checkCosts estimates the work of validating the policies of one bundle.
type checkCosts struct {
	set         *Set
	actionSteps int64 // to visit the groups of every action
	typeEdges   int64 // parents of all entity types together
	width       int64 // attributes of the widest entity type
	children    map[cedar.EntityType][]cedar.EntityType
	below       map[cedar.EntityType]int64 // steps to find the types below a type
	matched     map[string][]*action       // by the action scope of policies
}

func newCheckCosts(s *Set, bundle string) *checkCosts {
	k := &checkCosts{
		set: s, actionSteps: s.actionSteps(bundle), width: 1,
		children: map[cedar.EntityType][]cedar.EntityType{}, below: map[cedar.EntityType]int64{}, matched: map[string][]*action{},
	}
	for name, e := range s.schema.Entities {
		k.width = max(k.width, typeWidth(e.Shape))
		if e.Tags != nil {
			k.width = max(k.width, typeWidth(e.Tags))
		}
		k.typeEdges += int64(len(e.ParentTypes))
		for _, p := range e.ParentTypes {
			k.children[p] = append(k.children[p], name)
		}
	}
	return k
}

// actionSteps counts the pairs of an action that a bundle decides and a group above it. It stops
// soon after maxActionSteps.
func (s *Set) actionSteps(bundle string) int64 {
	var n int64
	for uid := range s.schema.Actions {
		if !decides(bundle, s.Owner(uid.Type)) {
			continue
		}
		seen := map[cedar.EntityUID]bool{uid: true}
		for todo := []cedar.EntityUID{uid}; len(todo) > 0; {
			next := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			n++
			for p := range s.schema.Actions[next].Entity.Parents.All() {
				if n++; !seen[p] {
					seen[p] = true
					todo = append(todo, p)
				}
			}
			if n > maxActionSteps {
				return n
			}
		}
	}
	return n
}

// typeWidth counts the attributes of a type, also those of records in it.
func typeWidth(t resolved.IsType) int64 {
	switch t := t.(type) {
	case resolved.RecordType:
		n := int64(1)
		for _, a := range t {
			n += typeWidth(a.Type)
		}
		return n
	case resolved.SetType:
		return 1 + typeWidth(t.Element)
	}
	return 1
}

// policy estimates the steps to validate one policy.
func (k *checkCosts) policy(p *policy) int64 {
	// The actions in the scope are looked for several times.
	steps, envs := 2*int64(len(k.set.actions)), int64(0)
	if !p.action.all {
		if steps = add(steps, times(int64(len(p.action.uids)), k.actionSteps)); steps > maxPolicySteps {
			return steps
		}
	}
	key := p.action.key()
	matched, ok := k.matched[key]
	if !ok {
		matched = k.set.matchedActions(p)
		k.matched[key] = matched
	}
	width := k.width
	for _, a := range matched {
		if a.appliesTo == nil {
			continue
		}
		w := typeWidth(a.appliesTo.Context)
		width, steps = max(width, w), add(steps, w)
		envs = add(envs, times(scopeTypes(p.principal, len(a.appliesTo.Principals)), scopeTypes(p.resource, len(a.appliesTo.Resources))))
		// All environments are listed before those of the scope are taken.
		steps = add(steps, int64(len(a.appliesTo.Principals)*len(a.appliesTo.Resources)))
	}
	for _, s := range []scope{p.principal, p.resource} {
		if s.in {
			steps = add(steps, k.typesBelow(s.uid.Type))
		}
	}
	w := costWalk{k: k, width: times(width, stepsOfAttribute)}
	conditions := int64(0)
	for _, c := range p.tree().Conditions {
		one, _ := w.expr(c.Body, guarantees{})
		conditions = add(conditions, times(one, envs))
	}
	if w.compares {
		conditions = times(2, conditions) // checkConditions validates such a policy once more
	}
	return add(steps, conditions)
}

// scopeTypes returns how many of n types a scope leaves.
func scopeTypes(s scope, n int) int64 {
	if s.hasType || s.hasUID && !s.in {
		return int64(min(n, 1))
	}
	return int64(n)
}

// typesBelow estimates the steps to find all types below a type: the validator goes through all
// types again for each level of the hierarchy, and searches a list for each.
func (k *checkCosts) typesBelow(t cedar.EntityType) int64 {
	if n, ok := k.below[t]; ok {
		return n
	}
	seen := map[cedar.EntityType]bool{t: true}
	levels := int64(1)
	for level := []cedar.EntityType{t}; len(level) > 0; levels++ {
		var next []cedar.EntityType
		for _, parent := range level {
			for _, c := range k.children[parent] {
				if !seen[c] {
					seen[c] = true
					next = append(next, c)
				}
			}
		}
		level = next
	}
	// A step here is the comparison of two names, which takes a fourth of the usual time.
	n := times(times(int64(len(k.set.schema.Entities))+k.typeEdges, int64(len(seen))), levels) / 4
	k.below[t] = n
	return n
}

// guarantees are the attributes and tags that "has" guarantees at a place of a policy. The
// validator keeps them in a list and searches it from the front.
type guarantees struct {
	count int64
	size  int64 // nodes of the expressions that have the attributes
}

// costWalk estimates the steps to find the type of an expression in one environment.
type costWalk struct {
	k     *checkCosts
	width int64 // steps to compare two values of the widest type

	compares bool // there is one of < <= > >=
}

// expr returns the steps for an expression, and what is guaranteed after it if it is true.
func (w *costWalk) expr(e xast.IsNode, g guarantees) (int64, guarantees) {
	switch t := e.(type) {
	case xast.NodeTypeAnd:
		left, gl := w.expr(t.Left, g)
		right, gr := w.expr(t.Right, gl)
		return add(1, left, right, mergeSteps(gl)), gr
	case xast.NodeTypeOr:
		left, gl := w.expr(t.Left, g)
		right, gr := w.expr(t.Right, g)
		return add(1, left, right, commonSteps(g, gl, gr)), wider(gl, gr)
	case xast.NodeTypeIfThenElse:
		cond, gc := w.expr(t.If, g)
		then, gt := w.expr(t.Then, gc)
		other, ge := w.expr(t.Else, g)
		return add(w.width, cond, then, other, mergeSteps(gc), commonSteps(g, gt, ge)), wider(gt, ge)
	case xast.NodeTypeHas:
		arg, _ := w.expr(t.Arg, g)
		return add(1, arg, 2*g.size), g.with(t.Arg)
	case xast.NodeTypeHasTag:
		left, _ := w.expr(t.Left, g)
		right, _ := w.expr(t.Right, g)
		after := g.with(t.Left)
		return add(1, left, right, 2*g.size), guarantees{after.count, add(after.size, nodes(t.Right))}
	case xast.NodeTypeGetTag:
		left, _ := w.expr(t.Left, g)
		right, _ := w.expr(t.Right, g)
		return add(1, left, right, g.size), g
	case xast.NodeTypeAccess:
		// To describe an attribute that nothing guarantees, the validator finds the type of
		// what has it once more, and so on inwards.
		arg, _ := w.expr(t.Arg, g)
		return add(1, times(2, arg), g.size), g
	case xast.NodeTypeIn:
		return add(w.operands(e, g), w.within(t.Right)), g
	case xast.NodeTypeIsIn:
		return add(w.operands(e, g), w.within(t.Entity)), g
	case xast.NodeTypeEquals:
		return add(w.operands(e, g), w.compared(t.Left, t.Right)), g
	case xast.NodeTypeNotEquals:
		return add(w.operands(e, g), w.compared(t.Left, t.Right)), g
	case xast.NodeTypeContains, xast.NodeTypeContainsAll, xast.NodeTypeContainsAny:
		return add(w.operands(e, g), w.width), g
	case xast.NodeTypeLessThan, xast.NodeTypeLessThanOrEqual, xast.NodeTypeGreaterThan, xast.NodeTypeGreaterThanOrEqual:
		w.compares = true
		return w.operands(e, g), g
	case xast.NodeTypeSet:
		n := w.operands(e, g)
		for _, el := range t.Elements {
			n = add(n, w.compared(el, el))
		}
		return n, g
	}
	return w.operands(e, g), g
}

// operands returns the steps for all operands of an expression, and one for itself.
func (w *costWalk) operands(e xast.IsNode, g guarantees) int64 {
	n, root := int64(1), true
	xast.Inspect(xast.NewNode(e), func(child xast.IsNode) bool {
		if root {
			root = false
			return true
		}
		if child != nil {
			one, _ := w.expr(child, g)
			n = add(n, one)
		}
		return false
	})
	return n
}

// compared returns the steps to compare the types of two operands. Only types of records are
// wide.
func (w *costWalk) compared(a, b xast.IsNode) int64 {
	for _, e := range []xast.IsNode{a, b} {
		if v, ok := e.(xast.NodeValue); ok {
			if _, record := v.Value.(cedar.Record); !record {
				return 1
			}
		}
	}
	return w.width
}

// within returns the steps to find out whether something can be in the right side of "in".
func (w *costWalk) within(right xast.IsNode) int64 {
	n := w.k.typeEdges
	actions := int64(0)
	xast.Inspect(xast.NewNode(right), func(e xast.IsNode) bool {
		if v, ok := e.(xast.NodeTypeVariable); ok && v.Name == "action" {
			actions++
		}
		if v, ok := e.(xast.NodeValue); ok {
			if uid, ok := v.Value.(cedar.EntityUID); ok && isActionType(uid.Type) {
				actions++
			}
		}
		return true
	})
	return add(n, times(actions, w.k.actionSteps))
}

func (g guarantees) with(on xast.IsNode) guarantees {
	return guarantees{g.count + 1, add(g.size, nodes(on))}
}

// mergeSteps is what the validator takes to add the guarantees of a condition to those before it:
// it searches each of them in the list.
func mergeSteps(g guarantees) int64 { return times(g.count, g.size) / 2 }

// commonSteps is what it takes to find the guarantees that a and b have in common. Both begin with
// those of before.
func commonSteps(before, a, b guarantees) int64 {
	return add(mergeSteps(before), times(a.count-before.count, b.size))
}

func wider(a, b guarantees) guarantees {
	return guarantees{max(a.count, b.count), max(a.size, b.size)}
}

// nodes counts the nodes of an expression.
func nodes(e xast.IsNode) int64 {
	n := int64(0)
	xast.Inspect(xast.NewNode(e), func(xast.IsNode) bool { n++; return true })
	return n
}

// add and times stop at the largest number.
func add(list ...int64) int64 {
	sum := int64(0)
	for _, n := range list {
		if sum > math.MaxInt64-n {
			return math.MaxInt64
		}
		sum += n
	}
	return sum
}

func times(a, b int64) int64 {
	if a > 0 && b > math.MaxInt64/a {
		return math.MaxInt64
	}
	return a * b
}

// affordable refuses policies that would take the validator too long. It reports whether all
// may be checked. What was published by a version without these limits is checked
// nevertheless.
func (c *compiler) affordable(b *compiledBundle) bool {
	if c.trusted || c.published[b.name] {
		return true
	}
	k := newCheckCosts(c.set, b.name)
	refused, total := 0, int64(0)
	for _, p := range b.policies {
		if c.stopped() || refused == maxCostly {
			return false
		}
		n := k.policy(p)
		if n > maxPolicySteps {
			refused++
			c.report(finding(p, fmt.Sprintf("takes %s steps to check, the limit is %s", million(n), million(maxPolicySteps)),
				"split it into policies with fewer has, fewer attributes in a row and fewer actions; steps are counted for each principal type, resource type and action that it applies to"))
		} else if total = add(total, n); total > maxBundleSteps {
			c.report(Finding{Bundle: b.name, Message: fmt.Sprintf("its policies take more than %s steps to check", million(maxBundleSteps)),
				Hint: "name the actions and types that a policy is for in its scope, or split the bundle"})
			return false
		}
	}
	return refused == 0
}

// million writes a number of steps.
func million(n int64) string {
	if n == math.MaxInt64 {
		return "far too many"
	}
	return fmt.Sprintf("%d million", (n+999_999)/1_000_000)
}
