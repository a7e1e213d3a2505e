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
func (db *DB) Explain(ctx context.Context, q DecisionQuery, by Group) ([]string, error) {
	sql := queryDecisions
	if by != 0 {
		sql = by.query()
	}
	rows, _ := db.admin.Query(ctx, "explain (analyze)"+sql, q.args()...)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}
