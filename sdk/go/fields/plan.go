package fields

import (
	"encoding"
	"encoding/json"
	"reflect"
	"strings"
	"sync"
	"unicode"
)

// plan is a struct type as encoding/json sees it.
type plan struct {
	fields []structField
	// hidden are exported fields that encoding/json leaves out: tagged "-", or shadowed by
	// another field of the same name.
	hidden [][]int
}

type structField struct {
	name   string
	index  []int
	tagged bool
}

// plans is never emptied, as in encoding/json: there are few types, and a filter lives too
// short to keep plans of its own.
var plans sync.Map // reflect.Type → *plan

func planOf(t reflect.Type) *plan {
	if p, ok := plans.Load(t); ok {
		return p.(*plan)
	}
	p, _ := plans.LoadOrStore(t, newPlan(t))
	return p.(*plan)
}

// newPlan goes through embedded structs level by level. Of several fields of one name the
// shallowest counts, among those of one level the tagged one. If there are still two,
// neither counts.
func newPlan(t reflect.Type) *plan {
	type embedded struct {
		typ   reflect.Type
		index []int
	}
	p := &plan{}
	taken := map[string]bool{} // names of the levels above
	seen := map[reflect.Type]bool{}
	for level := []embedded{{typ: t}}; len(level) > 0; {
		var below []embedded
		var names []string
		found := map[string][]structField{}
		for _, e := range level {
			seen[e.typ] = true
		}
		for _, e := range level {
			for i := range e.typ.NumField() {
				sf := e.typ.Field(i)
				index := append(append([]int(nil), e.index...), i)
				inner := sf.Type
				if inner.Kind() == reflect.Pointer && inner.Name() == "" {
					inner = inner.Elem()
				}
				if !sf.IsExported() && (!sf.Anonymous || inner.Kind() != reflect.Struct) {
					continue
				}
				tag := sf.Tag.Get("json")
				name, _, _ := strings.Cut(tag, ",")
				if !validTag(name) {
					name = ""
				}
				switch {
				case tag == "-":
					p.hidden = append(p.hidden, index)
				case name == "" && sf.Anonymous && inner.Kind() == reflect.Struct:
					if seen[inner] { // the fields of the outer occurrence shadow those of this one
						p.hidden = append(p.hidden, index)
						continue
					}
					below = append(below, embedded{inner, index})
				default:
					f := structField{name, index, name != ""}
					if name == "" {
						f.name = sf.Name
					}
					if len(found[f.name]) == 0 {
						names = append(names, f.name)
					}
					found[f.name] = append(found[f.name], f)
				}
			}
		}
		for _, name := range names {
			p.choose(found[name], taken[name])
			taken[name] = true
		}
		level = below
	}
	return p
}

// choose chooses the field that counts among the fields of one name and level.
func (p *plan) choose(same []structField, taken bool) {
	winner := -1
	for i, f := range same {
		if f.tagged || len(same) == 1 {
			if winner >= 0 { // two are tagged
				winner = -1
				break
			}
			winner = i
		}
	}
	for i, f := range same {
		if i == winner && !taken {
			p.fields = append(p.fields, f)
		} else {
			p.hidden = append(p.hidden, f.index)
		}
	}
}

// validTag says whether encoding/json accepts a name in a tag.
func validTag(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !strings.ContainsRune("!#$%&()*+-./:;<=>?@[]^_{|}~ ", r) && !unicode.IsLetter(r) && !unicode.IsDigit(r)
	})
}

var (
	jsonMarshaler = reflect.TypeFor[json.Marshaler]()
	textMarshaler = reflect.TypeFor[encoding.TextMarshaler]()
)

// marshalsItself says that a type makes its own JSON, so the members of that need not be the
// fields of the type.
func marshalsItself(t reflect.Type) bool {
	for _, t := range []reflect.Type{t, reflect.PointerTo(t)} {
		if t.Implements(jsonMarshaler) || t.Implements(textMarshaler) {
			return true
		}
	}
	return t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Uint8 // base64
}
