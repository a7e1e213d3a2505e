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
	begun   bool
	visited visits
	todo    []int            // places in visited: reached, and not yet walked from at their depth
	missing []int            // places in visited: not in the pool when they were looked up
	steps   int              // edges that the walk has followed
	closing int64            // edges that were followed to find all ancestors
	weight  int64            // of the stored entities that were reached
	err     error            // a TooLargeError: the walk has ended
	first   [fewVisits]visit // where visited and todo begin, so that most
	next    [fewVisits]int   // questions need no further memory
}

// visit is an entity that the walk has reached, and how far the walk went from it.
type visit struct {
	uid    cedar.EntityUID
	depth  int           // how deep to follow its attributes, 0 for ancestors and plain references
	done   int           // how deep they were followed, -1 before its parents were
	entity *Entity       // nil: not stored, or not looked up yet
	made   *cedar.Entity // for Cedar's evaluation; nil: not yet
}

// fewVisits is up to how many entities a list is searched faster than a map.
const fewVisits = 8

// visits are the entities that a walk has reached, each once.
type visits struct {
	list  []visit
	index map[cedar.EntityUID]int // where each is in list; nil while there are few
}

// find returns where an entity is in the list, or -1.
func (v *visits) find(uid cedar.EntityUID) int {
	if v.index != nil {
		if i, ok := v.index[uid]; ok {
			return i
		}
		return -1
	}
	for i := range v.list {
		if v.list[i].uid == uid {
			return i
		}
	}
	return -1
}

// add adds an entity that is not in the list, and returns where it is.
func (v *visits) add(uid cedar.EntityUID) int {
	i := len(v.list)
	v.list = append(v.list, visit{uid: uid, done: -1})
	switch {
	case v.index != nil:
		v.index[uid] = i
	case len(v.list) > fewVisits:
		v.index = make(map[cedar.EntityUID]int, 4*fewVisits)
		for j := range v.list {
			v.index[v.list[j].uid] = j
		}
	}
	return i
}

// newSlice makes an empty slice of a question. Several questions at one revision may
// share the pool.
func (s *Set) newSlice(q *Question, pool *Pool) *Slice {
	sl := &Slice{set: s, q: q, pool: pool}
	sl.visited.list, sl.todo = sl.first[:0], sl.next[:0]
	return sl
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
	if !sl.begun {
		sl.begun = true
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
	sl.todo, sl.missing = append(sl.todo, sl.missing...), sl.missing[:0]
	for len(sl.todo) > 0 && sl.err == nil {
		last := len(sl.todo) - 1
		i := sl.todo[last]
		sl.todo = sl.todo[:last]
		sl.walk(i)
	}
	if sl.err != nil || len(sl.missing) == 0 {
		return nil
	}
	out := make([]cedar.EntityUID, len(sl.missing))
	for i, m := range sl.missing {
		out[i] = sl.visited.list[m].uid
	}
	return out
}

// reach notes that the walk must follow the attributes of an entity to this depth.
func (sl *Slice) reach(uid cedar.EntityUID, depth int) {
	sl.steps++
	if _, static := sl.set.static[uid]; static {
		return
	}
	i := sl.visited.find(uid)
	known := true
	if i < 0 {
		i = sl.visited.add(uid)
	} else if v := &sl.visited.list[i]; v.depth >= depth {
		return
	} else {
		known = v.done >= 0
	}
	// An entity that was missing before is in todo or missing already.
	if known {
		sl.todo = append(sl.todo, i)
	}
	sl.visited.list[i].depth = depth
}

// walk follows the parents of an entity, and for depth > 1 the entities in its
// attributes.
func (sl *Slice) walk(i int) {
	v := &sl.visited.list[i]
	before, depth := v.done, v.depth
	if before < 0 {
		e, known := sl.lookup(v.uid)
		if !known {
			sl.missing = append(sl.missing, i)
			return
		}
		v.entity = e
	}
	e := v.entity
	v.done = depth
	if e == nil {
		return
	}
	// The list can grow from here on, so v is not used any more.
	if before < 0 {
		if sl.weigh(e); sl.err != nil {
			return
		}
		for _, p := range e.Parents {
			sl.reach(p, 0)
		}
	}
	if depth < 1 || depth <= before {
		return
	}
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
	for _, v := range sl.visited.list {
		if v.entity != nil && v.entity.weight() > heaviest.weight() {
			heaviest = v.entity
		}
	}
	sl.err = &TooLargeError{Batch: !large, Cause: fmt.Errorf("%d entities were reached, %d bytes of them are of %s", len(sl.visited.list), heaviest.weight(), heaviest.UID)}
}

// Reads yields the entities of the store that a decision on a complete slice depends on,
// in no particular order. They include ancestors, and entities that turned out not to be
// stored. Entities of the request and those that bundles define are not among them.
func (sl *Slice) Reads() iter.Seq[cedar.EntityUID] {
	return func(yield func(cedar.EntityUID) bool) {
		for i := range sl.visited.list {
			uid := sl.visited.list[i].uid
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
		if sl.visited.find(uid) < 0 && !sl.q.inapplicable {
			return nil, badf("entity %s came with the request, but nothing in the request refers to it", uid)
		}
	}
	out := &entities{static: sl.set.static, from: sl, left: maxClosed, meter: sl.newMeter()}
	for _, uid := range [...]cedar.EntityUID{sl.q.request.Principal, sl.q.request.Resource} {
		i := sl.visited.find(uid)
		if i < 0 || sl.visited.list[i].depth < 1 {
			continue // the question is inapplicable, or the entity is static
		}
		if v := &sl.visited.list[i]; v.entity != nil {
			closed, ok := sl.closure(v.entity, MaxAncestors)
			if !ok {
				return nil, fmt.Errorf("%w: %s has more than %d", ErrTooManyAncestors, uid, MaxAncestors)
			}
			out.spendClosure(closed)
			v.make(closed)
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
		if p := sl.visited.find(out[i]); p >= 0 && sl.visited.list[p].entity != nil {
			add(sl.visited.list[p].entity.Parents)
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
	static map[cedar.EntityUID]cedar.Entity
	from   *Slice
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
	i := e.from.visited.find(uid)
	if i < 0 {
		return cedar.Entity{}, false
	}
	v := &e.from.visited.list[i]
	if v.made != nil {
		return *v.made, true
	}
	if v.depth < 1 && e.left >= 0 || v.entity == nil {
		return cedar.Entity{}, false
	}
	parents := v.entity.Parents
	if e.left >= 0 {
		closed, ok := e.from.closure(v.entity, e.left)
		if ok {
			parents = closed
			e.left -= len(closed)
			e.spendClosure(closed)
		} else {
			e.left = -1
		}
	}
	return v.make(parents), true
}

// spendClosure counts the work to find all ancestors of an entity.
func (e *entities) spendClosure(ancestors []cedar.EntityUID) {
	edges := e.from.closing
	e.from.closing = 0
	e.meter.spend(stepsOfAncestor*int64(len(ancestors)) + stepsOfEdge*edges)
}

// make makes an entity for Cedar. An entity that is only an ancestor gets no attributes,
// since no policy can read them.
func (v *visit) make(parents []cedar.EntityUID) cedar.Entity {
	v.made = &cedar.Entity{UID: v.uid}
	if v.depth >= 1 {
		v.made.Attributes, v.made.Tags = v.entity.Attrs, v.entity.Tags
	}
	if len(parents) > 0 {
		v.made.Parents = cedar.NewEntityUIDSet(parents...)
	}
	return *v.made
}

// ancestors returns all ancestors of the principal, the resource, an action or a field. Those
// entities exist from the start.
func (e *entities) ancestors(uid cedar.EntityUID) cedar.EntityUIDSet {
	if ent, ok := e.static[uid]; ok {
		return ent.Parents
	}
	if i := e.from.visited.find(uid); i >= 0 && e.from.visited.list[i].made != nil {
		return e.from.visited.list[i].made.Parents
	}
	return cedar.EntityUIDSet{}
}
