package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// OpKind says what an [Op] does.
type OpKind int

// The kinds of operations, with the parts of [Op] that each reads.
const (
	// Put creates the entity or replaces it whole: Entity.
	Put OpKind = iota + 1
	// Delete removes the entity, if it is there: Entity.UID, Cascade.
	Delete
	// AddParents adds memberships of a stored entity: Entity.UID, Entity.Parents.
	AddParents
	// RemoveParents drops memberships of a stored entity; those that are not there
	// are no error: Entity.UID, Entity.Parents.
	RemoveParents
	// SetAttributes sets and removes single attributes of a stored entity:
	// Entity.UID, Entity.Attrs, Remove.
	SetAttributes
)

// Op is one change to one entity.
type Op struct {
	Kind         OpKind
	Entity       Entity
	Remove       []string // names of attributes; those that are not there are no error
	Cascade      bool     // drop the memberships in a deleted entity, instead of refusing
	Precondition Precondition
}

// Precondition is what must hold, or the whole write is refused. The zero value
// always holds.
type Precondition struct {
	// IfRevision, if not nil: nobody changed, made or deleted the entity after that
	// revision ([ErrStale]). What this write does to it does not count. An entity that
	// is not stored may have been deleted at any revision that was swept.
	IfRevision *int64
	// MustExist and MustNotExist: the entity is stored, or is not, when the
	// operation's turn comes ([ErrMustExist], [ErrMustNotExist]).
	MustExist, MustNotExist bool
}

// EntityWrite is a list of operations to commit as one revision, or not at all.
type EntityWrite struct {
	// Ops are applied in order, each to what the ones before it left behind.
	Ops []Op
	// Caller and Note say in the history who wrote this, and why.
	Caller, Note string
	// PolicyRevision is the [DB.PolicyRevision] the operations were checked
	// against; 0 when there was no bundle.
	PolicyRevision int64
	// At, if it has a number, is the position that the operations and their
	// preconditions were read at. When the database does not have it, as after a
	// failover, the error is [ErrOtherHistory].
	At Position
	// Import, if not nil, is moved on with this write, even if it changes nothing.
	Import *ImportStep
}

// WriteResult says what became of a write.
type WriteResult struct {
	// Revision is the one that holds the write. When nothing changed no revision
	// was made, and this is the newest one there is.
	Revision int64
	// Mark is that of the revision.
	Mark uuid.UUID
	// Changed counts the entities that have a new version or are gone.
	Changed int
	// Import is the import of the write, moved on.
	Import Import
}

// MaxCascade bounds the memberships that the deletes of one write may drop.
const MaxCascade = 10_000

// OpError says which operation was refused, and why.
type OpError struct {
	Index int   // of the operation, from 0
	UID   UID   // its entity
	Err   error // ErrMustExist, ErrMustNotExist, ErrStale, ErrNotFound, ErrCycle, ErrTooManyMembers, HasMembersError, or bad JSON
}

// Error names the operation, the entity and the reason.
func (e *OpError) Error() string { return fmt.Sprintf("operation %d: %v: %v", e.Index, e.UID, e.Err) }

// Unwrap returns the reason.
func (e *OpError) Unwrap() error { return e.Err }

// HasMembersError refuses to delete an entity that others name as parent.
type HasMembersError struct {
	Count int // of those others
}

// Error says how many.
func (e HasMembersError) Error() string { return fmt.Sprintf("is a parent of %d entities", e.Count) }

// errUnchanged rolls a write back that would not change anything.
var errUnchanged = errors.New("unchanged")

// WriteEntities applies the operations as one revision. Whatever the error,
// nothing was written, unless it is the commit that failed: then the connection is
// gone and the outcome unknown. A refused operation is an [*OpError]. After
// [ErrPolicyChanged] or [ErrOtherHistory], check the operations again and retry.
//
// An entity that several operations change gets one new version, and one that
// ends as it was gets none.
func (db *DB) WriteEntities(ctx context.Context, w EntityWrite) (result WriteResult, err error) {
	defer wrap(&err, "write entities")
	err = db.inTurn(ctx, func(tx pgx.Tx) error {
		n, p, err := lockAndRead(ctx, tx, w)
		if err != nil {
			return err
		}
		for i, op := range w.Ops {
			if err := p.apply(i, op); err != nil {
				return &OpError{i, op.Entity.UID, err}
			}
		}
		if err := checkMemberships(ctx, tx, p); err != nil {
			return err
		}
		changed := p.changed()
		if len(changed) == 0 {
			result.Revision = n - 1 // the lock is ours: nobody else made a newer one
			if result.Mark, err = readMark(ctx, tx, n-1); err != nil {
				return err
			}
			if w.Import == nil {
				return errUnchanged
			}
			// The import alone is to be committed: the number is as good as never taken.
			if _, err := tx.Exec(ctx, "update revision set n = n - 1"); err != nil {
				return err
			}
		} else {
			result = WriteResult{Revision: n, Changed: len(changed)}
			if result.Mark, err = db.writeVersions(ctx, tx, n, w, changed); err != nil {
				return err
			}
		}
		if w.Import != nil {
			result.Import, err = moveImport(ctx, tx, *w.Import, w.Caller, result.Revision)
		}
		return err
	})
	if err != nil && !errors.Is(err, errUnchanged) {
		return WriteResult{}, err
	}
	return result, nil
}

// lockAndRead takes the next revision, and everything the operations need to know
// in memory: the entities they name and the members that cascades reach.
func lockAndRead(ctx context.Context, tx pgx.Tx, w EntityWrite) (n int64, p *plan, err error) {
	p = newPlan()
	var uids []UID
	var cascades []string // parents to be deleted, and
	var cascadeOps []int  // by which operation
	conditional := false
	for i, op := range w.Ops {
		if p.touch(op.Entity.UID) {
			uids = append(uids, op.Entity.UID)
		}
		if op.Kind == Delete && op.Cascade {
			cascades, cascadeOps = append(cascades, op.Entity.parent()), append(cascadeOps, i)
		}
		conditional = conditional || op.Precondition.IfRevision != nil
	}

	// One round trip, but several statements: each sees what was committed before it
	// began, which for those after the first is all that came before the lock.
	var batch pgx.Batch
	batch.Queue("update revision set n = n + 1 returning n").QueryRow(func(row pgx.Row) error {
		return row.Scan(&n)
	})
	batch.Queue("select coalesce(greatest(max(since), max(until)), 0) from bundles").QueryRow(func(row pgx.Row) error {
		var policies int64
		if err := row.Scan(&policies); err != nil {
			return err
		}
		if policies != w.PolicyRevision {
			return ErrPolicyChanged
		}
		return nil
	})
	checkPosition(&batch, w.At)
	types, ids := split(uids)
	batch.Queue(`
		select named.type, named.id, e.attrs, e.tags, e.parents, e.since, e.until
		from unnest($1::text[], $2::text[]) as named (type, id)
		join lateral (
			select attrs, tags, parents, since, until from entities
			where type = named.type and id = named.id
			order by since desc limit 1
		) e on true`, types, ids).Query(func(rows pgx.Rows) error {
		type version struct {
			entityRow
			Until *int64
		}
		found, err := pgx.CollectRows(rows, pgx.RowToStructByName[version])
		for _, v := range found {
			p.load(v.entity(), v.Until)
		}
		return err
	})
	if conditional {
		// After the entities: the sweeper raises it before it takes one away.
		batch.Queue(selectOldest).QueryRow(func(row pgx.Row) error {
			var oldest int64
			err := row.Scan(&oldest)
			p.forget(oldest)
			return err
		})
	}
	if len(cascades) > 0 {
		batch.Queue(`
			select named.n, e.type, e.id, e.attrs, e.tags, e.parents, e.since
			from unnest($1::text[]) with ordinality as named (parent, n)
			join entities e on e.parents @> array[named.parent] and e.until is null
			order by named.n
			limit $2`, cascades, MaxCascade+1).Query(func(rows pgx.Rows) error {
			type member struct {
				N int64
				entityRow
			}
			found, err := pgx.CollectRows(rows, pgx.RowToStructByName[member])
			for i, m := range found {
				op := cascadeOps[m.N-1]
				if i == MaxCascade {
					return &OpError{op, w.Ops[op].Entity.UID, ErrTooManyMembers}
				}
				p.loadMember(op, m.entity())
			}
			return err
		})
	}
	err = tx.SendBatch(ctx, &batch).Close()
	return n, p, err
}

// checkMemberships refuses a result in which a deleted entity still has members,
// or an entity is its own ancestor.
func checkMemberships(ctx context.Context, tx pgx.Tx, p *plan) error {
	deleted, grown := p.deleted(), p.grown()
	var batch pgx.Batch
	if len(deleted) > 0 {
		parents := make([]string, len(deleted))
		for i, d := range deleted {
			parents[i] = d.uid.parent()
		}
		types, ids := split(p.uids())
		batch.Queue(`
			select named.n, count(*)
			from unnest($1::text[]) with ordinality as named (parent, n)
			join entities e on e.parents @> array[named.parent] and e.until is null
			where not exists (
				select from unnest($2::text[], $3::text[]) as written (type, id)
				where written.type = e.type and written.id = e.id)
			group by named.n`, parents, types, ids).Query(func(rows pgx.Rows) error {
			var i, count int
			_, err := pgx.ForEachRow(rows, []any{&i, &count}, func() error {
				deleted[i-1].members += count
				return nil
			})
			return err
		})
	}
	parentsOf := map[UID][]UID{}
	if len(grown) > 0 {
		var starts []UID
		for _, d := range grown {
			starts = append(starts, d.now.Parents...)
		}
		types, ids := split(starts)
		batch.Queue(`
			with recursive reached (type, id) as (
				select type collate "C", id collate "C"
				from unnest($1::text[], $2::text[]) as named (type, id)
				union
				select split_part(parent, ' ', 1) collate "C",
				       substr(parent, strpos(parent, ' ') + 1) collate "C"
				from reached
				join lateral (
					select parents from entities
					where type = reached.type and id = reached.id and until is null limit 1
				) e on true
				cross join unnest(e.parents) as parent
			)
			select reached.type, reached.id, null::jsonb as attrs, null::jsonb as tags, e.parents, 0::bigint as since
			from reached
			join lateral (
				select parents from entities
				where type = reached.type and id = reached.id and until is null limit 1
			) e on true`, types, ids).Query(func(rows pgx.Rows) error {
			stored, err := pgx.CollectRows(rows, scanEntity)
			for _, e := range stored {
				parentsOf[e.UID] = e.Parents
			}
			return err
		})
	}
	if batch.Len() == 0 {
		return nil
	}
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return err
	}
	for _, d := range deleted {
		if d.members > 0 {
			return &OpError{d.deletedBy, d.uid, HasMembersError{d.members}}
		}
	}
	p.overlay(parentsOf)
	circular := onCycles(parentsOf)
	for _, d := range grown {
		if circular[d.uid] {
			return &OpError{d.grownBy, d.uid, ErrCycle}
		}
	}
	return nil
}

// writeVersions closes the versions that were live and inserts the new ones, with
// the event of it, in one round trip. It returns the mark of the revision.
func (db *DB) writeVersions(ctx context.Context, tx pgx.Tx, n int64, w EntityWrite, changed []*draft) (mark uuid.UUID, err error) {
	type row struct {
		Type    string          `json:"type"`
		ID      string          `json:"id"`
		Attrs   json.RawMessage `json:"attrs"`
		Tags    json.RawMessage `json:"tags"`
		Parents []string        `json:"parents"`
	}
	var gone []UID
	rows := []row{}
	all := make([]UID, len(changed))
	for i, d := range changed {
		all[i] = d.uid
		if d.before != nil {
			gone = append(gone, d.uid)
		}
		if d.now != nil {
			parents := make([]string, len(d.now.Parents))
			for i, p := range d.now.Parents {
				parents[i] = p.parent()
			}
			rows = append(rows, row{d.uid.Type, d.uid.ID, d.now.Attrs, d.now.Tags, parents})
		}
	}
	versions, err := json.Marshal(rows)
	if err != nil {
		return mark, err
	}

	var batch pgx.Batch
	batch.Queue("insert into revisions (n, caller, note) values ($1, $2, $3) returning mark", n, w.Caller, w.Note).QueryRow(
		func(row pgx.Row) error { return row.Scan(&mark) })
	if len(gone) > 0 {
		types, ids := split(gone)
		batch.Queue(`
			update entities set until = $1
			from unnest($2::text[], $3::text[]) as gone (type, id)
			where entities.type = gone.type and entities.id = gone.id and until is null`, n, types, ids)
	}
	if len(rows) > 0 {
		batch.Queue(`
			insert into entities (type, id, attrs, tags, parents, since)
			select type, id, attrs, tags, parents, $1
			from json_to_recordset($2::json) as v (type text, id text, attrs jsonb, tags jsonb, parents text[])`,
			n, versions)
	}
	types, ids := split(all)
	batch.Queue(`
		insert into revision_entries (revision, kind, type, id)
		select $1, 'entity', type, id from unnest($2::text[], $3::text[]) as changed (type, id)`, n, types, ids)
	if db.changes.event != nil {
		c, err := changedEntities(n, w.Caller, changed)
		if err != nil {
			return mark, err
		}
		if err := db.changes.record(ctx, &batch, c); err != nil {
			return mark, err
		}
	}
	return mark, tx.SendBatch(ctx, &batch).Close()
}
