package engine

import (
	"slices"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// MaxLevel is how deep a policy may dereference entities. The entities a
// request can touch are loaded level by level, so this bounds its round trips.
const MaxLevel = 3

// leveler computes the level of a policy. It is 1 if the policy dereferences only the
// principal, the action, the resource and entities in the context, 2 if it also
// dereferences entities in the attributes of those, and so on
// (https://github.com/cedar-policy/rfcs/blob/main/text/0076-entity-slice-validation.md).
// "x.a", "x has a", tags, and the left side of "in" dereference x.
type leveler struct {
	schema     *resolved.Schema
	principals []resolved.IsType
	resources  []resolved.IsType
	contexts   []resolved.IsType

	level   int
	literal *cedar.EntityUID // a literal that is dereferenced
}

// operand is what is known about the value of an expression: the types it may have
// (nil: unknown), how many dereferences lead to it, and whether it may be an entity
// literal, which a slice does not contain.
type operand struct {
	types   []resolved.IsType
	depth   int
	literal *cedar.EntityUID
}

// isEntity reports whether the operand may be an entity. One of unknown type may be.
func (o operand) isEntity() bool {
	if o.types == nil {
		return true
	}
	for _, t := range o.types {
		if _, ok := t.(resolved.EntityType); ok {
			return true
		}
	}
	return false
}

func merge(a, b operand) operand {
	out := operand{depth: max(a.depth, b.depth), literal: a.literal}
	if b.literal != nil {
		out.literal = b.literal
	}
	if a.types != nil && b.types != nil {
		out.types = union(a.types, b.types)
	}
	return out
}

// union joins two lists of types and drops doubled entity types. There can be too many
// record types, so an operand that may be one of several records counts as unknown.
func union(a, b []resolved.IsType) []resolved.IsType {
	out := make([]resolved.IsType, 0, len(a)+len(b))
	seen := map[resolved.EntityType]bool{}
	for _, t := range slices.Concat(a, b) {
		e, ok := t.(resolved.EntityType)
		if !ok {
			if len(out) >= maxUnion {
				return nil
			}
			out = append(out, t)
			continue
		}
		if !seen[e] {
			seen[e] = true
			out = append(out, t)
		}
	}
	return out
}

// maxUnion bounds the types that one expression may have. An expression with more
// counts as unknown, which may give the policy a higher level and changes no decision.
const maxUnion = 64

var noEntity = operand{types: []resolved.IsType{}}

// deref notes that o is dereferenced, and returns the depth of the value.
func (l *leveler) deref(o operand) int {
	if !o.isEntity() {
		return o.depth
	}
	if o.literal != nil {
		l.literal = o.literal
	}
	l.level = max(l.level, o.depth+1)
	return o.depth + 1
}

func (l *leveler) expr(n xast.IsNode) operand {
	switch t := n.(type) {
	case xast.NodeTypeVariable:
		switch t.Name {
		case "principal":
			return operand{types: l.principals}
		case "resource":
			return operand{types: l.resources}
		case "context":
			return operand{types: l.contexts}
		}
		return noEntity // action: its entity is always there
	case xast.NodeValue:
		if uid, ok := t.Value.(cedar.EntityUID); ok {
			if _, isAction := l.schema.Actions[uid]; isAction {
				return noEntity
			}
			o := operand{types: []resolved.IsType{resolved.EntityType(uid.Type)}}
			if _, enum := l.schema.Enums[uid.Type]; !enum { // those have neither attributes nor parents
				o.literal = &uid
			}
			return o
		}
		return noEntity
	case xast.NodeTypeAccess:
		o := l.expr(t.Arg)
		return operand{types: l.attribute(o.types, t.Value), depth: l.deref(o), literal: recordLiteral(o)}
	case xast.NodeTypeHas:
		l.deref(l.expr(t.Arg))
		return noEntity
	case xast.NodeTypeGetTag:
		o := l.expr(t.Left)
		l.expr(t.Right)
		return operand{types: l.tags(o.types), depth: l.deref(o)}
	case xast.NodeTypeHasTag:
		l.deref(l.expr(t.Left))
		l.expr(t.Right)
		return noEntity
	case xast.NodeTypeIn:
		l.deref(l.expr(t.Left))
		l.expr(t.Right)
		return noEntity
	case xast.NodeTypeIsIn:
		l.deref(l.expr(t.Left))
		l.expr(t.Entity)
		return noEntity
	case xast.NodeTypeIfThenElse:
		l.expr(t.If)
		return merge(l.expr(t.Then), l.expr(t.Else))
	case xast.NodeTypeRecord:
		out := operand{}
		for _, e := range t.Elements {
			out = merge(out, l.expr(e.Value))
		}
		out.types = nil
		return out
	case xast.NodeTypeSet:
		out := operand{}
		for _, e := range t.Elements {
			out = merge(out, l.expr(e))
		}
		out.types = nil
		return out
	}
	// No other expression has an entity as its value: only its operands matter.
	first := true
	xast.Inspect(xast.NewNode(n), func(child xast.IsNode) bool {
		if first {
			first = false
			return true
		}
		l.expr(child)
		return false
	})
	return noEntity
}

// recordLiteral returns the entity literal inside a record of unknown shape, if there is
// one.
func recordLiteral(o operand) *cedar.EntityUID {
	if o.types == nil {
		return o.literal
	}
	return nil
}

func (l *leveler) attribute(types []resolved.IsType, name cedar.String) []resolved.IsType {
	if types == nil {
		return nil
	}
	out := []resolved.IsType{}
	for _, t := range types {
		var shape resolved.RecordType
		switch t := t.(type) {
		case resolved.RecordType:
			shape = t
		case resolved.EntityType:
			shape = l.schema.Entities[cedar.EntityType(t)].Shape
		}
		if a, ok := shape[name]; ok {
			out = append(out, a.Type)
		}
	}
	return out
}

func (l *leveler) tags(types []resolved.IsType) []resolved.IsType {
	if types == nil {
		return nil
	}
	out := []resolved.IsType{}
	for _, t := range types {
		if e, ok := t.(resolved.EntityType); ok {
			if tag := l.schema.Entities[cedar.EntityType(e)].Tags; tag != nil {
				out = append(out, tag)
			}
		}
	}
	return out
}
