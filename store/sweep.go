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

const (
	// sweepRows are removed by one statement, which takes some ten milliseconds.
	sweepRows = 5000
	// sweepSlack is kept besides: a decision can be made at a revision that another
	// one replaced seconds before, by a server whose clock is not the database's.
	sweepSlack = time.Hour
)

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
// that are called at once, one sweeps.
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
	if s.Oldest, err = raiseOldest(ctx, conn, keep+sweepSlack); err != nil {
		return err
	}
	s.Rows = map[string]int64{}
	for _, r := range removals {
		for from, n := int64(0), int64(sweepRows); n == sweepRows; {
			if err := conn.QueryRow(ctx, r.query, from, s.Oldest, sweepRows).Scan(&n, &from); err != nil {
				return fmt.Errorf("%s: %w", r.table, err)
			}
			s.Rows[r.table] += n
		}
	}
	tag, err := conn.Exec(ctx, "delete from imports where updated_at < now() - $1::interval", importKept)
	s.Rows["imports"] = tag.RowsAffected()
	return err
}

// removals remove what only revisions before $2 need: at most $3 rows, in the order
// of an index, from where the statement before got to ($1). Without that, each would
// walk once more over all that those before it removed, which stays in the index
// as long as some old snapshot may see it.
//
// The rows of revision $2 itself stay, and so do the newest revision's.
var removals = []struct{ table, query string }{
	{"entities", `
		with gone as (
			delete from entities
			where ctid = any (array (
				select ctid from entities
				where until >= $1 and until <= $2
				order by until limit $3))
			returning until as n
		)
		select count(*), coalesce(max(n), 0) from gone`},
	{"revision_entries", `
		with gone as (
			delete from revision_entries
			where ctid = any (array (
				select ctid from revision_entries
				where revision >= $1 and revision < $2
				order by revision limit $3))
			returning revision as n
		)
		select count(*), coalesce(max(n), 0) from gone`},
	{"revisions", `
		with gone as (
			delete from revisions
			where ctid = any (array (
				select ctid from revisions
				where revisions.n >= $1 and revisions.n < $2
				order by revisions.n limit $3))
			returning revisions.n
		)
		select count(*), coalesce(max(n), 0) from gone`},
}

// raiseOldest moves the first revision that can be read up to the newest of those
// made before the time to keep, or to the smallest that a decision in the log was
// made at.
//
// It looks for the first young revision, and not for the last old one: when the
// clock was set back meanwhile, rather too much is kept. And it looks from the old
// end: at most one sweep's worth of revisions is passed.
func raiseOldest(ctx context.Context, conn *pgx.Conn, keep time.Duration) (oldest int64, err error) {
	const query = `
		with bound as (
			select least(n, (select min(min_revision) from decision_days)) as n from revision
		)
		update history
		set oldest = greatest(oldest, coalesce(
			(select revisions.n - 1 from revisions
			 where revisions.n > history.oldest and revisions.n <= bound.n and at >= now() - $1::interval
			 order by revisions.n limit 1),
			bound.n))
		from bound
		returning oldest`
	err = conn.QueryRow(ctx, query, keep).Scan(&oldest)
	return oldest, err
}

// partitionDays are the days that the decision log has a partition for.
const partitionDays = `
	select to_date(right(relname, 8), 'YYYYMMDD') as day
	from pg_inherits join pg_class on pg_class.oid = inhrelid
	where inhparent = 'decisions'::regclass and relname ~ '^decisions_[0-9]{8}$'`

// readDecisionDays brings decision_days up to the day before yesterday. A decision
// that is written to one of its days later than that is from a server whose clock
// is days behind; its revision is a new one all the same.
func readDecisionDays(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, "delete from decision_days where day not in ("+partitionDays+")")
	if err != nil {
		return err
	}
	rows, _ := conn.Query(ctx, `
		select day from (`+partitionDays+`) as partitions
		where day < (now() at time zone 'UTC')::date - 1
		  and not exists (select from decision_days where decision_days.day = partitions.day)
		order by day`)
	days, err := pgx.CollectRows(rows, pgx.RowTo[time.Time])
	if err != nil || len(days) == 0 {
		return err
	}
	for _, day := range days {
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			// There is no index to tell the smallest: a large day takes its time, once.
			if _, err := tx.Exec(ctx, "set local statement_timeout = 0"); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `
				insert into decision_days (day, min_revision)
				select $1, min(revision) from decisions where at >= $2 and at < $3`, day, day, day.AddDate(0, 0, 1))
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
