package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/pressly/goose/v3"

	"github.com/cedarpost/cedarpost/migrations"
)

// ErrForeign means that the schema of a database has tables of another program.
var ErrForeign = errors.New("this database is not one of Cedarpost")

// ErrOtherSchema means that the schema is not the one that the migrations of this binary
// make: builds between releases had migrations of other numbers or texts, or somebody
// changed the schema by hand. The data can be moved into a new database.
var ErrOtherSchema = errors.New("the schema of this database is not the one that this binary's migrations make")

// wayOut is the end of a message about a schema that cannot be migrated in place.
const wayOut = "scripts/move-database.sh moves the data into a new database (docs/operations.md, \"Moving to a new database\")"

// lateMigration was committed after migrations 5 to 7. It does not depend on them, so it
// can be applied after them.
const lateMigration = 4

// missingMigrations returns the migrations of this binary that a database lacks. The error
// is [ErrOtherSchema] if one cannot be applied any more, because later ones were applied.
func missingMigrations(applied []int64) (missing []int64, err error) {
	newest := slices.Max(append(applied, 0))
	var late []int64
	for _, v := range ourMigrations() {
		if slices.Contains(applied, v) {
			continue
		}
		missing = append(missing, v)
		if v < newest && v != lateMigration {
			late = append(late, v)
		}
	}
	if len(late) > 0 {
		return nil, fmt.Errorf("%w: it has migration %d and lacks %v, as development builds made it; it cannot be upgraded in place\n%s",
			ErrOtherSchema, newest, late, wayOut)
	}
	return missing, nil
}

// ourMigrations are the versions of the embedded migrations, in order.
func ourMigrations() (versions []int64) {
	files, err := migrations.FS.ReadDir(".")
	if err != nil || len(files) == 0 {
		panic(errors.Join(errors.New("no embedded migrations"), err))
	}
	for _, f := range files {
		version, err := goose.NumericComponent(f.Name())
		if err != nil {
			panic(err)
		}
		versions = append(versions, version)
	}
	return versions
}

// appliedMigrations reads which migrations a database has. It has none if the table of
// goose is missing, or if another program made that table: then the tables of Cedarpost
// are missing.
func appliedMigrations(ctx context.Context, db querier) ([]int64, error) {
	rows, _ := db.Query(ctx, "select version_id from goose_db_version where is_applied and to_regclass('revision') is not null")
	applied, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	// undefined_table: never migrated; insufficient_privilege: last migrated before there
	// were roles
	if state := sqlState(err); state == "42P01" || state == "42501" {
		return nil, nil
	}
	return applied, err
}

// checkOurs refuses a schema with tables of something else and none of Cedarpost. Most
// likely the URL is that of another database.
func checkOurs(ctx context.Context, conn *pgx.Conn) error {
	rows, _ := conn.Query(ctx, `
		select relname::text
		from pg_class
		where relnamespace = to_regnamespace(quote_ident(current_schema())) and relkind in ('r', 'p', 'v', 'm', 'f')
		  and not exists (select from pg_depend where classid = 'pg_class'::regclass and objid = pg_class.oid and deptype = 'e')
		order by relname`)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	ours := []string{"api_keys", "bundles", "entities", "goose_db_version", "revision", "revision_entries", "revisions"}
	if !slices.ContainsFunc(ours, func(n string) bool { return !slices.Contains(names, n) }) {
		return nil
	}
	// Both are made before the first migration.
	names = slices.DeleteFunc(names, func(n string) bool { return n == "goose_db_version" || n == migrationLock })
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("%w: its schema holds other tables (%s)\ncheck the database URL, or give Cedarpost a database of its own, or a schema by search_path",
		ErrForeign, some(names))
}

// some writes the first few of a list.
func some(list []string) string {
	const most = 5
	if len(list) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
	}
	return strings.Join(list, ", ")
}

// failedMigration says which migration failed. A migration is one transaction, so a
// failed one changed nothing.
func failedMigration(err error) error {
	partial, ok := errors.AsType[*goose.PartialError](err)
	if !ok {
		return err
	}
	err = fmt.Errorf("migration %d failed, and nothing of it is kept: %w", partial.Failed.Source.Version, partial.Err)
	// Class 42 means that a statement does not fit the schema. 42501 is a missing right.
	if state := sqlState(err); strings.HasPrefix(state, "42") && state != "42501" {
		err = fmt.Errorf("%w: %w\n%s", ErrOtherSchema, err, wayOut)
	}
	return err
}

// selectSchema describes the tables, functions and rights of a schema, one line for each:
// kind, name and definition. It leaves out partitions, which are like their tables.
const selectSchema = `
	with whole as (
		select oid, relname, relacl, relowner from pg_class
		where relnamespace = to_regnamespace(quote_ident(current_schema())) and relkind in ('r', 'p') and not relispartition
	), routine as (
		select * from pg_proc where pronamespace = to_regnamespace(quote_ident(current_schema()))
	), rights as (
		select relname as object, '' as part, relowner as owner, relacl as acl from whole
		union all
		select relname, '.' || attname, relowner, attacl from whole join pg_attribute on attrelid = whole.oid and not attisdropped
		union all
		select proname, '()', proowner, coalesce(proacl, acldefault('f', proowner)) from routine
	)
	select format('column %s.%s: %s%s%s', relname, attname, format_type(atttypid, atttypmod),
	              case when attnotnull then ' not null' else '' end,
	              ' default ' || (select pg_get_expr(adbin, adrelid) from pg_attrdef where adrelid = attrelid and adnum = attnum))
	from whole join pg_attribute on attrelid = whole.oid and attnum > 0 and not attisdropped
	union all
	select format('index %s: %s', relname, pg_get_indexdef(indexrelid, 0, true)) from whole join pg_index on indrelid = whole.oid
	union all
	select format('constraint %s: %s %s', relname, conname, pg_get_constraintdef(pg_constraint.oid, true))
	from whole join pg_constraint on conrelid = whole.oid and contype in ('c', 'f', 'p', 'u')
	union all
	select format('trigger %s: %s', relname, pg_get_triggerdef(pg_trigger.oid, true))
	from whole join pg_trigger on tgrelid = whole.oid and not tgisinternal
	union all
	select format('function %s: (%s) returns %s%s%s %s text %s', proname, pg_get_function_identity_arguments(oid),
	              pg_get_function_result(oid), case when prosecdef then ' security definer' else '' end,
	              ' set ' || replace(array_to_string(proconfig, ' set '), quote_ident(current_schema()) || ',', '$schema,'),
	              provolatile, md5(prosrc))
	from routine
	union all
	select format('grant %s: %s%s to %s', object, privilege_type, part, case when grantee = 0 then 'public' else grantee::regrole::text end)
	from rights, aclexplode(acl)
	where grantee <> owner
	  and (grantee = 0 or grantee::regrole::text in ('cedarpost_owner', 'cedarpost_app', 'cedarpost_writer', 'cedarpost_auditor'))`

// readSchema describes the schema of a database, sorted.
func readSchema(ctx context.Context, conn *pgx.Conn) ([]string, error) {
	rows, _ := conn.Query(ctx, selectSchema)
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	slices.Sort(lines)
	// goose makes this table, and another version of goose may make another one.
	return slices.DeleteFunc(lines, func(line string) bool {
		return strings.Contains(line, " goose_db_version") && !strings.HasPrefix(line, "grant ")
	}), err
}

// checkSchema compares a migrated schema with the one that the migrations make. Indexes and
// tables that somebody added are ignored. A column, constraint or trigger that was added to
// a table of Cedarpost is an error, and so is a right of one of its roles.
func checkSchema(ctx context.Context, conn *pgx.Conn) error {
	have, err := readSchema(ctx, conn)
	if err != nil {
		return err
	}
	want := strings.Split(strings.TrimSpace(migrations.Schema), "\n")
	object := func(line string) (kind, name string) {
		head, _, _ := strings.Cut(line, ":")
		kind, name, _ = strings.Cut(head, " ")
		name, _, _ = strings.Cut(name, ".")
		return kind, name
	}
	ours := map[string]bool{}
	for _, line := range want {
		_, name := object(line)
		ours[name] = true
	}
	var wrong []string
	for _, line := range want {
		if _, found := slices.BinarySearch(have, line); !found {
			wrong = append(wrong, "it lacks "+line)
		}
	}
	for _, line := range have {
		kind, name := object(line)
		if !ours[name] || kind == "index" || slices.Contains(want, line) {
			continue
		}
		wrong = append(wrong, "it has "+line)
	}
	if len(wrong) == 0 {
		return nil
	}
	const most = 10
	more := ""
	if len(wrong) > most {
		wrong, more = wrong[:most], fmt.Sprintf("\n  - and %d more", len(wrong)-most)
	}
	return fmt.Errorf("%w, though every migration is applied:\n  - %s%s\n%s", ErrOtherSchema, strings.Join(wrong, "\n  - "), more, wayOut)
}
