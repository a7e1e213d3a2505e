package store

import (
	"context"
	"errors"
	"slices"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// querier reads over a pool, a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// View is the database at one moment, for a server that follows it. All reads come from
// the same server and the same snapshot, so that a failover in between cannot mix two
// histories.
type View struct {
	tx pgx.Tx
	// Position is the position of the newest revision in it.
	Position Position
	// Oldest is the first revision that can still be read. The changes of later revisions
	// are known.
	Oldest int64
	// KeyChanges grows with each change of the API keys, also with one that made no revision.
	KeyChanges int64
	// Copied is true if the database is a copy of the one that its id was made for: see
	// [DB.Claim].
	Copied bool
}

// View calls fn with a view of the primary. It fails on a standby, which cannot
// know the newest revision.
func (db *DB) View(ctx context.Context, fn func(*View) error) (err error) {
	defer wrap(&err, "read the database")
	// fn may read for longer. This read has a timeout, so that a dead connection is
	// noticed.
	short, cancel := context.WithTimeout(ctx, currentTimeout)
	defer cancel()
	tx, err := db.vital.BeginTx(short, oneSnapshot)
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
	batch.Queue("select oldest, key_changes, database_is_copy() from history").QueryRow(func(row pgx.Row) error {
		return row.Scan(&v.Oldest, &v.KeyChanges, &v.Copied)
	})
	if err := tx.SendBatch(short, &batch).Close(); err != nil {
		return err
	}
	return fn(v)
}

// ChangesUpTo reads what changed after one revision, up to another one, in a database
// that has a position. known is false if there are more changes than limit, if history
// does not go back so far, or if the database does not have the position.
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
	checkPosition(&batch, at, ErrOtherHistory)
	// The sweep raises oldest before it removes entries. If oldest is not above after
	// now, no entry was missing.
	var oldest int64
	batch.Queue(selectOldest).QueryRow(func(row pgx.Row) error { return row.Scan(&oldest) })
	err = db.pool.SendBatch(ctx, &batch).Close()
	if errors.Is(err, ErrOtherHistory) {
		return nil, false, nil
	}
	return changes, err == nil && oldest <= after && len(changes) <= limit, err
}

// Changes reads what changed after a revision, in order of revisions. It stops after the
// revision with which limit is reached, and never within a revision, so the result can have
// more than limit. If it is empty, after is the newest revision, because every revision
// changes something. Swept entries are missing, so after must not be below Oldest.
func (v *View) Changes(ctx context.Context, after int64, limit int) (_ []Change, err error) {
	ctx, cancel := context.WithTimeout(ctx, currentTimeout)
	defer cancel()
	rows, _ := v.tx.Query(ctx, `
		select revision, kind, type, id
		from revision_entries
		where revision > $1
		  and revision <= coalesce(
		      (select revision from revision_entries where revision > $1
		       order by revision offset $2 limit 1), 9223372036854775807)
		order by revision, kind, type, id`, after, max(limit, 1)-1)
	return pgx.CollectRows(rows, pgx.RowToStructByName[Change])
}

// Has reports whether the view's history has a position of its database and timeline.
func (v *View) Has(ctx context.Context, p Position) (has bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, currentTimeout)
	defer cancel()
	var batch pgx.Batch
	checkPosition(&batch, p, ErrOtherHistory)
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
// database that has a position. The error is [ErrNotFound] if there is no such revision,
// and [ErrOtherHistory] if the database does not have the position.
func (db *DB) Mark(ctx context.Context, revision int64, at Position) (mark uuid.UUID, oldest int64, err error) {
	defer wrap(&err, "read the mark of a revision")
	var batch pgx.Batch
	checkPosition(&batch, at, ErrOtherHistory)
	found := false
	batch.Queue("select mark from revisions where n = $1", revision).Query(func(rows pgx.Rows) error {
		list, err := pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
		if found = len(list) > 0; found {
			mark = list[0]
		}
		return err
	})
	// The sweep raises oldest before it removes revisions, so a removed revision is below
	// oldest.
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

// Keys reads the API keys that are not revoked, by id.
func (v *View) Keys(ctx context.Context) (_ []Key, err error) { return readKeys(ctx, v.tx) }
