package store

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// Kept is the size of what a writer keeps between writes.
func (w *LogWriter) Kept() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return cap(w.buf)
}

// Explain runs a query of the log and returns its plan; by is 0 for a page.
func (db *DB) Explain(ctx context.Context, q DecisionQuery, by Group) (plan []string, err error) {
	sql := queryDecisions
	if by != 0 {
		sql = by.query()
	}
	err = pgx.BeginFunc(ctx, db.admin, func(tx pgx.Tx) error {
		if by != 0 {
			if _, err := tx.Exec(ctx, "set local work_mem = '"+countMemory+"'"); err != nil {
				return err
			}
		}
		rows, _ := tx.Query(ctx, "explain (analyze)"+sql, q.args()...)
		plan, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	})
	return plan, err
}

// SweepRows are removed at once.
const SweepRows = sweepRows

// QueryUses is what EachUse asks.
const QueryUses = queryUses
