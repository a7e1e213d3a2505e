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

// migrationLock is the advisory lock that servers starting at the same time take
// turns on: to migrate, and to make the first API key.
const migrationLock = 0x6365646172706f73 // "cedarpos"

// Migrate brings the database's schema up to what this binary needs, and sees to
// it that the decision log has partitions for the days ahead. All of it belongs to
// the role cedarpost_owner, which the login must be a member of, or a superuser;
// roles that are missing are made, and if they cannot be, the error is [ErrRoles].
// Any number of processes may call it at once. The error is [ErrTooNew] when a
// newer binary has migrated before, [ErrForeign] where the tables are those of
// something else, and [ErrOtherSchema] when the schema is not the one that our
// migrations make. A nil log is silent.
func Migrate(ctx context.Context, databaseURL string, log *slog.Logger) (err error) {
	defer wrap(&err, "migrate")
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		return err
	}
	setDefaults(config)
	// A migration takes as long as it takes, and so does waiting for another's.
	config.RuntimeParams["statement_timeout"] = "0"

	var s sessions
	conn, err := s.connect(ctx, config)
	if err != nil {
		return err
	}
	defer closeConn(conn) // which also lets go of the lock
	if _, err := conn.Exec(ctx, "select pg_advisory_lock($1)", migrationLock); err != nil {
		return err
	}
	if err := checkOurs(ctx, conn); err != nil {
		return err
	}
	if err := ensureRoles(ctx, conn); err != nil {
		return err
	}
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
	if _, err := missingMigrations(applied); err != nil {
		return err
	}
	if have, want := slices.Max(append(applied, 0)), slices.Max(ourMigrations()); have > want {
		return fmt.Errorf("%w (its version is %d, ours %d)", ErrTooNew, have, want)
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

// checkMigrated fails with ErrNotMigrated when a migration of ours is missing. A
// newer schema is fine: migrations only add what older binaries can ignore, so
// that servers can be replaced one by one.
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
