package cedarpost

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// The key of a check is the whole question, written so that it can be read in one
// way only: every text and every list carries its length before it, every value its
// type. Two different questions never share a key; that is what keeps an answer from
// being given to somebody else. What does not bear on the decision stays out: the
// request id, how fresh the answer has to be, what to do when there is none.
//
// It is written without an allocation, for that is most of the cost of a hit.

const (
	maxNesting = 100
	// maxExact is the largest whole number that every JSON number has exactly.
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
	b = append(b, flags)
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

// appendMap writes the members of a map by name.
func appendMap[V any](b []byte, m map[string]V, depth int) (_ []byte, err error) {
	b = binary.AppendUvarint(b, uint64(len(m)))
	var few [16]string // on the stack, as maps of questions are small
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

// valueError is a value that no question can carry. Its place stands before it.
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
		return appendText(append(b, 'i'), v.String()), nil
	case netip.Prefix:
		return appendText(append(b, 'i'), v.String()), nil
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
	n, err := number(v)
	if err != nil {
		return nil, err
	}
	switch n := n.(type) {
	case int64:
		return appendLong(b, n), nil
	case float64:
		return appendFloat(b, n), nil
	}
	return nil, valueError(fmt.Sprintf("a %T cannot be sent", v))
}

// appendLong writes a whole number as it is sent: beyond what JSON has exactly, its
// digits are.
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

// inCalendar refuses a time that a datetime cannot have. Far out, two of them can even
// be the same number of milliseconds.
func inCalendar(t time.Time) error {
	if year := t.UTC().Year(); year < 0 || year > 9999 {
		return valueError("not a year of four digits")
	}
	return nil
}

// number reads the rarer kinds of numbers into int64 or float64; what is none is
// returned as it is.
func number(v any) (any, error) {
	switch v := v.(type) {
	case int:
		return int64(v), nil
	case int8:
		return int64(v), nil
	case int16:
		return int64(v), nil
	case int32:
		return int64(v), nil
	case uint8:
		return int64(v), nil
	case uint16:
		return int64(v), nil
	case uint32:
		return int64(v), nil
	case uint:
		return unsigned(uint64(v))
	case uint64:
		return unsigned(v)
	case float32:
		return finite(float64(v))
	case float64:
		return finite(v)
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n, nil
		}
		f, err := v.Float64()
		if err != nil {
			return nil, valueError(fmt.Sprintf("%q is not a number", string(v)))
		}
		return finite(f)
	}
	return v, nil
}

func unsigned(n uint64) (any, error) {
	if n > math.MaxInt64 {
		return nil, valueError("larger than any Long")
	}
	return int64(n), nil
}

func finite(f float64) (any, error) {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return nil, valueError("not a number")
	}
	return f, nil
}
