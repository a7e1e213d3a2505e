package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// dropTries and dropPause: a day cannot be dropped while a transaction reads the log,
	// and while drop_log_day waits for that, a tenth of a second at most, nobody can
	// write to the log.
	dropTries = 10
	dropPause = 2 * time.Second
)

// LogDay is a day of the log.
type LogDay struct {
	// Day is its midnight, UTC.
	Day time.Time
	// Decisions and Events are the numbers of its rows.
	Decisions, Events int64
	// FirstLeaf is the leaf of the first batch that has rows of a later day.
	FirstLeaf int64
}

// MinRetention reads the least retention of a day of the log. The database refuses to
// drop a day earlier. Only the owner of the database can change it, in the table
// log_retention.
func (db *DB) MinRetention(ctx context.Context) (retention time.Duration, err error) {
	defer wrap(&err, "read the retention of the log")
	var days int
	err = db.admin.QueryRow(ctx, "select days from log_retention").Scan(&days)
	return time.Duration(days) * 24 * time.Hour, err
}

// DropLogDays drops the days of the log that ended longer ago than the retention, the
// oldest first. It returns the days that it dropped, even with an error. Before it drops
// a day, it calls record to commit to the log that the day is dropped, because the
// database refuses otherwise. It does not call record for a day that has such a record
// already.
//
// If several processes call it at once, one does the work and the others return.
func (db *DB) DropLogDays(ctx context.Context, retention time.Duration, record func(context.Context, LogDay) error) (dropped []LogDay, err error) {
	defer wrap(&err, "drop old days of the log")
	_, err = db.Lead(ctx, retentionLock, func(ctx context.Context, alive func(context.Context) error) (err error) {
		dropped, err = db.dropLogDays(ctx, retention, alive, record)
		return err
	})
	return dropped, err
}

func (db *DB) dropLogDays(ctx context.Context, retention time.Duration, alive func(context.Context) error, record func(context.Context, LogDay) error) (dropped []LogDay, err error) {
	config := db.connConfig.Copy()
	config.RuntimeParams["statement_timeout"] = "0" // a large day takes long to count
	conn, err := db.sessions.connect(ctx, config)
	if err != nil {
		return nil, err
	}
	defer closeConn(conn)
	rows, _ := conn.Query(ctx, `
		select distinct day
		from pg_inherits
		join pg_class on pg_class.oid = inhrelid
		cross join to_date(substring(relname from '_([0-9]{8})$'), 'YYYYMMDD') as day
		where inhparent in ('decisions'::regclass, 'events'::regclass)
		  and day + 1 + $1::interval <= now() at time zone 'UTC'
		order by day`, retention)
	days, err := pgx.CollectRows(rows, pgx.RowTo[time.Time])
	if err != nil {
		return nil, err
	}
	for _, day := range days {
		d, err := countLogDay(ctx, conn, day)
		if err == nil {
			err = alive(ctx)
		}
		if err == nil {
			err = dropLogDay(ctx, conn, d, record)
		}
		if err != nil {
			return dropped, fmt.Errorf("%s: %w", day.Format(time.DateOnly), err)
		}
		dropped = append(dropped, d)
	}
	return dropped, nil
}

func countLogDay(ctx context.Context, conn *pgx.Conn, day time.Time) (d LogDay, err error) {
	d.Day = day
	err = conn.QueryRow(ctx, `
		select (select count(*) from decisions where at >= $1 and at < $2),
		       (select count(*) from events where at >= $1 and at < $2),
		       (select coalesce(min(first.seq), (select max(seq) + 1 from audit_batches), 0)
		        from generate_series($2::timestamptz at time zone 'UTC', (select max(day) from audit_batches), '1 day') as d (day)
		        cross join lateral (
		        	select seq from audit_batches where day = d.day::date order by day, seq limit 1) as first)`,
		day, day.AddDate(0, 0, 1)).Scan(&d.Decisions, &d.Events, &d.FirstLeaf)
	return d, err
}

// dropLogDay drops a day, and makes the record only if the database says that it is
// missing: a server may have written it before it stopped.
func dropLogDay(ctx context.Context, conn *pgx.Conn, d LogDay, record func(context.Context, LogDay) error) error {
	recorded := false
	for try := 1; ; {
		_, err := conn.Exec(ctx, "select drop_log_day($1)", d.Day)
		switch state := sqlState(err); {
		case state == "55000" && !recorded: // object_not_in_prerequisite_state
			if err := record(ctx, d); err != nil {
				return err
			}
			recorded = true
			continue
		case state != "55P03" || try == dropTries: // lock_not_available
			return err
		}
		try++
		select {
		case <-time.After(dropPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
