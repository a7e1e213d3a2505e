package fields

import (
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"strconv"
)

// Map removes the values that are not permitted from m, in place. The rest is what JSON would
// leave of the marshaled map: Map goes through nested maps, slices, pointers and interfaces,
// and through structs as Struct does. A slice that loses elements is replaced by a new one.
// Maps and the targets of pointers are changed in place, also for other holders of them,
// unless they are removed as a whole. A type that marshals itself (MarshalJSON, MarshalText),
// a []byte and a json.RawMessage are plain values: they stay only at a permitted path. A map
// whose keys cannot be JSON is dropped.
func (f *Filter) Map(m map[string]any) Dropped {
	w := newValueWalk()
	w.keep(reflect.ValueOf(m), f.top())
	return w.result()
}

// Struct sets the values that are not permitted to zero, in place. ptr points to a struct, or
// to a map, slice or array of structs. Names are those of encoding/json: tags, and fields
// promoted from embedded structs. An exported field that encoding/json would leave out, such
// as one tagged "-", has no path: it is set to zero as denied, unless it is inside a permitted
// path. An unexported field cannot be set and stays: do not print a filtered struct with "%v".
//
// Inside of fields, everything is as in Map. A value that is zero already is not counted. A
// value with two paths, by two pointers to it, keeps only what both paths permit. Cycles are
// followed once.
//
// It fails, and changes nothing, if ptr is not a pointer, is nil, or points to a plain value
// or a type that marshals itself. Use Marshal for those.
func (f *Filter) Struct(ptr any) (Dropped, error) {
	v := reflect.ValueOf(ptr)
	if v.Kind() != reflect.Pointer {
		return Dropped{}, fmt.Errorf("fields: %T is not a pointer", ptr)
	}
	if v.IsNil() {
		return Dropped{}, errors.New("fields: nil pointer")
	}
	switch v.Elem().Kind() {
	case reflect.Struct, reflect.Map, reflect.Slice, reflect.Array:
	default:
		return Dropped{}, fmt.Errorf("fields: %T points to neither a struct nor a list nor a map", ptr)
	}
	if marshalsItself(v.Elem().Type()) {
		return Dropped{}, fmt.Errorf("fields: %T marshals itself", ptr)
	}
	w := newValueWalk()
	w.keep(v, f.top())
	return w.result(), nil
}

// valueWalk goes through Go values. Below a node that keeps nothing it only counts, and the
// caller removes the whole value.
type valueWalk struct {
	tally
	seen map[place]bool // pointers and maps, and whether each was kept
	open map[place]bool // slices that the walk is in
}

// place is a pointer, map or slice at one path.
type place struct {
	typ  reflect.Type
	addr uintptr
	n    int
	node *node
}

func newValueWalk() *valueWalk {
	return &valueWalk{seen: map[place]bool{}, open: map[place]bool{}}
}

// keep removes from v the values that are not permitted at n, and says whether v stays. v must
// be settable, unless it is a pointer or a map.
func (w *valueWalk) keep(v reflect.Value, n *node) bool {
	if keep, ok := w.known(n); ok {
		return keep
	}
	if v.Kind() != reflect.Interface && v.Kind() != reflect.Pointer && marshalsItself(v.Type()) {
		if n.whole { // a denied path is inside, where the filter cannot reach
			return w.deny()
		}
		return w.unknown()
	}
	switch v.Kind() {
	case reflect.Interface:
		return w.inInterface(v, n)
	case reflect.Pointer, reflect.Map:
		if v.IsNil() {
			return w.null(n)
		}
		at := place{v.Type(), v.Pointer(), 0, n}
		if kept, ok := w.seen[at]; ok {
			return kept
		}
		w.seen[at] = n.keeps()
		if v.Kind() == reflect.Map {
			w.seen[at] = w.inMap(v, n)
		} else {
			w.seen[at] = w.keep(v.Elem(), n)
		}
		return w.seen[at]
	case reflect.Slice:
		if v.IsNil() {
			return w.null(n)
		}
		at := place{v.Type(), v.Pointer(), v.Len(), n}
		if w.open[at] { // a slice that contains itself has no JSON
			return w.unknown()
		}
		w.open[at] = true
		defer delete(w.open, at)
		return w.inSlice(v, n)
	case reflect.Array:
		return w.inArray(v, n)
	case reflect.Struct:
		return w.inStruct(v, n)
	default:
		return w.scalar(n)
	}
}

func (w *valueWalk) inInterface(v reflect.Value, n *node) bool {
	if v.IsNil() {
		return w.null(n)
	}
	held := v.Elem()
	if held.Kind() == reflect.Pointer || held.Kind() == reflect.Map {
		return w.keep(held, n)
	}
	changed := reflect.New(held.Type()).Elem()
	changed.Set(held)
	if !w.keep(changed, n) {
		return false
	}
	if v.CanSet() {
		v.Set(changed)
	}
	return true
}

func (w *valueWalk) inMap(v reflect.Value, n *node) bool {
	before := w.total()
	for it := v.MapRange(); it.Next(); {
		key, ok := keyName(it.Key())
		if !ok {
			return w.unknown()
		}
		child := n.child(key)
		mark := w.push(key, child != nil)
		value := reflect.New(v.Type().Elem()).Elem()
		value.Set(it.Value())
		kept := w.keep(value, child)
		switch {
		case !n.keeps():
		case kept && child.all():
		case kept:
			v.SetMapIndex(it.Key(), value)
		default:
			v.SetMapIndex(it.Key(), reflect.Value{})
		}
		w.pop(mark)
	}
	return w.settled(n, before)
}

// keyName returns the name that encoding/json gives to a key of a map.
func keyName(k reflect.Value) (string, bool) {
	if k.Kind() == reflect.String {
		return k.String(), true
	}
	if k.Type().Implements(textMarshaler) {
		if k.Kind() == reflect.Pointer && k.IsNil() {
			return "", true
		}
		text, err := k.Interface().(encoding.TextMarshaler).MarshalText()
		return string(text), err == nil
	}
	switch {
	case k.CanInt():
		return strconv.FormatInt(k.Int(), 10), true
	case k.CanUint():
		return strconv.FormatUint(k.Uint(), 10), true
	}
	return "", false
}

// inSlice makes a new slice if elements are removed. Other holders of the old one would see
// moved elements twice.
func (w *valueWalk) inSlice(v reflect.Value, n *node) bool {
	before := w.total()
	kept := make([]bool, v.Len())
	left := 0
	for i := range v.Len() {
		if kept[i] = w.keep(v.Index(i), n); kept[i] {
			left++
		}
	}
	if n.keeps() && left < v.Len() {
		rest := reflect.MakeSlice(v.Type(), 0, left)
		for i, k := range kept {
			if k {
				rest = reflect.Append(rest, v.Index(i))
			}
		}
		v.Set(rest)
	}
	return w.settled(n, before)
}

// inArray sets removed elements to zero, because an array cannot be shortened.
func (w *valueWalk) inArray(v reflect.Value, n *node) bool {
	before := w.total()
	for i := range v.Len() {
		w.part(v.Index(i), n, n)
	}
	return w.settled(n, before)
}

func (w *valueWalk) inStruct(v reflect.Value, n *node) bool {
	before := w.total()
	p := planOf(v.Type())
	for _, f := range p.fields {
		part, err := v.FieldByIndexErr(f.index)
		if err != nil { // because an embedded pointer is nil
			continue
		}
		child := n.child(f.name)
		mark := w.push(f.name, child != nil)
		w.part(part, n, child)
		w.pop(mark)
	}
	for _, index := range p.hidden {
		part, err := v.FieldByIndexErr(index)
		if err != nil || part.IsZero() {
			continue
		}
		w.deny()
		if n.keeps() {
			setZero(part)
		}
	}
	return w.settled(n, before)
}

// part filters a field or an element, which is set to zero if it does not stay.
func (w *valueWalk) part(v reflect.Value, holder, n *node) {
	if v.IsZero() {
		return
	}
	before := w.total()
	if kept := w.keep(v, n); kept || !holder.keeps() {
		return
	}
	setZero(v)
	if w.total() == before {
		w.deny()
	}
}

// setZero sets v to zero. An embedded field of an unexported type cannot be set
// itself, but its exported fields can.
func setZero(v reflect.Value) {
	switch {
	case v.CanSet():
		v.SetZero()
	case v.Kind() == reflect.Pointer && !v.IsNil():
		setZero(v.Elem())
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			if sf := v.Type().Field(i); sf.IsExported() || sf.Anonymous {
				setZero(v.Field(i))
			}
		}
	}
}
