package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// MinHistoryRetention is the shortest retention of history. The sweep knows which revisions the
// decisions of past days need. It does not know those of today and yesterday, which are
// still being recorded: they are 48 hours old at most, so this retention covers them.
const MinHistoryRetention = 48 * time.Hour

// sweepRows is the number of rows that one statement removes, in about ten milliseconds.
const sweepRows = 5000

// Swept says what a sweep did.
type Swept struct {
	// Elsewhere is true if another server is sweeping. Then nothing was done.
	Elsewhere bool
	// Oldest is the first revision that can be read.
	Oldest int64
	// Rows is the number of rows that were removed, by table. With an error it is what
	// was removed before it.
	Rows map[string]int64
}

// Sweep removes revisions that are older than the retention, except those that decisions
// in the log were made at. Bundles with their policies and files are never removed. A negative
// retention keeps all revisions. It first removes imports that cannot be continued any more, and
// idempotency keys that do not count any more, whatever the retention is.
//
// Nothing waits for it, because writers do not touch the rows that it locks and removes. Only a
// write that uses an old idempotency key again may wait for one of its small transactions.
// If several processes call it at once, one sweeps. Functions of the database's owner
// check and remove the rows, because the login of a server may not.
func (db *DB) Sweep(ctx context.Context, retention time.Duration) (swept Swept, err error) {
	defer wrap(&err, "sweep history")
	if retention >= 0 && retention < MinHistoryRetention {
		return swept, fmt.Errorf("history of %v is less than the %v that the newest decisions may need", retention, MinHistoryRetention)
	}
	led, err := db.Lead(ctx, sweepLock, func(ctx context.Context, alive func(context.Context) error) error {
		conn, err := db.sessions.connect(ctx, db.connConfig)
		if err != nil {
			return err
		}
		defer closeConn(conn)
		return swept.sweep(ctx, conn, retention, alive)
	})
	swept.Elsewhere = err == nil && !led
	return swept, err
}

func (s *Swept) sweep(ctx context.Context, conn *pgx.Conn, retention time.Duration, alive func(context.Context) error) (err error) {
	s.Rows = map[string]int64{}
	if err := s.sweepEnded(ctx, conn, alive); err != nil || retention < 0 {
		return err
	}
	if err := readDecisionDays(ctx, conn); err != nil {
		return err
	}
	if err := conn.QueryRow(ctx, "select raise_oldest($1)", retention).Scan(&s.Oldest); err != nil {
		return err
	}
	for _, table := range []string{"entities", "revision_entries", "revisions"} {
		if err := alive(ctx); err != nil {
			return err
		}
		for start, n := int64(0), int64(sweepRows); n == sweepRows; {
			err := conn.QueryRow(ctx, "select gone, last from sweep_history($1, $2, $3)", table, start, sweepRows).Scan(&n, &start)
			if err != nil {
				return fmt.Errorf("%s: %w", table, err)
			}
			s.Rows[table] += n
		}
	}
	return nil
}

// sweepEnded removes imports and idempotency keys that do not count any more.
func (s *Swept) sweepEnded(ctx context.Context, conn *pgx.Conn, alive func(context.Context) error) error {
	tag, err := conn.Exec(ctx, "delete from imports where updated_at < now() - $1::interval", importRetention)
	s.Rows["imports"] = tag.RowsAffected()
	if err != nil {
		return err
	}
	for n := int64(sweepRows); n == sweepRows; s.Rows["idempotency_keys"] += n {
		if err := alive(ctx); err != nil {
			return err
		}
		// A write that uses an old key again holds the revision lock, and need not wait for long.
		tag, err := conn.Exec(ctx, `
			delete from idempotency_keys where ctid = any (array(
				select ctid from idempotency_keys where at < now() - $1::interval limit $2 for update skip locked))`,
			onceRetention, sweepRows)
		if err != nil {
			return err
		}
		n = tag.RowsAffected()
	}
	return nil
}

// readDecisionDays makes the database store which revision the decisions of each past day
// need. That takes long for a large day, once.
func readDecisionDays(ctx context.Context, conn *pgx.Conn) error {
	for done := false; !done; {
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "set local statement_timeout = 0"); err != nil {
				return err
			}
			var day *time.Time
			err := tx.QueryRow(ctx, "select read_decision_day()").Scan(&day)
			done = day == nil
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
