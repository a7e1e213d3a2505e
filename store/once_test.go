package store_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// answering is a write under an idempotency key, whose answer is its revision.
func answering(caller, key, request string, ops ...store.Op) store.EntityWrite {
	return store.EntityWrite{Caller: caller, Ops: ops, Once: &store.Once[store.WriteResult]{
		Key: key, Request: sha256.Sum256([]byte(request)),
		Answer: func(r store.WriteResult) ([]byte, error) { return strconv.AppendInt(nil, r.Revision, 10), nil },
	}}
}

// answered reads the answer of a key: the revision of its write, and what it asked for.
func answered(t *testing.T, db *store.DB, caller, key string) (int64, [sha256.Size]byte) {
	t.Helper()
	request, answer, err := db.Answered(t.Context(), caller, key)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(string(answer), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n, request
}

func TestOnce(t *testing.T) {
	t.Parallel()
	db, url := openURL(t)
	r, err := db.WriteEntities(t.Context(), answering("ann", "k", "a", put("User a", `{}`)))
	if err != nil || r.Changed != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	if n, request := answered(t, db, "ann", "k"); n != r.Revision || request != sha256.Sum256([]byte("a")) {
		t.Errorf("%d, %x", n, request)
	}
	// Nothing of a second write with the key is stored.
	if _, err := db.WriteEntities(t.Context(), answering("ann", "k", "b", put("User b", `{}`))); !errors.Is(err, store.ErrRepeated) {
		t.Errorf("%v", err)
	}
	is(t, db, "User b", "absent")
	// A write that changes nothing has its answer, too.
	same, err := db.WriteEntities(t.Context(), answering("ann", "same", "a", put("User a", `{}`)))
	if n, _ := answered(t, db, "ann", "same"); err != nil || same.Changed != 0 || n != r.Revision {
		t.Errorf("%+v, %d, %v", same, n, err)
	}
	if revision := write(t, db, put("User c", `{}`)).Revision; revision != r.Revision+1 {
		t.Errorf("revision %d after %d: one was used up", revision, r.Revision)
	}
	// A write that is refused does not use its key up.
	if _, err := db.WriteEntities(t.Context(), answering("ann", "refused", "a", join("User z", "Role x"))); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%v", err)
	}
	if _, _, err := db.Answered(t.Context(), "ann", "refused"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%v", err)
	}
	// Keys of other callers are other keys.
	if _, _, err := db.Answered(t.Context(), "ben", "k"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%v", err)
	}
	if r, err := db.WriteEntities(t.Context(), answering("ben", "k", "b", put("User b", `{}`))); err != nil || r.Changed != 1 {
		t.Errorf("%+v, %v", r, err)
	}

	// After a day the key counts no more.
	mustRaw(t, url, "update idempotency_keys set at = at - interval '24 hours 1 second' where key = 'k' and caller = 'ann'")
	if _, _, err := db.Answered(t.Context(), "ann", "k"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%v", err)
	}
	again, err := db.WriteEntities(t.Context(), answering("ann", "k", "d", put("User d", `{}`)))
	if n, request := answered(t, db, "ann", "k"); err != nil || n != again.Revision || request != sha256.Sum256([]byte("d")) {
		t.Errorf("%+v, %d, %v", again, n, err)
	}
	// Keys are swept also if all history is kept.
	mustRaw(t, url, "update idempotency_keys set at = at - interval '24 hours 1 second' where key = 'same'")
	mustRaw(t, url, fmt.Sprintf(`insert into idempotency_keys (caller, key, request, answer, at)
		select 'old', n::text, sha256(''), '', now() - interval '25 hours' from generate_series(1, %d) n`, store.SweepRows))
	mustRaw(t, url, "insert into imports (id, entities, revision, caller, updated_at) values ('left', 1, 1, '', now() - interval '31 days')")
	swept, err := db.Sweep(t.Context(), -1)
	if err != nil || swept.Rows["idempotency_keys"] != store.SweepRows+1 || swept.Rows["imports"] != 1 || len(swept.Rows) != 2 {
		t.Errorf("%+v, %v", swept, err)
	}
	if n := count(t, url, "select count(*) from idempotency_keys"); n != 2 { // ann's k and ben's
		t.Errorf("%d keys", n)
	}
}

// Of many writes with one key, from several servers, one happens.
func TestOnceAmongMany(t *testing.T) {
	t.Parallel()
	a, url := openURL(t)
	b, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), MaxConns: 8, Event: storetest.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	var wg sync.WaitGroup
	results := make(chan error, 16)
	for i := range cap(results) {
		wg.Go(func() {
			_, err := []*store.DB{a, b}[i%2].WriteEntities(t.Context(), answering("ann", "k", fmt.Sprint(i), put(fmt.Sprint("User ", i), `{}`)))
			results <- err
		})
	}
	wg.Wait()
	close(results)
	happened := 0
	for err := range results {
		if err == nil {
			happened++
		} else if !errors.Is(err, store.ErrRepeated) {
			t.Error(err)
		}
	}
	if n := count(t, url, "select count(*) from entities"); happened != 1 || n != 1 {
		t.Errorf("%d writes succeeded, %d entities are stored", happened, n)
	}
}

// If the reply to a commit is lost, the answer is there.
func TestOnceWithoutReply(t *testing.T) {
	t.Parallel()
	other, url := openURL(t)
	proxied, lose := deafProxy(t, url)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(proxied), Event: storetest.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	// The commit waits until the proxy loses replies.
	mustRaw(t, url, `create function wait_for_test() returns trigger language plpgsql as $$
		begin perform pg_advisory_xact_lock_shared(1); return null; end $$`)
	mustRaw(t, url, `create constraint trigger wait_for_test after insert on idempotency_keys
		deferrable initially deferred for each row execute function wait_for_test()`)
	holder := connect(t, url)
	if _, err := holder.Exec(t.Context(), "select pg_advisory_lock(1)"); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := db.WriteEntities(t.Context(), answering("ann", "k", "a", put("User a", `{}`)))
		done <- err
	}()
	for count(t, url, "select count(*) from pg_locks where locktype = 'advisory' and not granted") == 0 {
		time.Sleep(time.Millisecond)
	}
	lose.Store(true)
	if _, err := holder.Exec(t.Context(), "select pg_advisory_unlock(1)"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil || errors.Is(err, store.ErrRepeated) {
		t.Errorf("%v", err)
	}
	if n, _ := answered(t, other, "ann", "k"); n != 1 {
		t.Errorf("revision %d", n)
	}
	is(t, other, "User a", "{} []")
}
