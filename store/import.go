package store

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// Import is how far an import got that has not ended.
type Import struct {
	ID string
	// Entities are stored, counted from the start of the import.
	Entities int64
	Revision int64  // of its last chunk
	Caller   string // who sent that
	// UpdatedAt is when it was stored, or when the import was last continued. With
	// Entities it tells who has the import from who had it.
	UpdatedAt time.Time
}

// importKept is how long an import can be continued. It bounds the table: nobody
// ends an import whose file was corrected and got another name.
const importKept = 30 * 24 * time.Hour

// ImportStep moves an import on, in the transaction of the write that makes it
// true, so that no entity is counted that is not stored, nor the other way round.
type ImportStep struct {
	// From is the import as the caller left it. When somebody else has continued or
	// begun it since, the write is refused with [ErrImportMoved]. One without
	// Entities begins, and forgets what stood under its ID.
	From Import
	// Entities are stored with this write, counted from the start.
	Entities int64
}

func scanImport(rows pgx.Rows) (Import, error) {
	return pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[Import])
}

// moveImport records the step of a write that the revision holds.
func moveImport(ctx context.Context, tx pgx.Tx, step ImportStep, caller string, revision int64) (Import, error) {
	if step.From.Entities == 0 {
		_, err := tx.Exec(ctx, "delete from imports where updated_at < clock_timestamp() - $1::interval", importKept)
		if err != nil {
			return Import{}, err
		}
		rows, _ := tx.Query(ctx, `
			insert into imports (id, entities, revision, caller) values ($1, $2, $3, $4)
			on conflict (id) do update
			set entities = excluded.entities, revision = excluded.revision,
			    caller = excluded.caller, updated_at = excluded.updated_at
			returning id, entities, revision, caller, updated_at`,
			step.From.ID, step.Entities, revision, caller)
		return scanImport(rows)
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

// GetImport reads how far an import got. [ErrNotFound]: it ended, or never began.
func (db *DB) GetImport(ctx context.Context, id string) (_ Import, err error) {
	defer wrap(&err, "read import")
	rows, _ := db.admin.Query(ctx, "select id, entities, revision, caller, updated_at from imports where id = $1", id)
	i, err := scanImport(rows)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotFound
	}
	return i, err
}

// ContinueImport takes an import over: whoever had it gets [ErrImportMoved] from now
// on, also for what they sent before. When the import does not stand at so many
// entities, that is its error too, and it tells where it stands.
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

// FinishImport forgets an import that has ended. One that somebody else has
// continued or begun since is theirs, and stays.
func (db *DB) FinishImport(ctx context.Context, i Import) (err error) {
	defer wrap(&err, "finish import")
	_, err = db.admin.Exec(ctx, "delete from imports where id = $1 and entities = $2 and updated_at = $3",
		i.ID, i.Entities, i.UpdatedAt)
	return err
}
