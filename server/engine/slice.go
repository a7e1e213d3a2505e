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

// What the entities of one question may weigh when they are loaded: about the work that they
// cause, in bytes. An entity weighs what its attributes and tags have as JSON, what the names
// of its parents have, 256 bytes more, and 64 more for each parent.
const (
	// MaxSliceWeight is for the stored entities of one question.
	MaxSliceWeight = 8 << 20
	// MaxBatchWeight is for all questions of a batch together. What several of them reach
	// counts several times, because each of them walks through it.
	MaxBatchWeight = 128 << 20
	// LightSliceWeight is what a question may weigh in any case, whatever the other
	// questions of its batch weigh.
	LightSliceWeight = 512 << 10

	entityWeight = 256
	parentWeight = 64
)

// ErrTooLarge is a question that cannot be decided because its entities, or those of its
// batch, weigh too much; see [TooLargeError].
var ErrTooLarge = errors.New("too much data for one call")

// TooLargeError refuses a question. It is an [ErrTooLarge].
type TooLargeError struct {
	// Batch says that the question could be decided alone. Otherwise its entities weigh more
	// than [MaxSliceWeight].
	Batch bool
	// Cause names the entity that weighs most, for the log of the service: its callers
	// need not know the ancestors of an entity.
	Cause error
}

// Error is for callers.
func (e *TooLargeError) Error() string {
	if e.Batch {
		return ErrTooLarge.Error() + ": the entities of the checks of this batch before this one weigh too much to load these, too; ask it in another call"
	}
	return fmt.Sprintf("%s: the entities that this question can depend on, with their ancestors, weigh more than %d bytes (attributes, tags and names of parents, with %d more for each entity and %d for each parent)",
		ErrTooLarge, MaxSliceWeight, entityWeight, parentWeight)
}

// Is makes it an [ErrTooLarge].
func (e *TooLargeError) Is(target error) bool { return target == ErrTooLarge }

// Unwrap returns Cause.
func (e *TooLargeError) Unwrap() error { return e.Cause }

// Entity is one entity, from the store or from a request.
type Entity struct {
	UID         cedar.EntityUID
	Attrs, Tags cedar.Record
	Parents     []cedar.EntityUID
	// Weight is what the entity weighs when it is loaded, in bytes, see [MaxSliceWeight]. If
	// it is 0, only the parents count.
	Weight int64
}

// weight returns what an entity counts for in a slice.
func (e *Entity) weight() int64 {
	if e.Weight > 0 {
		return e.Weight
	}
	return entityWeight + parentWeight*int64(len(e.Parents))
}

// Pool has the entities of one revision that are known while questions at that revision
// are decided. It is not safe for concurrent use.
type Pool struct {
	known     map[cedar.EntityUID]*Entity // nil: known not to be stored
	source    func(cedar.EntityUID) (*Entity, bool)
	pause     Pause // nil: never
	worked    int64 // steps since the last pause
	weighed   int64 // what the slices of all questions weigh together
	unbounded bool  // the budgets of a decision and of its entities do not apply
}

// NewPool returns an empty pool.
func NewPool() *Pool { return &Pool{known: map[cedar.EntityUID]*Entity{}} }

// SetSource sets a function that the pool calls for an entity that it does not have, or
// nil. The function returns nil and true for an entity that is not stored, and false for
// one that must be loaded. It is called once for each entity that it knows.
func (p *Pool) SetSource(source func(cedar.EntityUID) (*Entity, bool)) { p.source = source }

// SetPause sets a function that is called before each question is read, before its entities
// are looked up, and from time to time while it is decided or explained. Its error ends the
// preparation, or the decision.
func (p *Pool) SetPause(pause Pause) { p.pause = pause }

// SetUnbounded lifts [MaxDecisionCost] and [MaxSliceWeight], for decisions that were made
// already, perhaps before there were these limits.
func (p *Pool) SetUnbounded() { p.unbounded = true }

// get returns an entity, or nil if it is not stored. known is false if the entity must
// be loaded first.
func (p *Pool) get(uid cedar.EntityUID) (e *Entity, known bool) {
	if e, known = p.known[uid]; known || p.source == nil {
		return e, known
	}
	if e, known = p.source(uid); known {
		p.known[uid] = e
	}
	return e, known
}

// Add adds the result of a load. asked are the entities that were looked for. found are
// those that are stored, with every stored ancestor of them. An entity that is in asked,
// or is a parent in found, and is not in found is known not to be stored from then on.
func (p *Pool) Add(asked []cedar.EntityUID, found []Entity) {
	for i := range found {
		p.count(found[i].weight() / bytesInStep)
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

// Put adds one entity, or nil if it is not stored. It says nothing about the entity's
// parents: those are loaded if they are needed.
func (p *Pool) Put(uid cedar.EntityUID, e *Entity) { p.known[uid] = e }

// Has reports whether the pool has the entity and it is stored.
func (p *Pool) Has(uid cedar.EntityUID) bool { return p.known[uid] != nil }

// Slice is the set of entities that one question can touch: the entities that it names,
// their ancestors, and the entities that their attributes refer to, as deep as the
// policies of its action dereference.
type Slice struct {
	set     *Set
	q       *Question
	pool    *Pool
	visited map[cedar.EntityUID]reached // nil: the walk has not begun
	todo    []cedar.EntityUID           // reached, and not yet walked from at their depth
	missing []cedar.EntityUID           // reached, and not in the pool when they were looked up
	steps   int                         // edges that the walk has followed
	closing int64                       // edges that were followed to find all ancestors
	weight  int64                       // of the stored entities that were reached
	err     error                       // a TooLargeError: the walk has ended
}

// reached says how far the walk went from one entity.
type reached struct {
	depth int // how deep to follow its attributes, 0 for ancestors and plain references
	done  int // how deep they were followed, -1 before its parents were
}

// newSlice makes an empty slice of a question. Several questions at one revision may
// share the pool.
func (s *Set) newSlice(q *Question, pool *Pool) *Slice {
	return &Slice{set: s, q: q, pool: pool}
}

// toLoad walks on through the entities of the pool, and returns those that must be
// loaded and added to the pool before it is called again. It returns nothing once the
// slice is complete. Each call continues where the last one stopped, so an entity's
// parents are followed once, and its attributes once for each level of dereference. If
// each load brings all ancestors, toLoad asks at most once for each level. If the slice
// becomes too large, it returns nothing, and err says so.
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
	before := sl.steps
	defer func() { sl.pool.count(stepsOfEdge * int64(sl.steps-before)) }()
	sl.todo, sl.missing = append(sl.todo, sl.missing...), nil
	for len(sl.todo) > 0 && sl.err == nil {
		last := len(sl.todo) - 1
		uid := sl.todo[last]
		sl.todo = sl.todo[:last]
		sl.walk(uid)
	}
	if sl.err != nil {
		return nil
	}
	return sl.missing
}

// reach notes that the walk must follow the attributes of an entity to this depth.
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
	// An entity that was missing before is in todo or missing already.
	if known := !seen || r.done >= 0; known {
		sl.todo = append(sl.todo, uid)
	}
	r.depth = depth
	sl.visited[uid] = r
}

// walk follows the parents of an entity, and for depth > 1 the entities in its
// attributes.
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
		if sl.weigh(e); sl.err != nil {
			return
		}
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

// weigh adds an entity that was reached to the weight of the slice. So the same question is
// too large whether its entities are loaded or cached.
func (sl *Slice) weigh(e *Entity) {
	w := e.weight()
	sl.weight += w
	sl.pool.weighed += w
	large := sl.weight > MaxSliceWeight
	if sl.pool.unbounded || !large && (sl.pool.weighed <= MaxBatchWeight || sl.weight <= LightSliceWeight) {
		return
	}
	heaviest := e
	for uid := range sl.visited {
		if other, _ := sl.lookup(uid); other != nil && other.weight() > heaviest.weight() {
			heaviest = other
		}
	}
	sl.err = &TooLargeError{Batch: !large, Cause: fmt.Errorf("%d entities were reached, %d bytes of them are of %s", len(sl.visited), heaviest.weight(), heaviest.UID)}
}

// Reads yields the entities of the store that a decision on a complete slice depends on,
// in no particular order. They include ancestors, and entities that turned out not to be
// stored. Entities of the request and those that bundles define are not among them.
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

// lookup finds an entity, in the request or the pool. known is false if it must be
// loaded first.
func (sl *Slice) lookup(uid cedar.EntityUID) (e *Entity, known bool) {
	if e, ok := sl.q.inline[uid]; ok {
		return e, true
	}
	if sl.set.requestOnly(uid.Type) {
		return nil, true
	}
	return sl.pool.get(uid)
}

// entities returns the entities for Cedar's evaluation. It refuses entities of the
// request that nothing in the question refers to.
func (sl *Slice) entities() (*entities, error) {
	if m := sl.toLoad(); len(m) > 0 {
		return nil, fmt.Errorf("engine: slice is not complete, %s is missing", m[0])
	}
	if sl.err != nil {
		return nil, sl.err
	}
	for uid := range sl.q.inline {
		if _, ok := sl.visited[uid]; !ok && !sl.q.inapplicable {
			return nil, badf("entity %s came with the request, but nothing in the request refers to it", uid)
		}
	}
	out := &entities{static: sl.set.static, slice: make(map[cedar.EntityUID]cedar.Entity, 4), from: sl, left: maxClosed, meter: sl.newMeter()}
	for _, uid := range []cedar.EntityUID{sl.q.request.Principal, sl.q.request.Resource} {
		if sl.visited[uid].depth < 1 {
			continue // the question is inapplicable, or the entity is static
		}
		if e, _ := sl.lookup(uid); e != nil {
			closed, ok := sl.closure(e, MaxAncestors)
			if !ok {
				return nil, fmt.Errorf("%w: %s has more than %d", ErrTooManyAncestors, e.UID, MaxAncestors)
			}
			out.spendClosure(closed)
			out.put(e, 1, closed)
		}
	}
	return out, nil
}

// closure returns all ancestors of e; ok is false if there are more than limit. Cedar
// decides the same if it gets them as direct parents, and does not have to walk.
func (sl *Slice) closure(e *Entity, limit int) (out []cedar.EntityUID, ok bool) {
	if len(e.Parents) == 0 {
		return nil, true
	}
	const few = 16 // a list of up to 16 is searched faster than a map
	var seen map[cedar.EntityUID]bool
	out = make([]cedar.EntityUID, 0, len(e.Parents)+4)
	add := func(list []cedar.EntityUID) {
		sl.closing += int64(len(list))
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
	for i := 0; i < len(out); i++ { // out grows in the loop
		if len(out) > limit {
			return nil, false
		}
		if parent, _ := sl.lookup(out[i]); parent != nil {
			add(parent.Parents)
		}
	}
	return out, true
}

// maxClosed bounds the ancestors that the other entities of a question, besides the
// principal and the resource, get as direct parents. Otherwise m entities that share n
// ancestors would take m × n places.
const maxClosed = MaxAncestors

// entities is a complete slice together with the action, field and group entities of the
// bundles. Entities are made when Cedar asks for them.
//
// The principal, the resource and the first other entities get all their ancestors as
// direct parents, and the ancestors themselves are left out. After maxClosed ancestors,
// an entity gets its own parents only, the ancestors are included, and Cedar walks. The
// answers are the same; then each "in" costs time that is linear in the slice.
type entities struct {
	slice  map[cedar.EntityUID]cedar.Entity // made already
	static map[cedar.EntityUID]cedar.Entity
	from   *Slice // nil: slice is all there is
	left   int    // of maxClosed, less than 0 when it is spent
	meter  *meter // nil: the work is not counted
}

// Get implements cedar.EntityGetter. When the budget is spent, no entity exists any more, so
// that a walk over ancestors ends at once.
func (e *entities) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	if !e.meter.spend(stepsOfLookup) {
		return cedar.Entity{}, false
	}
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
			e.spendClosure(closed)
		} else {
			e.left = -1
		}
	}
	return e.put(stored, r.depth, parents), true
}

// spendClosure counts the work to find all ancestors of an entity.
func (e *entities) spendClosure(ancestors []cedar.EntityUID) {
	edges := e.from.closing
	e.from.closing = 0
	e.meter.spend(stepsOfAncestor*int64(len(ancestors)) + stepsOfEdge*edges)
}

// put makes an entity for Cedar. An entity that is only an ancestor gets no attributes,
// since no policy can read them.
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

// spendAncestors counts the work of a loop over [entities.ancestors].
func (e *entities) spendAncestors(uid cedar.EntityUID) bool {
	ent, ok := e.static[uid]
	if !ok {
		ent = e.slice[uid]
	}
	return e.meter.spend(int64(ent.Parents.Len()))
}

// ancestors yields all ancestors of the principal, the resource, an action or a field.
// Those entities exist from the start. The function is small enough to be inlined.
func (e *entities) ancestors(uid cedar.EntityUID) iter.Seq[cedar.EntityUID] {
	ent, ok := e.static[uid]
	if !ok {
		ent = e.slice[uid]
	}
	return ent.Parents.All()
}
