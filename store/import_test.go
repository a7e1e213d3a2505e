package store_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// chunk writes the next chunk of an import.
func chunk(t testing.TB, db *store.DB, from store.Import, ops ...store.Op) (store.WriteResult, error) {
	t.Helper()
	return db.WriteEntities(t.Context(), store.EntityWrite{
		Ops: ops, Caller: "test", Import: &store.ImportStep{From: from, Entities: from.Entities + int64(len(ops))},
	})
}

func mustChunk(t testing.TB, db *store.DB, from store.Import, ops ...store.Op) store.Import {
	t.Helper()
	r, err := chunk(t, db, from, ops...)
	if err != nil {
		t.Fatal(err)
	}
	return r.Import
}

// stored reads an import as "3 entities at revision 2", or "none".
func stored(t testing.TB, db *store.DB, id string) string {
	t.Helper()
	i, err := db.GetImport(t.Context(), id)
	if errors.Is(err, store.ErrNotFound) {
		return "none"
	}
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d entities at revision %d", i.Entities, i.Revision)
}

func wantStored(t testing.TB, db *store.DB, want string) {
	t.Helper()
	if got := stored(t, db, "people"); got != want {
		t.Errorf("the import has %s, want %s", got, want)
	}
}

func TestImport(t *testing.T) {
	db := storetest.Open(t)
	wantStored(t, db, "none")
	people := mustChunk(t, db, store.Import{ID: "people"}, put("User a", `{}`), put("User b", `{}`))
	wantStored(t, db, "2 entities at revision 1")
	if people.Caller != "test" || people.UpdatedAt.IsZero() {
		t.Errorf("%+v", people)
	}
	// A chunk that changes nothing makes no revision, and is counted.
	people = mustChunk(t, db, people, put("User a", `{}`))
	wantStored(t, db, "3 entities at revision 1")
	if n := current(t, db); n != 1 {
		t.Errorf("an unchanged chunk made revision %d", n)
	}
	people = mustChunk(t, db, people, put("User c", `{}`))
	wantStored(t, db, "4 entities at revision 2")

	other := mustChunk(t, db, store.Import{ID: "orders"}, put("Order 1", `{}`))
	if err := db.FinishImport(t.Context(), people); err != nil {
		t.Fatal(err)
	}
	wantStored(t, db, "none")
	if got := stored(t, db, "orders"); got != "1 entities at revision 3" {
		t.Errorf("after the import ended: %s", got)
	}
	if err := db.FinishImport(t.Context(), other); err != nil {
		t.Error(err)
	}
}

// A chunk is both stored and counted, or neither.
func TestImportAndChunkAreOne(t *testing.T) {
	db, url := openURL(t)
	people := mustChunk(t, db, store.Import{ID: "people"}, put("User a", `{}`))
	if _, err := chunk(t, db, people, put("User b", `{}`), put("G a", `{}`, "G a")); !errors.Is(err, store.ErrCycle) {
		t.Errorf("got %v", err)
	}
	// The database refuses after the entities are written, then at the commit.
	for _, when := range []string{"", "deferrable initially deferred"} {
		mustRaw(t, url, `create or replace function refuse() returns trigger language plpgsql as $$ begin raise 'refused'; end $$`)
		mustRaw(t, url, `create constraint trigger refuse after update on imports `+when+` for each row execute function refuse()`)
		if _, err := chunk(t, db, people, put("User b", `{}`)); err == nil {
			t.Error("a chunk was stored that could not be counted")
		}
		mustRaw(t, url, `drop trigger refuse on imports`)
		is(t, db, "User b", "absent")
		wantStored(t, db, "1 entities at revision 1")
	}
	mustChunk(t, db, people, put("User b", `{}`))
	wantStored(t, db, "2 entities at revision 2")
}

// If two callers continue one import, each chunk is accepted from one of them only.
func TestImportContinuedTwice(t *testing.T) {
	db := storetest.Open(t)
	people := mustChunk(t, db, store.Import{ID: "people"}, put("User a", `{}`))
	results := make([]error, 2)
	var group sync.WaitGroup
	for i := range results {
		group.Go(func() { _, results[i] = chunk(t, db, people, put(fmt.Sprintf("User %d", i), `{}`)) })
	}
	group.Wait()
	moved := 0
	for i, err := range results {
		want := `{} []`
		if errors.Is(err, store.ErrImportMoved) {
			moved++
			want = "absent"
		} else if err != nil {
			t.Error(err)
		}
		is(t, db, fmt.Sprintf("User %d", i), want)
	}
	if moved != 1 {
		t.Errorf("%d of two were refused: %v", moved, results)
	}
	wantStored(t, db, "2 entities at revision 2")
}

// An import that begins anew replaces the old one. A caller of the old one cannot
// continue it, even at the same number of entities.
func TestImportBegunAnew(t *testing.T) {
	db := storetest.Open(t)
	first := mustChunk(t, db, store.Import{ID: "people"}, put("User a", `{}`))
	second := mustChunk(t, db, store.Import{ID: "people"}, put("User b", `{}`))
	wantStored(t, db, "1 entities at revision 2")
	if _, err := chunk(t, db, first, put("User c", `{}`)); !errors.Is(err, store.ErrImportMoved) {
		t.Errorf("got %v", err)
	}
	if err := db.FinishImport(t.Context(), first); err != nil {
		t.Error(err)
	}
	wantStored(t, db, "1 entities at revision 2")
	// An import that ended cannot be continued either.
	if err := db.FinishImport(t.Context(), second); err != nil {
		t.Error(err)
	}
	if _, err := chunk(t, db, second, put("User c", `{}`)); !errors.Is(err, store.ErrImportMoved) {
		t.Errorf("got %v", err)
	}
	is(t, db, "User c", "absent")
}

// A caller that continues an import takes it away from the caller that had it.
func TestContinueImport(t *testing.T) {
	db := storetest.Open(t)
	if _, err := db.ContinueImport(t.Context(), "people", 1); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	first := mustChunk(t, db, store.Import{ID: "people"}, put("User a", `{}`))
	if at, err := db.ContinueImport(t.Context(), "people", 2); !errors.Is(err, store.ErrImportMoved) || at.Entities != 1 {
		t.Errorf("%+v, %v", at, err)
	}
	first = mustChunk(t, db, first, put("User b", `{}`))
	second, err := db.ContinueImport(t.Context(), "people", 2)
	if err != nil || second.Revision != first.Revision {
		t.Fatalf("%+v, %v", second, err)
	}
	if _, err := chunk(t, db, first, put("User c", `{}`)); !errors.Is(err, store.ErrImportMoved) {
		t.Errorf("got %v", err)
	}
	if err := db.FinishImport(t.Context(), first); err != nil {
		t.Error(err)
	}
	mustChunk(t, db, second, put("User d", `{}`))
	wantStored(t, db, "3 entities at revision 3")
	is(t, db, "User c", "absent")
}

// An import that was not continued for long is removed when another one begins.
func TestOldImportsAreForgotten(t *testing.T) {
	db, url := openURL(t)
	mustChunk(t, db, store.Import{ID: "old"}, put("User a", `{}`))
	mustChunk(t, db, store.Import{ID: "people"}, put("User b", `{}`))
	mustRaw(t, url, `update imports set updated_at = updated_at - case id when 'old' then interval '31 days' else interval '29 days' end`)
	mustChunk(t, db, store.Import{ID: "new"}, put("User c", `{}`))
	wantStored(t, db, "1 entities at revision 2")
	if got := stored(t, db, "old"); got != "none" {
		t.Errorf("the old one has %s", got)
	}
}
