package engine

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Work is counted in steps. A step is about the time in which Cedar evaluates one node of an
// expression, some 20 ns. The cost of a policy is an upper bound of the steps of one
// evaluation, whatever the question and the data are. It is computed when the policy is
// compiled, so the same question always costs the same, on a busy machine as on an idle one.
const (
	// MaxPolicyCost is the largest cost of a policy that can be published: one evaluation
	// cannot be interrupted, and takes a few milliseconds at most.
	MaxPolicyCost = 100_000
	// MaxDecisionCost is how many steps one decision may take, less than a second.
	MaxDecisionCost = 20_000_000
	// pauseEvery is after how many steps [Pause] is called.
	pauseEvery = 20_000
)

// ErrTooCostly is a question whose decision would take more than [MaxDecisionCost].
var ErrTooCostly = errors.New("too much work for one decision")

// Pause is called between pieces of work, about every half a millisecond, with the bundle
// that the question is about and the steps since the last call. It may wait, and ends the work
// with an error.
type Pause func(bundle string, steps int64) error

// meter counts the work of one decision. A nil meter counts nothing.
type meter struct {
	bundle string
	// guardrails names the other bundle whose policies join the decision, if there is one.
	guardrails string

	pool *Pool
	left int64 // of the decision's budget
	err  error // why the work must end
}

func (sl *Slice) newMeter() *meter {
	m := &meter{bundle: sl.q.action.bundle, pool: sl.pool, left: MaxDecisionCost}
	if sl.set.bundles[Guardrails] != nil && m.bundle != Guardrails {
		m.guardrails = ", those of " + Guardrails
	}
	if sl.pool.unbounded {
		m.left = 1 << 62
	}
	return m
}

// spend takes steps from the budget before the work is done. It returns false if the work
// must not be done: then err says why, and what was found so far is not the answer.
func (m *meter) spend(steps int64) bool {
	if m == nil {
		return true
	}
	if m.err != nil {
		return false
	}
	if m.left -= steps; m.left < 0 {
		m.err = fmt.Errorf("%w: the policies of bundle %q%s and the entities of this question take more than %s steps; give policies that apply to every question a principal, a resource or a type in their scope",
			ErrTooCostly, m.bundle, m.guardrails, million(MaxDecisionCost))
		return false
	}
	m.err = m.pool.work(m.bundle, steps)
	return m.err == nil
}

// refund takes back steps that were spent, because the same work is counted again.
func (m *meter) refund(steps int64) {
	if m != nil {
		m.left += steps
	}
}

// fail ends the work with an error.
func (m *meter) fail(err error) {
	if m != nil && m.err == nil {
		m.err = err
	}
}

// failed returns why the work had to end, or nil.
func (m *meter) failed() error {
	if m == nil {
		return nil
	}
	return m.err
}

// look pauses, however little work was done since the last pause.
func (p *Pool) look(bundle string) error {
	if p.pause == nil {
		return nil
	}
	if p.worked >= pauseEvery {
		return p.work(bundle, 0)
	}
	return p.pause(bundle, 0)
}

// count counts steps without a pause: of loads, and of the walk over entities, which ends when the
// context does.
func (p *Pool) count(steps int64) { p.worked += steps }

// work counts steps of all questions of the pool, and pauses from time to time.
func (p *Pool) work(bundle string, steps int64) error {
	if p.pause == nil {
		return nil
	}
	if p.worked += steps; p.worked < pauseEvery {
		return nil
	}
	worked := p.worked
	p.worked = 0
	return p.pause(bundle, worked)
}

// The steps of operations, as bounds for the largest values that requests and stored entities
// can have.
const (
	stepsOfNode      = 2
	stepsOfEquals    = 5      // of texts: 4 KiB in 0.1 µs
	stepsOfExtension = 10     // to parse a text
	stepsOfElement   = 10     // to put one value into a set or record
	stepsOfLookup    = 4      // of one entity, as for each ancestor that "in" passes
	stepsOfAncestor  = 10     // to put one ancestor into the set of parents
	stepsOfEdge      = 3      // to follow one parent or reference
	stepsOfCandidate = 2      // to find one policy in the index
	stepsOfField     = 50     // to make the question about one field
	stepsOfReason    = 4      // to list a policy with a field
	stepsOfSet       = 2_000  // to compare or search sets of up to 1,000 texts or numbers
	stepsOfSets      = 10_000 // the same for sets of sets and sets of records
	stepsOfPair      = 50     // to compare two sets or records whose hashes are equal
	bytesInStep      = 13     // that the matcher of patterns compares, or that are hashed
	stepsOfText      = MaxStringBytes / bytesInStep

	stepsOfExplanation = 50 // to write the text about one policy
	explainings        = 4  // how often an explanation evaluates a condition, at most
)

// coster computes the cost of a policy.
type coster struct {
	types *leveler
	cost  int64
	// costliest is the operation that takes the most steps by itself.
	costliest xast.IsNode
	most      int64
}

// costOf returns the cost of a policy, and its costliest operation.
func (l *leveler) costOf(tree *xast.Policy) (cost int64, costliest xast.IsNode) {
	c := &coster{types: l, cost: 10 + stepsOfElement*int64(len(actionScopeOf(tree.Action).uids))} // its scope
	for _, cond := range tree.Conditions {
		c.add(cond.Body)
	}
	return c.cost, c.costliest
}

func (c *coster) add(n xast.IsNode) {
	steps := c.steps(n)
	c.cost += steps
	if steps > c.most {
		c.most, c.costliest = steps, n
	}
	root := true
	xast.Inspect(xast.NewNode(n), func(child xast.IsNode) bool {
		if root {
			root = false
			return true
		}
		c.add(child)
		return false
	})
}

// steps is the cost of one operation without that of its operands.
func (c *coster) steps(n xast.IsNode) int64 {
	switch t := n.(type) {
	case xast.NodeTypeLike:
		return stepsOfLike(t)
	case xast.NodeTypeEquals:
		return stepsOfEquals + c.compare(t.Left, t.Right)
	case xast.NodeTypeNotEquals:
		return stepsOfEquals + c.compare(t.Left, t.Right)
	case xast.NodeTypeContains:
		return stepsOfText + c.compare(t.Right) // hashes the text, or the id
	case xast.NodeTypeContainsAll:
		return stepsOfNode + c.compare(t.Left, t.Right)
	case xast.NodeTypeContainsAny:
		return stepsOfNode + c.compare(t.Left, t.Right)
	case xast.NodeTypeIn:
		return stepsOfNode + c.compare(t.Right)
	case xast.NodeTypeRecord:
		return stepsOfNode + (stepsOfElement+stepsOfText)*int64(len(t.Elements))
	case xast.NodeTypeSet:
		n := int64(len(t.Elements))
		steps := stepsOfNode + stepsOfElement*n
		for _, e := range t.Elements {
			if _, constant := e.(xast.NodeValue); !constant {
				steps += stepsOfText
			}
		}
		if n > 1 && c.holds(t.Elements[0]) != plainValue {
			steps += stepsOfPair * n * (n - 1) / 2
		}
		return steps
	case xast.NodeTypeExtensionCall:
		return stepsOfExtension
	}
	return stepsOfNode
}

// stepsOfLike bounds the time to match a pattern: at each of the places of the longest text,
// the matcher compares up to one part between two wildcards.
func stepsOfLike(n xast.NodeTypeLike) int64 {
	text := strings.Trim(string(n.Value.MarshalCedar()), `"`)
	part, longest, first := 0, 0, 0
	wildcard := false
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '*':
			wildcard, part = true, 0
			continue
		case '\\':
			i++ // the next byte is no wildcard
		}
		if part++; wildcard {
			longest = max(longest, part)
		} else {
			first = part
		}
	}
	steps := stepsOfEquals + int64(first/bytesInStep)
	if longest > 0 {
		steps += int64(longest+2) * MaxStringBytes / bytesInStep
	}
	return steps
}

// kind sorts values by the time to compare them.
type kind int

const (
	plainValue kind = iota
	plainSet        // also a record
	setOfSets       // also a set of records, a record with a set, and a value of unknown type
)

// compare is the cost to compare or search values as large as these operands can be.
func (c *coster) compare(operands ...xast.IsNode) int64 {
	largest := plainValue
	for _, n := range operands {
		largest = max(largest, c.holds(n))
	}
	return [...]int64{plainValue: 0, plainSet: stepsOfSet, setOfSets: stepsOfSets}[largest]
}

func (c *coster) holds(n xast.IsNode) kind {
	switch t := n.(type) {
	case xast.NodeValue:
		return kindOfValue(t.Value)
	case xast.NodeTypeSet:
		largest := plainSet
		for _, e := range t.Elements {
			if c.holds(e) != plainValue {
				largest = setOfSets
			}
		}
		return largest
	case xast.NodeTypeRecord:
		largest := plainSet
		for _, e := range t.Elements {
			if c.holds(e.Value) != plainValue {
				largest = setOfSets
			}
		}
		return largest
	}
	types := c.types.expr(n).types
	if types == nil {
		return setOfSets
	}
	largest := plainValue
	for _, t := range types {
		largest = max(largest, kindOf(t))
	}
	return largest
}

func kindOf(t resolved.IsType) kind {
	switch t := t.(type) {
	case resolved.SetType:
		if kindOf(t.Element) != plainValue {
			return setOfSets
		}
		return plainSet
	case resolved.RecordType:
		for _, a := range t {
			if kindOf(a.Type) != plainValue {
				return setOfSets
			}
		}
		return plainSet
	}
	return plainValue
}

func kindOfValue(v cedar.Value) kind {
	switch v.(type) {
	case cedar.Set, cedar.Record:
		return setOfSets
	}
	return plainValue
}

// checkDecisionCost refuses policies that leave no budget for any decision of an action.
func (c *compiler) checkDecisionCost(a *action) {
	if c.published[a.bundle] && c.published[Guardrails] {
		return
	}
	all := int64(0)
	for _, pt := range a.index.parts {
		all += pt.always
	}
	if all <= MaxDecisionCost {
		return
	}
	cost := map[string]int64{} // of these policies, by bundle
	for _, pt := range a.index.parts {
		for _, p := range pt.anyPrincipal.rest {
			if p.joinsAll() {
				cost[p.ref.Bundle] += p.cost
			}
		}
	}
	bundle := a.bundle
	if cost[Guardrails] > cost[bundle] {
		bundle = Guardrails
	}
	guards := ""
	if n := cost[Guardrails]; n > 0 {
		guards = fmt.Sprintf(" (%s of %s)", million(n), Guardrails)
	}
	f := Finding{
		Bundle: bundle, Warning: c.published[bundle],
		Message: fmt.Sprintf("the policies without a principal, a resource or a type in their scope can take %s steps for each decision about %s%s, the limit is %s", million(all), a.uid, guards, million(MaxDecisionCost)),
		Hint:    "give policies a principal, a resource or a type in their scope, so that few of them are evaluated for each decision",
	}
	if !slices.ContainsFunc(c.findings, func(g Finding) bool { return g.Bundle == bundle && g.Hint == f.Hint }) {
		c.rule(f)
	}
}

// checkCost computes the cost of a policy, and refuses a policy that is too costly.
func (c *compiler) checkCost(p *policy, types *leveler) {
	cost, costliest := types.costOf(p.tree())
	p.cost = cost
	if cost > MaxPolicyCost && !c.published[p.ref.Bundle] {
		c.rule(finding(p, fmt.Sprintf("can take %d steps to evaluate, the limit is %d; its costliest part is %s", cost, MaxPolicyCost, shorten(cedarText(costliest))),
			"use shorter like patterns, or compare fewer sets; or split the policy"))
	}
}
