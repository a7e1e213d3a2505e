package store_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/migrations"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// serving are the roles of a server's login.
var serving = []string{"cedarpost_app", "cedarpost_writer", "cedarpost_auditor"}

// state is the SQLSTATE of an error, or "".
func state(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

// actAs runs SQL as a role, in a transaction that is rolled back.
func actAs(t *testing.T, conn *pgx.Conn, role, sql string) error {
	t.Helper()
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), "set local role "+role); err != nil {
		t.Fatal(err)
	}
	_, err = tx.Exec(t.Context(), sql)
	return err
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// partitionOf names today's partition of a table.
func partitionOf(table string) string { return table + time.Now().UTC().Format("_20060102") }

// logTables are the tables that no role may rewrite.
func logTables() []string {
	return []string{"decisions", partitionOf("decisions"), "events", partitionOf("events"), "audit_batches", "checkpoints"}
}

// recordOf removes the bytes that are hashed.
func recordOf(table string) string {
	switch table {
	case "audit_batches":
		return "header = ''"
	case "checkpoints":
		return "note = ''"
	}
	return "record = ''"
}

func TestWhatRolesMayNotDo(t *testing.T) {
	conn := connect(t, storetest.New(t))
	const app, writer, auditor = "cedarpost_app", "cedarpost_writer", "cedarpost_auditor"
	denied := func(t *testing.T, role, sql string) {
		t.Helper()
		if got := state(actAs(t, conn, role, sql)); got != "42501" { // insufficient_privilege
			t.Errorf("as %s: %s: %q", role, sql, got)
		}
	}
	for _, line := range []struct{ says, role, sql string }{
		{"the writer may not read a decision", writer, "select from decisions"},
		{"the writer may not read an event", writer, "select from events"},
		{"the writer may not write past the table", writer, "insert into " + partitionOf("decisions") + " default values"},
		{"the writer may not make a batch by hand", writer, "insert into audit_batches (seq) values (0)"},
		{"the writer may not sign", writer, "insert into checkpoints (size) values (0)"},
		{"the writer may not grow the tree", writer, "insert into audit_nodes (level) values (0)"},
		{"the writer may not make another writer its own", writer, "update audit_writers set writer = gen_random_uuid()"},
		{"the writer may not read keys", writer, "select from api_keys"},
		{"the writer may not write an entity", writer, "insert into entities (type) values ('T')"},
		{"the writer may not take a revision", writer, "update revision set n = n + 1"},
		{"the writer may not make partitions", writer, "select create_log_partitions('2020-01-01', 1)"},
		{"the writer may not drop a day", writer, "select drop_log_day('2020-01-01')"},

		{"the writer may not read the edits of changes", writer, "select from change_edits"},
		{"the auditor may not edit a change", auditor, "update change_edits set content = ''"},
		{"the application may not change why a bundle was published", app, "update bundles set message = ''"},
		{"the writer may not say that a policy was used", writer, "insert into policy_uses (policy) values ('b/p')"},
		{"the auditor may not say that a policy was used", auditor, "update policy_uses set at = now()"},
		{"the application may not choose since when uses are counted", app, "update history set policy_uses_since = '2000-01-01'"},
		{"the application may not hide that a bundle was published past rules", app, "update bundles set break_glass = ''"},
		{"the writer may not say what a server has applied", writer, "update servers set revision = 9"},
		{"the auditor may not say what a server has applied", auditor, "update servers set revision = 9"},
		{"the auditor may not list servers", auditor, "select from servers"},
		{"the writer may not read answers", writer, "select from idempotency_keys"},
		{"the auditor may not read answers", auditor, "select from idempotency_keys"},
		{"the auditor may not write a decision", auditor, "insert into decisions default values"},
		{"the auditor may not write an event", auditor, "insert into events default values"},
		{"the auditor may not append", auditor, "select log_append(null, null, 0, 0, null, null, null, null)"},
		{"the auditor may not append in one call", auditor, "select append_batch(null, null, 0, 0, null, null, null, null, null, null)"},
		{"the application may not append decisions", app, "select append_batch(null, null, 0, 0, null, null, null, null, null, null)"},
		{"the writer may not merge", writer, "select merge_log_keys()"},
		{"the auditor may not merge", auditor, "select merge_log_keys()"},
		{"the auditor may not read keys", auditor, "select from api_keys"},
		{"the auditor may not write an entity", auditor, "delete from entities"},
		{"the auditor may not drop a day", auditor, "select drop_log_day('2020-01-01')"},

		{"the application may not read a record", app, "select record from decisions"},
		{"the application may not read an event", app, "select subject from events"},
		{"the application may not decide", app, "insert into decisions default values"},
		{"the application may not make a batch by hand", app, "insert into audit_batches (seq) values (0)"},
		{"the application may not sign by hand", app, "insert into checkpoints (size) values (0)"},
		{"the application may not grow the tree by hand", app, "insert into audit_nodes (level) values (0)"},
		{"the application may not change the tree by hand", app, "update audit_nodes set hashes = hashes"},
		{"the application may not remove a bundle", app, "delete from bundles"},
		{"the application may not remove a policy", app, "delete from policies"},
		{"the application may not remove a key", app, "delete from api_keys"},
		{"the application may not cut down the tree", app, "delete from audit_nodes"},
		{"the application may not shorten the retention", app, "update log_retention set days = 1"},
		{"the application may not remove batches", app, "select drop_log_batches('2020-01-01', 1)"},
		{"the application may not change an entity", app, "update entities set attrs = '{}'"},
		{"the application may not move an entity back", app, "update entities set since = 0"},
		{"the application may not remove an entity", app, "delete from entities"},
		{"the application may not change a bundle", app, "update bundles set schema = ''"},
		{"the application may not change a policy", app, "update policies set text = ''"},
		{"the application may not change a file", app, "update bundle_files set content = ''"},
		{"the application may not remove a file", app, "delete from bundle_files"},
		{"the application may not add a key by hand", app, "insert into api_keys (id, name, hash) values ('k', 'k', 'k')"},
		{"the application may not change a key", app, "update api_keys set hash = ''"},
		{"the application may not bring a key back", app, "update api_keys set revoked_at = null"},
		{"the application may not choose when a revision was made", app, "insert into revisions (n, at, caller) values (1, '2020-01-01', '')"},
		{"the application may not choose the mark of a revision", app, "insert into revisions (n, mark, caller) values (1, gen_random_uuid(), '')"},
		{"the application may not remove a revision", app, "delete from revisions"},
		{"the application may not remove what a revision changed", app, "delete from revision_entries"},
		{"the application may not take another database for its own", app, "update revision set database = gen_random_uuid()"},
		{"the application may not give history up", app, "update history set oldest = 9"},
		{"the application may not say what decisions need", app, "update decision_days set min_revision = 9"},
		{"the application may not say that decisions need nothing", app, "insert into decision_days values ('2020-01-01')"},
		{"the application may not forget what decisions need", app, "delete from decision_days"},
		{"the application may not read what decisions need", app, "select revision from decisions"},
		{"the application may not list keys as an auditor", app, "select audited_keys()"},
		{"the writer may not add a key", writer, "select add_api_key('k', 'k', 'k', null, 1)"},
		{"the writer may not sweep", writer, "select sweep_history('entities', 0, 1)"},
		{"the writer may not give history up", writer, "select raise_oldest('90 days')"},
		{"the writer may not revoke a key", writer, "select revoke_api_key('k', 1)"},
		{"the auditor may not revoke a key", auditor, "select revoke_api_key('k', 1)"},
		{"the application may not check a key by itself", app, "select logged_key_change('k', 1)"},
		{"the auditor may not add a key", auditor, "select add_api_key('k', 'k', 'k', null, 1)"},
		{"the auditor may not sweep", auditor, "select sweep_history('entities', 0, 1)"},
		{"the application may not change what was migrated", app, "update goose_db_version set is_applied = false"},
	} {
		t.Run(line.says, func(t *testing.T) { denied(t, line.role, line.sql) })
	}
	for _, role := range serving {
		t.Run(role, func(t *testing.T) {
			for _, table := range logTables() {
				for _, sql := range []string{
					"update %s set " + recordOf(table), "delete from %s", "truncate %s", "lock table %s in share mode", "drop table %s",
					"alter table %s disable trigger all", "drop trigger refuse_rewrite on %s", "create rule r as on insert to %[1]s do instead nothing",
					"create trigger t before insert on %s for each row execute function refuse_rewrite()",
					"alter table %s owner to current_user", "create index on %s ((1))",
				} {
					denied(t, role, fmt.Sprintf(sql, table))
				}
			}
			for _, sql := range []string{
				"create table decisions_20200101 partition of decisions for values from ('2020-01-01') to ('2020-01-02')",
				"alter table decisions detach partition " + partitionOf("decisions"),
				"create table other ()", "create function other() returns int language sql as 'select 1'",
				"create or replace function refuse_rewrite() returns trigger language plpgsql as 'begin return null; end'",
				"alter function log_append security invoker", "drop function drop_log_day",
				"set session_replication_role = replica",
				"create role other", "grant cedarpost_owner to " + role, "alter role " + role + " superuser",
				"copy audit_batches to program 'true'", "copy audit_batches to '/tmp/x'",
			} {
				denied(t, role, sql)
			}
		})
	}
}

// The owner has the right to rewrite the log. A trigger refuses it.
func TestOwnerDoesNotRewriteByMistake(t *testing.T) {
	conn := connect(t, storetest.New(t))
	for _, table := range logTables() {
		for _, sql := range []string{"update " + table + " set " + recordOf(table), "delete from " + table, "truncate " + table} {
			for _, role := range []string{"cedarpost_owner", "none"} { // none: the superuser
				if got := state(actAs(t, conn, role, sql)); got != "23001" { // restrict_violation
					t.Errorf("as %s: %s: %q", role, sql, got)
				}
			}
		}
	}
	// The setting that lets drop_log_batches remove rows lets no other statement remove
	// them.
	for role, sql := range map[string]string{
		"none":            "set local cedarpost.drop_log_batches = on; delete from audit_batches",
		"cedarpost_owner": "set local cedarpost.drop_log_batches = on; delete from decisions",
	} {
		if got := state(actAs(t, conn, role, sql)); got != "23001" {
			t.Errorf("as %s: %s: %q", role, sql, got)
		}
	}
}

// A key can be added only in the transaction that puts its event into the log.
func TestKeyNeedsItsEvent(t *testing.T) {
	conn := connect(t, storetest.New(t))
	const (
		count = "update revision set n = n + 1; "
		event = `insert into events (event_id, at, kind, caller, server, subject, revision, record, batch, pos, crc)
			values (gen_random_uuid(), now(), '%s', '', '', '%s', %d, '', '00000000-0000-0000-0000-00000000000a', 0, 0); `
		seal = "select log_append('00000000-0000-0000-0000-00000000000a', gen_random_uuid(), 0, 1, 'header', current_date, now(), now()); "
	)
	of := func(kind, subject string, revision int) string { return fmt.Sprintf(event, kind, subject, revision) }
	const refused = "55000" // object_not_in_prerequisite_state
	for _, add := range []string{"select add_api_key('k', 'k', 'secret', null, 1)", "select revoke_api_key('k', 1)"} {
		for _, c := range []struct{ says, sql, want string }{
			{"there is no event", count + add, refused},
			{"the event is in no batch", count + of("change", "k", 1) + add, refused},
			{"the event is of another key", count + of("change", "other", 1) + seal + add, refused},
			{"the event is of another kind", count + of("log_read", "k", 1) + seal + add, refused},
			{"the event is of another revision", count + of("change", "k", 2) + seal + add, refused},
			{"the revision is not the newest", count + count + of("change", "k", 1) + seal + add, refused},
			{"the event is there", count + of("change", "k", 1) + seal + add, ""},
		} {
			if got := state(actAs(t, conn, "cedarpost_app", c.sql)); got != c.want {
				t.Errorf("%s: %s: %q, want %q", add, c.says, got, c.want)
			}
		}
		if !strings.Contains(add, "revoke") {
			mustExec(t, conn, "insert into api_keys (id, name, hash) values ('k', 'k', 'secret')")
		}
	}
	// An event of an earlier transaction is not enough either.
	if _, err := conn.Exec(t.Context(), count+of("change", "k", 1)+seal); err != nil {
		t.Fatal(err)
	}
	if got := state(actAs(t, conn, "cedarpost_app", "select revoke_api_key('k', 1)")); got != refused {
		t.Errorf("the event was committed before: %q", got)
	}
}

// The login of a server sweeps by functions, which remove nothing that is needed.
func TestSweepCannotBeForged(t *testing.T) {
	db, url := openURL(t)
	conn := connect(t, url)
	for range 4 {
		write(t, db, put("U a", fmt.Sprintf(`{"n": %d}`, current(t, db))))
	}
	as := func(sql string) string { t.Helper(); return state(actAs(t, conn, "cedarpost_app", sql)) }
	if got := as("select raise_oldest('47 hours')"); got != "23001" { // restrict_violation
		t.Errorf("history of 47 hours: %q", got)
	}
	if got := as("select raise_oldest(null)"); got != "23001" {
		t.Errorf("history of no time: %q", got)
	}
	if got := as("select sweep_history('bundles', 0, 1)"); got != "22023" { // invalid_parameter_value
		t.Errorf("bundles are swept: %q", got)
	}
	nothing := func(says string) {
		t.Helper()
		for _, sql := range []string{"do $$ begin assert raise_oldest('48 hours') = 0; end $$",
			"do $$ begin assert (select gone = 0 from sweep_history('entities', 0, 9)); end $$"} {
			if got := as(sql); got != "" {
				t.Errorf("%s: %s: %q", says, sql, got)
			}
		}
	}
	nothing("the revisions are young")
	// If the counter was moved ahead, nothing young is removed.
	if got := as("update revision set n = 1000; do $$ begin assert raise_oldest('48 hours') = 0; end $$"); got != "" {
		t.Errorf("the counter is ahead: %q", got)
	}
	// Only the database finds out what the decisions of an old day need. Until it has,
	// nothing is removed.
	grow(t, conn, 4)
	mustExec(t, conn, "select create_log_partitions($1::date, 1)", ago(20))
	d := decision(ago(20), 1)
	d.Revision = 2
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	if _, err := w.Append(t.Context(), []store.Decision{d}, nil); err != nil {
		t.Fatal(err)
	}
	nothing("a day was not looked at")
	if got := as("select read_decision_day(); do $$ begin assert raise_oldest('48 hours') = 2; end $$"); got != "" {
		t.Errorf("a decision needs revision 2: %q", got)
	}
}

// A function that runs as the owner does not use a temporary table of its caller in place
// of a table of the log.
func TestFunctionsOfTheOwnerIgnoreTemporaryTables(t *testing.T) {
	url := storetest.New(t)
	conn := connect(t, storetest.Login(t, url, serving...))
	for _, sql := range []string{
		"create temp table audit_batches (like public.audit_batches)", "create temp table pg_inherits (inhparent oid, inhrelid oid)",
		"create temp table decisions (at timestamptz) partition by range (at)",
		"select log_append(gen_random_uuid(), gen_random_uuid(), 0, 0, 'header', '2020-01-01', null, null)",
		"select append_batch(gen_random_uuid(), gen_random_uuid(), 0, 0, 'header', '2020-01-01', null, null, null, null)",
		"select create_log_partitions('2020-01-01', 1)", "select merge_log_keys()",
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	mustRaw(t, url, `do $$ begin
		assert (select count(*) = 2 from public.audit_batches);
		assert (select count(*) = 1 from pg_inherits where inhparent = 'public.decisions'::regclass and inhrelid = 'public.decisions_20200101'::regclass);
	end $$`)
}

// Everything that migrations make belongs to the owner, whichever login migrates. So does
// what the functions make later.
func everythingIsOwned(t *testing.T, url string) {
	t.Helper()
	conn := connect(t, url)
	rows, _ := conn.Query(t.Context(), `
		select format('%s of %s', oid::regclass, relowner::regrole) from pg_class
		where relnamespace = 'public'::regnamespace and relowner <> to_regrole('cedarpost_owner')
		union all
		select format('%s of %s', oid::regprocedure, proowner::regrole) from pg_proc
		where pronamespace = 'public'::regnamespace and proowner <> to_regrole('cedarpost_owner')`)
	strange, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(strange) > 0 {
		t.Errorf("%q, %v", strange, err)
	}
}

func TestEverythingIsTheOwners(t *testing.T) {
	db, url := openURL(t)
	if err := db.EnsurePartitions(t.Context(), time.Now().AddDate(0, 0, 30)); err != nil {
		t.Fatal(err)
	}
	everythingIsOwned(t, url)
}

// asLogin returns a URL with another user.
func asLogin(t *testing.T, databaseURL, login string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(login, "secret")
	return u.String()
}

// advice returns the SQL in an error, which is between empty lines.
func advice(t *testing.T, err error) string {
	t.Helper()
	parts := strings.Split(fmt.Sprint(err), "\n\n")
	if !errors.Is(err, store.ErrRoles) || len(parts) < 2 {
		t.Fatalf("got %v", err)
	}
	return strings.TrimSpace(parts[1])
}

// The error for a login without rights has the SQL that an administrator has to run, and
// that SQL is enough.
func TestAdviceOnRoles(t *testing.T) {
	root := storetest.NewServer(t).URL()
	mustRaw(t, root, `create role "mi grate" login password 'secret'; create role serve login password 'secret'`)
	migrate, serve := asLogin(t, root, "mi grate"), asLogin(t, root, "serve")

	sql := advice(t, store.Migrate(t.Context(), migrate, nil))
	mustRaw(t, root, sql)
	if err := store.Migrate(t.Context(), migrate, nil); err != nil {
		t.Fatal(err)
	}
	everythingIsOwned(t, root)

	_, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(serve)})
	if sql = advice(t, err); sql != `grant cedarpost_app, cedarpost_writer, cedarpost_auditor to "serve";` {
		t.Errorf("advice is %s", sql)
	}
	mustRaw(t, root, sql)
	worksAs(t, serve)
	db := openSmall(t, serve)
	if err := db.CheckProduction(t.Context()); err != nil {
		t.Error(err)
	}
}

// worksAs uses each of the three roles once.
func worksAs(t *testing.T, url string) {
	t.Helper()
	db := openSmall(t, url)
	write(t, db, put("User a", `{}`))
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	d := decision(time.Now(), 1)
	if _, err := w.Append(t.Context(), []store.Decision{d}, nil); err != nil {
		t.Error(err)
	}
	if got, err := db.GetDecision(t.Context(), d.ID); err != nil || !same(got, d) {
		t.Errorf("%+v, %v", got, err)
	}
}

// An administrator needs to run only what migrate --print-roles prints.
func TestPrintedRoles(t *testing.T) {
	root := storetest.NewServer(t).URL()
	mustRaw(t, root, store.Roles())
	mustRaw(t, root, "alter role cedarpost_migrate password 'secret'; alter role cedarpost_serve password 'secret'")
	if err := store.Migrate(t.Context(), asLogin(t, root, "cedarpost_migrate"), nil); err != nil {
		t.Fatal(err)
	}
	serve := asLogin(t, root, "cedarpost_serve")
	worksAs(t, serve)
	if err := openSmall(t, serve).CheckProduction(t.Context()); err != nil {
		t.Error(err)
	}
	mustRaw(t, root, "alter role cedarpost_audit password 'secret'")
	if conn := session(t, asLogin(t, root, "cedarpost_audit")); conn != nil {
		mustExec(t, conn, "select count(*) from decisions")
		if _, err := conn.Exec(t.Context(), "delete from policies"); state(err) != "42501" {
			t.Errorf("an auditor deletes policies: %v", err)
		}
	}
	// Each command works with its own login.
	if err := store.Migrate(t.Context(), serve, nil); !errors.Is(err, store.ErrRoles) {
		t.Errorf("the server's login migrates: %v", err)
	}
	if _, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(asLogin(t, root, "cedarpost_migrate"))}); !errors.Is(err, store.ErrRoles) {
		t.Errorf("the login that migrates serves: %v", err)
	}
}

// A login that may make roles needs no administrator. Several databases of a cluster that
// are migrated at once get the same roles.
func TestMigrateMakesRoles(t *testing.T) {
	root := storetest.NewServer(t).URL()
	tenant := func(name string) string {
		mustRaw(t, root, "create role "+name+" login createrole password 'secret'")
		mustRaw(t, root, "create database "+name+" owner "+name)
		u, err := url.Parse(asLogin(t, root, name))
		if err != nil {
			t.Fatal(err)
		}
		u.Path = "/" + name
		return u.String()
	}
	alone := tenant("alone")
	if err := store.Migrate(t.Context(), alone, nil); err != nil {
		t.Fatal(err)
	}
	everythingIsOwned(t, alone)

	mustRaw(t, root, "drop database alone with (force)")
	mustRaw(t, root, "drop role cedarpost_owner, cedarpost_app, cedarpost_writer, cedarpost_auditor")
	var group sync.WaitGroup
	var done atomic.Int32
	for _, url := range []string{tenant("a"), tenant("b"), tenant("c"), tenant("d")} {
		group.Go(func() {
			switch err := store.Migrate(context.Background(), url, nil); {
			case err == nil:
				done.Add(1)
			case !errors.Is(err, store.ErrRoles): // since Postgres 16, only the role that made a role can grant it
				t.Error(err)
			}
		})
	}
	group.Wait()
	if done.Load() == 0 {
		t.Error("no database was migrated")
	}
}

// A database that was migrated before roles existed is migrated, and gets the owner.
func TestMigrateAdopts(t *testing.T) {
	u, err := url.Parse(storetest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(u.Path, "/") + "_old"
	other := connect(t, u.String())
	if _, err := other.Exec(t.Context(), "create database "+name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := other.Exec(context.Background(), "drop database "+name+" with (force)"); err != nil {
			t.Error(err)
		}
	})
	u.Path = "/" + name
	root := u.String()
	if _, err := newProvider(t, root, "none", migrations.FS).UpTo(t.Context(), 5); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, root, "select create_log_partitions(current_date - 1, 3)")
	if _, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(root)}); !errors.Is(err, store.ErrNotMigrated) {
		t.Errorf("got %v", err)
	}
	if err := store.Migrate(t.Context(), root, nil); err != nil {
		t.Fatal(err)
	}
	everythingIsOwned(t, root)
	worksAs(t, root)
}

func TestCheckProduction(t *testing.T) {
	root := storetest.NewServer(t).URL()
	if err := store.Migrate(t.Context(), root, nil); err != nil {
		t.Fatal(err)
	}
	admin := session(t, root)
	mustExec(t, admin, `
		create role boss superuser;
		create role clerk;
		grant delete on events to clerk;
		create role landlord`)
	for _, line := range []struct{ says, grant, undo string }{
		{"is a superuser", "alter role %s superuser", "alter role %s nosuperuser"},
		{"may act as boss, a superuser", "grant boss to %s", ""},
		{"CREATEROLE", "alter role %s createrole", ""},
		{"may act as cedarpost_owner\n", "grant cedarpost_owner to %s", ""},
		{"may act as cedarpost_owner\n", "grant cedarpost_owner to clerk; grant clerk to %s", "revoke cedarpost_owner from clerk"},
		{"may act as pg_write_all_data\n", "grant pg_write_all_data to %s", ""},
		{"may act as pg_execute_server_program\n", "grant pg_execute_server_program to %s", ""},
		{"may rewrite the log (UPDATE)", "grant update on audit_batches to %s", ""},
		{"may rewrite the log (UPDATE)", "grant update (record) on decisions to %s", ""},
		{"may rewrite the log (TRUNCATE)", "grant truncate on " + partitionOf("decisions") + " to %s", ""},
		{"may rewrite the log (TRIGGER)", "grant trigger on checkpoints to %s", ""},
		{"may act as clerk, who may rewrite the log (DELETE)", "grant clerk to %s", ""},
		{"owns the schema public", "alter schema public owner to landlord; grant landlord to %s", "alter schema public owner to pg_database_owner"},
		{"may make tables and functions in the schema public", "grant create on schema public to public; select '%s'", "revoke create on schema public from public"},
		{"owns the database", "alter database cedarpost owner to %s", "alter database cedarpost owner to cedarpost"},
		{"session_replication_role", "grant set on parameter session_replication_role to %s", ""},
		{"fsync is off", "alter system set fsync = off; select pg_reload_conf(), '%s'", "alter system reset fsync; select pg_reload_conf()"},
	} {
		t.Run(line.says, func(t *testing.T) {
			login := storetest.Login(t, root, serving...)
			u, err := url.Parse(login)
			if err != nil {
				t.Fatal(err)
			}
			name := u.User.Username()
			db := openSmall(t, login)
			if err := db.CheckProduction(t.Context()); err != nil {
				t.Fatalf("before: %v", err)
			}
			for sql := range strings.SplitSeq(line.grant, "; ") {
				mustExec(t, admin, strings.ReplaceAll(sql, "%s", name))
			}
			found := db.CheckProduction(t.Context())
			// A server applies its settings after a moment.
			for deadline := time.Now().Add(time.Minute); found == nil && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
				found = db.CheckProduction(t.Context())
			}
			if !errors.Is(found, store.ErrUnsafe) || !strings.Contains(found.Error(), line.says) {
				t.Errorf("got %v", found)
			}
			undo := slices.DeleteFunc(strings.Split(line.undo, "; "), func(s string) bool { return s == "" })
			for _, sql := range append(undo, "drop owned by "+name) {
				mustExec(t, admin, strings.ReplaceAll(sql, "%s", name))
			}
		})
	}
}
