package engine

import (
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/cedar-policy/cedar-go"
)

// MaxAncestors bounds the ancestors of one entity in a question.
const MaxAncestors = 10_000

// ErrTooManyAncestors is a question that cannot be decided because an entity has
// more than MaxAncestors.
var ErrTooManyAncestors = errors.New("too many ancestors")

// Entity is one entity as stored or as it came with a request.
type Entity struct {
	UID         cedar.EntityUID
	Attrs, Tags cedar.Record
	Parents     []cedar.EntityUID
}

// Pool holds entities of one revision while questions of that revision are
// answered. It is not safe for concurrent use.
type Pool struct {
	known  map[cedar.EntityUID]*Entity // nil: known not to be stored
	source func(cedar.EntityUID) (*Entity, bool)
	ended  func() error // nil: never
}

// NewPool returns an empty pool.
func NewPool() *Pool { return &Pool{known: map[cedar.EntityUID]*Entity{}} }

// SetSource sets where a pool looks for an entity that it does not have, nil for
// nowhere. The source returns nil and true for an entity that is not stored, and
// false for one that has to be loaded. It is asked once for each entity it knows.
//
// ended, if not nil, is asked before the entities of each question are looked up; the
// preparation ends with its error, if it returns one.
func (p *Pool) SetSource(source func(cedar.EntityUID) (*Entity, bool), ended func() error) {
	p.source, p.ended = source, ended
}

// get finds an entity, nil when it is not stored. known is false when it has to be
// loaded first.
func (p *Pool) get(uid cedar.EntityUID) (e *Entity, known bool) {
	if e, known = p.known[uid]; known || p.source == nil {
		return e, known
	}
	if e, known = p.source(uid); known {
		p.known[uid] = e
	}
	return e, known
}

// Add puts the answer to a load into the pool: asked are the entities asked for,
// found those that are stored, which must include every stored ancestor of the
// ones asked for. Whatever is named and not found is not stored.
func (p *Pool) Add(asked []cedar.EntityUID, found []Entity) {
	for i := range found {
		p.known[found[i].UID] = &found[i]
	}
	absent := func(uid cedar.EntityUID) {
		if _, ok := p.known[uid]; !ok {
			p.known[uid] = nil
		}
	}
	for _, uid := range asked {
		absent(uid)
	}
	for i := range found {
		for _, parent := range found[i].Parents {
			absent(parent)
		}
	}
}

// Put adds one entity that is known by itself, nil when it is not stored. Nothing
// is said of its parents.
func (p *Pool) Put(uid cedar.EntityUID, e *Entity) { p.known[uid] = e }

// Has says whether the entity is in the pool as a stored one.
func (p *Pool) Has(uid cedar.EntityUID) bool { return p.known[uid] != nil }

// Slice is the part of the entities that one question can touch: what it names,
// their ancestors, and what their attributes refer to, as deep as the policies
// of its action dereference.
type Slice struct {
	set     *Set
	q       *Question
	pool    *Pool
	visited map[cedar.EntityUID]reached // nil: the walk has not begun
	todo    []cedar.EntityUID           // reached, and not yet walked from at their depth
	missing []cedar.EntityUID           // reached, and not in the pool when they were looked up
	steps   int                         // edges that the walk has followed, for tests
}

// reached says how far the walk has come with an entity.
type reached struct {
	depth int // how deep to follow from it, 0 for ancestors and plain references
	done  int // how deep that was done, -1 before its parents were followed
}

// newSlice starts the slice of a question on a pool, which several questions of
// one revision may share.
func (s *Set) newSlice(q *Question, pool *Pool) *Slice {
	return &Slice{set: s, q: q, pool: pool}
}

// toLoad returns the entities to load and Add to the pool before asking again,
// nothing when the slice is complete. Each call goes on where the one before it
// stopped, so however many it takes, an entity's parents are followed once, and
// what its attributes name once for each level of dereference. If each load brings
// all ancestors, toLoad asks at most once for each level.
func (sl *Slice) toLoad() []cedar.EntityUID {
	if sl.q.inapplicable {
		return nil
	}
	if sl.visited == nil {
		sl.visited = make(map[cedar.EntityUID]reached, 16)
		sl.todo = make([]cedar.EntityUID, 0, 16)
		level := sl.q.action.index.level
		if sl.q.fieldsAsked {
			level = max(level, sl.q.action.field.index.level)
		}
		sl.reach(sl.q.request.Principal, level)
		sl.reach(sl.q.request.Resource, level)
		entitiesIn(sl.q.request.Context, func(uid cedar.EntityUID) { sl.reach(uid, level) })
	}
	sl.todo, sl.missing = append(sl.todo, sl.missing...), nil
	for len(sl.todo) > 0 {
		last := len(sl.todo) - 1
		uid := sl.todo[last]
		sl.todo = sl.todo[:last]
		sl.walk(uid)
	}
	return sl.missing
}

// reach notes that the walk has to go from an entity so deep.
func (sl *Slice) reach(uid cedar.EntityUID, depth int) {
	sl.steps++
	if _, static := sl.set.static[uid]; static {
		return
	}
	r, seen := sl.visited[uid]
	switch {
	case !seen:
		r.done = -1
	case r.depth >= depth:
		return
	}
	// An entity that is missing stands in todo or missing already.
	if known := !seen || r.done >= 0; known {
		sl.todo = append(sl.todo, uid)
	}
	r.depth = depth
	sl.visited[uid] = r
}

// walk goes on from an entity: to its parents, and for depth > 1 to what its
// attributes name.
func (sl *Slice) walk(uid cedar.EntityUID) {
	e, known := sl.lookup(uid)
	if !known {
		sl.missing = append(sl.missing, uid)
		return
	}
	r := sl.visited[uid]
	before := r.done
	r.done = r.depth
	sl.visited[uid] = r
	if e == nil {
		return
	}
	if before < 0 {
		for _, p := range e.Parents {
			sl.reach(p, 0)
		}
	}
	if r.depth < 1 || r.depth <= before {
		return
	}
	depth := r.depth
	follow := func(ref cedar.EntityUID) {
		if depth > 1 {
			sl.reach(ref, depth-1)
		} else if _, inline := sl.q.inline[ref]; inline {
			sl.reach(ref, 0)
		}
	}
	entitiesIn(e.Attrs, follow)
	entitiesIn(e.Tags, follow)
}

// Reads yields the stored entities that the decision of a complete slice depends on,
// in no order: those that it read, those that turned out not to be stored, and all
// ancestors. What came with the request is not among them, nor what bundles define.
func (sl *Slice) Reads() iter.Seq[cedar.EntityUID] {
	return func(yield func(cedar.EntityUID) bool) {
		for uid := range sl.visited {
			if _, inline := sl.q.inline[uid]; inline || sl.set.requestOnly(uid.Type) {
				continue
			}
			if !yield(uid) {
				return
			}
		}
	}
}

// lookup finds an entity. known is false when it has to be loaded first.
func (sl *Slice) lookup(uid cedar.EntityUID) (e *Entity, known bool) {
	if e, ok := sl.q.inline[uid]; ok {
		return e, true
	}
	if sl.set.requestOnly(uid.Type) {
		return nil, true
	}
	return sl.pool.get(uid)
}

// entities builds what Cedar evaluates against. It refuses inline entities that
// the question does not reach.
func (sl *Slice) entities() (*entities, error) {
	if m := sl.toLoad(); len(m) > 0 {
		return nil, fmt.Errorf("engine: slice is not complete, %s is missing", m[0])
	}
	for uid := range sl.q.inline {
		if _, ok := sl.visited[uid]; !ok && !sl.q.inapplicable {
			return nil, badf("entity %s came with the request, but nothing in the request refers to it", uid)
		}
	}
	out := &entities{static: sl.set.static, slice: make(map[cedar.EntityUID]cedar.Entity, 4), from: sl, left: maxClosed}
	for _, uid := range []cedar.EntityUID{sl.q.request.Principal, sl.q.request.Resource} {
		if sl.visited[uid].depth < 1 {
			continue // the question is inapplicable, or the entity is static
		}
		if e, _ := sl.lookup(uid); e != nil {
			closed, ok := sl.closure(e, MaxAncestors)
			if !ok {
				return nil, fmt.Errorf("%w: %s has more than %d", ErrTooManyAncestors, e.UID, MaxAncestors)
			}
			out.put(e, 1, closed)
		}
	}
	return out, nil
}

// closure returns all ancestors of e; ok is false if there are more than limit.
// Giving them to Cedar as direct parents equals the real graph and saves it the
// walk.
func (sl *Slice) closure(e *Entity, limit int) (out []cedar.EntityUID, ok bool) {
	if len(e.Parents) == 0 {
		return nil, true
	}
	const few = 16 // up to so many, looking through a list beats a map
	var seen map[cedar.EntityUID]bool
	out = make([]cedar.EntityUID, 0, len(e.Parents)+4)
	add := func(list []cedar.EntityUID) {
		for _, uid := range list {
			if seen == nil && len(out) == few {
				seen = make(map[cedar.EntityUID]bool, 4*few)
				for _, u := range out {
					seen[u] = true
				}
			}
			if seen != nil {
				if seen[uid] {
					continue
				}
				seen[uid] = true
			} else if slices.Contains(out, uid) {
				continue
			}
			out = append(out, uid)
		}
	}
	add(e.Parents)
	for i := 0; i < len(out); i++ { // out grows
		if len(out) > limit {
			return nil, false
		}
		if parent, _ := sl.lookup(out[i]); parent != nil {
			add(parent.Parents)
		}
	}
	return out, true
}

// maxClosed bounds the ancestors that are given to entities of one question besides
// principal and resource. Many entities with the same many ancestors would take the
// product of both.
const maxClosed = MaxAncestors

// entities is a complete slice, with the action, field and group entities of the
// bundles. Entities are made when Cedar asks for them.
//
// The principal, the resource and the first others get all their ancestors as
// parents, and the ancestors themselves are left out. Once maxClosed is spent, an
// entity has its direct parents, the ancestors are there, and Cedar walks: the
// answers are equal, and the cost is linear in the slice for each "in".
type entities struct {
	slice  map[cedar.EntityUID]cedar.Entity // made already
	static map[cedar.EntityUID]cedar.Entity
	from   *Slice // nil: slice is all there is
	left   int    // of maxClosed, less than 0 when it is spent
}

// Get implements cedar.EntityGetter.
func (e *entities) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	if ent, ok := e.static[uid]; ok {
		return ent, true
	}
	if ent, ok := e.slice[uid]; ok || e.from == nil {
		return ent, ok
	}
	r, reached := e.from.visited[uid]
	if !reached || r.depth < 1 && e.left >= 0 {
		return cedar.Entity{}, false
	}
	stored, _ := e.from.lookup(uid)
	if stored == nil {
		return cedar.Entity{}, false
	}
	parents := stored.Parents
	if e.left >= 0 {
		closed, ok := e.from.closure(stored, e.left)
		if ok {
			parents = closed
			e.left -= len(closed)
		} else {
			e.left = -1
		}
	}
	return e.put(stored, r.depth, parents), true
}

// put makes an entity for Cedar. One that is only an ancestor has no attributes:
// no policy reads them.
func (e *entities) put(stored *Entity, depth int, parents []cedar.EntityUID) cedar.Entity {
	ent := cedar.Entity{UID: stored.UID}
	if depth >= 1 {
		ent.Attributes, ent.Tags = stored.Attrs, stored.Tags
	}
	if len(parents) > 0 {
		ent.Parents = cedar.NewEntityUIDSet(parents...)
	}
	e.slice[stored.UID] = ent
	return ent
}

// ancestors yields all ancestors of the principal, the resource, an action or a
// field, which are made from the start. It is small enough to be inlined.
func (e *entities) ancestors(uid cedar.EntityUID) iter.Seq[cedar.EntityUID] {
	ent, ok := e.static[uid]
	if !ok {
		ent = e.slice[uid]
	}
	return ent.Parents.All()
}
