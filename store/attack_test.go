package store_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// strangersLocks are the advisory locks that versions before migration 12 took, and those that
// writers of the log hold now.
const strangersLocks = `
	select hashtextextended('cedarpost.' || name, 0) as number
	from unnest(array['log', 'decision_partitions', 'lead.signer', 'lead.sweep', 'lead.state root']) as name
	union all select 7162241152097218419
	union all select 7162241152096432752
	union all select hashtextextended('cedarpost.writer.' || writer, 0) from unnest($1::uuid[]) as writer`

// A login without any grant holds every advisory lock that it can name. Nobody waits for it.
func TestAttackAdvisoryLocks(t *testing.T) {
	db, databaseURL := openURL(t)
	writerDB := openSmall(t, databaseURL)
	w := writerDB.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	if _, err := w.Append(t.Context(), []store.Decision{decision(time.Now(), 1)}, nil); err != nil {
		t.Fatal(err)
	}
	var writers []string
	rows, _ := session(t, databaseURL).Query(t.Context(), "select writer::text from audit_writers")
	writers, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(writers) != 1 {
		t.Fatalf("%v, %v", writers, err)
	}
	// The writer's session ends, so the stranger can take its number too.
	mustRaw(t, databaseURL, `select pg_terminate_backend(pid, 60000) from pg_locks where locktype = 'advisory'
		and database = (select oid from pg_database where datname = current_database())`)
	stranger := session(t, storetest.Login(t, databaseURL))
	tag, err := stranger.Exec(t.Context(), "select pg_advisory_lock(number) from ("+strangersLocks+") as locks", writers)
	if err != nil {
		t.Fatal(err)
	}

	// No step takes as long on any machine, unless it waits for the stranger.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	waited := 0
	step := func(what string, err error) {
		t.Helper()
		if err != nil {
			waited++
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = w.Append(ctx, []store.Decision{decision(time.Now(), 2)}, nil)
	step("append after the connection was lost", err)
	step("partitions", db.EnsurePartitions(ctx, time.Now().AddDate(0, 0, 3)))
	_, err = db.ChangeAccess(ctx, "test", func(context.Context, store.Access) (c store.AccessChange, err error) { return c, nil })
	step("the first key", err)
	led, err := db.Lead(ctx, store.SignerLock, func(ctx context.Context, alive func(context.Context) error) error { return alive(ctx) })
	if step("lead", err); !led {
		t.Error("nobody can lead")
	}
	swept, err := db.Sweep(ctx, keep)
	if step("sweep", err); swept.Elsewhere {
		t.Error("nobody can sweep")
	}
	there, err := db.WriteStateRoot(ctx, func(context.Context, store.StateRoot) (store.Event, error) {
		return storetest.Event(ctx, store.Changed{})
	})
	if step("state root", err); !there {
		t.Error("nobody can record the state root")
	}
	_, err = db.DropLogDays(ctx, 90*24*time.Hour, nil)
	step("retention", err)
	step("migrate", store.Migrate(ctx, databaseURL, nil))
	t.Logf("attack: a login without grants holds %d advisory locks: %d of 8 kinds of work waited", tag.RowsAffected(), waited)
}

// A login without any grant holds the lock of a writer that crashed. The next writer of the
// server reports the crash all the same.
func TestAttackHidesNoCrash(t *testing.T) {
	db, databaseURL := openURL(t)
	crashed := db.NewLogWriter("s1", auditlog.Buffered, 500)
	if _, err := crashed.Append(t.Context(), []store.Decision{decision(time.Now(), 1)}, nil); err != nil {
		t.Fatal(err)
	}
	stranger := session(t, storetest.Login(t, databaseURL))
	// Every login can read the number of the lock while the writer holds it.
	tag, err := stranger.Exec(t.Context(), `
		select pg_advisory_lock_shared(classid::bigint << 32 | objid::bigint) from pg_locks where locktype = 'advisory'
		and database = (select oid from pg_database where datname = current_database())`)
	if err != nil || tag.RowsAffected() != 1 {
		t.Fatalf("%v, %v", tag, err)
	}
	mustRaw(t, databaseURL, `select pg_terminate_backend(pid, 60000) from pg_stat_activity
		where datname = current_database() and application_name = 'cedarpost'`)
	next := openSmall(t, databaseURL).NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(next.Close)
	done, err := next.Append(t.Context(), []store.Decision{decision(time.Now(), 2)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var header []byte
	if err := session(t, databaseURL).QueryRow(t.Context(), "select header from audit_batches where seq = $1", done.Leaf).Scan(&header); err != nil {
		t.Fatal(err)
	}
	h, err := auditlog.ParseHeader(header)
	if err != nil || len(h.Unclean) != 1 || h.Unclean[0].Lost != 500 {
		t.Errorf("the next batch reports %v, %v", h.Unclean, err)
	}
	t.Logf("attack: a login without grants holds the lock of a crashed writer: %d of 1 crash is reported", len(h.Unclean))
}

// A login without any grant can lock, read and write nothing of Cedarpost.
func TestAttackLockTable(t *testing.T) {
	databaseURL := storetest.New(t)
	rows, _ := session(t, databaseURL).Query(t.Context(), `
		select relname::text from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p', 'v')`)
	relations, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(relations) < 25 {
		t.Fatalf("%v, %v", relations, err)
	}
	stranger := session(t, storetest.Login(t, databaseURL))
	tries := 0
	for _, relation := range relations {
		for _, sql := range []string{
			"lock table only %s in access share mode nowait", "lock table only %s in row exclusive mode nowait",
			"lock table only %s in share update exclusive mode nowait", "lock table only %s in access exclusive mode nowait",
			"select from %s for update", "delete from %s", "truncate %s", "vacuum %s", "analyze %s", "alter table %s rename to gone",
		} {
			tries++
			sql = fmt.Sprintf(sql, relation)
			if strings.HasPrefix(sql, "vacuum") || strings.HasPrefix(sql, "analyze") {
				continue // a warning and no error; they take no lock
			}
			if got := state(stranger.PgConn().Exec(t.Context(), "begin; "+sql).Close()); got != "42501" && got != "42809" && got != "55000" {
				t.Errorf("%s: %q", sql, got)
			}
			mustExec(t, stranger, "rollback")
		}
	}
	// A statement that is prepared and not executed locks tables, too, because rights are looked
	// up later. None of these locks is in the way of a write.
	mustExec(t, stranger, `begin`)
	for _, sql := range []string{"select from decisions", "select from log_lock for update", "update revision set n = n", "delete from events", "delete from audit_batches"} {
		tries++
		mustExec(t, stranger, fmt.Sprintf("prepare p%d as %s", tries, sql))
	}
	worksAs(t, databaseURL)
	t.Logf("attack: a login without grants locks, reads or changes %d relations in %d ways: all are refused, or in nobody's way", len(relations), tries)
}

// After the statements that migrate --print-roles prints, a login without any grant cannot even
// connect. What it does in another database of the cluster does not reach this one.
func TestAttackOtherLoginsStayOutside(t *testing.T) {
	root := storetest.NewServer(t).URL()
	mustRaw(t, root, store.Roles())
	mustRaw(t, root, `alter role cedarpost_migrate password 'secret'; alter role cedarpost_serve password 'secret';
		create role stranger login password 'secret'`)
	if err := store.Migrate(t.Context(), asLogin(t, root, "cedarpost_migrate"), nil); err != nil {
		t.Fatal(err)
	}
	db := openSmall(t, asLogin(t, root, "cedarpost_serve"))
	if found, err := db.Exposed(t.Context()); err != nil || len(found) > 0 {
		t.Errorf("%q, %v", found, err)
	}
	if conn, err := pgx.Connect(t.Context(), asLogin(t, root, "stranger")); state(err) != "42501" && !strings.Contains(fmt.Sprint(err), "permission denied for database") {
		t.Errorf("a stranger connects: %v, %v", conn, err)
	}
	u, err := url.Parse(asLogin(t, root, "stranger"))
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/postgres"
	outside := session(t, u.String())
	mustExec(t, outside, `select pg_advisory_lock(hashtextextended('cedarpost.log', 0)); notify cedarpost_revision`)
	worksAs(t, asLogin(t, root, "cedarpost_serve"))
	// The login that migrates may make temporary tables: scripts/move-database.sh needs one.
	mustExec(t, session(t, asLogin(t, root, "cedarpost_migrate")), "create temporary table t ()")
	if got := state(raw(t, asLogin(t, root, "cedarpost_serve"), "create temporary table t ()")); got != "42501" {
		t.Errorf("the login that serves makes a temporary table: %q", got)
	}
	t.Log("attack: a login without grants: 0 connections to the database")
}

// Exposed says what other logins may do that they need not.
func TestExposed(t *testing.T) {
	root := storetest.NewServer(t).URL()
	if err := store.Migrate(t.Context(), root, nil); err != nil {
		t.Fatal(err)
	}
	admin := session(t, root)
	mustExec(t, admin, "create role clerk; create role boss superuser")
	mustExec(t, admin, "revoke connect, temporary on database cedarpost from public")
	login := storetest.Login(t, root, serving...)
	u, err := url.Parse(login)
	if err != nil {
		t.Fatal(err)
	}
	mustExec(t, admin, "grant connect on database cedarpost to "+u.User.Username())
	defer mustExec(t, admin, "revoke connect on database cedarpost from "+u.User.Username())
	db := openSmall(t, login)
	for _, c := range []struct{ grant, undo, warns, refuses string }{
		{"select", "select", "", ""},
		{"grant connect on database cedarpost to public", "revoke connect on database cedarpost from public", "every login of the cluster may connect", ""},
		{"grant temporary on database cedarpost to public", "revoke temporary on database cedarpost from public", "temporary tables", ""},
		{"grant insert on policies to clerk", "revoke insert on policies from clerk", "", "clerk may write to policies (INSERT)"},
		{"grant update (attrs) on entities to clerk", "revoke update (attrs) on entities from clerk", "", "clerk may write to entities (UPDATE)"},
		{"grant update on api_keys to public", "revoke update on api_keys from public", "", "every login may write to api_keys (UPDATE)"},
		{"grant delete, trigger on bundles to clerk", "revoke all on bundles from clerk", "", "clerk may write to bundles (DELETE, TRIGGER)"},
		{"grant select on entities to clerk", "revoke all on entities from clerk", "", ""},
		{"grant pg_write_all_data to clerk", "revoke pg_write_all_data from clerk", "", ""}, // it cannot log in
		{"alter role clerk login; grant pg_write_all_data to clerk", "alter role clerk nologin; revoke pg_write_all_data from clerk", "", "clerk may write to all tables"},
		{"grant all on entities to boss", "revoke all on entities from boss", "", ""}, // a superuser may anyway
	} {
		mustExec(t, admin, c.grant)
		warned, err := db.Exposed(t.Context())
		if err != nil || (c.warns == "") != (len(warned) == 0) || !strings.Contains(strings.Join(warned, "\n"), c.warns) {
			t.Errorf("%s: warns %q, %v", c.grant, warned, err)
		}
		err = db.CheckProduction(t.Context())
		if (c.refuses == "") != (err == nil) || !strings.Contains(fmt.Sprint(err), c.refuses) {
			t.Errorf("%s: refuses %v", c.grant, err)
		}
		mustExec(t, admin, c.undo)
	}
}

// A caller that makes up a new idempotency key for each write fills the table up to a limit, on each
// server. Keys of past days do not count.
func TestAttackManyIdempotencyKeys(t *testing.T) {
	t.Parallel()
	db, url := openURL(t)
	const room, lot = 1500, 500 // more than one step of the count
	mustRaw(t, url, `insert into idempotency_keys (caller, key, request, answer, at)
		select 'ann', n::text, $1, '', case when n <= $2::int then now() else now() - interval '25 hours' end from generate_series(1, $2::int + 10) n`,
		make([]byte, 32), store.MaxOnceKeys-room)
	made := 0
	var err error
	began := time.Now()
	for ; err == nil && made <= room; made++ {
		if err = db.MayKeep(t.Context(), "ann"); err == nil && made%lot == lot-1 {
			mustRaw(t, url, `insert into idempotency_keys (caller, key, request, answer)
				select 'ann', 'new' || n, $1, '' from generate_series($2::int, $3::int) n`, make([]byte, 32), made+1-lot, made)
		}
	}
	if made--; !errors.Is(err, store.ErrTooManyKeys) || made != room {
		t.Errorf("%d more writes, want %d, then %v", made, room, err)
	}
	took := time.Since(began)
	if err := db.MayKeep(t.Context(), "ann"); !errors.Is(err, store.ErrTooManyKeys) {
		t.Errorf("one more: %v", err)
	}
	if err := db.MayKeep(t.Context(), "ben"); err != nil {
		t.Errorf("another caller: %v", err)
	}
	t.Logf("attack: a caller makes new idempotency keys without end: refused after %d; counting for %d writes took %v", store.MaxOnceKeys, room, took.Round(time.Millisecond))
}
