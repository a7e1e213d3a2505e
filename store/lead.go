package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// The locks that one process holds while it does some work. Each is a view that only the
// roles of Cedarpost may lock: see migration 12. Any login could hold an advisory lock.
const (
	SignerLock    = "signer_lock"
	sweepLock     = "sweep_lock"
	stateRootLock = "state_root_lock"
	retentionLock = "retention_lock"
	ShadowLock    = "shadow_lock"
	migrationLock = "migration_lock"
)

// Lead runs fn if no other process holds the lock, and reports whether it did. The process
// leads as long as the session that holds the lock lives, which fn checks with alive from
// time to time. Between two checks another process may have taken over, so work that must
// not be done twice needs a safeguard of its own.
func (db *DB) Lead(ctx context.Context, lock string, fn func(ctx context.Context, alive func(context.Context) error) error) (led bool, err error) {
	defer wrap(&err, "lead by "+lock)
	conn, err := db.sessions.hold(ctx, db.connConfig, lock, " nowait")
	if sqlState(err) == "55P03" { // lock_not_available
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer letGo(ctx, conn)
	return true, fn(ctx, conn.Ping)
}

// hold takes a lock on a connection of its own. The lock ends with the connection. option
// is added to the LOCK statement.
//
// The connection stays in a transaction that has neither a snapshot nor a transaction id,
// so it does not hold back vacuum.
func (s *sessions) hold(ctx context.Context, config *pgx.ConnConfig, lock, option string) (*pgx.Conn, error) {
	conn, err := s.connect(ctx, config)
	if err != nil {
		return nil, err
	}
	// transaction_timeout exists since Postgres 17.
	_, err = conn.Exec(ctx, "select set_config(name, '0', false) from pg_settings where name in ('idle_in_transaction_session_timeout', 'transaction_timeout'); "+
		"begin isolation level read committed; lock table "+lock+" in share update exclusive mode"+option)
	if err != nil {
		closeConn(conn)
		return nil, err
	}
	return conn, nil
}

// letGo releases the lock of a connection and closes it, even if ctx has ended. The server
// may notice late that the connection is closed, and the next session that wants the lock
// does not wait for that.
func letGo(ctx context.Context, conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_, _ = conn.Exec(ctx, "rollback")
	closeConn(conn)
}
