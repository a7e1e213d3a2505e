package engine

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// This file reads and writes values of the extension types as Cedar does, where cedar-go
// differs from Cedar.

// extension is one extension type, with two functions that read its text: one as Cedar
// does, one as cedar-go does.
type extension struct {
	fn             string // the constructor
	parse, cedarGo func(string) (cedar.Value, error)
}

// extensions maps a type's name to how its text is read.
var extensions = map[string]extension{
	"ipaddr":   {"ip", value(types.ParseIPAddr), value(types.ParseIPAddr)},
	"decimal":  {"decimal", parseDecimal, value(types.ParseDecimal)},
	"datetime": {"datetime", parseDatetime, value(types.ParseDatetime)},
	"duration": {"duration", parseDuration, value(types.ParseDuration)},
}

func value[V cedar.Value](parse func(string) (V, error)) func(string) (cedar.Value, error) {
	return func(s string) (cedar.Value, error) { return parse(s) }
}

// parseDecimal refuses a plus sign, which cedar-go accepts and Cedar does not.
func parseDecimal(s string) (cedar.Value, error) {
	if strings.HasPrefix(s, "+") {
		return nil, errors.New("plus sign")
	}
	return types.ParseDecimal(s)
}

// parseDatetime refuses years with a sign and nine digits. cedar-go accepts them, and
// does not check their range if no time follows; Cedar does not accept them.
func parseDatetime(s string) (cedar.Value, error) {
	if strings.HasPrefix(s, "+") || strings.HasPrefix(s, "-") {
		return nil, errors.New("sign before the year")
	}
	return types.ParseDatetime(s)
}

// parseDuration accepts the smallest duration, which cedar-go refuses.
func parseDuration(s string) (cedar.Value, error) {
	d, err := types.ParseDuration(s)
	if err != nil && isLeastDuration(s) {
		return leastDuration, nil
	}
	return d, err
}

var (
	leastDuration    = types.NewDurationFromMillis(math.MinInt64)
	negativeDuration = regexp.MustCompile(`^-(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?(?:([0-9]+)ms)?$`)
)

func isLeastDuration(s string) bool {
	m := negativeDuration.FindStringSubmatch(s)
	if m == nil {
		return false
	}
	sum := new(big.Int)
	for i, millis := range []int64{dayMillis, 3_600_000, 60_000, 1000, 1} {
		if n, ok := new(big.Int).SetString(m[i+1], 10); ok {
			sum.Add(sum, n.Mul(n, big.NewInt(millis)))
		}
	}
	return sum.Neg(sum).IsInt64() && sum.Int64() == math.MinInt64
}

// literal is a constructor with its text, like decimal("1.0"), that cedar-go and Cedar
// read differently.
type literal struct {
	typ, fn, text string
	value         cedar.Value // nil: Cedar refuses it, and cedar-go does not
}

// oddLiteral recognizes a literal that cedar-go and Cedar read differently.
func oddLiteral(n xast.IsNode) (literal, bool) {
	call, ok := n.(xast.NodeTypeExtensionCall)
	if !ok || len(call.Args) != 1 {
		return literal{}, false
	}
	arg, _ := call.Args[0].(xast.NodeValue)
	text, ok := arg.Value.(cedar.String)
	if !ok {
		return literal{}, false
	}
	for typ, ext := range extensions {
		if ext.fn != string(call.Name) {
			continue
		}
		v, err := ext.parse(string(text))
		_, refused := ext.cedarGo(string(text))
		if err != nil {
			v = nil
		}
		return literal{typ, ext.fn, string(text), v}, (err != nil) != (refused != nil)
	}
	return literal{}, false
}

// exactLiteral makes cedar-go read a literal as Cedar does.
func exactLiteral(n xast.IsNode) xast.IsNode {
	l, odd := oddLiteral(n)
	switch {
	case !odd:
		return n
	case l.value == nil:
		// This fails when it is evaluated, like any text that is not a valid value.
		return xast.NodeTypeExtensionCall{Name: types.Path(l.fn), Args: []xast.IsNode{xast.NodeValue{Value: cedar.String("?" + l.text)}}}
	}
	return xast.NodeValue{Value: l.value}
}

// refusedLiterals returns the literals of a policy that Cedar refuses and cedar-go
// accepts.
func refusedLiterals(tree *xast.Policy) (out []literal) {
	for _, c := range tree.Conditions {
		xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
			if l, odd := oddLiteral(n); odd && l.value == nil {
				out = append(out, l)
			}
			return true
		})
	}
	return out
}

// hint says how to write the literal so that Cedar accepts it.
func (l literal) hint() string {
	switch l.typ {
	case "decimal":
		return "Cedar's decimals have no plus sign"
	case "datetime":
		return "Cedar's years have four digits and no sign"
	}
	return ""
}

// validatable returns the policy for cedar-go's validator: every literal that only
// cedar-go refuses is replaced by another one of its type. The validator looks at types
// only.
func validatable(tree *xast.Policy) *xast.Policy {
	return mapPolicy(tree, func(n xast.IsNode) xast.IsNode {
		if l, odd := oddLiteral(n); odd && l.value != nil {
			text := map[string]string{"duration": "0ms"}[l.fn]
			return xast.NodeTypeExtensionCall{Name: types.Path(l.fn), Args: []xast.IsNode{xast.NodeValue{Value: cedar.String(text)}}}
		}
		return n
	})
}

// datetimeText writes a datetime so that Cedar reads it back. With a time zone, a
// datetime can be before the year 0000 or after 9999 in UTC: such a datetime is written
// with the largest offset.
func datetimeText(d cedar.Datetime) string {
	const farthest = dayMillis - 60_000 // 23 hours and 59 minutes
	text := d.String()
	zone, local := "-2359", d.Milliseconds()-farthest
	switch text[0] {
	case '+':
	case '-':
		zone, local = "+2359", d.Milliseconds()+farthest
	default: // four digits
		return text
	}
	return strings.TrimSuffix(types.NewDatetimeFromMillis(local).String(), "Z") + zone
}

// durationText writes a duration so that Cedar reads it back. cedar-go cannot write
// the least one.
func durationText(d cedar.Duration) string {
	if d == leastDuration {
		return fmt.Sprintf("%dms", int64(math.MinInt64))
	}
	return d.String()
}

// ipText writes an address so that Cedar reads it back. Unlike String, it writes an IPv4
// address that is mapped into IPv6 in hexadecimal, the only form that Cedar accepts.
func ipText(ip cedar.IPAddr) string {
	if !ip.Addr().Is4In6() {
		return ip.String()
	}
	b := ip.Addr().As16()
	s := fmt.Sprintf("::ffff:%x:%x", uint16(b[12])<<8|uint16(b[13]), uint16(b[14])<<8|uint16(b[15]))
	if n := ip.Prefix().Bits(); n < 128 {
		s += "/" + strconv.Itoa(n)
	}
	return s
}

// cedarValue writes a value as Cedar text.
func cedarValue(v cedar.Value) string {
	switch v := v.(type) {
	case cedar.IPAddr:
		return "ip(" + strconv.Quote(ipText(v)) + ")"
	case cedar.Datetime:
		return "datetime(" + strconv.Quote(datetimeText(v)) + ")"
	case cedar.Duration:
		return "duration(" + strconv.Quote(durationText(v)) + ")"
	case cedar.Set:
		var out []string
		for e := range v.All() {
			out = append(out, cedarValue(e))
		}
		slices.Sort(out)
		return "[" + strings.Join(out, ", ") + "]"
	case cedar.Record:
		var out []string
		for k, e := range v.All() {
			out = append(out, string(k.MarshalCedar())+":"+cedarValue(e))
		}
		slices.Sort(out)
		return "{" + strings.Join(out, ", ") + "}"
	}
	return string(v.MarshalCedar())
}
