package cedarposttest

import (
	"fmt"
	"slices"

	"github.com/cedar-policy/cedar-go"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/wire"
)

// Put stores whole entities, all of them or none, in one revision. Like all writes, it
// returns the token of the revision, for [cedarpost.Check].AtLeastAsFresh. Values are as in
// [cedarpost.Check].Context. A write that the schema refuses fails the test.
func (s *Service) Put(entities ...cedarpost.Entity) (revision string) {
	s.t.Helper()
	return s.write(func(next map[cedar.EntityUID]*engine.Entity) error {
		for _, e := range entities {
			sent, err := e.Proto()
			if err != nil {
				return fmt.Errorf("entity %s: %w", e.UID, err)
			}
			entity, err := s.set.ReadEntity(wire.Entity(sent))
			if err != nil {
				return err
			}
			next[entity.UID] = entity
		}
		return nil
	})
}

// Delete removes entities and all memberships in them.
func (s *Service) Delete(uids ...cedarpost.EntityUID) (revision string) {
	s.t.Helper()
	return s.write(func(next map[cedar.EntityUID]*engine.Entity) error {
		for _, uid := range cedarUIDs(uids) {
			if err := s.set.CheckStorable(uid); err != nil {
				return err
			}
			delete(next, uid)
			for member, e := range next {
				if slices.Contains(e.Parents, uid) {
					next[member] = withParents(e, without(e.Parents, uid))
				}
			}
		}
		return nil
	})
}

// AddParents makes a stored entity a member of other entities.
func (s *Service) AddParents(uid cedarpost.EntityUID, parents ...cedarpost.EntityUID) (revision string) {
	s.t.Helper()
	return s.reparent(uid, parents, func(has, given []cedar.EntityUID) []cedar.EntityUID {
		return append(without(has, given...), given...)
	})
}

// RemoveParents ends memberships of a stored entity.
func (s *Service) RemoveParents(uid cedarpost.EntityUID, parents ...cedarpost.EntityUID) (revision string) {
	s.t.Helper()
	return s.reparent(uid, parents, func(has, given []cedar.EntityUID) []cedar.EntityUID { return without(has, given...) })
}

func (s *Service) reparent(uid cedarpost.EntityUID, parents []cedarpost.EntityUID, change func(has, given []cedar.EntityUID) []cedar.EntityUID) string {
	s.t.Helper()
	return s.write(func(next map[cedar.EntityUID]*engine.Entity) error {
		u, given := cedarUID(uid), cedarUIDs(parents)
		if err := s.set.CheckParents(u, given); err != nil {
			return err
		}
		e := next[u]
		if e == nil {
			return fmt.Errorf("entity %s: it is not stored; put it first", u)
		}
		next[u] = withParents(e, change(e.Parents, given))
		return nil
	})
}

// write makes a revision with the changes that fn makes. An error of fn fails the test.
func (s *Service) write(fn func(next map[cedar.EntityUID]*engine.Entity) error) string {
	s.t.Helper()
	revision, err := s.commit(fn)
	if err != nil {
		s.t.Fatalf("cedarposttest: %v", err)
	}
	return revision
}

func (s *Service) commit(fn func(next map[cedar.EntityUID]*engine.Entity) error) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := make(map[cedar.EntityUID]*engine.Entity, len(s.entities)+1)
	for uid, e := range s.entities {
		next[uid] = e
	}
	if err := fn(next); err != nil {
		return "", err
	}
	for uid, e := range next {
		if e != s.entities[uid] && inCycle(next, uid) {
			return "", fmt.Errorf("entity %s: these parents would make it its own ancestor", uid)
		}
	}
	s.entities = next
	s.number++
	s.signal()
	return s.revision(s.number).GetToken(), nil
}

// inCycle says whether an entity is its own ancestor.
func inCycle(all map[cedar.EntityUID]*engine.Entity, uid cedar.EntityUID) bool {
	seen := map[cedar.EntityUID]bool{}
	for todo := []cedar.EntityUID{uid}; len(todo) > 0; {
		e := all[todo[0]]
		if todo = todo[1:]; e == nil {
			continue
		}
		for _, p := range e.Parents {
			if p == uid {
				return true
			}
			if !seen[p] {
				seen[p] = true
				todo = append(todo, p)
			}
		}
	}
	return false
}

// withParents returns a copy of an entity with other parents.
func withParents(e *engine.Entity, parents []cedar.EntityUID) *engine.Entity {
	c := *e
	c.Parents = parents
	return &c
}

// without returns a copy of a list without some of its members.
func without(list []cedar.EntityUID, some ...cedar.EntityUID) []cedar.EntityUID {
	return slices.DeleteFunc(slices.Clone(list), func(u cedar.EntityUID) bool { return slices.Contains(some, u) })
}

func cedarUID(u cedarpost.EntityUID) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType(u.Type), cedar.String(u.ID))
}

func cedarUIDs(us []cedarpost.EntityUID) []cedar.EntityUID {
	out := make([]cedar.EntityUID, len(us))
	for i, u := range us {
		out[i] = cedarUID(u)
	}
	return out
}
