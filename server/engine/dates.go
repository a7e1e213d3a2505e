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

// exactDates compiles a policy with exact dates.
func exactDates(compiled *cedar.Policy) *cedar.Policy {
	tree := (*xast.Policy)(compiled.AST())
	uses := false
	for _, c := range tree.Conditions {
		xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
			call, ok := n.(xast.NodeTypeExtensionCall)
			uses = uses || ok && (call.Name == "toDate" || call.Name == "toTime")
			return !uses
		})
	}
	if !uses {
		return compiled
	}
	exact := *tree
	exact.Conditions = nil
	for _, c := range tree.Conditions {
		c.Body = shiftDates(c.Body)
		exact.Conditions = append(exact.Conditions, c)
	}
	return cedar.NewPolicyFromAST((*ast.Policy)(&exact))
}

// shiftDates returns a copy of n with every toDate and toTime made exact.
func shiftDates(n xast.IsNode) xast.IsNode {
	v := reflect.New(reflect.TypeOf(n)).Elem()
	v.Set(reflect.ValueOf(n))
	shiftFields(v)
	out := v.Interface().(xast.IsNode)
	call, ok := out.(xast.NodeTypeExtensionCall)
	if !ok || len(call.Args) != 1 {
		return out
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
	return out
}

var nodeType = reflect.TypeFor[xast.IsNode]()

// shiftFields goes through the nodes that a node holds, in fields, embedded
// structs and slices. The slices are copied, never written to.
func shiftFields(v reflect.Value) {
	switch v.Kind() {
	case reflect.Interface:
		if v.Type() == nodeType && !v.IsNil() {
			v.Set(reflect.ValueOf(shiftDates(v.Interface().(xast.IsNode))))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				shiftFields(v.Field(i))
			}
		}
	case reflect.Slice:
		if elem := v.Type().Elem(); elem != nodeType && elem != reflect.TypeFor[xast.RecordElementNode]() {
			return
		}
		fresh := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		reflect.Copy(fresh, v)
		for i := range fresh.Len() {
			shiftFields(fresh.Index(i))
		}
		v.Set(fresh)
	}
}
