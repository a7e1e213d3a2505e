package cedarpost

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"time"
)

// The key of a check is the whole question in an encoding that can be read in one way only:
// every text and every list begins with its length, every value with its type. Two
// different questions never have the same key, so an answer never reaches a caller that
// asked something else. Fields that do not affect the decision are left out: RequestID,
// AtLeastAsFresh, FullyConsistent and FailOpen.
//
// The key is built without allocations, which would be most of the cost of a hit.

const (
	maxNesting = 100
	// maxExact is the largest n for which a JSON number has all whole numbers up to n exactly.
	maxExact = 1<<53 - 1
)

// appendKey appends the key of a check.
func appendKey(b []byte, c *Check) ([]byte, error) {
	b = appendUID(b, c.Principal)
	b = appendUID(b, c.Action)
	b = appendUID(b, c.Resource)
	var flags byte
	if c.AllFields {
		flags |= 1
	}
	if c.RequireAllFields {
		flags |= 2
	}
	if !c.PrincipalToken.IsZero() {
		b = c.PrincipalToken.appendHash(append(b, flags|4))
	} else {
		b = append(b, flags)
	}
	b = binary.AppendUvarint(b, uint64(len(c.Fields)))
	for _, f := range c.Fields {
		b = appendText(b, f)
	}
	b, err := appendMap(b, c.Context, 0)
	if err != nil {
		return nil, fmt.Errorf("context%w", err)
	}
	b = binary.AppendUvarint(b, uint64(len(c.Entities)))
	for i := range c.Entities {
		if b, err = appendEntity(b, &c.Entities[i]); err != nil {
			return nil, fmt.Errorf("entities[%d].%w", i, err)
		}
	}
	return b, nil
}

func appendEntity(b []byte, e *Entity) (_ []byte, err error) {
	b = appendUID(b, e.UID)
	if b, err = appendMap(b, e.Attrs, 0); err != nil {
		return nil, fmt.Errorf("attrs%w", err)
	}
	if b, err = appendMap(b, e.Tags, 0); err != nil {
		return nil, fmt.Errorf("tags%w", err)
	}
	b = binary.AppendUvarint(b, uint64(len(e.Parents)))
	for _, p := range e.Parents {
		b = appendUID(b, p)
	}
	return b, nil
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendUID(b []byte, u EntityUID) []byte { return appendText(appendText(b, u.Type), u.ID) }

// appendMap appends the members of a map in order of their names.
func appendMap[V any](b []byte, m map[string]V, depth int) (_ []byte, err error) {
	b = binary.AppendUvarint(b, uint64(len(m)))
	var few [16]string // on the stack: maps of questions are usually small
	names := few[:0]
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		b = appendText(b, name)
		if b, err = appendValue(b, m[name], depth+1); err != nil {
			return nil, fmt.Errorf(".%s%w", name, err)
		}
	}
	return b, nil
}

func appendList[V any](b []byte, list []V, depth int) (_ []byte, err error) {
	b = binary.AppendUvarint(append(b, '['), uint64(len(list)))
	for i, v := range list {
		if b, err = appendValue(b, v, depth+1); err != nil {
			return nil, fmt.Errorf("[%d]%w", i, err)
		}
	}
	return b, nil
}

// valueError says why a value cannot be sent. Errors around it put the value's path before
// it.
type valueError string

func (e valueError) Error() string { return ": " + string(e) }

// appendValue has the same cases as [toPlain].
func appendValue(b []byte, v any, depth int) ([]byte, error) {
	if depth > maxNesting {
		return nil, valueError("nested too deep")
	}
	switch v := v.(type) {
	case bool:
		if v {
			return append(b, 't'), nil
		}
		return append(b, 'f'), nil
	case string:
		return appendText(append(b, 's'), v), nil
	case int:
		return appendLong(b, int64(v)), nil
	case int64:
		return appendLong(b, v), nil
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, valueError("not a number")
		}
		return appendFloat(b, v), nil
	case EntityUID:
		return appendUID(append(b, 'e'), v), nil
	case time.Time:
		if err := inCalendar(v); err != nil {
			return nil, err
		}
		return binary.AppendVarint(append(b, 'd'), v.UnixMilli()), nil
	case time.Duration:
		return binary.AppendVarint(append(b, 'p'), v.Milliseconds()), nil
	case netip.Addr:
		text, err := addrText(v)
		return appendText(append(b, 'i'), text), err
	case netip.Prefix:
		text, err := prefixText(v)
		return appendText(append(b, 'i'), text), err
	case map[string]any:
		return appendMap(append(b, '{'), v, depth)
	case map[string]string:
		return appendMap(append(b, '{'), v, depth)
	case []any:
		return appendList(b, v, depth)
	case []string:
		return appendList(b, v, depth)
	case []EntityUID:
		return appendList(b, v, depth)
	}
	simple, err := simplify(v)
	if err != nil {
		return nil, err
	}
	return appendValue(b, simple, depth)
}

// appendLong appends a whole number as it is sent: as a number if JSON has it exactly, else
// as its digits.
func appendLong(b []byte, n int64) []byte {
	if n > maxExact || n < -maxExact {
		return strconv.AppendInt(binary.AppendUvarint(append(b, 's'), uint64(digits(n))), n, 10)
	}
	return appendFloat(b, float64(n))
}

func digits(n int64) int {
	var buf [20]byte
	return len(strconv.AppendInt(buf[:0], n, 10))
}

func appendFloat(b []byte, f float64) []byte {
	return binary.BigEndian.AppendUint64(append(b, 'n'), math.Float64bits(f))
}

// inCalendar refuses a time that a Cedar datetime cannot have. Beyond the range of
// milliseconds, two such times could even have one key.
func inCalendar(t time.Time) error {
	if year := t.UTC().Year(); year < 0 || year > 9999 {
		return valueError("not a year of four digits")
	}
	return nil
}

// addrText writes an address as Cedar reads it. A listener for IPv4 and IPv6 reports the
// IPv4 address 10.1.2.3 as ::ffff:10.1.2.3. It is sent as 10.1.2.3, because Cedar refuses
// ::ffff:10.1.2.3, and takes ::ffff:a01:203 for an IPv6 address that is in no range of IPv4.
func addrText(a netip.Addr) (string, error) {
	switch {
	case !a.IsValid():
		return "", valueError("the zero netip.Addr is no address")
	case a.Zone() != "":
		return "", valueError(fmt.Sprintf("%.60q has a zone, which Cedar does not have: leave it out with WithZone", a))
	}
	return a.Unmap().String(), nil
}

// prefixText is addrText for a range of addresses.
func prefixText(p netip.Prefix) (string, error) {
	switch {
	case !p.IsValid():
		return "", valueError("not a valid netip.Prefix")
	case !p.Addr().Is4In6():
		return p.String(), nil
	case p.Bits() < 96:
		return "", valueError(fmt.Sprintf("%q is a range of IPv6 around IPv4 addresses: give one of the two", p))
	}
	return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96).String(), nil
}

// simplify converts a value of a rarer type into one of the types that [appendValue] and
// [toPlain] know: bool, string, int64, float64, []any, map[string]any.
func simplify(v any) (any, error) {
	if n, ok := v.(json.Number); ok {
		if i, err := n.Int64(); err == nil {
			return i, nil
		}
		f, err := n.Float64()
		if err != nil {
			return nil, valueError(fmt.Sprintf("%q is not a number", string(n)))
		}
		return f, nil
	}
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Bool:
		return r.Bool(), nil
	case reflect.String:
		return r.String(), nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return r.Int(), nil
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		if r.Uint() > math.MaxInt64 {
			return nil, valueError("larger than any Long")
		}
		return int64(r.Uint()), nil
	case reflect.Float32, reflect.Float64:
		return r.Float(), nil
	case reflect.Slice, reflect.Array:
		if r.Type().Elem().Kind() == reflect.Uint8 {
			break // a []byte is not a set of numbers
		}
		list := make([]any, r.Len())
		for i := range list {
			list[i] = r.Index(i).Interface()
		}
		return list, nil
	case reflect.Map:
		if r.Type().Key().Kind() != reflect.String {
			break
		}
		m := make(map[string]any, r.Len())
		for key, value := range r.Seq2() {
			m[key.String()] = value.Interface()
		}
		return m, nil
	}
	return nil, valueError(fmt.Sprintf("a %T cannot be sent", v))
}
