package store_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/migrations"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/localpg"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// emptyDatabase makes a database without any table on the server of another one.
func emptyDatabase(t *testing.T, beside string) string {
	t.Helper()
	u, err := url.Parse(beside)
	if err != nil {
		t.Fatal(err)
	}
	name := "empty_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	conn := session(t, beside)
	mustExec(t, conn, "create database "+name)
	t.Cleanup(func() {
		if !t.Failed() {
			mustRawWithout(t, beside, "drop database "+name+" with (force)")
		}
	})
	u.Path = "/" + name
	return u.String()
}

// mustRawWithout is mustRaw without the context of the test, for use after its end.
func mustRawWithout(t *testing.T, databaseURL, sql string) {
	conn, err := pgx.Connect(context.Background(), databaseURL)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), sql); err != nil {
		t.Error(err)
	}
}

// ownSchema is what an administrator runs before the first migration.
const ownSchema = `
	grant usage, create on schema public to cedarpost_owner;
	grant usage on schema public to cedarpost_app, cedarpost_writer, cedarpost_auditor`

// old is a state of the schema that a build made: with the migrations of today, or with
// migrations of another text or number.
type old struct {
	name  string
	files []string // migrations of this binary by number, or files in testdata/migrations
}

// migrateAs applies the migrations of a build one by one, from migration 6 on as the
// owner. After each it stores some rows.
func (o old) migrateAs(t *testing.T, databaseURL string) {
	t.Helper()
	current := map[string]string{}
	names, err := fs.Glob(migrations.FS, "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		current[strings.TrimLeft(name[:5], "0")] = name
	}
	all := fstest.MapFS{}
	for _, file := range o.files {
		number, as, renumbered := strings.Cut(file, " as ")
		if !renumbered {
			as = number
		}
		text, err := os.ReadFile(filepath.Join("testdata", "migrations", file))
		if name := current[number]; name != "" {
			text, err = migrations.FS.ReadFile(name)
			file = fmt.Sprintf("%05s_%s", as, name[6:])
		}
		if err != nil {
			t.Fatal(err)
		}
		all[file] = &fstest.MapFile{Data: text}
	}
	conn := session(t, databaseURL)
	provider := newProvider(t, databaseURL, "", all)
	owned := false
	for _, file := range slices.Sorted(maps.Keys(all)) {
		version, err := goose.NumericComponent(file)
		if err != nil {
			t.Fatal(err)
		}
		if version >= 6 {
			if !owned {
				mustExec(t, conn, ownSchema)
				provider, owned = newProvider(t, databaseURL, "cedarpost_owner", all), true
			}
			if err := store.Adopt(t.Context(), conn); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := provider.UpTo(t.Context(), version); err != nil {
			t.Fatal(err)
		}
		fill(t, conn, version)
	}
}

// newProvider applies migrations as a role, or as the user of the URL.
func newProvider(t *testing.T, databaseURL, role string, files fs.FS) *goose.Provider {
	t.Helper()
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	if role != "" {
		config.RuntimeParams["role"] = role
	}
	pool := stdlib.OpenDB(*config)
	t.Cleanup(func() { _ = pool.Close() })
	provider, err := goose.NewProvider(goose.DialectPostgres, pool, files, goose.WithDisableGlobalRegistry(true))
	if err != nil {
		t.Fatal(err)
	}
	return provider
}

// fill stores some rows in every table that exists.
func fill(t *testing.T, conn *pgx.Conn, version int64) {
	t.Helper()
	switch version {
	case 2:
		mustExec(t, conn, `
			update revision set n = 3;
			insert into revisions (n, caller, note) values (1, 'ann', ''), (2, 'ann', 'a note'), (3, 'bob', '');
			insert into revision_entries values (1, 'bundle', '', 'doc'), (2, 'entity', 'User', 'a'), (3, 'key', '', 'k1');
			insert into entities values ('User', 'a', '{"n": 1}', '{}', '{"Group g"}', 1, 2), ('User', 'a', '{"n": 2}', '{"t": "x"}', '{}', 2, null);
			insert into bundles values ('doc', 1, 'digest', '', '{ann}', 'deny', '{Doc}', 'entity User;', 'null', 1, 'ann', now(), 1, null);
			insert into policies values ('doc', 'p', 'p.cedar', 1, 'permit (principal, action, resource);', 1, null);
			insert into bundle_files values ('doc', 'p.cedar', 'permit (principal, action, resource);', 1, null);
			insert into api_keys values ('k1', 'ann', '\x01', now(), null);
			select create_decision_partitions((now() at time zone 'UTC')::date - 1, 3);
			insert into decisions values (gen_random_uuid(), now() - interval '1 day', 2, 'ann', 's', 'User', 'a', 'Action', 'View', 'Doc', 'd', true, null, '{doc/p}', null, null, '\x0102'),
				(gen_random_uuid(), now(), 2, 'ann', 's', 'User', 'b', 'Action', 'View', 'Doc', 'd', false, 1, '{}', 'r', null, '\x03')`)
	case 3:
		mustExec(t, conn, `
			update history set oldest = 1;
			insert into imports values ('i', 2, 2, 'ann')`)
	case 4:
		mustExec(t, conn, "insert into decision_days values ((now() at time zone 'UTC')::date - 1, 2)")
	case 5:
		mustExec(t, conn, `
			select create_log_partitions((now() at time zone 'UTC')::date - 1, 3);
			insert into events (event_id, at, kind, caller, server, subject, record, batch, pos, crc)
				values (gen_random_uuid(), now(), 'change', 'ann', 's', 'a', '\x04', 'a0000000-0000-0000-0000-000000000000', 0, 7);
			insert into audit_batches values (0, 'a0000000-0000-0000-0000-000000000000', 'b0000000-0000-0000-0000-000000000000', 0, 1, 'header', now(), now(), now());
			insert into audit_nodes values (0, 0, sha256('header'));
			insert into checkpoints (size, note, origin) values (1, 'note', 'log');
			insert into audit_writers values ('b0000000-0000-0000-0000-000000000000', 's', 0)`)
	case 6:
		mustExec(t, conn, "update log_retention set days = 365")
	}
}

// contents returns the rows of each table.
type contents map[string]string

// readContents reads the columns of tables: all that exist, or those of an earlier read.
func readContents(t *testing.T, databaseURL string, before contents) contents {
	t.Helper()
	conn := session(t, databaseURL)
	rows, _ := conn.Query(t.Context(), `
		select format('%I (%s)', relname, string_agg(quote_ident(attname), ', ' order by attnum))
		from pg_class join pg_attribute on attrelid = pg_class.oid and attnum > 0 and not attisdropped
		where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relispartition and relname <> 'goose_db_version'
		group by relname`)
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	if before != nil {
		tables = slices.Collect(maps.Keys(before))
	}
	found := contents{}
	for _, table := range tables {
		name, columns, _ := strings.Cut(table, " ")
		var text string
		err := conn.QueryRow(t.Context(), "select coalesce(string_agg(row"+columns+"::text, e'\n' order by row"+columns+"::text), '') from "+name).Scan(&text)
		if err != nil {
			t.Fatal(err)
		}
		found[table] = text
	}
	return found
}

// sameContents reports the rows that a database has lost, changed or gained.
func sameContents(t *testing.T, databaseURL string, want contents) {
	t.Helper()
	for table, got := range readContents(t, databaseURL, want) {
		if got != want[table] {
			t.Errorf("%s holds\n%s\nit was\n%s", table, got, want[table])
		}
	}
}

// dumpSchema returns the schema as pg_dump prints it, without partitions, which depend on
// the day, and without the lock that migrate makes before it changes anything.
func dumpSchema(t *testing.T, databaseURL string) string {
	t.Helper()
	bin, err := localpg.FindBinaries()
	if err != nil {
		t.Fatal(err)
	}
	output, err := exec.CommandContext(t.Context(), filepath.Join(bin, "pg_dump"), "--schema-only", "--dbname", databaseURL,
		"--exclude-table", "decisions_2*", "--exclude-table", "events_2*", "--exclude-table", "migration_lock").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	// Later versions of pg_dump write a random word at the beginning and the end.
	return regexp.MustCompile(`(?m)^\\(un)?restrict .*$`).ReplaceAllString(string(output), "")
}

// sameLines reports the first lines that differ.
func sameLines(t *testing.T, got, want string) {
	t.Helper()
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range max(len(g), len(w)) {
		a, b := "", ""
		if i < len(g) {
			a = g[i]
		}
		if i < len(w) {
			b = w[i]
		}
		if a != b {
			t.Errorf("line %d of the schema:\n%s\na new database has\n%s", i+1, a, b)
			return
		}
	}
}

// Migrate turns each schema that can be upgraded into that of a new database, and the
// stored rows do not change.
func TestMigrateFromEarlierSchemas(t *testing.T) {
	fresh := storetest.New(t)
	want := dumpSchema(t, fresh)
	for _, o := range []old{
		{"revisions and decisions", []string{"1", "2"}},
		{"history", []string{"1", "2", "3"}},
		{"sweep", []string{"1", "2", "3", "4"}},
		{"log without sweep", []string{"1", "2", "3", "5"}},
		{"log", []string{"1", "2", "3", "4", "5"}},
		{"roles without sweep", []string{"1", "2", "3", "5", "6"}},
		{"queries without sweep", []string{"1", "2", "3", "5", "6", "7"}},
		{"queries", []string{"1", "2", "3", "4", "5", "6", "7"}},
		{"reuse", []string{"1", "2", "3", "4", "5", "6", "7", "8"}},
		{"proofs", []string{"1", "2", "3", "4", "5", "6", "7", "8", "9"}},
		{"stored history", []string{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10"}},
		{"idempotency keys", []string{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14"}},
	} {
		t.Run(o.name, func(t *testing.T) {
			t.Parallel()
			databaseURL := emptyDatabase(t, fresh)
			o.migrateAs(t, databaseURL)
			before := readContents(t, databaseURL, nil)
			lacks := len(o.files) < len(store.OurMigrations())
			db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(databaseURL)})
			if err == nil {
				db.Close()
			}
			if lacks && (!errors.Is(err, store.ErrNotMigrated) || !strings.Contains(err.Error(), "run cedarpost migrate")) {
				t.Errorf("served: %v", err)
			}
			for range 2 {
				if err := store.Migrate(t.Context(), databaseURL, nil); err != nil {
					t.Fatal(err)
				}
			}
			sameContents(t, databaseURL, before)
			sameLines(t, dumpSchema(t, databaseURL), want)
			db, err = store.Open(t.Context(), store.Config{DatabaseURL: secret.New(databaseURL), Event: storetest.Event})
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			writeMore(t, db)
		})
	}
}

// writeMore makes writes to what [fill] stored.
func writeMore(t *testing.T, db *store.DB) {
	t.Helper()
	_, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: []store.Op{put("User c", `{}`)}, Caller: "test", PolicyRevision: 1})
	if err != nil {
		t.Error(err)
	}
}

// Schemas of builds whose migrations had other texts or numbers are refused with a clear
// error, and the data can be moved to a new database.
func TestSchemaThatCannotBeUpgraded(t *testing.T) {
	fresh := storetest.New(t)
	bin, err := localpg.FindBinaries()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		old
		says []string
		kept bool // nothing changes
	}{
		{old{"the log before log_guard", []string{"1", "2", "3", "00005_log.sql"}},
			[]string{"migration 6 failed, and nothing of it is kept", "log_guard"}, false},
		{old{"queries as migration 8", []string{"1", "2", "3", "5", "7 as 8"}},
			[]string{"it has migration 8 and lacks [6 7]", "it cannot be upgraded in place"}, true},
		{old{"an earlier text of the proofs", []string{"1", "2", "3", "4", "5", "6", "7", "8", "00009_log_proofs.sql"}},
			[]string{"every migration is applied", "it lacks function log_checkpoint: ", "it has function log_checkpoint: "}, false},
		{old{"stored history as migration 11", []string{"1", "2", "3", "4", "5", "6", "7", "8", "00009_log_proofs.sql", "00011_stored_history.sql"}},
			[]string{"it has migration 11 and lacks [10]", "it cannot be upgraded in place"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			databaseURL := emptyDatabase(t, fresh)
			c.migrateAs(t, databaseURL)
			before, schema := readContents(t, databaseURL, nil), dumpSchema(t, databaseURL)
			for range 2 {
				err := store.Migrate(t.Context(), databaseURL, nil)
				if !errors.Is(err, store.ErrOtherSchema) {
					t.Fatalf("migrated: %v", err)
				}
				for _, text := range append(c.says, "scripts/move-database.sh", "docs/operations.md") {
					if !strings.Contains(err.Error(), text) {
						t.Errorf("%v\ndoes not say %q", err, text)
					}
				}
			}
			if c.kept {
				sameLines(t, dumpSchema(t, databaseURL), schema)
				// A server cannot read the migrations of a database from before roles
				// existed.
				_, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(databaseURL)})
				if !errors.Is(err, store.ErrOtherSchema) && !errors.Is(err, store.ErrNotMigrated) {
					t.Errorf("served: %v", err)
				}
			}
			sameContents(t, databaseURL, before)

			moved := storetest.New(t)
			move := func() (string, error) {
				cmd := exec.CommandContext(t.Context(), "sh", "../scripts/move-database.sh", databaseURL, moved)
				cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
				output, err := cmd.CombinedOutput()
				return string(output), err
			}
			if output, err := move(); err != nil || output != "moved\n" {
				t.Fatalf("%v\n%s", err, output)
			}
			sameContents(t, moved, before)
			sameLines(t, dumpSchema(t, moved), dumpSchema(t, fresh))
			if output, err := move(); err == nil || !strings.Contains(output, "the new database is not empty") {
				t.Errorf("%v\n%s", err, output)
			}
			db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(moved), Event: storetest.Event})
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			writeMore(t, db)
		})
	}
}

// A database of another program is refused before anything is changed in it. The error
// for a schema that was changed by hand names the differences.
func TestMigrateRefusesOthers(t *testing.T) {
	fresh := storetest.New(t)
	for name, sql := range map[string]string{
		"tables":                "create table entities (id int); create view orders as select 1",
		"another goose":         "create table goose_db_version (id int, version_id bigint, is_applied boolean); insert into goose_db_version values (1, 10, true); create table orders ()",
		"a materialized view":   "create materialized view orders as select 1",
		"more than can be told": "create table a (); create table b (); create table c (); create table d (); create table e (); create table orders (); create table z ()",
	} {
		t.Run(name, func(t *testing.T) {
			databaseURL := emptyDatabase(t, fresh)
			mustRaw(t, databaseURL, sql)
			before := dumpSchema(t, databaseURL)
			err := store.Migrate(t.Context(), databaseURL, nil)
			if !errors.Is(err, store.ErrForeign) || !strings.Contains(err.Error(), "check the database URL") {
				t.Errorf("got %v", err)
			}
			sameLines(t, dumpSchema(t, databaseURL), before)
			if _, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(databaseURL)}); !errors.Is(err, store.ErrNotMigrated) {
				t.Errorf("served: %v", err)
			}
		})
	}
	// Other tables beside those of Cedarpost do no harm, and neither do an extension or a
	// first migration that was interrupted before its first table.
	databaseURL := emptyDatabase(t, fresh)
	mustRaw(t, databaseURL, `
		create table goose_db_version (id integer primary key generated by default as identity, version_id bigint not null,
			is_applied boolean not null, tstamp timestamp not null default now());
		insert into goose_db_version (version_id, is_applied) values (0, true)`)
	if err := store.Migrate(t.Context(), databaseURL, nil); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, databaseURL, "create table beside (); create index decisions_caller on decisions (caller); create role reader; grant select on decisions to reader")
	if err := store.Migrate(t.Context(), databaseURL, nil); err != nil {
		t.Error(err)
	}
	mustRaw(t, databaseURL, "drop owned by reader; drop role reader")
	for sql, want := range map[string]string{
		"grant delete on events to cedarpost_writer":           "it has grant events: DELETE to cedarpost_writer",
		"grant execute on function drop_log_batches to public": "it has grant drop_log_batches: EXECUTE() to public",
		"drop trigger refuse_rewrite on audit_batches":         "it lacks trigger audit_batches: ",
		"alter table api_keys add column other text":           "it has column api_keys.other: text",
		"drop index events_caller":                             "it lacks index events: CREATE INDEX events_caller",
		"alter function drop_log_day reset lock_timeout":       "it lacks function drop_log_day: ",
		"create or replace function log_guard(revision bigint, mark uuid) returns void language plpgsql as $$ begin end $$": "it lacks function log_guard: ",
	} {
		changed := storetest.New(t)
		mustRaw(t, changed, sql)
		if err := store.Migrate(t.Context(), changed, nil); !errors.Is(err, store.ErrOtherSchema) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", sql, err, want)
		}
	}
}

// A migration whose session breaks changes nothing, and the next call of Migrate goes on.
func TestMigrationIsInterrupted(t *testing.T) {
	fresh := storetest.New(t)
	databaseURL := emptyDatabase(t, fresh)
	old{files: []string{"1", "2", "3", "4", "5", "6", "7", "8", "9"}}.migrateAs(t, databaseURL)
	before, schema := readContents(t, databaseURL, nil), dumpSchema(t, databaseURL)
	// Migration 10 does part of its work, and then waits for this table.
	locker, observer := session(t, databaseURL), session(t, databaseURL)
	mustExec(t, locker, "begin; lock table api_keys")
	failed := make(chan error, 1)
	go func() { failed <- store.Migrate(context.Background(), databaseURL, nil) }()
	for killed := false; !killed; time.Sleep(10 * time.Millisecond) {
		err := observer.QueryRow(t.Context(), `
			select coalesce(bool_or(pg_terminate_backend(pid)), false) from pg_stat_activity
			where datname = current_database() and wait_event_type = 'Lock'`).Scan(&killed)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-failed:
			if !killed {
				t.Fatalf("it does not wait: %v", err)
			}
			failed <- err
		default:
		}
	}
	if err := <-failed; err == nil || !strings.Contains(err.Error(), "migration 10 failed, and nothing of it is kept") || errors.Is(err, store.ErrOtherSchema) {
		t.Errorf("got %v", err)
	}
	mustExec(t, locker, "rollback")
	sameLines(t, dumpSchema(t, databaseURL), schema)
	if err := store.Migrate(t.Context(), databaseURL, nil); err != nil {
		t.Fatal(err)
	}
	sameContents(t, databaseURL, before)
	sameLines(t, dumpSchema(t, databaseURL), dumpSchema(t, fresh))
}
