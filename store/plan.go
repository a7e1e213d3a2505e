package store

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// plan computes a write in memory: the entities that it touches, before and after it.
type plan struct {
	drafts  map[UID]*draft
	order   []*draft         // the drafts in a fixed order, so that results have one too
	named   int              // the first so many of order are named by operations; members follow
	members map[int][]*draft // the stored members that the cascade of an operation affects
}

// draft is one entity in a plan.
type draft struct {
	uid         UID
	before, now *Entity // nil: not stored; never changed in place
	lastChange  int64   // revision of the newest change before this write, or a later one, see forget; 0: never stored
	grownBy     int     // the last operation that may have added parents
	deletedBy   int     // the last operation that deleted it without cascade, or -1
	members     int     // how many entities name it as parent after the write, if deletedBy ≥ 0
}

func newPlan() *plan {
	return &plan{drafts: map[UID]*draft{}, members: map[int][]*draft{}}
}

// touch adds an entity that an operation names, and reports whether it is new to the
// plan.
func (p *plan) touch(uid UID) bool {
	if p.drafts[uid] != nil {
		return false
	}
	p.add(uid)
	p.named++
	return true
}

func (p *plan) add(uid UID) *draft {
	d := &draft{uid: uid, deletedBy: -1}
	p.drafts[uid] = d
	p.order = append(p.order, d)
	return d
}

// load sets the newest version of an entity, which is live if until is nil.
func (p *plan) load(e Entity, until *int64) {
	d := p.drafts[e.UID]
	if until != nil {
		d.lastChange = *until
		return
	}
	d.lastChange = e.Since
	d.before, d.now = &e, &e
}

// forget is called with the first revision of the history. An entity without a version
// was never stored, or was deleted at that revision or before it.
func (p *plan) forget(oldest int64) {
	for _, d := range p.order {
		if d.lastChange == 0 {
			d.lastChange = oldest
		}
	}
}

// loadMember adds a stored entity that the cascade of an operation affects.
func (p *plan) loadMember(op int, e Entity) {
	d := p.drafts[e.UID]
	if d == nil {
		d = p.add(e.UID)
		d.before, d.now = &e, &e
	}
	p.members[op] = append(p.members[op], d)
}

// apply applies operation i to the result of the operations before it.
func (p *plan) apply(i int, op Op) error {
	d := p.drafts[op.Entity.UID]
	switch pre := op.Precondition; {
	case pre.MustExist && d.now == nil:
		return ErrMustExist
	case pre.MustNotExist && d.now != nil:
		return ErrMustNotExist
	case pre.IfRevision != nil && d.lastChange > *pre.IfRevision:
		return ErrStale
	}
	if d.now == nil && (op.Kind == AddParents || op.Kind == RemoveParents || op.Kind == SetAttributes) {
		return ErrNotFound
	}
	switch op.Kind {
	case Put:
		e := op.Entity
		e.Attrs, e.Tags = orObject(e.Attrs), orObject(e.Tags)
		e.Parents = sortedSet(e.Parents)
		d.now, d.grownBy = &e, i
	case Delete:
		if op.Cascade {
			p.dropMembers(i, d.uid)
		} else if d.now != nil {
			d.deletedBy = i
		}
		d.now = nil
	case AddParents:
		e := *d.now
		e.Parents = sortedSet(slices.Concat(e.Parents, op.Entity.Parents))
		d.now, d.grownBy = &e, i
	case RemoveParents:
		d.now = without(d.now, op.Entity.Parents)
	case SetAttributes:
		e := *d.now
		var err error
		if e.Attrs, err = mergeAttrs(e.Attrs, op.Entity.Attrs, op.Remove); err != nil {
			return err
		}
		d.now = &e
	default:
		return fmt.Errorf("unknown kind of operation: %d", op.Kind)
	}
	// An entity from before there was the bound may stay as it is, and shrink.
	if size := d.now.size(); size > MaxEntityBytes && size > d.before.size() {
		return EntityTooLargeError{size}
	}
	return nil
}

// size returns how many bytes an entity has as [MaxEntityBytes] counts them; 0 if it is nil.
func (e *Entity) size() int {
	if e == nil {
		return 0
	}
	size := len(e.Attrs) + len(e.Tags)
	if size > MaxEntityBytes { // Postgres writes JSON with spaces
		size = compactSize(e.Attrs) + compactSize(e.Tags)
	}
	for _, p := range e.Parents {
		size += len(p.parent())
	}
	return size
}

func compactSize(document []byte) int {
	var b bytes.Buffer
	if json.Compact(&b, document) != nil {
		return len(document)
	}
	return b.Len()
}

// dropMembers removes every membership in the parent that operation i deletes.
func (p *plan) dropMembers(i int, parent UID) {
	for _, list := range [][]*draft{p.order[:p.named], p.members[i]} {
		for _, d := range list {
			if d.now != nil && slices.Contains(d.now.Parents, parent) {
				d.now = without(d.now, []UID{parent})
			}
		}
	}
}

// memberTypes lists the types of the entities that only a cascade changes, each once.
func (p *plan) memberTypes() (types []string) {
	for _, d := range p.order[p.named:] {
		if !sameEntity(d.before, d.now) && !slices.Contains(types, d.uid.Type) {
			types = append(types, d.uid.Type)
		}
	}
	return types
}

// changed lists the drafts that differ from what is stored.
func (p *plan) changed() []*draft {
	var list []*draft
	for _, d := range p.order {
		if !sameEntity(d.before, d.now) {
			list = append(list, d)
		}
	}
	return list
}

// deleted lists the drafts that were deleted without cascade, and counts their members in
// the plan. It includes one that was put again later: a member of the old entity must not
// become a member of the new one by accident.
func (p *plan) deleted() []*draft {
	var list []*draft
	byUID := map[UID]*draft{}
	for _, d := range p.order {
		if d.deletedBy >= 0 {
			list, byUID[d.uid] = append(list, d), d
		}
	}
	if len(list) == 0 {
		return nil
	}
	for _, d := range p.order {
		if d.now == nil {
			continue
		}
		for _, parent := range d.now.Parents {
			if gone := byUID[parent]; gone != nil {
				gone.members++
			}
		}
	}
	return list
}

// grown lists the drafts that have new parents.
func (p *plan) grown() []*draft {
	var list []*draft
	for _, d := range p.order {
		if d.now == nil {
			continue
		}
		isNew := func(parent UID) bool { return d.before == nil || !slices.Contains(d.before.Parents, parent) }
		if slices.ContainsFunc(d.now.Parents, isNew) {
			list = append(list, d)
		}
	}
	return list
}

// uids lists every entity of the plan.
func (p *plan) uids() []UID { return slices.Collect(maps.Keys(p.drafts)) }

// overlay replaces the stored parents of the entities in the plan by the new ones.
func (p *plan) overlay(parentsOf map[UID][]UID) {
	for uid, d := range p.drafts {
		delete(parentsOf, uid)
		if d.now != nil {
			parentsOf[uid] = d.now.Parents
		}
	}
}

// onCycles returns the nodes that can reach themselves (Tarjan's strongly
// connected components).
func onCycles(parentsOf map[UID][]UID) map[UID]bool {
	found := map[UID]bool{}
	index, low := map[UID]int{}, map[UID]int{}
	onStack := map[UID]bool{}
	var stack []UID
	var visit func(u UID)
	visit = func(u UID) {
		index[u] = len(index) + 1
		low[u] = index[u]
		stack, onStack[u] = append(stack, u), true
		for _, v := range parentsOf[u] {
			if index[v] == 0 {
				visit(v)
				low[u] = min(low[u], low[v])
			} else if onStack[v] {
				low[u] = min(low[u], index[v])
			}
			found[u] = found[u] || v == u
		}
		if low[u] != index[u] {
			return
		}
		at := len(stack) - 1
		for stack[at] != u {
			at--
		}
		for _, v := range stack[at:] {
			found[v] = found[v] || len(stack)-at > 1
			onStack[v] = false
		}
		stack = stack[:at]
	}
	for u := range parentsOf {
		if index[u] == 0 {
			visit(u)
		}
	}
	return found
}

// without returns a copy of e without the parents.
func without(e *Entity, parents []UID) *Entity {
	c := *e
	c.Parents = slices.DeleteFunc(slices.Clone(e.Parents), func(p UID) bool { return slices.Contains(parents, p) })
	return &c
}

// sortedSet returns the UIDs in order, each once.
func sortedSet(uids []UID) []UID {
	return slices.Compact(slices.SortedFunc(slices.Values(uids), UID.compare))
}

// orObject returns {} for an empty text.
func orObject(object []byte) []byte {
	if len(object) == 0 {
		return []byte("{}")
	}
	return object
}

// mergeAttrs sets and removes members of a JSON object.
func mergeAttrs(attrs, set []byte, remove []string) ([]byte, error) {
	var merged map[string]json.RawMessage
	if err := json.Unmarshal(attrs, &merged); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(orObject(set), &merged); err != nil {
		return nil, err
	}
	for _, name := range remove {
		delete(merged, name)
	}
	return json.Marshal(merged)
}

func sameEntity(a, b *Entity) bool {
	if a == nil || b == nil || a == b {
		return a == b
	}
	return slices.Equal(a.Parents, b.Parents) && sameJSON(a.Attrs, b.Attrs) && sameJSON(a.Tags, b.Tags)
}

// sameJSON reports whether two documents are equal. It may report numbers as different
// that are equal and written in two ways, like 100 and 1e2: then an entity gets a new
// version that it does not need. It never reports different values as equal.
func sameJSON(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	x, errX := decode(a)
	y, errY := decode(b)
	return errX == nil && errY == nil && sameValue(x, y)
}

func decode(document []byte) (value any, err error) {
	d := json.NewDecoder(bytes.NewReader(document))
	d.UseNumber()
	err = d.Decode(&value)
	return value, err
}

func sameValue(a, b any) bool {
	switch a := a.(type) {
	case map[string]any:
		b, ok := b.(map[string]any)
		return ok && maps.EqualFunc(a, b, sameValue)
	case []any:
		b, ok := b.([]any)
		return ok && slices.EqualFunc(a, b, sameValue)
	case json.Number:
		b, ok := b.(json.Number)
		return ok && (a == b || sameInteger(string(a), string(b)))
	default: // string, bool, nil
		return a == b
	}
}

// sameInteger knows that -0 is 0.
func sameInteger(a, b string) bool {
	x, errX := strconv.ParseInt(a, 10, 64)
	y, errY := strconv.ParseInt(b, 10, 64)
	return errX == nil && errY == nil && x == y
}
