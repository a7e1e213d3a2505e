package engine

import (
	"reflect"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// cedar-go's toDate() rounds towards 1970, where Cedar's rounds down, and its toTime()
// is negative before 1970, where Cedar's never is. So the compiled policy adds one day
// before it takes the time of day, and for a date it adds many days, takes the date, and
// subtracts the days. The policy is validated and shown as it was written. Dates are
// exact except within two million years of the first and the last datetime.
const (
	dayMillis = 24 * 60 * 60 * 1000
	dateShift = 1_000_000_000 * dayMillis
)

// exact compiles a policy so that cedar-go evaluates it as Cedar does. It rewrites
// functions on dates, and literals that the two read differently.
func exact(compiled *cedar.Policy) *cedar.Policy {
	tree := (*xast.Policy)(compiled.AST())
	uses := false
	for _, c := range tree.Conditions {
		xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
			call, ok := n.(xast.NodeTypeExtensionCall)
			_, odd := oddLiteral(n)
			uses = uses || odd || ok && (call.Name == "toDate" || call.Name == "toTime")
			return !uses
		})
	}
	if !uses {
		return compiled
	}
	return cedar.NewPolicyFromAST((*ast.Policy)(mapPolicy(tree, exactNode)))
}

// exactNode rewrites a node for [exact]. Its inner nodes are rewritten already.
func exactNode(n xast.IsNode) xast.IsNode { return shiftDate(exactLiteral(n)) }

// shiftDate rewrites a call of toDate or toTime.
func shiftDate(n xast.IsNode) xast.IsNode {
	call, ok := n.(xast.NodeTypeExtensionCall)
	if !ok || len(call.Args) != 1 {
		return n
	}
	offset := func(n xast.IsNode, ms int64) xast.IsNode {
		by := xast.NodeValue{Value: cedar.NewDurationFromMillis(ms)}
		return xast.NodeTypeExtensionCall{Name: "offset", Args: []xast.IsNode{n, by}}
	}
	switch call.Name {
	case "toTime":
		// The time of day, which may be negative, plus one day has the right time of day.
		day := xast.NodeValue{Value: cedar.NewDatetimeFromMillis(dayMillis)}
		sum := xast.NodeTypeExtensionCall{Name: "offset", Args: []xast.IsNode{day, call}}
		return xast.NodeTypeExtensionCall{Name: "toTime", Args: []xast.IsNode{sum}}
	case "toDate":
		date := xast.NodeTypeExtensionCall{Name: "toDate", Args: []xast.IsNode{offset(call.Args[0], dateShift)}}
		return offset(date, -dateShift)
	}
	return n
}

// oneType turns a comparison into an expression whose two sides Cedar's validator
// requires to have the same type. The validator accepts "<" between a Long and a
// datetime, which always fails when it is evaluated, so a forbid with it could never be
// satisfied.
func oneType(n xast.IsNode) xast.IsNode {
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

// comparedAlike returns the policy with every comparison replaced by oneType, or nil if
// it has no comparison.
func comparedAlike(tree *xast.Policy) *xast.Policy {
	compares := false
	out := mapPolicy(tree, func(n xast.IsNode) xast.IsNode {
		m := oneType(n)
		_, was := n.(xast.NodeTypeContains)
		_, is := m.(xast.NodeTypeContains)
		compares = compares || is && !was
		return m
	})
	if !compares {
		return nil
	}
	return out
}

// mapPolicy returns a copy of a policy with fn applied to every node of its
// conditions, the inner ones first.
func mapPolicy(tree *xast.Policy, fn func(xast.IsNode) xast.IsNode) *xast.Policy {
	out := *tree
	out.Conditions = nil
	for _, c := range tree.Conditions {
		c.Body = mapNode(c.Body, fn)
		out.Conditions = append(out.Conditions, c)
	}
	return &out
}

// mapNode returns a copy of n with fn applied to every node, the inner ones first.
func mapNode(n xast.IsNode, fn func(xast.IsNode) xast.IsNode) xast.IsNode {
	v := reflect.New(reflect.TypeOf(n)).Elem()
	v.Set(reflect.ValueOf(n))
	mapFields(v, fn)
	return fn(v.Interface().(xast.IsNode))
}

var nodeType = reflect.TypeFor[xast.IsNode]()

// mapFields applies fn to the nodes inside a node: in fields, embedded structs and
// slices. It copies the slices and does not change the original.
func mapFields(v reflect.Value, fn func(xast.IsNode) xast.IsNode) {
	switch v.Kind() {
	case reflect.Interface:
		if v.Type() == nodeType && !v.IsNil() {
			v.Set(reflect.ValueOf(mapNode(v.Interface().(xast.IsNode), fn)))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				mapFields(v.Field(i), fn)
			}
		}
	case reflect.Slice:
		if elem := v.Type().Elem(); elem != nodeType && elem != reflect.TypeFor[xast.RecordElementNode]() {
			return
		}
		fresh := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		reflect.Copy(fresh, v)
		for i := range fresh.Len() {
			mapFields(fresh.Index(i), fn)
		}
		v.Set(fresh)
	}
}
