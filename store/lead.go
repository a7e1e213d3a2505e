package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// Lead runs fn if no other process leads under that name, and says whether it did.
// It leads as long as the session lives that holds the lock, which alive asks for now
// and then. In between another can have taken over, so what must not be done twice
// has to be safe by itself.
func (db *DB) Lead(ctx context.Context, name string, fn func(ctx context.Context, alive func(context.Context) error) error) (led bool, err error) {
	defer wrap(&err, "lead "+name)
	return db.lead(ctx, name, func(conn *pgx.Conn) error { return fn(ctx, conn.Ping) })
}

// lead is Lead for work that is done on the very connection that holds the lock: who
// loses the one cannot go on with the other.
func (db *DB) lead(ctx context.Context, name string, fn func(conn *pgx.Conn) error) (led bool, err error) {
	conn, err := db.sessions.connect(ctx, db.conn)
	if err != nil {
		return false, err
	}
	defer closeConn(conn)
	err = conn.QueryRow(ctx, "select pg_try_advisory_lock(hashtextextended($1, 0))", leadLock+name).Scan(&led)
	if err != nil || !led {
		return false, err
	}
	// The server may notice only after a while that the connection is closed, and the
	// next one need not wait for that.
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_, _ = conn.Exec(ctx, "select pg_advisory_unlock_all()")
	}()
	return true, fn(conn)
}

const leadLock = "cedarpost.lead."
