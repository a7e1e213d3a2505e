package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Who decides again what was decided once reads the database as it was then, over
// the connections of administration: however many replays there are, decisions do
// not wait for them.

// ErrSwept says that history does not go back to the revision; see [SweptError].
var ErrSwept = errors.New("is older than history is kept")

// SweptError refuses to read a revision that is older than what history is kept
// for. It is an [ErrSwept].
type SweptError struct {
	Oldest int64 // the first revision that can be read
}

// Error says how far back history goes.
func (e *SweptError) Error() string { return fmt.Sprintf("history begins at revision %d", e.Oldest) }

// Is makes it an [ErrSwept].
func (e *SweptError) Is(target error) bool { return target == ErrSwept }

const selectOldest = "select oldest from history"

// checkSwept fails if the revision cannot be read any more. The sweeper moves
// oldest up before it removes anything. So a read is whole if this succeeds after
// it, or in the same snapshot; before it would prove nothing.
func checkSwept(row pgx.Row, revision int64) error {
	var oldest int64
	err := row.Scan(&oldest)
	if err == nil && revision < oldest {
		err = &SweptError{oldest}
	}
	return err
}

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

// PastEntities is [DB.LoadEntities].
func (db *DB) PastEntities(ctx context.Context, revision int64, uids []UID) (_ []Entity, err error) {
	defer wrap(&err, "load entities of the past")
	return loadEntities(ctx, db.admin, revision, uids)
}
