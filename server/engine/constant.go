package engine

import (
	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// fold finds expressions that have the same value for every question. Like never, it knows the types
// that principal and resource can have, and assumes that everything else is possible.
type fold struct{ never }

// value returns the value that a Boolean expression has for every question. It does so only if the
// evaluation never fails: a forbid that fails denies, so "fails && false" is not false.
func (f fold) value(e xast.IsNode) (value, known bool) {
	switch t := e.(type) {
	case xast.NodeTypeAnd:
		return f.junction(t.Left, t.Right, false)
	case xast.NodeTypeOr:
		return f.junction(t.Left, t.Right, true)
	case xast.NodeTypeNot:
		value, known = f.value(t.Arg)
		return !value, known
	case xast.NodeTypeIfThenElse:
		cond, ok := f.value(t.If)
		switch {
		case !ok:
			return false, false
		case cond:
			return f.value(t.Then)
		}
		return f.value(t.Else)
	case xast.NodeTypeIs:
		if types, ok := f.typesOf(t.Left); ok {
			return types[t.EntityType], !types[t.EntityType] || len(types) == 1
		}
	case xast.NodeTypeEquals:
		if f.otherType(t.Left, t.Right) {
			return false, true
		}
	case xast.NodeTypeNotEquals:
		if f.otherType(t.Left, t.Right) {
			return true, true
		}
	}
	return evaluated(e)
}

// junction is && (decides is false) or || (decides is true): one operand with the value decides is enough,
// if nothing before it fails.
func (f fold) junction(left, right xast.IsNode, decides bool) (value, known bool) {
	l, knowL := f.value(left)
	if knowL && l == decides {
		return decides, true
	}
	r, knowR := f.value(right)
	switch {
	case knowR && r == decides && (knowL || total(left)):
		return decides, true
	case knowL && knowR:
		return r, true
	}
	return false, false
}

// otherType reports whether a variable is compared with an entity of a type that it cannot have.
func (f fold) otherType(a, b xast.IsNode) bool {
	for _, pair := range [...][2]xast.IsNode{{a, b}, {b, a}} {
		types, ok := f.typesOf(pair[0])
		if uid, isLiteral := entityLiteral(pair[1]); ok && isLiteral && !types[uid.Type] {
			return true
		}
	}
	return false
}

// evaluated evaluates an expression that depends on nothing: it has no variables and no entities.
func evaluated(e xast.IsNode) (value, known bool) {
	depends := false
	xast.Inspect(xast.NewNode(e), func(n xast.IsNode) bool {
		switch n := n.(type) {
		case xast.NodeTypeVariable:
			depends = true
		case xast.NodeValue:
			entitiesIn(n.Value, func(cedar.EntityUID) { depends = true })
		}
		return !depends
	})
	if depends {
		return false, false
	}
	eval := func(body xast.IsNode) bool {
		p := exact(cedar.NewPolicyFromAST((*ast.Policy)(&xast.Policy{
			Effect: xast.EffectPermit, Principal: xast.ScopeTypeAll{}, Action: xast.ScopeTypeAll{}, Resource: xast.ScopeTypeAll{},
			Conditions: []xast.ConditionType{{Condition: xast.ConditionWhen, Body: body}},
		})))
		d, diag := cedar.Authorize(single{p}, cedar.EntityMap{}, cedar.Request{})
		return d == cedar.Allow && len(diag.Errors) == 0
	}
	if eval(e) {
		return true, true
	}
	return false, eval(xast.NodeTypeNot{UnaryNode: xast.UnaryNode{Arg: e}}) // else it fails
}

// total reports whether the evaluation of an expression, which is valid, never fails. Attributes and tags
// can be missing, because an entity need not be stored, and numbers can be too large.
func total(e xast.IsNode) bool {
	ok := true
	xast.Inspect(xast.NewNode(e), func(n xast.IsNode) bool {
		switch n.(type) {
		case xast.NodeValue, xast.NodeTypeVariable, xast.NodeTypeAnd, xast.NodeTypeOr, xast.NodeTypeNot, xast.NodeTypeIs, xast.NodeTypeIsIn,
			xast.NodeTypeEquals, xast.NodeTypeNotEquals, xast.NodeTypeIn, xast.NodeTypeHas, xast.NodeTypeSet:
		default:
			ok = false
		}
		return ok
	})
	return ok
}
