package engine

import (
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// Cedar evaluates the members of a record literal in the order of their names. cedar-go
// does it in an order that changes from one evaluation to the next. The decision is the
// same, but if several members fail, the message is that of any of them, and a replay
// would differ. So a policy for which this can happen is compiled a second time, with
// tests around its record literals that evaluate their members in order. The second one
// is evaluated only for the message, after the first one failed.

// maxRecordOrder bounds how deep such record literals may be nested: each level doubles
// the time of an evaluation.
const maxRecordOrder = 4

// anyOrderMessage replaces the message of a failed policy that nests record literals
// deeper than that.
const anyOrderMessage = "evaluation failed (no message: the policy nests records in which several members can fail)"

// recordsInOrder returns the policy that finds the message of a failed one, or nil if
// the failed one has the right message already (depth 0) or if there is no such policy.
// depth is how deep record literals whose order matters are nested.
func recordsInOrder(compiled *cedar.Policy) (_ *cedar.Policy, depth int) {
	tree := (*xast.Policy)(compiled.AST())
	for _, c := range tree.Conditions {
		depth = max(depth, anyOrderDepth(c.Body))
	}
	if depth == 0 || depth > maxRecordOrder {
		return nil, depth
	}
	return cedar.NewPolicyFromAST((*ast.Policy)(mapPolicy(tree, membersInOrder))), depth
}

// anyOrderDepth is how deep record literals with an order that matters are nested in n.
func anyOrderDepth(n xast.IsNode) int {
	inner, root := 0, true
	xast.Inspect(xast.NewNode(n), func(m xast.IsNode) bool {
		if _, ok := m.(xast.NodeTypeRecord); ok && !root {
			inner = max(inner, anyOrderDepth(m))
			return false
		}
		root = false
		return true
	})
	if r, ok := n.(xast.NodeTypeRecord); ok && len(fallible(r)) > 1 {
		return inner + 1
	}
	return inner
}

// fallible returns the members of a record literal whose evaluation can fail, in the
// order of their names.
func fallible(r xast.NodeTypeRecord) (out []xast.RecordElementNode) {
	for _, e := range r.Elements {
		switch e.Value.(type) {
		case xast.NodeValue, xast.NodeTypeVariable:
		default:
			out = append(out, e)
		}
	}
	slices.SortStableFunc(out, func(a, b xast.RecordElementNode) int { return strings.Compare(string(a.Key), string(b.Key)) })
	return out
}

// membersInOrder turns {a: x, b: y, c: z} into
//
//	if {a: x} has a then (if {b: y} has b then {a: x, b: y, c: z} else false) else false
//
// where a, b and c are the members that can fail. Other nodes stay as they are.
func membersInOrder(n xast.IsNode) xast.IsNode {
	r, ok := n.(xast.NodeTypeRecord)
	if !ok {
		return n
	}
	members := fallible(r)
	for i := len(members) - 2; i >= 0; i-- {
		m := members[i]
		alone := xast.NodeTypeRecord{Elements: []xast.RecordElementNode{m}}
		n = xast.NodeTypeIfThenElse{
			If:   xast.NodeTypeHas{StrOpNode: xast.StrOpNode{Arg: alone, Value: m.Key}},
			Then: n, Else: xast.NodeValue{Value: cedar.False},
		}
	}
	return n
}
