package engine

import (
	"slices"

	"github.com/cedar-policy/cedar-go"
)

// ReadAttribute reads a value to compare an attribute of stored entities with.
func (s *Set) ReadAttribute(t cedar.EntityType, name string, v any) (cedar.Value, error) {
	if !s.knowsType(t) {
		return nil, badf("type %s is not declared by any schema", quote(string(t)))
	}
	attr, ok := s.schema.Entities[t].Shape[cedar.String(name)]
	if !ok {
		return nil, badf("attributes: %s has no attribute %s", t, quote(name))
	}
	return s.newReading().project(attr.Type, v, "attributes: "+name)
}

// GroupTypes returns the types whose entities can be members of the entity, at any
// depth, and have members themselves, sorted.
func (s *Set) GroupTypes(uid cedar.EntityUID) ([]string, error) {
	if !s.knowsType(uid.Type) {
		return nil, badf("entity %s: type %s is not declared by any schema", uid, quote(string(uid.Type)))
	}
	members := map[cedar.EntityType][]cedar.EntityType{}
	for t, decl := range s.schema.Entities {
		for _, parent := range decl.ParentTypes {
			members[parent] = append(members[parent], t)
		}
	}
	seen := map[cedar.EntityType]bool{}
	var groups []string
	for todo := slices.Clone(members[uid.Type]); len(todo) > 0; {
		t := todo[0]
		todo = todo[1:]
		if !seen[t] && len(members[t]) > 0 {
			groups = append(groups, string(t))
			todo = append(todo, members[t]...)
		}
		seen[t] = true
	}
	slices.Sort(groups)
	return groups, nil
}
