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
	known map[cedar.EntityUID]*Entity // nil: known not to be stored
}

// NewPool returns an empty pool.
func NewPool() *Pool { return &Pool{known: map[cedar.EntityUID]*Entity{}} }

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
	visited map[cedar.EntityUID]int // remaining depth, 0 for ancestors and plain references
	missing []cedar.EntityUID
	// complete: the last walk found everything, so visited stands.
	complete bool
}

// NewSlice starts the slice of a question on a pool, which several questions of
// one revision may share.
func (s *Set) NewSlice(q *Question, pool *Pool) *Slice {
	return &Slice{set: s, q: q, pool: pool}
}

// Missing returns the entities to load and Add to the pool before asking again,
// nothing when the slice is complete. It asks at most once for each level of
// dereference.
func (sl *Slice) Missing() []cedar.EntityUID {
	if sl.complete {
		return nil
	}
	sl.visited = make(map[cedar.EntityUID]int, 16)
	sl.missing = nil
	if sl.q.inapplicable {
		return nil
	}
	level := sl.q.action.index.level
	if sl.q.fieldsAsked {
		level = max(level, sl.q.action.field.index.level)
	}
	sl.visit(sl.q.request.Principal, level)
	sl.visit(sl.q.request.Resource, level)
	entitiesIn(sl.q.request.Context, func(uid cedar.EntityUID) { sl.visit(uid, level) })
	sl.complete = len(sl.missing) == 0
	return sl.missing
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
	e, known = sl.pool.known[uid]
	return e, known
}

// visit walks from uid: to its ancestors, and for depth > 1 to what its
// attributes name.
func (sl *Slice) visit(uid cedar.EntityUID, depth int) {
	if _, static := sl.set.static[uid]; static {
		return
	}
	before, seen := sl.visited[uid]
	if seen && before >= depth {
		return
	}
	sl.visited[uid] = depth
	e, known := sl.lookup(uid)
	if !known {
		if !seen {
			sl.missing = append(sl.missing, uid)
		}
		return
	}
	if e == nil {
		return
	}
	if !seen {
		for _, p := range e.Parents {
			sl.visit(p, 0)
		}
	}
	if depth < 1 {
		return
	}
	follow := func(ref cedar.EntityUID) {
		if depth > 1 {
			sl.visit(ref, depth-1)
		} else if _, inline := sl.q.inline[ref]; inline {
			sl.visit(ref, 0)
		}
	}
	entitiesIn(e.Attrs, follow)
	entitiesIn(e.Tags, follow)
}

// entities builds what Cedar evaluates against. It refuses inline entities that
// the question does not reach.
func (sl *Slice) entities() (*entities, error) {
	if m := sl.Missing(); len(m) > 0 {
		return nil, fmt.Errorf("engine: slice is not complete, %s is missing", m[0])
	}
	for uid := range sl.q.inline {
		if _, ok := sl.visited[uid]; !ok && !sl.q.inapplicable {
			return nil, badf("entity %s came with the request, but nothing in the request refers to it", uid)
		}
	}
	out := &entities{static: sl.set.static, slice: make(map[cedar.EntityUID]cedar.Entity, 4)}
	for uid, depth := range sl.visited {
		e, _ := sl.lookup(uid)
		if e == nil || depth < 1 {
			continue
		}
		closed, err := sl.closure(e)
		if err != nil {
			return nil, err
		}
		ent := cedar.Entity{UID: uid, Attributes: e.Attrs, Tags: e.Tags}
		if len(closed) > 0 {
			ent.Parents = cedar.NewEntityUIDSet(closed...)
		}
		out.slice[uid] = ent
	}
	return out, nil
}

// closure returns all ancestors of e. Giving them to Cedar as direct parents
// equals the real graph and saves it the walk.
func (sl *Slice) closure(e *Entity) ([]cedar.EntityUID, error) {
	if len(e.Parents) == 0 {
		return nil, nil
	}
	const few = 16 // up to so many, looking through a list beats a map
	var seen map[cedar.EntityUID]bool
	out := make([]cedar.EntityUID, 0, len(e.Parents)+4)
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
		if len(out) > MaxAncestors {
			return nil, fmt.Errorf("%w: %s has more than %d", ErrTooManyAncestors, e.UID, MaxAncestors)
		}
		if parent, _ := sl.lookup(out[i]); parent != nil {
			add(parent.Parents)
		}
	}
	return out, nil
}

// entities is a complete slice, closed over ancestors, with the action, field
// and group entities of the bundles.
type entities struct {
	slice  map[cedar.EntityUID]cedar.Entity
	static map[cedar.EntityUID]cedar.Entity
}

// Get implements cedar.EntityGetter.
func (e *entities) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	if ent, ok := e.static[uid]; ok {
		return ent, true
	}
	ent, ok := e.slice[uid]
	return ent, ok
}

// ancestors yields all ancestors of uid.
func (e *entities) ancestors(uid cedar.EntityUID) iter.Seq[cedar.EntityUID] {
	ent, _ := e.Get(uid)
	return ent.Parents.All()
}
