package store

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
)

// Who decides again what was decided once reads the database as it was then, over
// the connections of administration: however many replays there are, decisions do
// not wait for them.

// ErrSwept says that history does not go back to the revision.
var ErrSwept = errors.New("is older than history is kept")

// PastPolicies names the bundles that were live at the revision, and their content:
// where the name is the same, so are schemas, catalogues and policies. They are kept
// for good. The error is [ErrNotFound] for a revision that was not made yet.
func (db *DB) PastPolicies(ctx context.Context, revision int64) (name string, err error) {
	defer wrap(&err, "read policies of the past")
	const query = `
		select (select n from revision),
		       coalesce(string_agg(version || ' ' || digest || ' ' || name, e'\n' order by name), '')
		from bundles
		where since <= $1 and (until is null or until > $1)`
	var newest int64
	err = db.admin.QueryRow(ctx, query, revision).Scan(&newest, &name)
	if err == nil && revision > newest {
		err = ErrNotFound
	}
	return name, err
}

// PastBundles is [DB.Bundles].
func (db *DB) PastBundles(ctx context.Context, revision int64) (_ []Bundle, err error) {
	defer wrap(&err, "read bundles of the past")
	return readBundles(ctx, db.admin, revision)
}

// PastEntities is [DB.LoadEntities]. The error is [ErrSwept] for a revision that
// history does not go back to.
func (db *DB) PastEntities(ctx context.Context, revision int64, uids []UID) (found []Entity, err error) {
	defer wrap(&err, "load entities of the past")
	args, most := sliceArgs(revision, uids)
	var batch pgx.Batch
	batch.Queue(selectSlice, args...).Query(func(rows pgx.Rows) (err error) {
		found, err = collectSlice(rows, most)
		return err
	})
	// The sweeper moves oldest up before it removes anything: what was read is whole
	// if this holds after it.
	batch.Queue("select oldest from history").QueryRow(func(row pgx.Row) error {
		var oldest int64
		err := row.Scan(&oldest)
		if err == nil && revision < oldest {
			err = ErrSwept
		}
		return err
	})
	if err := db.admin.SendBatch(ctx, &batch).Close(); err != nil {
		return nil, err
	}
	return found, nil
}
