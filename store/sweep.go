package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// MinKeep is the shortest time to keep history for. The sweeper knows what the
// decisions of past days need, but not those of today and yesterday, for they are
// still coming in: at most 48 hours old, they are covered by this.
const MinKeep = 48 * time.Hour

// sweepRows are removed by one statement, which takes some ten milliseconds.
const sweepRows = 5000

// Swept says what a sweep did.
type Swept struct {
	// Elsewhere: another server is sweeping, so nothing was done.
	Elsewhere bool
	// Oldest is the first revision that can be read.
	Oldest int64
	// Rows were removed, by table. An error leaves here what was removed before it.
	Rows map[string]int64
}

// Sweep removes the history that nobody needs: revisions older than keep, but for
// what the decisions in the log were made at. Bundles with their policies and
// files stay for good; imports that can no longer go on go too.
//
// Nobody waits for it: what it removes, and locks, no writer touches. Of several
// that are called at once, one sweeps. Functions of the database's owner remove the
// rows, for the login that serves may not, and check what may go.
func (db *DB) Sweep(ctx context.Context, keep time.Duration) (swept Swept, err error) {
	defer wrap(&err, "sweep history")
	if keep < MinKeep {
		return swept, fmt.Errorf("history of %v is less than the %v that the newest decisions may need", keep, MinKeep)
	}
	led, err := db.lead(ctx, "sweep", func(conn *pgx.Conn) error { return swept.sweep(ctx, conn, keep) })
	swept.Elsewhere = err == nil && !led
	return swept, err
}

func (s *Swept) sweep(ctx context.Context, conn *pgx.Conn, keep time.Duration) (err error) {
	if err := readDecisionDays(ctx, conn); err != nil {
		return err
	}
	if err := conn.QueryRow(ctx, "select raise_oldest($1)", keep).Scan(&s.Oldest); err != nil {
		return err
	}
	s.Rows = map[string]int64{}
	for _, table := range []string{"entities", "revision_entries", "revisions"} {
		for start, n := int64(0), int64(sweepRows); n == sweepRows; {
			err := conn.QueryRow(ctx, "select gone, last from sweep_history($1, $2, $3)", table, start, sweepRows).Scan(&n, &start)
			if err != nil {
				return fmt.Errorf("%s: %w", table, err)
			}
			s.Rows[table] += n
		}
	}
	tag, err := conn.Exec(ctx, "delete from imports where updated_at < now() - $1::interval", importKept)
	s.Rows["imports"] = tag.RowsAffected()
	return err
}

// readDecisionDays has the database note what the decisions of each past day need. A
// large day takes its time, once.
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
