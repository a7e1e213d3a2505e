package engine

import (
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

// gap is a place where cedar-go's validator is known to judge a policy otherwise
// than the reference, and what keeps it from doing harm. The gaps in reading
// values and in "is" are closed by lints of our own and so do not stand here.
type gap struct {
	what, guard string
	// covers says whether a disagreement about p is this one. The side that
	// accepts says nothing.
	covers func(s *Set, p *policy, ours, reference []string) bool
}

// gaps are the disagreements that are understood. Any other fails the test.
var gaps = []gap{
	{
		what:  "refused: a part that is never evaluated is not sound",
		guard: "none needed: we refuse at publish; the reference sees that the part is dead",
		covers: func(s *Set, p *policy, _, reference []string) bool {
			return len(reference) == 0 && validForEachAction(s, p)
		},
	},
	{
		what:  "refused: a part that is dead because a tag was asked for before is not sound",
		guard: "none needed: we refuse at publish; cedar-go forgets what it knows of tags",
		covers: func(_ *Set, p *policy, _, reference []string) bool {
			return len(reference) == 0 && asksTwiceForATag(p)
		},
	},
	{
		what:  "accepted: a part behind a variable compared with itself is not sound",
		guard: "none needed: the part is never evaluated",
		covers: func(s *Set, p *policy, ours, _ []string) bool {
			return len(ours) == 0 && validate.New(s.schema).Policy("", rewrite(validatable(p.tree()), hideSelfComparison)) != nil
		},
	},
	{
		what:  "accepted: < between two of Long, datetime and duration",
		guard: "fails when it is evaluated: such a permit permits nothing, such a forbid denies",
		covers: func(s *Set, p *policy, ours, _ []string) bool {
			return len(ours) == 0 && validate.New(s.schema).Policy("", rewrite(validatable(p.tree()), comparesAlike)) != nil
		},
	},
	{
		what:  "accepted: sets or records that differ in an entity type inside",
		guard: "none needed: evaluation compares values, whatever their types",
		covers: func(_ *Set, _ *policy, ours, reference []string) bool {
			return len(ours) == 0 && !slices.ContainsFunc(reference, func(msg string) bool { return !nestedTypes.MatchString(msg) })
		},
	},
}

// readOtherwise says whether cedar-go, without a schema, reads a drawn value
// otherwise than the reference. This service reads values itself, by the schema.
func readOtherwise(v any) bool {
	switch v := v.(type) {
	case diffExt:
		for _, ext := range extensions {
			if ext.fn == v[0] {
				_, ours := ext.parse(v[1])
				_, cedarGo := ext.cedarGo(v[1])
				return (ours == nil) != (cedarGo == nil)
			}
		}
	case []any:
		return slices.ContainsFunc(v, readOtherwise)
	case map[string]any:
		for _, e := range v {
			if readOtherwise(e) {
				return true
			}
		}
	}
	return false
}

var nestedTypes = regexp.MustCompile(`^the types .*[{<].* are not compatible$`)

// validForEachAction says whether p validates when it is written so that
// cedar-go, too, sees what is never evaluated: for one action at a time, with
// the conditions as one, "is in" as "is" and "in", and comparisons of the action
// decided.
func validForEachAction(s *Set, p *policy) bool {
	v := validate.New(s.schema)
	for _, a := range s.matchedActions(p) {
		tree := rewrite(joined(validatable(p.tree())), func(n xast.IsNode) xast.IsNode {
			switch t := n.(type) {
			case xast.NodeTypeIsIn:
				return xast.NodeTypeAnd{BinaryNode: xast.BinaryNode{Left: t.NodeTypeIs, Right: xast.NodeTypeIn{BinaryNode: xast.BinaryNode{Left: t.Left, Right: t.Entity}}}}
			case xast.NodeTypeEquals:
				if v, ok := t.Left.(xast.NodeTypeVariable); ok && v.Name == "action" {
					if uid, ok := entityLiteral(t.Right); ok {
						return xast.NodeValue{Value: cedar.Boolean(uid == a.uid)}
					}
				}
			}
			return n
		})
		tree.Action = xast.ScopeTypeEq{Entity: a.uid}
		if err := v.Policy("", tree); err != nil && !strings.Contains(err.Error(), noActionApplies) {
			return false
		}
	}
	return true
}

// asksTwiceForATag says whether p has the same hasTag in two places.
func asksTwiceForATag(p *policy) bool {
	var asked []xast.NodeTypeHasTag
	twice := false
	for _, c := range p.tree().Conditions {
		xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
			if t, ok := n.(xast.NodeTypeHasTag); ok {
				twice = twice || slices.ContainsFunc(asked, func(o xast.NodeTypeHasTag) bool { return reflect.DeepEqual(o, t) })
				asked = append(asked, t)
			}
			return true
		})
	}
	return twice
}

// hideSelfComparison makes "principal == principal" and its like something that
// is not known before evaluation.
func hideSelfComparison(n xast.IsNode) xast.IsNode {
	hide := func(b xast.BinaryNode) xast.IsNode {
		l, okL := b.Left.(xast.NodeTypeVariable)
		r, okR := b.Right.(xast.NodeTypeVariable)
		if !okL || !okR || l.Name != r.Name {
			return n
		}
		return xast.NodeTypeContains{BinaryNode: xast.BinaryNode{Left: xast.NodeTypeSet{Elements: []xast.IsNode{l}}, Right: r}}
	}
	switch t := n.(type) {
	case xast.NodeTypeEquals:
		return hide(t.BinaryNode)
	case xast.NodeTypeNotEquals:
		return hide(t.BinaryNode)
	}
	return n
}

// comparesAlike turns a comparison into one that wants both sides of one type.
func comparesAlike(n xast.IsNode) xast.IsNode {
	var b xast.BinaryNode
	switch t := n.(type) {
	case xast.NodeTypeLessThan:
		b = t.BinaryNode
	case xast.NodeTypeLessThanOrEqual:
		b = t.BinaryNode
	case xast.NodeTypeGreaterThan:
		b = t.BinaryNode
	case xast.NodeTypeGreaterThanOrEqual:
		b = t.BinaryNode
	default:
		return n
	}
	return xast.NodeTypeContains{BinaryNode: xast.BinaryNode{Left: xast.NodeTypeSet{Elements: []xast.IsNode{b.Left}}, Right: b.Right}}
}

// joined puts the conditions of a policy into one.
func joined(tree *xast.Policy) *xast.Policy {
	out := *tree
	var all xast.IsNode
	for _, c := range tree.Conditions {
		n := c.Body
		if c.Condition == xast.ConditionUnless {
			n = xast.NodeTypeNot{UnaryNode: xast.UnaryNode{Arg: n}}
		}
		if all == nil {
			all = n
		} else {
			all = xast.NodeTypeAnd{BinaryNode: xast.BinaryNode{Left: all, Right: n}}
		}
	}
	if all != nil {
		out.Conditions = []xast.ConditionType{{Condition: xast.ConditionWhen, Body: all}}
	}
	return &out
}

// rewrite returns the policy with fn applied to each node of its conditions,
// from the leaves up.
func rewrite(tree *xast.Policy, fn func(xast.IsNode) xast.IsNode) *xast.Policy {
	out := *tree
	out.Conditions = slices.Clone(tree.Conditions)
	for i := range out.Conditions {
		out.Conditions[i].Body = rewriteNode(out.Conditions[i].Body, fn)
	}
	return &out
}

func rewriteNode(n xast.IsNode, fn func(xast.IsNode) xast.IsNode) xast.IsNode {
	v := reflect.New(reflect.TypeOf(n)).Elem()
	v.Set(reflect.ValueOf(n))
	rewriteFields(v, fn)
	return fn(v.Interface().(xast.IsNode))
}

func rewriteFields(v reflect.Value, fn func(xast.IsNode) xast.IsNode) {
	isNode := reflect.TypeFor[xast.IsNode]()
	switch {
	case v.Type() == isNode:
		v.Set(reflect.ValueOf(rewriteNode(v.Interface().(xast.IsNode), fn)))
	case v.Kind() == reflect.Slice:
		list := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		reflect.Copy(list, v)
		for i := range list.Len() {
			rewriteFields(list.Index(i), fn)
		}
		v.Set(list)
	case v.Kind() == reflect.Struct && v.Type() != reflect.TypeFor[cedar.EntityUID]():
		for i := range v.NumField() {
			if f := v.Field(i); f.CanSet() && (f.Kind() == reflect.Struct || f.Kind() == reflect.Slice || f.Type() == isNode) {
				rewriteFields(f, fn)
			}
		}
	}
}
