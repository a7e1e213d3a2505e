package store_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// anyWeight is more than all entities of a test weigh.
const anyWeight = 1 << 40

// A load of at most some weight succeeds if and only if the entities weigh no more. This holds for
// any graph of entities.
func TestLoadWeight(t *testing.T) {
	db := storetest.Open(t)
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		name := func(i int) string { return fmt.Sprintf("W%d e%d", n, i) }
		count := rapid.IntRange(1, 6).Draw(t, "entities")
		var ops []store.Op
		for i := range count {
			attrs := fmt.Sprintf(`{"a": "é%s"}`, strings.Repeat("x", rapid.IntRange(0, 2000).Draw(t, "bytes")))
			var parents []string
			for p := range rapid.IntRange(0, 8).Draw(t, "parents") {
				parents = append(parents, name(i+1+p)+strings.Repeat("ü", rapid.IntRange(0, 1).Draw(t, "long")*200))
			}
			ops = append(ops, put(name(i), attrs, parents...))
		}
		written, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops, Caller: "test"})
		if err != nil {
			t.Fatal(err)
		}
		revision := written.Revision
		all, err := db.LoadEntities(t.Context(), revision, uids(name(0)), anyWeight)
		if err != nil {
			t.Fatal(err)
		}
		var weight int64
		for i := range all {
			weight += all[i].Weight()
		}
		for _, most := range []int64{weight, weight + 1, weight - 1, rapid.Int64Range(1, 2*weight).Draw(t, "most")} {
			found, err := db.LoadEntities(t.Context(), revision, uids(name(0)), most)
			var large *store.TooLargeError
			switch {
			case weight <= most && (err != nil || len(found) != len(all)):
				t.Errorf("%d bytes of %d: %d of %d entities, %v", weight, most, len(found), len(all), err)
			case weight > most && (!errors.As(err, &large) || found != nil || large.Entities == 0 || large.Most != most):
				t.Errorf("%d bytes of %d: %d entities, %v", weight, most, len(found), err)
			}
		}
	})
}

// Many entities with the same many parents: the load ends after a few, and says which weighs most.
func TestAttackLoadOfManyEdges(t *testing.T) {
	db, url := openURL(t)
	mustRaw(t, url, `
		drop index entities_parents;
		insert into entities (type, id, attrs, tags, parents, since)
		select 'Role', 'mid' || i, '{}', '{}', many.parents, 0
		from generate_series(1, 5000) as i, (select array_agg('Role ' || i) as parents from generate_series(1, 1000) as i) as many;
		insert into entities (type, id, attrs, tags, parents, since)
		select 'User', 'deep', '{}', '{}', array_agg('Role mid' || i), 0 from generate_series(1, 5000) as i`)
	const most = 8 << 20
	_, err := db.LoadEntities(t.Context(), 0, uids("User deep"), most)
	var large *store.TooLargeError
	if !errors.As(err, &large) {
		t.Fatal(err)
	}
	if large.Parents > 120_000 || large.Entities > 150 || large.Heaviest != uid("User deep") || !strings.Contains(err.Error(), "8388608 bytes") {
		t.Errorf("%+v: %v", large, err)
	}
	t.Logf("attack: a user in 5,000 roles with 1,000 parents each: a load ends after %d entities with %d parents, of 5,005,000", large.Entities, large.Parents)
}

// StoredAt finds what is stored at a position, without ancestors.
func TestStoredAt(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("User a", `{}`, "Role none"), put("Role r", `{}`))
	write(t, db, remove("Role r"))
	at, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found, err := db.StoredAt(t.Context(), at, uids("User a", "Role r", "User none"))
	if err != nil || !slices.Equal(found, uids("User a")) {
		t.Errorf("%v, %v", found, err)
	}
	at.Mark[0]++
	if _, err := db.StoredAt(t.Context(), at, uids("User a")); !errors.Is(err, store.ErrBehind) {
		t.Errorf("at a position of another database: %v", err)
	}
}
