package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Replays read the database as it was at an earlier revision. They use the connections of
// administration, so that decisions do not wait for them.

// ErrSwept says that history does not go back to the revision; see [SweptError].
var ErrSwept = errors.New("is older than history is kept")

// SweptError refuses to read a revision that is older than the history. It is an
// [ErrSwept].
type SweptError struct {
	Oldest int64 // the first revision that can be read
}

// Error names the first revision that can be read.
func (e *SweptError) Error() string { return fmt.Sprintf("history begins at revision %d", e.Oldest) }

// Is makes it an [ErrSwept].
func (e *SweptError) Is(target error) bool { return target == ErrSwept }

const selectOldest = "select oldest from history"

// checkSwept fails if the revision cannot be read any more. Call it after a read or in
// the same snapshot: the sweeper raises oldest before it removes rows, so if checkSwept
// succeeds then, the read was complete. A call before the read would prove nothing.
func checkSwept(row pgx.Row, revision int64) error {
	var oldest int64
	err := row.Scan(&oldest)
	if err == nil && revision < oldest {
		err = &SweptError{oldest}
	}
	return err
}

// PastPolicies returns a name for the content of all bundles that were live at the
// revision. If two revisions have the same name, their schemas, catalogues and policies
// are equal. They are never removed. The error is [ErrNotFound] if there is no such
// revision yet.
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

// PastBundles is [DB.Bundles] over the connections of administration.
func (db *DB) PastBundles(ctx context.Context, revision int64) (_ []Bundle, err error) {
	defer wrap(&err, "read bundles of the past")
	return readBundles(ctx, db.admin, revision)
}

// PastEntities is [DB.LoadEntities] over the connections of administration.
func (db *DB) PastEntities(ctx context.Context, revision int64, uids []UID, most int64) (_ []Entity, err error) {
	defer wrap(&err, "load entities of the past")
	return loadEntities(ctx, db.admin, revision, uids, most)
}
