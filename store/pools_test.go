package store_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// hold runs SQL in a transaction of another session, which stays open until
// release.
func hold(t *testing.T, url, sql string) (release func()) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() { conn.Close(context.Background()) })
	t.Cleanup(release)
	if _, err := conn.Exec(t.Context(), "begin; "+sql); err != nil {
		t.Fatal(err)
	}
	return release
}

// waitForLocks waits until so many sessions wait for a lock.
func waitForLocks(t *testing.T, url string, n int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		var waiting int
		err := conn.QueryRow(t.Context(), `select count(*) from pg_stat_activity
			where datname = current_database() and wait_event_type = 'Lock'`).Scan(&waiting)
		if err != nil {
			t.Fatal(err)
		}
		if waiting >= n {
			return
		}
	}
	t.Fatalf("%d sessions never waited for a lock", n)
}

func openSmall(t *testing.T, url string) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), MaxConns: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}

// within fails if fn fails or takes longer than it can on any machine.
func within(t *testing.T, what string, fn func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := fn(ctx); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// Of the writers of a process that wait for the revision lock, only one uses a connection.
func TestWritersWaitWithoutConnections(t *testing.T) {
	url := storetest.New(t)
	db := openSmall(t, url)
	write(t, db, put("User a", `{}`))
	release := hold(t, url, "update revision set n = n")
	const writers = 20
	var began atomic.Int32
	done := make(chan error, writers)
	for i := range writers {
		go func() {
			began.Add(1)
			_, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: []store.Op{put(fmt.Sprintf("User w%d", i), `{}`)}})
			done <- err
		}()
	}
	for began.Load() < writers {
		time.Sleep(time.Millisecond)
	}
	waitForLocks(t, url, 1)

	within(t, "load", func(ctx context.Context) error {
		_, err := db.LoadEntities(ctx, 1, uids("User a"), anyWeight)
		return err
	})
	within(t, "get", func(ctx context.Context) error { _, err := db.GetEntity(ctx, 1, uid("User a")); return err })
	within(t, "current", func(ctx context.Context) error { _, err := db.Current(ctx); return err })
	// A writer whose deadline ends stops waiting.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := db.CreateKey(ctx, store.Key{ID: "k", Hash: []byte("k")}, "test"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	release()
	for range writers {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := current(t, db); n != writers+1 {
		t.Errorf("revision %d, want %d", n, writers+1)
	}
}

// Decisions and administration do not delay each other, and neither delays reads of the
// newest revision and of the partitions.
func TestPoolsAreApart(t *testing.T) {
	url := storetest.New(t)
	db := openSmall(t, url)
	write(t, db, put("User a", `{}`))
	release := hold(t, url, "lock table entities, policies")
	var wg sync.WaitGroup
	defer wg.Wait()
	defer release()
	for range 5 {
		wg.Go(func() { _, _ = db.GetEntity(t.Context(), 1, uid("User a")) })
	}
	waitForLocks(t, url, 2)
	within(t, "policies", func(ctx context.Context) error { _, err := db.PolicyRevision(ctx, 1); return err })
	for range 5 {
		wg.Go(func() { _, _ = db.LoadEntities(t.Context(), 1, uids("User a"), anyWeight) })
	}
	waitForLocks(t, url, 4)
	within(t, "current", func(ctx context.Context) error { _, err := db.Current(ctx); return err })
	within(t, "partition", func(ctx context.Context) error { _, _, err := db.PartitionsReady(ctx, time.Now()); return err })
}

func TestLoadEntitiesAt(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("User a", `{"n": 1}`, "Group g"), put("Group g", `{}`))
	at, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	write(t, db, put("User a", `{"n": 2}`))
	found, err := db.LoadEntitiesAt(t.Context(), at, uids("User a", "User none"), anyWeight)
	if err != nil || len(found) != 2 {
		t.Fatalf("%v, %v", found, err)
	}
	for _, e := range found {
		if got := describe(e); e.Type == "User" && got != `{"n": 1} [Group g]` {
			t.Errorf("loaded %s", got)
		}
	}
	for name, change := range map[string]func(p *store.Position){
		"another history": func(p *store.Position) { p.Mark[0]++ },
		"not there yet":   func(p *store.Position) { p.Number += 2 },
	} {
		elsewhere := at
		change(&elsewhere)
		if found, err := db.LoadEntitiesAt(t.Context(), elsewhere, uids("User a"), anyWeight); !errors.Is(err, store.ErrBehind) || found != nil {
			t.Errorf("%s: %v, %v", name, found, err)
		}
	}
	// The connection can be used after a refusal.
	if _, err := db.LoadEntitiesAt(t.Context(), at, nil, anyWeight); err != nil {
		t.Error(err)
	}
}

// A commit waits for the disk, whatever the settings of the URL, the role and the server
// are.
func TestCommitsAreSynchronous(t *testing.T) {
	url := storetest.New(t)
	mustRaw(t, url, `
		create table seen (setting text);
		grant insert on seen to public;
		create function see() returns trigger language plpgsql as
			$$ begin insert into seen values (current_setting('synchronous_commit')); return null; end $$;
		create trigger see after insert on revisions for each row execute function see();
		create trigger see after insert on decisions for each row execute function see()`)
	db := openSmall(t, url+"&synchronous_commit=off")
	write(t, db, put("User a", `{}`))
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	if _, err := w.Append(t.Context(), []store.Decision{decision(time.Now(), 1)}, nil); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, url, `do $$ begin assert (select array_agg(setting) from seen) = '{on,on}'; end $$`)
}

// A write of many entities, whose plan looks costly, is not compiled first.
func TestPlansAreNotCompiled(t *testing.T) {
	url := storetest.New(t)
	mustRaw(t, url, `
		create function look() returns trigger language plpgsql as
			$$ begin assert current_setting('jit') = 'off'; return null; end $$;
		create trigger look after insert on revisions for each row execute function look()`)
	write(t, openSmall(t, url), put("User a", `{}`))
}

// Of several hosts, the one that accepts writes is used by default.
func TestSeveralHosts(t *testing.T) {
	standby, primary := storetest.NewServer(t), storetest.NewServer(t)
	if err := store.Migrate(t.Context(), primary.URL(), nil); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, standby.URL(), "alter database cedarpost set default_transaction_read_only = on")
	var hosts []string
	for _, server := range []string{standby.URL(), primary.URL()} {
		mustRaw(t, server, "begin read write; alter role cedarpost password 'secret'; commit")
		u, err := url.Parse(server)
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, u.Host)
	}
	db := openSmall(t, "postgres://cedarpost:secret@"+strings.Join(hosts, ",")+"/cedarpost?sslmode=disable")
	write(t, db, put("User a", `{}`))
}

func TestWriterLetsGoOfALargeBuffer(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	for n, size := range []int{100, 8 << 20, 100} {
		d := decision(time.Now(), byte(n))
		d.Record = make([]byte, size)
		if _, err := w.Append(t.Context(), []store.Decision{d}, nil); err != nil {
			t.Fatal(err)
		}
		if kept := w.Kept(); kept > 1<<20 {
			t.Errorf("keeps %d bytes after a record of %d", kept, size)
		}
	}
}
