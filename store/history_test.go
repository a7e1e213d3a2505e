package store_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// TestHistory makes random writes to the store and to a model that keeps every state.
// Then it reads every revision.
func TestHistory(t *testing.T) {
	db, url := openURL(t)
	conn := session(t, url)
	storetest.Check(t, 50, func(rt *rapid.T) {
		emptied(t, conn)
		w := newWorld()
		for range rapid.IntRange(1, 12).Draw(rt, "writes") {
			w.draw(rt, t, db)
		}
		for revision, state := range w {
			compare(rt, t, db, int64(revision), state)
		}
	})
}

// world is every state of a model, by revision.
type world []model

func newWorld() world { return world{model{}} }

// newest is the newest revision.
func (w world) newest() int64 { return int64(len(w) - 1) }

// draw makes a random write.
func (w *world) draw(rt *rapid.T, t *testing.T, db *store.DB) {
	var ops []store.Op
	for range rapid.IntRange(1, 4).Draw(rt, "operations") {
		ops = append(ops, drawOp(rt))
	}
	w.write(rt, t, db, ops...)
}

// write writes to the store and to the model.
func (w *world) write(rt *rapid.T, t *testing.T, db *store.DB, ops ...store.Op) {
	now := (*w)[w.newest()]
	next, refusedByModel := now.apply(ops)
	result, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops, Caller: "test"})
	var opErr *store.OpError
	if refusedByModel != errors.As(err, &opErr) || err != nil && opErr == nil {
		rt.Fatalf("the store says %v, the model refused: %v; for %v", err, refusedByModel, ops)
	}
	if err == nil && result.Changed > 0 {
		*w = append(*w, next)
	}
	if err == nil && (result.Revision != w.newest() || !maps.EqualFunc((*w)[w.newest()], next, sameModel)) {
		rt.Fatalf("%+v at revision %d of the model, from %v to %v", result, w.newest(), now, next)
	}
}

// There are few ids, so that operations affect the same entities.
var ids = []string{"G a", "G b", "G c", "U d", "U e"}

func drawOp(rt *rapid.T) store.Op {
	name := rapid.SampledFrom(ids).Draw(rt, "entity")
	parents := rapid.SliceOfN(rapid.SampledFrom(ids), 1, 2).Draw(rt, "parents")
	attrs := fmt.Sprintf(`{"n": %d}`, rapid.IntRange(0, 2).Draw(rt, "n"))
	switch rapid.IntRange(0, 5).Draw(rt, "kind") {
	case 0:
		return put(name, attrs, parents...)
	case 1:
		return remove(name)
	case 2:
		return cascade(name)
	case 3:
		return join(name, parents...)
	case 4:
		return leave(name, parents...)
	default:
		return set(name, attrs)
	}
}

// model is a whole state: name → entity. It applies the rules in the simplest way,
// without a plan or a database.
type model map[string]modelEntity

type modelEntity struct {
	attrs   string
	parents map[string]bool
}

func sameModel(a, b modelEntity) bool { return a.attrs == b.attrs && maps.Equal(a.parents, b.parents) }

func (m model) apply(ops []store.Op) (next model, refused bool) {
	next = model{}
	for name, e := range m {
		next[name] = modelEntity{e.attrs, maps.Clone(e.parents)}
	}
	plainDeletes := map[string]bool{}
	for _, op := range ops {
		name := op.Entity.Type + " " + op.Entity.ID
		e, stored := next[name]
		if !stored && op.Kind != store.Put && op.Kind != store.Delete {
			return m, true
		}
		switch op.Kind {
		case store.Put:
			next[name] = modelEntity{string(op.Entity.Attrs), names(op.Entity.Parents)}
		case store.Delete:
			delete(next, name)
			if op.Cascade {
				for _, other := range next {
					delete(other.parents, name)
				}
			} else if stored {
				plainDeletes[name] = true
			}
		case store.AddParents:
			maps.Copy(e.parents, names(op.Entity.Parents))
		case store.RemoveParents:
			for parent := range names(op.Entity.Parents) {
				delete(e.parents, parent)
			}
		case store.SetAttributes:
			next[name] = modelEntity{string(op.Entity.Attrs), e.parents}
		}
	}
	for name, e := range next {
		if next.ancestors(name)[name] {
			return m, true
		}
		for parent := range e.parents {
			if plainDeletes[parent] {
				return m, true
			}
		}
	}
	return next, false
}

func names(uids []store.UID) map[string]bool {
	set := map[string]bool{}
	for _, u := range uids {
		set[u.Type+" "+u.ID] = true
	}
	return set
}

// ancestors returns the ancestors of an entity, with the entity itself only if it is on a
// cycle.
func (m model) ancestors(name string) map[string]bool {
	found := map[string]bool{}
	todo := slices.Collect(maps.Keys(m[name].parents))
	for len(todo) > 0 {
		parent := todo[0]
		todo = todo[1:]
		if !found[parent] {
			found[parent] = true
			todo = append(todo, slices.Collect(maps.Keys(m[parent].parents))...)
		}
	}
	return found
}

func (e modelEntity) describe(name string) string {
	return describe(entity(name, e.attrs, slices.Sorted(maps.Keys(e.parents))...))
}

func compare(rt *rapid.T, t *testing.T, db *store.DB, revision int64, state model) {
	for _, name := range ids {
		want := "absent"
		if e, ok := state[name]; ok {
			want = e.describe(name)
		}
		if got := show(t, db, revision, name); got != want {
			rt.Fatalf("revision %d: %s is %s, want %s", revision, name, got, want)
		}
		closure := state.ancestors(name)
		closure[name] = true
		loaded, err := db.LoadEntities(t.Context(), revision, uids(name), anyWeight)
		if err != nil {
			rt.Fatal(err)
		}
		got := map[string]string{}
		for _, e := range loaded {
			got[e.Type+" "+e.ID] = describe(e)
		}
		wanted := map[string]string{}
		for other := range closure {
			if e, ok := state[other]; ok {
				wanted[other] = e.describe(other)
			}
		}
		if !maps.Equal(got, wanted) || len(loaded) != len(wanted) {
			rt.Fatalf("revision %d: above %s are %v, want %v", revision, name, got, wanted)
		}
	}
	list, err := db.ListEntities(t.Context(), revision, store.EntityQuery{Limit: 100})
	if err != nil || len(list) != len(state) {
		rt.Fatalf("revision %d: %d listed of %d, %v", revision, len(list), len(state), err)
	}
}

func TestListAndEach(t *testing.T) {
	db := storetest.Open(t)
	var ops []store.Op
	var all []string
	for _, typ := range []string{"A", "B", "a"} {
		for _, id := range []string{"", "X", "a", "b c", "z", "é"} {
			all = append(all, typ+" "+id)
			ops = append(ops, put(typ+" "+id, `{}`))
		}
	}
	slices.Reverse(ops)
	then := write(t, db, ops...).Revision
	write(t, db, remove("A X"), put("B new", `{}`))

	var paged []string
	after := store.UID{}
	for {
		page, err := db.ListEntities(t.Context(), then, store.EntityQuery{After: after, Limit: 4})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page {
			paged = append(paged, e.Type+" "+e.ID)
			after = e.UID
		}
		if len(page) < 4 {
			break
		}
	}
	if !slices.Equal(paged, all) {
		t.Errorf("pages of %q", paged)
	}
	if list, err := db.ListEntities(t.Context(), then, store.EntityQuery{Type: "B", After: uid("B X"), Limit: 100}); err != nil || len(list) != 4 {
		t.Errorf("%v, %v", list, err)
	}

	for _, c := range []struct {
		types []string
		want  int
	}{{nil, 18}, {[]string{"A", "a"}, 12}, {[]string{}, 0}} {
		n := 0
		err := db.EachEntity(t.Context(), then, c.types, func(store.Entity) error { n++; return nil })
		if err != nil || n != c.want {
			t.Errorf("%v: %d of %d, %v", c.types, n, c.want, err)
		}
	}
	enough := errors.New("enough")
	if err := db.EachEntity(t.Context(), then, nil, func(store.Entity) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("got %v", err)
	}
}

func TestLoadDeepAndCircular(t *testing.T) {
	db, url := openURL(t)
	const deep = 1000
	mustRaw(t, url, `insert into entities (type, id, attrs, tags, parents, since)
		select 'G', n::text, '{}', '{}', array['G ' || n + 1], 1 from generate_series(1, $1::int) n`, deep)
	mustRaw(t, url, `insert into entities (type, id, attrs, tags, parents, since) values
		('C', 'a', '{}', '{}', '{"C b", "G 1"}', 1), ('C', 'b', '{}', '{}', '{"C a", "C b"}', 1)`)
	loaded, err := db.LoadEntities(t.Context(), 1, uids("C a", "C a", "C b", "U none"), anyWeight)
	if err != nil || len(loaded) != deep+2 {
		t.Errorf("%d loaded, %v", len(loaded), err)
	}
	if loaded, err := db.LoadEntities(t.Context(), 0, uids("C a"), anyWeight); err != nil || len(loaded) != 0 {
		t.Errorf("%d loaded from before there was anything, %v", len(loaded), err)
	}
	// A write below the cycle is accepted. One that joins the cycle is refused.
	write(t, db, put("U u", `{}`, "C a"))
	refused(t, db, 0, store.ErrCycle, join("G 1000", "C a"))
}
