package store

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
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
	err = pgx.BeginFunc(ctx, db.audit, func(tx pgx.Tx) error {
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

// Limits that tests reach.
const (
	SweepRows   = sweepRows
	MaxOnceKeys = maxOnceKeys
	MaxCascade  = maxCascade
)

// QueryUses is what EachUse asks.
const QueryUses = queryUses

// eachSession calls fn with a connection of each pool, and with that of a writer.
func (db *DB) eachSession(ctx context.Context, fail func(...any), w *LogWriter, fn func(part string, conn *pgx.Conn) error) {
	for part, pool := range map[string]*pgxpool.Pool{"pool": db.pool, "admin": db.admin, "audit": db.audit, "vital": db.vital} {
		err := pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error { return fn(part, conn.Conn()) })
		if err != nil {
			fail(part, err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := fn("writer", w.conn); err != nil {
		fail("writer", err)
	}
}

// InEachSession runs SQL over a connection of each pool, and over that of a writer.
func (db *DB) InEachSession(ctx context.Context, fail func(...any), w *LogWriter, sql string) {
	db.eachSession(ctx, fail, w, func(_ string, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, sql)
		return err
	})
}

// Sessions reads the settings of a connection of each pool, and of a writer's.
func (db *DB) Sessions(ctx context.Context, fail func(...any), w *LogWriter) map[string]map[string]string {
	out := map[string]map[string]string{}
	db.eachSession(ctx, fail, w, func(part string, conn *pgx.Conn) error {
		out[part] = map[string]string{}
		var name, value string
		rows, _ := conn.Query(ctx, "select name, current_setting(name) from pg_settings union all values ('role', current_user::text)")
		_, err := pgx.ForEachRow(rows, []any{&name, &value}, func() error {
			out[part][name] = value
			return nil
		})
		return err
	})
	return out
}

// ParseOptions reads the connection parameter options.
var ParseOptions = parseOptions

// ReadSchema describes the schema of a database.
var ReadSchema = readSchema

// Adopt gives the owner what migrations made before there was one.
var Adopt = adopt

// OurMigrations are the versions of the embedded migrations.
var OurMigrations = ourMigrations
