package engine

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Limits of values. The time to compare sets of sets, or long strings with patterns,
// grows with the square of their size.
const (
	MaxStringBytes   = 4 << 10
	MaxArrayElements = 1000
	maxSafeInteger   = 1<<53 - 1
)

// RequestError says what is wrong with a question or an entity. Its text is written for
// the client that sent it.
type RequestError struct{ Message string }

// Error returns the message.
func (e *RequestError) Error() string { return e.Message }

func badf(format string, args ...any) error {
	return &RequestError{fmt.Sprintf(format, args...)}
}

// MaxPairs bounds the pairs of elements in all sets of sets, and sets of records, of one
// question or one entity that is written: one set of 141 elements has as many. Pairs of sets with
// more than 8 elements count more. cedar-go
// compares elements with equal hashes, and equal hashes of sets and records can be made, so
// making such a set can take time that grows with the square of its size.
const MaxPairs = 10_000

// reading reads the values of one question or one entity.
type reading struct {
	*Set
	pairs int // that its sets may still have
	// masked says which attributes may be missing; nil: none.
	masked *masked
}

func (s *Set) newReading() *reading { return &reading{Set: s, pairs: MaxPairs} }

// project reads a decoded JSON value as the declared type t, the way Cedar reads
// JSON with a schema (https://docs.cedarpolicy.com/auth/entities-syntax.html).
// Numbers may be float64 or json.Number. The walk follows the type, so its
// depth is bounded by the schema and not by the value.
func (s *reading) project(t resolved.IsType, v any, at string) (cedar.Value, error) {
	switch t := t.(type) {
	case resolved.BoolType:
		if b, ok := v.(bool); ok {
			return cedar.Boolean(b), nil
		}
		return nil, mismatch(at, "a Bool", v)
	case resolved.LongType:
		return projectLong(v, at)
	case resolved.StringType:
		str, ok := v.(string)
		if !ok {
			return nil, mismatch(at, "a String", v)
		}
		if err := checkText(str, at); err != nil {
			return nil, err
		}
		return cedar.String(str), nil
	case resolved.SetType:
		list, ok := v.([]any)
		if !ok {
			return nil, mismatch(at, "a Set (a JSON array)", v)
		}
		if len(list) > MaxArrayElements {
			return nil, badf("%s: %d elements, the limit is %d", at, len(list), MaxArrayElements)
		}
		if kindOf(t.Element) != plainValue {
			inner := 0
			for _, e := range list {
				switch e := e.(type) {
				case []any:
					inner += len(e)
				case map[string]any:
					inner += len(e)
				}
			}
			// To compare sets of 8 elements takes about as long as to find them.
			weight := 1 + inner/(8*max(len(list), 1))
			if s.pairs -= len(list) * (len(list) - 1) / 2 * weight; s.pairs < 0 {
				return nil, badf("%s: %d elements that are sets or records; to compare each with each takes more than %d steps, the limit for all such sets together", at, len(list), MaxPairs)
			}
		}
		out := make([]cedar.Value, len(list))
		for i, e := range list {
			var err error
			if out[i], err = s.project(t.Element, e, fmt.Sprintf("%s[%d]", at, i)); err != nil {
				return nil, err
			}
		}
		return cedar.NewSet(out...), nil
	case resolved.RecordType:
		m, ok := v.(map[string]any)
		if !ok {
			return nil, mismatch(at, "a record (a JSON object)", v)
		}
		return s.projectRecord(t, m, at)
	case resolved.EntityType:
		return s.projectReference(cedar.EntityType(t), v, at)
	case resolved.ExtensionType:
		return projectExtension(string(t), v, at)
	}
	return nil, badf("%s: type %T is not supported", at, t)
}

// projectRecord refuses attributes that are not declared and misses none that
// are required.
func (s *reading) projectRecord(t resolved.RecordType, m map[string]any, at string) (cedar.Record, error) {
	out := make(cedar.RecordMap, len(m))
	for name, v := range m {
		attr, ok := t[cedar.String(name)]
		if !ok {
			return cedar.Record{}, badf("%s: attribute %s is not declared in the schema", at, quote(name))
		}
		val, err := s.project(attr.Type, v, at+"."+name)
		if err != nil {
			return cedar.Record{}, err
		}
		out[cedar.String(name)] = val
	}
	for name, attr := range t {
		if _, ok := out[name]; !ok && !attr.Optional && !s.masked.has(name) {
			return cedar.Record{}, badf("%s: required attribute %s is missing", at, quote(string(name)))
		}
	}
	return cedar.NewRecord(out), nil
}

func projectLong(v any, at string) (cedar.Value, error) {
	switch n := v.(type) {
	case float64:
		if n != math.Trunc(n) || math.IsInf(n, 0) {
			return nil, badf("%s: a Long is a whole number", at)
		}
		if math.Abs(n) > maxSafeInteger {
			return nil, badf("%s: a JSON number beyond ±(2^53 - 1) is not exact; send it as a string of digits", at)
		}
		return cedar.Long(n), nil
	case json.Number:
		i, err := strconv.ParseInt(n.String(), 10, 64)
		if err != nil {
			return nil, badf("%s: a Long is a whole number of 64 bits", at)
		}
		return cedar.Long(i), nil
	case string:
		// Digits are accepted only for numbers that JSON cannot hold exactly, so that
		// each Long can be written in one way only.
		i, err := strconv.ParseInt(n, 10, 64)
		if err != nil || (i >= -maxSafeInteger && i <= maxSafeInteger) || strconv.FormatInt(i, 10) != n {
			return nil, mismatch(at, "a Long", v)
		}
		return cedar.Long(i), nil
	}
	return nil, mismatch(at, "a Long", v)
}

// projectReference reads {"type","id"} or {"__entity":{"type","id"}}.
func (s *Set) projectReference(want cedar.EntityType, v any, at string) (cedar.Value, error) {
	m, ok := v.(map[string]any)
	if !ok {
		return nil, mismatch(at, "a reference to "+string(want), v)
	}
	if inner, ok := m["__entity"]; ok && len(m) == 1 {
		if m, ok = inner.(map[string]any); !ok {
			return nil, mismatch(at+".__entity", `{"type", "id"}`, inner)
		}
	}
	typ, okType := m["type"].(string)
	id, okID := m["id"].(string)
	if !okType || !okID || len(m) != 2 {
		return nil, badf(`%s: a reference to an entity is {"type": "…", "id": "…"}`, at)
	}
	if cedar.EntityType(typ) != want {
		return nil, badf("%s: expected an entity of type %s, got %s", at, want, quote(typ))
	}
	if err := checkText(id, at+".id"); err != nil {
		return nil, err
	}
	uid := cedar.NewEntityUID(want, cedar.String(id))
	return uid, s.checkEnum(uid, at)
}

// checkEnum refuses an id that an enumerated entity type does not list.
func (s *Set) checkEnum(uid cedar.EntityUID, at string) error {
	enum, ok := s.schema.Enums[uid.Type]
	if !ok {
		return nil
	}
	for _, v := range enum.Values {
		if v == uid {
			return nil
		}
	}
	return badf("%s: %s is not a value of the enumerated type %s", at, quote(string(uid.ID)), uid.Type)
}

// projectExtension reads "text" or {"__extn":{"fn","arg"}}.
func projectExtension(name string, v any, at string) (cedar.Value, error) {
	ext, ok := extensions[name]
	if !ok {
		return nil, badf("%s: extension type %s is not supported", at, name)
	}
	text, ok := v.(string)
	if m, isMap := v.(map[string]any); isMap && len(m) == 1 {
		if call, isCall := m["__extn"].(map[string]any); isCall && len(call) == 2 && call["fn"] == ext.fn {
			text, ok = call["arg"].(string)
		}
	}
	if !ok {
		return nil, mismatch(at, "the text of a "+name, v)
	}
	if err := checkText(text, at); err != nil {
		return nil, err
	}
	val, err := ext.parse(text)
	if err != nil {
		return nil, badf("%s: %s is not a %s", at, quote(text), name)
	}
	return val, nil
}

// checkText bounds a string and refuses NUL, which the store cannot keep.
func checkText(s, at string) error {
	if len(s) > MaxStringBytes {
		return badf("%s: a string of %d bytes, the limit is %d", at, len(s), MaxStringBytes)
	}
	if !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
		return badf("%s: not valid text (UTF-8 without NUL)", at)
	}
	return nil
}

func mismatch(at, want string, v any) error {
	got := "null"
	switch v.(type) {
	case bool:
		got = "a Bool"
	case float64, json.Number:
		got = "a number"
	case string:
		got = "a string"
	case []any:
		got = "an array"
	case map[string]any:
		got = "an object"
	}
	return badf("%s: expected %s, got %s", at, want, got)
}

// quote quotes text from outside for a message, shortened.
func quote(s string) string {
	if len(s) > 80 {
		s = strings.ToValidUTF8(s[:80], "") + "…"
	}
	return strconv.Quote(s)
}

// entitiesIn calls fn for each entity that occurs in v.
func entitiesIn(v cedar.Value, fn func(cedar.EntityUID)) {
	switch v := v.(type) {
	case cedar.EntityUID:
		fn(v)
	case cedar.Record:
		for _, e := range v.All() {
			entitiesIn(e, fn)
		}
	case cedar.Set:
		for e := range v.All() {
			entitiesIn(e, fn)
		}
	}
}

// Plain turns a Cedar value into values that encoding/json and structpb accept. Entity
// references and extension values get Cedar's explicit form. A Long becomes a float64 if
// that is exact, and a string of digits otherwise. [Set.Prepare] and [Set.ReadEntity]
// read an equal value back.
func Plain(v cedar.Value) any {
	switch v := v.(type) {
	case cedar.Boolean:
		return bool(v)
	case cedar.Long:
		if v > maxSafeInteger || v < -maxSafeInteger {
			return strconv.FormatInt(int64(v), 10)
		}
		return float64(v)
	case cedar.String:
		return string(v)
	case cedar.EntityUID:
		return map[string]any{"__entity": map[string]any{"type": string(v.Type), "id": string(v.ID)}}
	case cedar.Record:
		return PlainRecord(v)
	case cedar.Set:
		out := make([]any, 0, v.Len())
		for e := range v.All() {
			out = append(out, Plain(e))
		}
		return out
	case cedar.IPAddr:
		return extn("ip", ipText(v))
	case cedar.Decimal:
		return extn("decimal", v.String())
	case cedar.Datetime:
		return extn("datetime", datetimeText(v))
	case cedar.Duration:
		return extn("duration", durationText(v))
	}
	return nil
}

// PlainRecord is Plain of a record.
func PlainRecord(r cedar.Record) map[string]any {
	out := make(map[string]any, r.Len())
	for k, e := range r.All() {
		out[string(k)] = Plain(e)
	}
	return out
}

func extn(fn, arg string) any {
	return map[string]any{"__extn": map[string]any{"fn": fn, "arg": arg}}
}
