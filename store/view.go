package store

import (
	"context"
	"errors"
	"slices"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// querier is what reads need, of a pool or of a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// View is the database as it is at one moment, for those who follow it. All reads
// come from the same server and the same snapshot, so that a failover in between
// cannot mix two histories.
type View struct {
	tx pgx.Tx
	// Position is the newest revision in it.
	Position Position
	// Oldest is the first revision that can still be read. Changes are known from
	// the one after it on.
	Oldest int64
	// Copied says that the database is a copy of the one that its id was made for; see
	// [DB.Claim].
	Copied bool
}

// View calls fn with a view of the primary. It fails on a standby, which cannot
// know the newest revision.
func (db *DB) View(ctx context.Context, fn func(*View) error) (err error) {
	defer wrap(&err, "read the database")
	// What fn reads may take its time. This may not: a connection that leads nowhere
	// has to be noticed.
	short, cancel := context.WithTimeout(ctx, currentTimeout)
	defer cancel()
	tx, err := db.vital.BeginTx(short, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }() // it only reads
	v := &View{tx: tx}
	var batch pgx.Batch
	batch.Queue(selectPosition).Query(func(rows pgx.Rows) (err error) {
		v.Position, err = scanPosition(rows)
		return err
	})
	batch.Queue("select oldest, database_is_copy() from history").QueryRow(func(row pgx.Row) error { return row.Scan(&v.Oldest, &v.Copied) })
	if err := tx.SendBatch(short, &batch).Close(); err != nil {
		return err
	}
	return fn(v)
}

// ChangesUpTo reads what changed after one revision, up to another one, in a database
// that has a position. known is false where that cannot be told: it is more than
// limit, history no longer goes back so far, or the database is not at the position.
func (db *DB) ChangesUpTo(ctx context.Context, after, to int64, at Position, limit int) (changes []Change, known bool, err error) {
	defer wrap(&err, "read changes")
	var batch pgx.Batch
	batch.Queue(`
		select revision, kind, type, id
		from revision_entries
		where revision > $1 and revision <= $2
		order by revision, kind, type, id
		limit $3`, after, to, limit+1).Query(func(rows pgx.Rows) (err error) {
		changes, err = pgx.CollectRows(rows, pgx.RowToStructByName[Change])
		return err
	})
	checkPosition(&batch, at)
	// The sweeper moves it up first: if it is not above after now, all were there.
	var oldest int64
	batch.Queue(selectOldest).QueryRow(func(row pgx.Row) error { return row.Scan(&oldest) })
	err = db.pool.SendBatch(ctx, &batch).Close()
	if errors.Is(err, ErrOtherHistory) {
		return nil, false, nil
	}
	return changes, err == nil && oldest <= after && len(changes) <= limit, err
}

// Changes is [DB.Changes] in the view.
func (v *View) Changes(ctx context.Context, after int64, limit int) (_ []Change, err error) {
	ctx, cancel := context.WithTimeout(ctx, currentTimeout)
	defer cancel()
	return readChanges(ctx, v.tx, after, limit)
}

// Has says whether the view's history has a position of its database and timeline.
func (v *View) Has(ctx context.Context, p Position) (has bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, currentTimeout)
	defer cancel()
	var batch pgx.Batch
	checkPosition(&batch, p)
	if batch.Len() > 0 {
		err = v.tx.SendBatch(ctx, &batch).Close()
	}
	if errors.Is(err, ErrOtherHistory) {
		return false, nil
	}
	return err == nil, err
}

// Marks reads the marks of the newest revisions after one, at most limit, in order.
func (v *View) Marks(ctx context.Context, after int64, limit int) (list []uuid.UUID, err error) {
	ctx, cancel := context.WithTimeout(ctx, currentTimeout)
	defer cancel()
	rows, _ := v.tx.Query(ctx, "select mark from revisions where n > $1 order by n desc limit $2", after, limit)
	list, err = pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
	slices.Reverse(list)
	return list, err
}

// Mark reads the mark of a revision, and the first revision that can be read, from a
// database that has a position. The error is [ErrNotFound] where there is no such
// revision, and [ErrOtherHistory] where the database does not have the position.
func (db *DB) Mark(ctx context.Context, revision int64, at Position) (mark uuid.UUID, oldest int64, err error) {
	defer wrap(&err, "read the mark of a revision")
	var batch pgx.Batch
	checkPosition(&batch, at)
	found := false
	batch.Queue("select mark from revisions where n = $1", revision).Query(func(rows pgx.Rows) error {
		list, err := pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
		if found = len(list) > 0; found {
			mark = list[0]
		}
		return err
	})
	// The sweep raises oldest before it removes revisions, so a removed one is below it.
	batch.Queue(selectOldest).QueryRow(func(row pgx.Row) error { return row.Scan(&oldest) })
	ctx, cancel := context.WithTimeout(ctx, currentTimeout)
	defer cancel()
	if err = db.pool.SendBatch(ctx, &batch).Close(); err == nil && !found {
		err = ErrNotFound
	}
	return mark, oldest, err
}

// readMark reads the mark of a revision in the transaction that holds the lock.
func readMark(ctx context.Context, tx pgx.Tx, n int64) (mark uuid.UUID, err error) {
	if n > 0 {
		err = tx.QueryRow(ctx, "select mark from revisions where n = $1", n).Scan(&mark)
	}
	return mark, err
}

// Bundles is [DB.Bundles] at the view's revision.
func (v *View) Bundles(ctx context.Context) (_ []Bundle, err error) {
	return readBundles(ctx, v.tx, v.Position.Number)
}

// PolicyRevision is [DB.PolicyRevision] at the view's revision.
func (v *View) PolicyRevision(ctx context.Context) (int64, error) {
	return readPolicyRevision(ctx, v.tx, v.Position.Number)
}

// Keys is [DB.Keys] in the view.
func (v *View) Keys(ctx context.Context) (_ []Key, err error) { return readKeys(ctx, v.tx) }
