package store

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// Import is the progress of an import that has not ended.
type Import struct {
	ID string
	// Entities is the number of entities that are stored, from the start of the import.
	Entities int64
	Revision int64  // of its last chunk
	Caller   string // who sent that chunk
	// UpdatedAt is the time when the last chunk was stored or the import was last
	// continued. Together with Entities it identifies the caller that has the import now.
	UpdatedAt time.Time
}

// importRetention is the time for which an import can be continued. It bounds the table:
// an import is never ended if its file is corrected and imported under another name.
const importRetention = 30 * 24 * time.Hour

// ImportStep is the progress that a write makes in an import. It is stored in the
// transaction of the write, so that exactly the entities that are stored are counted.
type ImportStep struct {
	// From is the import as the caller left it. If somebody else has continued it or
	// begun it anew since, the write is refused with [ErrImportMoved]. If From has no
	// Entities, the import begins, and replaces one with the same ID. If that is of another
	// caller, the write is refused with [ErrImportTaken] unless OfAnyone is set.
	From     Import
	OfAnyone bool
	// Entities is the number of entities that are stored after this write, from the
	// start.
	Entities int64
}

func scanImport(rows pgx.Rows) (Import, error) {
	return pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[Import])
}

// moveImport stores the progress that the write of a revision makes.
func moveImport(ctx context.Context, tx pgx.Tx, step ImportStep, caller string, revision int64) (Import, error) {
	if step.From.Entities == 0 {
		_, err := tx.Exec(ctx, "delete from imports where updated_at < clock_timestamp() - $1::interval", importRetention)
		if err != nil {
			return Import{}, err
		}
		rows, _ := tx.Query(ctx, `
			insert into imports (id, entities, revision, caller) values ($1, $2, $3, $4)
			on conflict (id) do update
			set entities = excluded.entities, revision = excluded.revision,
			    caller = excluded.caller, updated_at = excluded.updated_at
			where imports.caller = excluded.caller or $5
			returning id, entities, revision, caller, updated_at`,
			step.From.ID, step.Entities, revision, caller, step.OfAnyone)
		begun, err := scanImport(rows)
		if errors.Is(err, pgx.ErrNoRows) {
			err = ErrImportTaken
		}
		return begun, err
	}
	rows, _ := tx.Query(ctx, `
		update imports
		set entities = $2, revision = $3, caller = $4, updated_at = clock_timestamp()
		where id = $1 and entities = $5 and updated_at = $6
		returning id, entities, revision, caller, updated_at`,
		step.From.ID, step.Entities, revision, caller, step.From.Entities, step.From.UpdatedAt)
	moved, err := scanImport(rows)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrImportMoved
	}
	return moved, err
}

// GetImport reads the progress of an import. The error is [ErrNotFound] if it has ended
// or never began.
func (db *DB) GetImport(ctx context.Context, id string) (_ Import, err error) {
	defer wrap(&err, "read import")
	rows, _ := db.admin.Query(ctx, "select id, entities, revision, caller, updated_at from imports where id = $1", id)
	i, err := scanImport(rows)
	return i, notFound(err)
}

// ContinueImport takes an import over: from now on the caller that had it gets
// [ErrImportMoved], also for chunks that are on their way. If so many entities is not the
// progress of the import, the error is [ErrImportMoved] too, and the result is the
// progress.
func (db *DB) ContinueImport(ctx context.Context, id string, entities int64) (_ Import, err error) {
	defer wrap(&err, "continue import")
	rows, _ := db.admin.Query(ctx, `
		update imports set updated_at = clock_timestamp() where id = $1 and entities = $2
		returning id, entities, revision, caller, updated_at`, id, entities)
	i, err := scanImport(rows)
	if errors.Is(err, pgx.ErrNoRows) {
		if i, err = db.GetImport(ctx, id); err == nil {
			err = ErrImportMoved
		}
	}
	return i, err
}

// FinishImport removes an import that has ended. If somebody else has continued it or
// begun it anew since, it stays.
func (db *DB) FinishImport(ctx context.Context, i Import) (err error) {
	defer wrap(&err, "finish import")
	_, err = db.admin.Exec(ctx, "delete from imports where id = $1 and entities = $2 and updated_at = $3",
		i.ID, i.Entities, i.UpdatedAt)
	return err
}
