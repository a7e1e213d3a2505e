package store

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// Lead runs fn if no other process leads under that name, and says whether it did.
// It leads as long as the session lives that holds the lock: fn gets a context that
// ends with it, at most a heartbeat late, so what must not be done twice has to be
// safe by itself.
func (db *DB) Lead(ctx context.Context, name string, fn func(ctx context.Context, alive func(context.Context) error) error) (led bool, err error) {
	defer wrap(&err, "lead "+name)
	conn, err := pgx.ConnectConfig(ctx, db.conn.Copy())
	if err != nil {
		return false, err
	}
	defer closeConn(conn)
	err = conn.QueryRow(ctx, "select pg_try_advisory_lock(hashtextextended($1, 0))", "cedarpost.lead."+name).Scan(&led)
	if err != nil || !led {
		return false, err
	}
	return true, fn(ctx, conn.Ping)
}
