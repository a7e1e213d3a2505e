package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A read of an earlier revision has the same result after later writes, until the
// revision is swept. The name of its policies is the same as long as no bundle changes.
func TestPast(t *testing.T) {
	db, url := openURL(t)
	publish := func(name, digest string) int64 {
		t.Helper()
		base, err := db.PolicyRevision(t.Context(), current(t, db))
		if err != nil {
			t.Fatal(err)
		}
		n, _, err := publishBundle(t, db, store.Publish{
			Bundle: store.Bundle{Name: name, Digest: digest, OnForbidError: "deny", Policies: []store.Policy{policy("p", digest, 1)}}, BaseRevision: base,
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	named := func(revision int64) string {
		t.Helper()
		name, err := db.PastPolicies(t.Context(), revision)
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	first := publish("a", "d1")
	change := func(ops ...store.Op) {
		t.Helper()
		policies, err := db.PolicyRevision(t.Context(), current(t, db))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops, PolicyRevision: policies}); err != nil {
			t.Fatal(err)
		}
	}
	change(put("User u", `{"n": 1}`, "Group g"), put("Group g", `{}`))
	old := current(t, db)
	second := publish("b", "d2")
	third := publish("a", "d3")
	change(put("User u", `{"n": 2}`))

	if named(first) != named(old) || named(0) != "" || named(third) != named(current(t, db)) {
		t.Error("one state of policies has several names")
	}
	if named(first) == named(second) || named(second) == named(third) {
		t.Error("two states of policies have one name")
	}
	if _, err := db.PastPolicies(t.Context(), current(t, db)+1); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a revision to come: %v", err)
	}
	bundles, err := db.PastBundles(t.Context(), second)
	if err != nil || len(bundles) != 2 || bundles[0].Policies[0].Text != "d1" {
		t.Errorf("%+v %v", bundles, err)
	}
	found, err := db.PastEntities(t.Context(), old, uids("User u", "User none"), anyWeight)
	if err != nil || len(found) != 2 {
		t.Fatalf("%v %v", found, err)
	}
	for _, e := range found {
		if e.ID == "u" && string(e.Attrs) != `{"n": 1}` {
			t.Errorf("%s", e.Attrs)
		}
	}
	mustRaw(t, url, fmt.Sprintf("update history set oldest = %d", old+1))
	if _, err := db.PastEntities(t.Context(), old, uids("User u"), anyWeight); !errors.Is(err, store.ErrSwept) {
		t.Errorf("a revision that was swept: %v", err)
	}
	if named(old) != named(first) {
		t.Error("policies are not kept for good")
	}
}

// Replays do not use the connections of decisions.
func TestPastLeavesDecisionsAlone(t *testing.T) {
	url := storetest.New(t)
	db := openSmall(t, url)
	write(t, db, put("User a", `{}`))
	release := hold(t, url, "lock table history")
	var wg sync.WaitGroup
	defer wg.Wait()
	defer release()
	for range 5 {
		wg.Go(func() { _, _ = db.PastEntities(t.Context(), 1, uids("User a"), anyWeight) })
	}
	waitForLocks(t, url, 2)
	within(t, "bundles", func(ctx context.Context) error { _, err := db.Bundles(ctx, 1); return err })
}

// Every read of a swept revision fails, and none returns a part of it.
func TestReadsOfWhatIsSwept(t *testing.T) {
	db, url := openURL(t)
	old := write(t, db, put("U a", `{}`, "G x"), put("U b", `{}`)).Revision
	write(t, db, remove("U a"))
	at := write(t, db, put("U c", `{}`)).Revision
	mustRaw(t, url, "update history set oldest = $1", at)
	for name, read := range reads(db) {
		if _, err := read(t.Context(), old); !errors.Is(err, store.ErrSwept) {
			t.Errorf("%s: %v", name, err)
		}
		if n, err := read(t.Context(), at); err != nil || n == 0 {
			t.Errorf("%s: %d entities, %v", name, n, err)
		}
	}
}

// reads are the ways to read entities of a revision. Each returns their number.
func reads(db *store.DB) map[string]func(context.Context, int64) (int, error) {
	return map[string]func(context.Context, int64) (int, error){
		"get": func(ctx context.Context, revision int64) (int, error) {
			_, err := db.GetEntity(ctx, revision, uid("U b"))
			return 1, err
		},
		"list": func(ctx context.Context, revision int64) (int, error) {
			list, err := db.ListEntities(ctx, revision, store.EntityQuery{Limit: 10})
			return len(list), err
		},
		"load": func(ctx context.Context, revision int64) (int, error) {
			list, err := db.LoadEntities(ctx, revision, uids("U a", "U b"), anyWeight)
			return len(list), err
		},
		"each": func(ctx context.Context, revision int64) (n int, err error) {
			err = db.EachEntity(ctx, revision, nil, func(store.Entity) error { n++; return nil })
			return n, err
		},
	}
}

// A sweep between two statements of a read does not make the read miss entities.
func TestReadsBesideASweep(t *testing.T) {
	db, url := openURL(t)
	all := reads(db)
	all["write"] = func(ctx context.Context, revision int64) (int, error) {
		_, err := db.WriteEntities(ctx, store.EntityWrite{Ops: []store.Op{ifRevision(revision, put("U b", `{"n": 1}`))}})
		if errors.Is(err, store.ErrStale) {
			err = store.ErrSwept
		}
		return 0, err // it is not enough that the lock is taken
	}
	for name, read := range all {
		t.Run(name, func(t *testing.T) {
			before := write(t, db, put("U a", `{}`), put("U b", `{}`)).Revision
			// The first read prepares the statements, which would wait too.
			if _, err := read(t.Context(), before); err != nil {
				t.Fatal(err)
			}
			old := current(t, db)
			deleted := write(t, db, remove("U a"), remove("U b")).Revision
			write(t, db, put("U c", fmt.Sprintf(`{"n": %d}`, deleted)))

			sweeper := session(t, url)
			mustExec(t, sweeper, "begin; lock table entities in access exclusive mode")
			var group sync.WaitGroup
			group.Go(func() {
				if n, err := read(t.Context(), old); !errors.Is(err, store.ErrSwept) && (err != nil || n == 0) {
					t.Errorf("%d entities, %v", n, err)
				}
			})
			waitForLocks(t, url, 1)
			mustExec(t, sweeper, fmt.Sprintf("update history set oldest = %d; delete from entities where until <= %[1]d; commit", deleted))
			group.Wait()
		})
	}
}
