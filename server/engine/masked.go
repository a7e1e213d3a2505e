package engine

import (
	"errors"
	"maps"
	"slices"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// ErrMasked is a recorded question that cannot be decided again: a policy that could apply to it reads a
// value of which the record has only a hash.
var ErrMasked = errors.New("a policy reads a value that is masked in the record")

// MaskedKey is the name of the only member of the object that a record has in place of a masked value.
const MaskedKey = "__masked"

// masked says what a recorded question has hashes in place of: attributes of the context or of entities
// of the request, by name, and tags.
type masked struct {
	attrs map[cedar.String]bool
	tags  bool
}

// has reports whether an attribute with a name is masked.
func (m *masked) has(name cedar.String) bool { return m != nil && m.attrs[name] }

// withoutMasked returns a recorded question without the attributes and tags in which a value is masked. m
// is nil if there are none.
func withoutMasked(a Ask) (_ Ask, m *masked) {
	note := func() *masked {
		if m == nil {
			m = &masked{attrs: map[cedar.String]bool{}}
		}
		return m
	}
	drop := func(values map[string]any, found func(name string)) map[string]any {
		copied := false
		for name, v := range values {
			if !hasMasked(v) {
				continue
			}
			if !copied {
				values, copied = maps.Clone(values), true
			}
			delete(values, name)
			found(name)
		}
		return values
	}
	attr := func(name string) { note().attrs[cedar.String(name)] = true }
	a.Context = drop(a.Context, attr)
	for i, e := range a.Inline {
		attrs := drop(e.Attrs, attr)
		tags := drop(e.Tags, func(string) { note().tags = true })
		if len(attrs) < len(e.Attrs) || len(tags) < len(e.Tags) {
			a.Inline = slices.Clone(a.Inline)
			a.Inline[i].Attrs, a.Inline[i].Tags = attrs, tags
		}
	}
	return a, m
}

func hasMasked(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		if _, is := v[MaskedKey]; is && len(v) == 1 {
			return true
		}
		for _, inner := range v {
			if hasMasked(inner) {
				return true
			}
		}
	case []any:
		return slices.ContainsFunc(v, hasMasked)
	}
	return false
}

// guard ends the work if a candidate reads something that is masked.
func (m *masked) guard(candidates policies, work *meter) {
	if m != nil && slices.ContainsFunc(candidates, m.readBy) {
		work.fail(ErrMasked)
	}
}

// readBy reports whether a condition of a policy reads something that is masked. It compares names alone,
// so it can be true for an attribute of the same name.
func (m *masked) readBy(p *policy) bool {
	return slices.ContainsFunc(p.tree().Conditions, func(c xast.ConditionType) bool { return m.readIn(c.Body) })
}

// readIn reports whether an expression reads something that is masked. The context as a whole has all
// of its attributes.
func (m *masked) readIn(n xast.IsNode) (found bool) {
	var arg xast.IsNode
	switch t := n.(type) {
	case xast.NodeTypeVariable:
		return t.Name == "context" && len(m.attrs) > 0
	case xast.NodeTypeAccess:
		found, arg = m.attrs[t.Value], t.Arg
	case xast.NodeTypeHas:
		found, arg = m.attrs[t.Value], t.Arg
	case xast.NodeTypeHasTag, xast.NodeTypeGetTag:
		found = m.tags
	}
	if found || isContext(arg) {
		return found
	}
	root := true
	xast.Inspect(xast.NewNode(n), func(child xast.IsNode) bool {
		if root {
			root = false
			return true
		}
		found = found || m.readIn(child)
		return false
	})
	return found
}

// Masked reports whether the question comes from a record in which values are masked. Then
// [Result.DeniedAt] is not certain: whether any resource could be allowed can depend on them.
func (q *Question) Masked() bool { return q.masked != nil }
