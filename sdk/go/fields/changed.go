package fields

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json/jsontext"
)

// Changed returns the paths at which two values differ as JSON, sorted, each once. It
// returns none if they are equal. For an object that is on one side only, or null on the
// other, it returns the fields of the object. Lists of equal length are compared element by
// element. A list whose length differs has changed as a whole, and so has a value that is an
// object on one side and another value on the other: all members in them have changed, also
// those that are in no catalogue. Numbers are compared as they are written: 1 and 1.0 differ. What encoding/json
// leaves out is not compared.
//
// Both values must be objects, or lists of objects of equal length. Changed fails if one is
// something else or cannot be marshaled, or has a member twice, which a json.RawMessage can.
// It also has the limits of MergePatch, except the size.
func Changed(before, after any) ([]string, error) {
	a, err := asJSON(before)
	if err != nil {
		return nil, err
	}
	b, err := asJSON(after)
	if err != nil {
		return nil, err
	}
	d := differ{pathSet{}}
	if err := d.diff("", a, b, 0); err != nil {
		return nil, err
	}
	return d.paths.sorted(), nil
}

func asJSON(v any) (any, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("fields: %w", err)
	}
	_, err = jsontext.NewDecoder(bytes.NewReader(text)).ReadValue()
	grammar, _ := errors.AsType[*jsontext.SyntacticError](err)
	switch {
	case errors.Is(err, jsontext.ErrDuplicateName): // readers differ in which of the two they use
		return nil, fmt.Errorf("fields: %.60q twice in an object", grammar.JSONPointer.LastToken())
	case err != nil:
		return nil, errors.New("fields: not Unicode")
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var out any
	if err := d.Decode(&out); err != nil {
		return nil, fmt.Errorf("fields: %w", err)
	}
	return out, nil
}

type differ struct{ paths pathSet }

// absent takes the place of a member that an object does not have.
type absent struct{}

func (d differ) diff(path string, a, b any, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("fields: nested deeper than %d", maxDepth)
	}
	objectA, isA := a.(map[string]any)
	objectB, isB := b.(map[string]any)
	if isA && isB || len(objectA) > 0 && b == any(absent{}) || len(objectB) > 0 && a == any(absent{}) {
		return d.members(path, objectA, objectB, depth)
	}
	listA, isA := a.([]any)
	listB, isB := b.([]any)
	switch {
	case isA && isB && len(listA) == len(listB):
		for i := range listA {
			if err := d.diff(path, listA[i], listB[i], depth+1); err != nil {
				return err
			}
		}
		return nil
	case !isA && !isB && objectA == nil && objectB == nil && a == b:
		return nil
	case path == "":
		return errors.New("fields: the values are neither two objects nor two lists of one length")
	}
	return d.replaced(path, depth, a, b)
}

// replaced adds the paths of all members in values that replace each other as a whole. It adds
// the path itself if a value has none, or if a list takes the place of an object.
func (d differ) replaced(path string, depth int, values ...any) error {
	if depth > maxDepth {
		return fmt.Errorf("fields: nested deeper than %d", maxDepth)
	}
	members := map[string][]any{}
	list, object, plain := false, false, false
	var collect func(v any, element bool)
	collect = func(v any, element bool) {
		switch v := v.(type) {
		case absent:
		case []any:
			list = true
			for _, e := range v {
				collect(e, true)
			}
		case map[string]any:
			object = object || !element
			plain = plain || len(v) == 0
			for key, m := range v {
				members[key] = append(members[key], m)
			}
		default:
			plain = plain || v != nil || element
		}
	}
	for _, v := range values {
		collect(v, false)
	}
	for key, list := range members {
		below, err := join(path, key)
		if err != nil {
			return err
		}
		if err := d.replaced(below, depth+1, list...); err != nil {
			return err
		}
	}
	if plain || list && object || len(members) == 0 {
		return d.paths.add(path)
	}
	return nil
}

func (d differ) members(path string, a, b map[string]any, depth int) error {
	one := func(key string) error {
		below, err := join(path, key)
		if err != nil {
			return err
		}
		return d.diff(below, member(a, key), member(b, key), depth+1)
	}
	for key := range a {
		if err := one(key); err != nil {
			return err
		}
	}
	for key := range b {
		if _, both := a[key]; !both {
			if err := one(key); err != nil {
				return err
			}
		}
	}
	return nil
}

func member(object map[string]any, key string) any {
	if v, ok := object[key]; ok {
		return v
	}
	return absent{}
}
