package engine

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// marks says which parts of a type are marked @sensitive. nil means none.
type marks struct {
	whole   bool       // the value itself
	attrs   []attrMark // of a record or an entity, by name
	element *marks     // of a set, or of every tag
}

type attrMark struct {
	name string
	*marks
}

// marksOf finds the marks of a type.
func marksOf(t resolved.IsType) *marks {
	switch t := t.(type) {
	case resolved.RecordType:
		return recordMarks(t)
	case resolved.SetType:
		if e := marksOf(t.Element); e != nil {
			return &marks{element: e}
		}
	}
	return nil
}

// recordMarks joins the marks of several declarations of one record: a part is sensitive
// if any of them marks it.
func recordMarks(shapes ...resolved.RecordType) *marks {
	found := map[string]*marks{}
	for _, shape := range shapes {
		for name, a := range shape {
			m := marksOf(a.Type)
			if _, whole := a.Annotations["sensitive"]; whole {
				m = &marks{whole: true}
			}
			if m = joinMarks(found[string(name)], m); m != nil {
				found[string(name)] = m
			}
		}
	}
	if len(found) == 0 {
		return nil
	}
	out := &marks{}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		out.attrs = append(out.attrs, attrMark{name, found[name]})
	}
	return out
}

func joinMarks(a, b *marks) *marks {
	switch {
	case a == nil || b != nil && b.whole:
		return b
	case b == nil || a.whole:
		return a
	}
	out := &marks{element: joinMarks(a.element, b.element), attrs: slices.Clone(a.attrs)}
	for _, attr := range b.attrs {
		i, both := slices.BinarySearchFunc(out.attrs, attr.name, func(a attrMark, name string) int { return strings.Compare(a.name, name) })
		if both {
			out.attrs[i].marks = joinMarks(out.attrs[i].marks, attr.marks)
		} else {
			out.attrs = slices.Insert(out.attrs, i, attr)
		}
	}
	return out
}

// readSensitive collects what the schema marks @sensitive: the marks of everything that
// a request can contain, for masking, and the names of all marked attributes.
func (s *Set) readSensitive() {
	for _, a := range s.actions {
		if a.appliesTo == nil {
			continue
		}
		s.nameSensitive(a.appliesTo.Context)
		shapes := []resolved.RecordType{a.appliesTo.Context}
		if a.field != nil {
			// X and "X.field" both declare the context.
			shapes = append(shapes, a.field.appliesTo.Context)
		}
		a.sensitive = recordMarks(shapes...)
	}
	for t, decl := range s.schema.Entities {
		s.nameSensitive(decl.Shape)
		s.nameSensitive(decl.Tags)
		if s.requestTypes[t] {
			s.sensitive[t] = entityMarks{recordMarks(decl.Shape), marksOf(decl.Tags)}
		}
	}
}

// entityMarks are the marks of an entity type.
type entityMarks struct {
	attrs *marks
	tags  *marks // of each tag
}

func (s *Set) nameSensitive(t resolved.IsType) {
	switch t := t.(type) {
	case resolved.RecordType:
		for name, a := range t {
			if _, marked := a.Annotations["sensitive"]; marked {
				s.sensitiveNames[name] = true
			}
			s.nameSensitive(a.Type)
		}
	case resolved.SetType:
		s.nameSensitive(t.Element)
	}
}

// Mask returns what is recorded in place of a sensitive value, which it gets in the form
// of [Plain]. The path is the place of the value: "context.person.ssn",
// "entities[0].attrs.ssn".
type Mask func(path string, value any) any

// MaskContext is [PlainRecord] of the context as it is evaluated, with every value
// masked that the schema marks @sensitive in the action or in its ".field" action.
//
// Only attributes can be marked. The ids of the principal, the resource and the entities
// of the request cannot: a record must say who did what to which resource. Use ids that
// reveal nothing.
func (s *Set) MaskContext(q *Question, mask Mask) map[string]any {
	out := PlainRecord(q.request.Context)
	q.action.sensitive.mask(out, "context", mask)
	return out
}

// MaskEntity masks the attributes and tags of the i-th entity of the request. ok is
// false if nothing in it is marked.
func (s *Set) MaskEntity(q *Question, uid cedar.EntityUID, i int, mask Mask) (attrs, tags map[string]any, ok bool) {
	m := s.sensitive[uid.Type]
	if m.attrs == nil && m.tags == nil {
		return nil, nil, false
	}
	e, at := q.inline[uid], fmt.Sprintf("entities[%d]", i)
	attrs, tags = PlainRecord(e.Attrs), PlainRecord(e.Tags)
	m.attrs.mask(attrs, at+".attrs", mask)
	if m.tags != nil {
		for _, name := range slices.Sorted(maps.Keys(tags)) {
			m.tags.mask(tags[name], at+".tags."+name, mask)
		}
	}
	return attrs, tags, true
}

// mask masks, in place, what is marked in a record or a set.
func (m *marks) mask(v any, at string, mask Mask) {
	if m == nil {
		return
	}
	switch v := v.(type) {
	case map[string]any:
		for _, a := range m.attrs {
			inner, ok := v[a.name]
			switch at := at + "." + a.name; {
			case !ok:
			case a.whole:
				v[a.name] = mask(at, inner)
			default:
				a.mask(inner, at, mask)
			}
		}
	case []any:
		for i, e := range v {
			m.element.mask(e, fmt.Sprintf("%s[%d]", at, i), mask)
		}
	}
}

// withheldMessage replaces the message of a failed policy that reads an attribute marked
// @sensitive.
const withheldMessage = "evaluation failed (the message is withheld: the policy reads an attribute marked @sensitive)"

// message is the text of a failed evaluation that may be shown and recorded. Cedar's
// messages can contain operands: "integer overflow while attempting to add `…` with
// `…`", "entity `…` does not exist".
func (s *Set) message(p *policy, req cedar.Request, e *entities, text string) string {
	switch {
	case s.readsSensitive(p):
		return withheldMessage
	case p.orderDepth > maxRecordOrder:
		return anyOrderMessage
	case p.inOrder != nil && e.meter.spend(p.cost<<p.orderDepth):
		if _, diag := cedar.Authorize(single{p.inOrder}, e, req); len(diag.Errors) == 1 {
			return diag.Errors[0].Message
		}
	}
	return text
}

// readsSensitive reports whether a condition reads an attribute whose name is marked
// @sensitive in any type. It compares names alone, so it may withhold too much, and it
// does not need the types of expressions.
func (s *Set) readsSensitive(p *policy) bool {
	if len(s.sensitiveNames) == 0 {
		return false
	}
	found := false
	for _, c := range p.tree().Conditions {
		xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
			a, ok := n.(xast.NodeTypeAccess)
			found = found || ok && s.sensitiveNames[a.Value]
			return !found
		})
	}
	return found
}
