package engine

import (
	"fmt"
	"strings"

	"github.com/cedar-policy/cedar-go"
)

// leaf is one field that is decided by itself: a path of the catalogue with no other
// path below it.
type leaf struct {
	index int
	path  string
	uid   cedar.EntityUID
}

// catalogue holds the fields of one resource type.
type catalogue struct {
	leaves []leaf
	below  map[string][]int // path → the leaves it stands for
}

// readFields turns a bundle's catalogue into Field and FieldGroup entities and
// the leaves that are decided.
func (s *Set) readFields(b Source, report func(line, column int, msg, hint string)) {
	parents := map[cedar.EntityUID]map[cedar.EntityUID]bool{}
	link := func(child, parent cedar.EntityUID) {
		if parents[child] == nil {
			parents[child] = map[cedar.EntityUID]bool{}
		}
		parents[child][parent] = true
	}
	paths := map[cedar.EntityType][]string{}
	uidOf := func(t cedar.EntityType, path string) cedar.EntityUID {
		id := baseName(t)
		if path != "" {
			id += "." + path
		}
		return cedar.NewEntityUID(qualify(namespaceOf(t), fieldType), cedar.String(id))
	}
	for _, f := range b.Fields {
		t := cedar.EntityType(f.Type)
		ns := namespaceOf(t)
		group := qualify(ns, fieldGroupType)
		if s.owners[ns] != b.Name {
			report(f.Line, f.Column, fmt.Sprintf("type %s is not of a namespace that this bundle owns", t), "")
			continue
		}
		if !s.knowsType(t) {
			report(f.Line, f.Column, fmt.Sprintf("type %s is not declared in the schema", t), "")
			continue
		}
		if _, ok := s.schema.Entities[qualify(ns, fieldType)]; !ok {
			report(f.Line, f.Column, fmt.Sprintf("namespace %s declares no entity type %s", ns, fieldType), "entity FieldGroup in [FieldGroup]; entity Field in [Field, FieldGroup];")
			continue
		}
		if _, ok := s.schema.Entities[group]; !ok && len(f.Groups) > 0 {
			report(f.Line, f.Column, fmt.Sprintf("namespace %s declares no entity type %s", ns, fieldGroupType), "entity FieldGroup in [FieldGroup];")
			continue
		}
		var child cedar.EntityUID
		if t == group {
			child = cedar.NewEntityUID(group, cedar.String(f.Path))
		} else {
			child = uidOf(t, f.Path)
			paths[t] = append(paths[t], f.Path)
			for path := f.Path; path != ""; {
				up := ""
				if i := strings.LastIndexByte(path, '.'); i >= 0 {
					up = path[:i]
				}
				link(uidOf(t, path), uidOf(t, up))
				path = up
			}
		}
		if parents[child] == nil {
			parents[child] = map[cedar.EntityUID]bool{}
		}
		for _, g := range f.Groups {
			link(child, cedar.NewEntityUID(group, cedar.String(g)))
		}
	}
	for t, list := range paths {
		s.catalogues[t] = newCatalogue(list, func(path string) cedar.EntityUID { return uidOf(t, path) })
	}
	for uid := range parents {
		closed, cyclic := closeOver(uid, parents)
		if cyclic {
			report(0, 0, fmt.Sprintf("%s is in itself", uid), "field groups must not form a circle")
			return
		}
		s.static[uid] = cedar.Entity{UID: uid, Parents: cedar.NewEntityUIDSet(closed...)}
		for _, p := range closed {
			if _, ok := s.static[p]; !ok {
				s.static[p] = cedar.Entity{UID: p}
			}
		}
	}
}

func closeOver(uid cedar.EntityUID, parents map[cedar.EntityUID]map[cedar.EntityUID]bool) (out []cedar.EntityUID, cyclic bool) {
	seen := map[cedar.EntityUID]bool{}
	queue := []cedar.EntityUID{uid}
	for len(queue) > 0 {
		u := queue[0]
		queue = queue[1:]
		for p := range parents[u] {
			if p == uid {
				return nil, true
			}
			if !seen[p] {
				seen[p] = true
				out = append(out, p)
				queue = append(queue, p)
			}
		}
	}
	return out, false
}

// newCatalogue finds the leaves among paths, and for each path the leaves below it.
func newCatalogue(paths []string, uid func(string) cedar.EntityUID) *catalogue {
	c := &catalogue{below: map[string][]int{}}
	interior := map[string]bool{}
	for _, p := range paths {
		for i := strings.LastIndexByte(p, '.'); i >= 0; i = strings.LastIndexByte(p[:i], '.') {
			interior[p[:i]] = true
		}
	}
	for _, p := range paths {
		if interior[p] {
			continue
		}
		n := len(c.leaves)
		c.leaves = append(c.leaves, leaf{n, p, uid(p)})
		c.below[p] = []int{n}
		for i := strings.LastIndexByte(p, '.'); i >= 0; i = strings.LastIndexByte(p[:i], '.') {
			c.below[p[:i]] = append(c.below[p[:i]], n)
		}
	}
	return c
}
