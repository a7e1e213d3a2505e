package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestOperations(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("User a", `{"n": 1, "region": "eu"}`, "Role y", "Role x", "Role y"))
	is(t, db, "User a", `{"n": 1, "region": "eu"} [Role x, Role y]`)

	write(t, db, set("User a", `{"n": 2, "new": {"deep": [1, "<&>"]}}`, "region", "never there"))
	is(t, db, "User a", `{"n": 2, "new": {"deep": [1, "<&>"]}} [Role x, Role y]`)
	write(t, db, join("User a", "Role z", "Role x"))
	is(t, db, "User a", `{"n": 2, "new": {"deep": [1, "<&>"]}} [Role x, Role y, Role z]`)
	write(t, db, leave("User a", "Role x", "Role z", "Role never"))
	is(t, db, "User a", `{"n": 2, "new": {"deep": [1, "<&>"]}} [Role y]`)
	write(t, db, put("User a", ``))
	is(t, db, "User a", `{} []`)
	write(t, db, remove("User a"))
	is(t, db, "User a", `absent`)

	for _, op := range []store.Op{join("User a", "Role x"), leave("User a", "Role x"), set("User a", `{}`)} {
		refused(t, db, 0, store.ErrNotFound, op)
	}
	// A later operation sees the result of an earlier one, and both make one version.
	r := write(t, db, put("User a", `{}`), join("User a", "Role x"), set("User a", `{"k": true}`), leave("User a", "Role x"))
	if r.Changed != 1 {
		t.Errorf("one entity, %d changes", r.Changed)
	}
	is(t, db, "User a", `{"k": true} []`)
	// An id can be any text.
	strange := "User a b\n\"'\\ü, {}"
	write(t, db, put(strange, `{}`, "Role x y", `Role {"`))
	is(t, db, strange, `{} [Role x y, Role {"]`)
}

func TestUnchangedIsNoRevision(t *testing.T) {
	db := storetest.Open(t)
	first := write(t, db, put("User a", `{"n": 1, "s": {"x": [1, 2], "y": null}}`, "Role x", "Role y"))
	for _, ops := range [][]store.Op{
		{put("User a", `{"s": {"y": null, "x": [1,2]}, "n": 1}`, "Role y", "Role x", "Role x")},
		{join("User a", "Role y")},
		{leave("User a", "Role z")},
		{set("User a", `{"n": 1}`, "zzz")},
		{remove("User b")},
		{put("User b", `{}`), remove("User b")},
		{join("User a", "Role z"), leave("User a", "Role z")},
	} {
		if r := write(t, db, ops...); r != (store.WriteResult{Revision: first.Revision, Mark: first.Mark}) {
			t.Errorf("%v: %+v", ops, r)
		}
	}
	// Only entities that changed get a version.
	r := write(t, db, put("User a", `{"n": 1, "s": {"x": [1, 2], "y": null}}`, "Role x", "Role y"), put("User b", `{}`))
	list := changes(t, db, first.Revision, 100)
	if r.Changed != 1 || len(list) != 1 || list[0] != (store.Change{Revision: r.Revision, Kind: store.KindEntity, Type: "User", ID: "b"}) {
		t.Errorf("%+v, %+v", r, list)
	}
}

func TestPreconditions(t *testing.T) {
	db := storetest.Open(t)
	refused(t, db, 0, store.ErrMustExist, mustExist(put("User a", `{}`)))
	refused(t, db, 1, store.ErrMustExist, put("User b", `{}`), mustExist(remove("User a")))
	made := write(t, db, ifRevision(0, mustNotExist(put("User a", `{}`)))).Revision
	refused(t, db, 0, store.ErrMustNotExist, mustNotExist(put("User a", `{}`)))
	refused(t, db, 0, store.ErrStale, ifRevision(made-1, put("User a", `{"n": 1}`)))

	// A stale copy does not restore a revoked membership.
	write(t, db, ifRevision(made, join("User a", "Role admin")))
	read := current(t, db)
	revoked := write(t, db, ifRevision(read, leave("User a", "Role admin"))).Revision
	refused(t, db, 0, store.ErrStale, ifRevision(read, put("User a", `{}`, "Role admin")))
	// Changes of other entities and earlier operations do not make it stale.
	write(t, db, put("User b", `{}`))
	write(t, db, ifRevision(revoked, set("User a", `{"n": 1}`)), ifRevision(revoked, set("User a", `{"n": 2}`)))
	// An entity that was made or deleted has changed.
	before := current(t, db)
	write(t, db, remove("User a"))
	refused(t, db, 0, store.ErrStale, ifRevision(before, remove("User a")))
	refused(t, db, 0, store.ErrStale, ifRevision(before, put("User a", `{}`)))
	write(t, db, ifRevision(before+1, put("User a", `{}`)))
}

func TestAllOrNothing(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("User a", `{}`))
	refused(t, db, 2, store.ErrNotFound, put("User b", `{}`), remove("User a"), join("User c", "Role x"))
	is(t, db, "User a", `{} []`)
	is(t, db, "User b", `absent`)
	// The database itself refuses.
	if _, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: []store.Op{remove("User a"), put("User z", `[]`)}}); err == nil {
		t.Error("an array for attributes was accepted")
	}
	is(t, db, "User a", `{} []`)
}

func TestDeleteWithMembers(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("Role r", `{}`), put("User a", `{}`, "Role r", "Role s"), put("User b", `{}`, "Role r"))
	refused(t, db, 1, store.HasMembersError{Count: 2}, put("User c", `{}`), remove("Role r"))
	refused(t, db, 0, store.HasMembersError{Count: 3}, remove("Role r"), put("User c", `{}`, "Role r"))
	refused(t, db, 0, store.HasMembersError{Count: 1}, remove("Role r"), remove("User a"))
	// An entity made again under the same id would get the old members.
	refused(t, db, 0, store.HasMembersError{Count: 2}, remove("Role r"), put("Role r", `{}`))

	before := current(t, db)
	r := write(t, db, put("User c", `{}`, "Role r"), cascade("Role r"))
	if r.Changed != 4 {
		t.Errorf("%d changes, want r, a, b and c", r.Changed)
	}
	is(t, db, "Role r", `absent`)
	is(t, db, "User a", `{} [Role s]`)
	is(t, db, "User b", `{} []`)
	is(t, db, "User c", `{} []`)
	if got := show(t, db, before, "User a"); got != `{} [Role r, Role s]` {
		t.Errorf("history was changed: %s", got)
	}
	// Memberships in an entity that is not stored are removed too.
	write(t, db, cascade("Role s"))
	is(t, db, "User a", `{} []`)
	// Members that the same write deletes do not count.
	write(t, db, put("Role r", `{}`), put("User a", `{}`, "Role r"))
	write(t, db, remove("Role r"), remove("User a"))
}

func TestCascadeIsBounded(t *testing.T) {
	db, url := openURL(t)
	mustRaw(t, url, `insert into entities (type, id, attrs, tags, parents, since)
		select 'User', n::text, '{}', '{}', array['Role r'], 1 from generate_series(1, $1::int) n`, store.MaxCascade+1)
	write(t, db, put("Role r", `{}`))
	refused(t, db, 0, store.ErrTooManyMembers, cascade("Role r"))
	write(t, db, remove("User 1"))
	if r := write(t, db, cascade("Role r")); r.Changed != store.MaxCascade+1 {
		t.Errorf("%d changes", r.Changed)
	}
}

func TestCycles(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("G a", `{}`, "G b"), put("G b", `{}`, "G c"), put("G c", `{}`))
	refused(t, db, 0, store.ErrCycle, join("G c", "G c"))
	refused(t, db, 0, store.ErrCycle, join("G c", "G a"))
	refused(t, db, 1, store.ErrCycle, put("G x", `{}`, "G y"), put("G c", `{}`, "G a"))
	refused(t, db, 0, store.ErrCycle, put("G x", `{}`, "G y"), put("G y", `{}`, "G x"))
	// A cycle through an entity that is stored later.
	write(t, db, put("G x", `{}`, "G y"))
	refused(t, db, 0, store.ErrCycle, put("G y", `{}`, "G z", "G x"))
	// A write may reverse an edge.
	write(t, db, join("G c", "G a"), leave("G a", "G b"))
	is(t, db, "G c", `{} [G a]`)
}

func TestPolicyChanged(t *testing.T) {
	db := storetest.Open(t)
	ops := []store.Op{put("User a", `{}`)}
	published, _, err := publishBundle(t, db, store.Publish{Bundle: store.Bundle{Name: "shop"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops}); !errors.Is(err, store.ErrPolicyChanged) {
		t.Errorf("got %v", err)
	}
	if _, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops, PolicyRevision: published}); err != nil {
		t.Error(err)
	}
}

// The error for a position that the database does not have is not that for a publish.
func TestOtherHistory(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("User a", `{}`))
	here, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	lost := here
	lost.Mark = uuid.New()
	later := here
	later.Number++
	for name, at := range map[string]store.Position{"another mark": lost, "a later number": later} {
		_, write := db.WriteEntities(t.Context(), store.EntityWrite{Ops: []store.Op{put("User b", `{}`)}, At: at})
		_, _, publish := publishBundle(t, db, store.Publish{Bundle: store.Bundle{Name: "shop"}, At: at})
		_, _, mark := db.Mark(t.Context(), here.Number, at)
		for call, err := range map[string]error{"write": write, "publish": publish, "mark": mark} {
			if !errors.Is(err, store.ErrOtherHistory) || errors.Is(err, store.ErrPolicyChanged) {
				t.Errorf("%s at %s: %v", call, name, err)
			}
		}
		err := db.View(t.Context(), func(v *store.View) error {
			has, err := v.Has(t.Context(), at)
			if has {
				t.Errorf("the view has the position of %s", name)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	if n := current(t, db); n != here.Number {
		t.Errorf("revision %d after refused writes at %d", n, here.Number)
	}
	write(t, db, put("User b", `{}`))
	if _, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: []store.Op{put("User c", `{}`)}, At: here}); err != nil {
		t.Errorf("at an earlier position of this history: %v", err)
	}
}

func TestConcurrentWriters(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("User a", `{}`))
	start := current(t, db)
	const writers, writes = 8, 25
	began := time.Now()
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			for i := range writes {
				_, err := db.WriteEntities(context.Background(), store.EntityWrite{
					Ops: []store.Op{join("User a", fmt.Sprintf("Role %d-%d", w, i))}})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	t.Logf("%.0f writes/s to one entity (race detector may be on, fsync off)", writers*writes/time.Since(began).Seconds())

	if got := current(t, db); got != start+writers*writes {
		t.Errorf("revision %d after %d writes from %d", got, writers*writes, start)
	}
	e, err := db.GetEntity(t.Context(), current(t, db), uid("User a"))
	if err != nil || len(e.Parents) != writers*writes {
		t.Errorf("%d memberships of %d, %v", len(e.Parents), writers*writes, err)
	}
	for i, c := range changes(t, db, start, 1000) {
		if c.Revision != start+int64(i)+1 {
			t.Fatalf("revision %d at place %d", c.Revision, i)
		}
	}
}
