package store_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestMigrate(t *testing.T) {
	server := storetest.NewServer(t) // its database is empty
	if _, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(server.URL())}); !errors.Is(err, store.ErrNotMigrated) {
		t.Fatalf("got %v", err)
	}
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			if err := store.Migrate(context.Background(), server.URL(), slog.Default()); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(server.URL())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	write(t, db, put("User a", `{}`))
	if err := store.Migrate(t.Context(), server.URL(), nil); err != nil {
		t.Fatal(err)
	}
	is(t, db, "User a", `{} []`)

	// What was written survives a crash, and the open store connects again.
	before, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Current(t.Context()); err == nil {
		t.Error("a dead server answers")
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	var after store.Position
	// A connection that broke with the server may fail only when it is used.
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		if after, err = db.Current(t.Context()); err == nil {
			break
		}
	}
	if err != nil || after != before {
		t.Errorf("%+v before the crash, %+v after, %v", before, after, err)
	}

	mustRaw(t, server.URL(), "insert into goose_db_version (version_id, is_applied) values (99999, true)")
	if err := store.Migrate(t.Context(), server.URL(), nil); !errors.Is(err, store.ErrTooNew) {
		t.Errorf("got %v", err)
	}
	mustRaw(t, server.URL(), "delete from goose_db_version where version_id > 1")
	if _, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(server.URL())}); !errors.Is(err, store.ErrNotMigrated) {
		t.Errorf("got %v", err)
	}
}

func TestPosition(t *testing.T) {
	a, url := openURL(t)
	b := storetest.Open(t)
	p, err := a.Current(t.Context())
	if err != nil || p.Number != 0 || p.Timeline != 1 {
		t.Errorf("%+v, %v", p, err)
	}
	if q, err := b.Current(t.Context()); err != nil || p.Database == q.Database {
		t.Errorf("two databases have the same name: %+v and %+v, %v", p, q, err)
	}
	// A role that has rights on the table only can read it.
	mustRaw(t, url, `grant select on revision to pg_signal_backend;
		set role pg_signal_backend; select pg_walfile_name(pg_current_wal_lsn()), n from revision`)
}

func TestChanges(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("User a", `{}`), put("User b", `{}`), put("User c", `{}`))
	write(t, db, put("User a", `{"n": 1}`))
	write(t, db, put("User b", `{"n": 1}`), put("User c", `{"n": 1}`))
	for _, c := range []struct {
		after int64
		limit int
		want  string
	}{
		{0, 1, "1a 1b 1c"}, {0, 3, "1a 1b 1c"}, {0, 4, "1a 1b 1c 2a"}, {0, 5, "1a 1b 1c 2a 3b 3c"},
		{0, 0, "1a 1b 1c"}, {1, 1, "2a"}, {1, 100, "2a 3b 3c"}, {3, 100, ""}, {99, 1, ""},
	} {
		var got []string
		for _, change := range changes(t, db, c.after, c.limit) {
			got = append(got, string(rune('0'+change.Revision))+change.ID)
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("after %d, limit %d: %q, want %q", c.after, c.limit, s, c.want)
		}
	}
}

func TestListen(t *testing.T) {
	db, url := openURL(t)
	ctx, cancel := context.WithCancel(t.Context())
	woken := make(chan struct{}, 10)
	ended := make(chan error)
	go func() { ended <- db.Listen(ctx, func() { woken <- struct{}{} }) }()
	wait := func(why string) {
		t.Helper()
		select {
		case <-woken:
		case <-time.After(time.Minute):
			t.Fatalf("not woken %s", why)
		}
	}
	wait("when listening")
	write(t, db, put("User a", `{}`))
	wait("by a write")
	if err := db.CreateKey(t.Context(), store.Key{ID: "k", Name: "k", Hash: make([]byte, 32)}, "test"); err != nil {
		t.Fatal(err)
	}
	wait("by a key")
	// Notifications arrive in the order of commits. So if the next one is of a later
	// write, the write that changed nothing sent none.
	conn := connect(t, url)
	mustExec(t, conn, "listen cedarpost_revision")
	write(t, db, put("User a", `{}`)) // unchanged
	mustRaw(t, url, "select pg_notify('cedarpost_revision', 'later')")
	if n, err := conn.WaitForNotification(t.Context()); err != nil || n.Payload != "later" {
		t.Errorf("woken without a revision: %v, %v", n, err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestKeys(t *testing.T) {
	db := storetest.Open(t)
	var group sync.WaitGroup
	var made int
	for range 5 {
		group.Go(func() {
			_, err := db.ChangeAccess(context.Background(), "test", func(_ context.Context, now store.Access) (c store.AccessChange, err error) {
				if len(now.Keys) > 0 {
					return c, nil
				}
				made++ // the lock prevents a data race
				c.Add = []store.Key{{ID: "first", Name: "First", Hash: []byte("hash of the first")}}
				return c, nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if made != 1 || current(t, db) != 1 {
		t.Errorf("%d first keys, revision %d", made, current(t, db))
	}
	no := errors.New("no")
	_, err := db.ChangeAccess(t.Context(), "test", func(context.Context, store.Access) (c store.AccessChange, err error) { return c, no })
	if !errors.Is(err, no) {
		t.Errorf("got %v", err)
	}
	if err := db.CreateKey(t.Context(), store.Key{ID: "second", Name: "Second", Hash: []byte("another")}, "test"); err != nil {
		t.Fatal(err)
	}
	var keys []store.Key
	err = db.View(t.Context(), func(v *store.View) (err error) {
		keys, err = v.Keys(t.Context())
		return err
	})
	if err != nil || len(keys) != 2 || keys[0].ID != "first" || string(keys[1].Hash) != "another" || keys[0].CreatedAt.IsZero() {
		t.Errorf("%+v, %v", keys, err)
	}
	if list := changes(t, db, 1, 10); len(list) != 1 || list[0] != (store.Change{Revision: 2, Kind: store.KindKey, ID: "second"}) {
		t.Errorf("%+v", list)
	}
	if err := db.CreateKey(t.Context(), store.Key{ID: "second", Hash: []byte("x")}, "test"); err == nil || current(t, db) != 2 {
		t.Errorf("the same id twice: %v, revision %d", err, current(t, db))
	}
}
