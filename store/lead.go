package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// Lead runs fn if no other process leads under that name, and reports whether it did. The
// process leads as long as the session that holds the lock lives, which fn checks with
// alive from time to time. Between two checks another process may have taken over, so
// work that must not be done twice needs a safeguard of its own.
func (db *DB) Lead(ctx context.Context, name string, fn func(ctx context.Context, alive func(context.Context) error) error) (led bool, err error) {
	defer wrap(&err, "lead "+name)
	return db.lead(ctx, name, func(conn *pgx.Conn) error { return fn(ctx, conn.Ping) })
}

// lead is Lead for work on the connection that holds the lock. If the connection is lost,
// so is the lock, and the work cannot go on.
func (db *DB) lead(ctx context.Context, name string, fn func(conn *pgx.Conn) error) (led bool, err error) {
	conn, err := db.sessions.connect(ctx, db.connConfig)
	if err != nil {
		return false, err
	}
	defer closeConn(conn)
	err = conn.QueryRow(ctx, "select pg_try_advisory_lock(hashtextextended($1, 0))", leadLock+name).Scan(&led)
	if err != nil || !led {
		return false, err
	}
	defer unlockAll(ctx, conn)
	return true, fn(conn)
}

// unlockAll releases the advisory locks of a session that is about to end, even if ctx has
// ended. The server may notice late that the connection is closed, and the next session
// that wants a lock does not wait for that.
func unlockAll(ctx context.Context, conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_, _ = conn.Exec(ctx, "select pg_advisory_unlock_all()")
}

const leadLock = "cedarpost.lead."
