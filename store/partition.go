package store

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// The decision log has partitions from yesterday, for clocks that are behind, to a week
// ahead, in case the job that makes them does not run.
const (
	daysBehind = 1
	daysAhead  = 7
)

// EnsurePartitions makes the missing partitions of the decision log, from the UTC day
// before now to a week after it. It is cheap if none is missing, and does not block
// writes to the log.
func (db *DB) EnsurePartitions(ctx context.Context, now time.Time) (err error) {
	defer wrap(&err, "make partitions of the decision log")
	conn, err := db.admin.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	return ensurePartitions(ctx, conn.Conn(), now)
}

// EnsurePartition makes the partition of one day and those around it, if the day is near
// to now or to the clock of the database: within the days that [DB.EnsurePartitions]
// makes. It returns whether the day is near, and the clock of the database.
func (db *DB) EnsurePartition(ctx context.Context, day, now time.Time) (near bool, clock time.Time, err error) {
	defer wrap(&err, "make a partition of the decision log")
	conn, err := db.admin.Acquire(ctx)
	if err != nil {
		return false, clock, err
	}
	defer conn.Release()
	if err := conn.QueryRow(ctx, "select clock_timestamp()").Scan(&clock); err != nil {
		return false, clock, err
	}
	midnight := func(t time.Time) time.Time { return t.UTC().Truncate(24 * time.Hour) }
	for _, c := range []time.Time{now, clock} {
		first, last := midnight(c).AddDate(0, 0, -daysBehind), midnight(c).AddDate(0, 0, daysAhead)
		if d := midnight(day); !d.Before(first) && !d.After(last) {
			return true, clock, ensurePartitions(ctx, conn.Conn(), c)
		}
	}
	return false, clock, nil
}

func ensurePartitions(ctx context.Context, conn *pgx.Conn, now time.Time) error {
	_, err := conn.Exec(ctx, "select create_log_partitions($1::date, $2)",
		now.UTC().AddDate(0, 0, -daysBehind), daysBehind+1+daysAhead)
	return err
}

// PartitionsReady reports for each of the times whether the log can take decisions and
// events of its UTC day. It also returns the clock of the database.
func (db *DB) PartitionsReady(ctx context.Context, days ...time.Time) (ready []bool, clock time.Time, err error) {
	defer wrap(&err, "look for partitions of the decision log")
	const query = `
		select clock_timestamp(), array(
			select (select count(*) = 2
			        from unnest(array['decisions', 'events']) as whole
			        join pg_inherits on inhparent = whole::regclass and inhrelid = to_regclass(whole || day))
			from unnest($1::text[]) with ordinality as asked (day, n)
			order by n)`
	names := make([]string, len(days))
	for i, day := range days {
		names[i] = day.UTC().Format("_20060102")
	}
	err = db.vital.QueryRow(ctx, query, names).Scan(&clock, &ready)
	return ready, clock, err
}

// isNoPartition reports whether the error is "no partition for this row". Errors of check
// constraints have the same code, but they name a constraint.
func isNoPartition(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "23514" && pgErr.ConstraintName == ""
}
