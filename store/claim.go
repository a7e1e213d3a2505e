package store

import (
	"context"
	"errors"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// Renewed says that a database got another id, because it is a copy of the one with the
// old id or because its owner says that it was restored.
type Renewed struct {
	// Before and After are the ids. Both are zero if nothing was renewed.
	Before, After uuid.UUID
	// Copied is true for a copy, and false if the owner demanded the new id.
	Copied bool
}

// Claim gives the database an id of its own if it is a copy of another one: a restored
// dump, a database made from a template, an upgraded cluster. Tokens and tags from the
// original are then not valid here. makeEvent makes the event that says so, which is
// committed with the new id. Several servers may call it at once: one of them renews the
// id.
func (db *DB) Claim(ctx context.Context, makeEvent func(context.Context, Renewed) (Event, error)) (r Renewed, err error) {
	defer wrap(&err, "claim the database")
	err = db.inTurn(ctx, func(tx pgx.Tx) error {
		r, err = claim(ctx, tx, "select before, after from claim_database()", true, &db.changes, makeEvent)
		return err
	})
	return r, err
}

// ClaimDatabase is [DB.Claim] for a login that may migrate. If restored is true, the id
// is renewed in any case. server is the name of the server in the log.
func ClaimDatabase(ctx context.Context, databaseURL, server string, restored bool, makeEvent func(context.Context, Renewed) (Event, error)) (r Renewed, err error) {
	defer wrap(&err, "claim the database")
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		return r, err
	}
	setDefaults(config)
	var s sessions
	conn, err := s.connect(ctx, as(config, ownerRole))
	if err != nil {
		return r, err
	}
	defer closeConn(conn)
	sql := "select before, after from claim_database()"
	if restored {
		sql = "select before, after from renew_database()"
	}
	changes := changeLog{writer: uuid.New(), server: server}
	err = pgx.BeginTxFunc(ctx, conn, readCommitted, func(tx pgx.Tx) error {
		r, err = claim(ctx, tx, sql, !restored, &changes, makeEvent)
		return err
	})
	return r, err
}

func claim(ctx context.Context, tx pgx.Tx, sql string, copied bool, changes *changeLog, makeEvent func(context.Context, Renewed) (Event, error)) (r Renewed, err error) {
	err = tx.QueryRow(ctx, sql).Scan(&r.Before, &r.After)
	if errors.Is(err, pgx.ErrNoRows) {
		return Renewed{}, nil
	}
	if err != nil {
		return r, err
	}
	r.Copied = copied
	e, err := makeEvent(ctx, r)
	if err != nil {
		return r, err
	}
	var batch pgx.Batch
	changes.queue(&batch, e)
	return r, tx.SendBatch(ctx, &batch).Close()
}
