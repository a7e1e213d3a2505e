package engine

import (
	"reflect"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// cedar-go rounds toDate() towards 1970 where Cedar rounds down, and toTime() is
// negative before 1970 where Cedar's never is. So the compiled policy takes the
// time of day of "a day and the time of day", and for a date moves the time up by
// days enough and the date back down. What is validated and shown is the policy as
// written. Dates are exact but within two million years of the ends of time.
const (
	dayMillis = 24 * 60 * 60 * 1000
	dateShift = 1_000_000_000 * dayMillis
)

// exact compiles a policy so that cedar-go evaluates it as Cedar does: dates before
// 1970, and literals that the two read differently.
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

// exactNode makes a node exact whose inner nodes are.
func exactNode(n xast.IsNode) xast.IsNode { return shiftDate(exactLiteral(n)) }

// shiftDate makes a toDate or toTime exact.
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
		// One day and the time, which may be negative, have the time of day wanted.
		day := xast.NodeValue{Value: cedar.NewDatetimeFromMillis(dayMillis)}
		sum := xast.NodeTypeExtensionCall{Name: "offset", Args: []xast.IsNode{day, call}}
		return xast.NodeTypeExtensionCall{Name: "toTime", Args: []xast.IsNode{sum}}
	case "toDate":
		date := xast.NodeTypeExtensionCall{Name: "toDate", Args: []xast.IsNode{offset(call.Args[0], dateShift)}}
		return offset(date, -dateShift)
	}
	return n
}

// oneType turns a comparison into an expression that Cedar's validator holds to
// one type on both sides. It takes "<" between a Long and a datetime, which fails
// when it is evaluated, so that a forbid of it might never fire.
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

// comparedAlike is the policy with every comparison as oneType has it, nil when it
// compares nothing.
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

// mapFields goes through the nodes that a node holds, in fields, embedded
// structs and slices. The slices are copied, never written to.
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
