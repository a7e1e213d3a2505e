package store

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/cedarpost/cedarpost/migrations"
)

// Migrate applies the migrations that the database lacks, and makes the partitions of the
// decision log for the days ahead. All tables belong to the role cedarpost_owner, so the
// login must be a member of it or a superuser. Migrate makes missing roles. If it cannot,
// the error is [ErrRoles]. Several processes may call it at once. The error is
// [ErrTooNew] if a newer binary has migrated the database, [ErrForeign] if the tables are
// those of another program, and [ErrOtherSchema] if the schema is not the one that the
// migrations make. A nil log discards messages.
func Migrate(ctx context.Context, databaseURL string, log *slog.Logger) (err error) {
	defer wrap(&err, "migrate")
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		return err
	}
	setDefaults(config)
	// A migration may take long, and so may the wait for one of another process.
	config.RuntimeParams["statement_timeout"] = "0"

	var s sessions
	conn, err := s.connect(ctx, config)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if err := checkOurs(ctx, conn); err != nil {
		return err
	}
	if err := ensureRoles(ctx, conn); err != nil {
		return err
	}
	lock, err := lockMigration(ctx, &s, as(config, ownerRole))
	if err != nil {
		return err
	}
	defer letGo(ctx, lock)
	if err := adopt(ctx, conn); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, "set role "+ownerRole); err != nil {
		return err
	}

	owner, err := s.prepare(as(config, ownerRole))
	if err != nil {
		return err
	}
	pool := stdlib.OpenDB(*owner)
	defer func() { _ = pool.Close() }()
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	provider, err := goose.NewProvider(goose.DialectPostgres, pool, migrations.FS,
		goose.WithSlog(log), goose.WithDisableGlobalRegistry(true), goose.WithAllowOutofOrder(true))
	if err != nil {
		return err
	}
	applied, err := appliedMigrations(ctx, conn)
	if err != nil {
		return err
	}
	missing, err := missingMigrations(applied)
	if err != nil {
		return err
	}
	if have, want := slices.Max(append(applied, 0)), slices.Max(ourMigrations()); have > want {
		return fmt.Errorf("%w (its version is %d, ours %d)", ErrTooNew, have, want)
	}
	if slices.Contains(missing, keysMigration) {
		if err := indexKeys(ctx, conn, log); err != nil {
			return err
		}
	}
	results, err := provider.Up(ctx)
	if err != nil {
		return failedMigration(err)
	}
	for _, r := range results {
		log.InfoContext(ctx, "migrated", "version", r.Source.Version, "took", r.Duration)
	}
	if err := ensurePartitions(ctx, conn, time.Now()); err != nil {
		return err
	}
	return checkSchema(ctx, conn)
}

// keysMigration makes the index decisions_keys.
const keysMigration = 15

// indexKeys makes the index decisions_keys of each partition that the log has, one by one and
// without a lock that stops writers: the log may be large. The migration then finds these
// indexes, and makes none itself. An index that an interrupted call left is made again.
func indexKeys(ctx context.Context, conn *pgx.Conn, log *slog.Logger) error {
	rows, _ := conn.Query(ctx, `
		select part.relname::text as name, exists (
			select from pg_index join pg_class named on named.oid = indexrelid
			where indrelid = part.oid and indisvalid and named.relname = part.relname || '_keys') as indexed
		from pg_inherits join pg_class part on part.oid = inhrelid
		where inhparent = to_regclass('decisions')
		order by part.relname`)
	type partition struct {
		Name    string
		Indexed bool
	}
	partitions, err := pgx.CollectRows(rows, pgx.RowToStructByName[partition])
	if err != nil {
		return err
	}
	for _, p := range partitions {
		if p.Indexed {
			continue
		}
		table, index := pgx.Identifier{p.Name}.Sanitize(), pgx.Identifier{p.Name + "_keys"}.Sanitize()
		began := time.Now()
		for _, sql := range []string{
			"drop index if exists " + index,
			"create index concurrently " + index + " on " + table + " using gin ((" + decisionKeys + ")) with (gin_pending_list_limit = 32768)",
			"analyze " + table, // nothing else does it on a day that is over, and the index is of an expression
		} {
			if _, err := conn.Exec(ctx, sql); err != nil {
				return fmt.Errorf("index %s by principal and resource: %w", p.Name, err)
			}
		}
		log.InfoContext(ctx, "decisions indexed by principal and resource", "partition", p.Name, "took", time.Since(began))
	}
	return nil
}

// lockMigration waits until no other process migrates the database. The lock is held until
// the connection is closed.
func lockMigration(ctx context.Context, s *sessions, config *pgx.ConnConfig) (*pgx.Conn, error) {
	conn, err := s.hold(ctx, config, migrationLock, "")
	if sqlState(err) != "42P01" { // undefined_table
		return conn, err
	}
	if conn, err = s.connect(ctx, config); err != nil {
		return nil, err
	}
	defer closeConn(conn)
	_, err = conn.Exec(ctx, "create view "+migrationLock+" as select true as one")
	// duplicate_table, unique_violation: another process has just made it
	if state := sqlState(err); err != nil && state != "42P07" && state != "23505" {
		return nil, err
	}
	return s.hold(ctx, config, migrationLock, "")
}

// checkMigrated fails with ErrNotMigrated if a migration of this binary is missing. A
// newer schema is accepted: migrations only add what older binaries can ignore, so that
// servers can be replaced one by one.
func checkMigrated(ctx context.Context, pool *pgxpool.Pool) error {
	applied, err := appliedMigrations(ctx, pool)
	if err != nil {
		return err
	}
	missing, err := missingMigrations(applied)
	switch {
	case err != nil || len(missing) == 0:
		return err
	case len(applied) == 0:
		return ErrNotMigrated
	}
	return fmt.Errorf("%w (it lacks migrations %v)", ErrNotMigrated, missing)
}
