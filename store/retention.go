package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// retentionLock is the advisory lock of the one who drops days: "cedardrp".
	retentionLock = 0x6365646172647270
	// dropTries and dropPause: a day cannot go while somebody reads the log, and while
	// drop_log_day waits for that, at most a tenth of a second, nobody can write to it.
	dropTries = 10
	dropPause = 2 * time.Second
)

// LogDay is a day of the log.
type LogDay struct {
	// Day is its midnight, UTC.
	Day time.Time
	// Decisions and Events are how many it has.
	Decisions, Events int64
	// FirstLeaf is the place of the first batch that has rows of a later day.
	FirstLeaf int64
}

// MinRetention reads for how long the database keeps a day of the log, whoever
// wants to drop it. Only its owner can change that, in the table log_retention.
func (db *DB) MinRetention(ctx context.Context) (keep time.Duration, err error) {
	defer wrap(&err, "read the retention of the log")
	var days int
	err = db.admin.QueryRow(ctx, "select days from log_retention").Scan(&days)
	return time.Duration(days) * 24 * time.Hour, err
}

// DropLogDays drops the days of the log that ended longer ago than keep, the oldest
// first, and returns those that are gone, even with an error. Before one goes,
// record must have committed to the log that it will: the database refuses
// otherwise. It is not called for a day whose record is there already.
//
// Of several that are called at once, one does the work and the others return.
func (db *DB) DropLogDays(ctx context.Context, keep time.Duration, record func(context.Context, LogDay) error) (dropped []LogDay, err error) {
	defer wrap(&err, "drop old days of the log")
	config := db.conn.Copy()
	config.RuntimeParams["statement_timeout"] = "0" // a large day takes its time to count
	conn, err := db.sessions.connect(ctx, config)
	if err != nil {
		return nil, err
	}
	defer func() {
		// The end of the session lets go of the lock too, but only a moment later.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_, _ = conn.Exec(ctx, "select pg_advisory_unlock_all()")
		closeConn(conn)
	}()
	var alone bool
	if err := conn.QueryRow(ctx, "select pg_try_advisory_lock($1)", retentionLock).Scan(&alone); err != nil || !alone {
		return nil, err
	}
	rows, _ := conn.Query(ctx, `
		select distinct day
		from pg_inherits
		join pg_class on pg_class.oid = inhrelid
		cross join to_date(substring(relname from '_([0-9]{8})$'), 'YYYYMMDD') as day
		where inhparent in ('decisions'::regclass, 'events'::regclass)
		  and day + 1 + $1::interval <= now() at time zone 'UTC'
		order by day`, keep)
	days, err := pgx.CollectRows(rows, pgx.RowTo[time.Time])
	if err != nil {
		return nil, err
	}
	for _, day := range days {
		d, err := countLogDay(ctx, conn, day)
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

// dropLogDay drops a day, and makes its record when the database asks for it: one
// that a server wrote before it stopped is as good.
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
