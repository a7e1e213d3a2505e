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
	// RemoveParents removes memberships of a stored entity. One that is missing is no
	// error: Entity.UID, Entity.Parents.
	RemoveParents
	// SetAttributes sets and removes single attributes of a stored entity:
	// Entity.UID, Entity.Attrs, Remove.
	SetAttributes
)

// Op is one operation on one entity.
type Op struct {
	Kind         OpKind
	Entity       Entity
	Remove       []string // names of attributes; one that is missing is no error
	Cascade      bool     // remove the memberships in a deleted entity, instead of refusing to delete it
	Precondition Precondition
}

// Precondition is a condition of an operation. If it does not hold, the whole write is
// refused. The zero value always holds.
type Precondition struct {
	// IfRevision, if not nil: the entity was not made, changed or deleted after that
	// revision ([ErrStale]). Earlier operations of the same write do not count. An entity
	// that is not stored counts as deleted at the oldest revision of the history, unless
	// a later one is known.
	IfRevision *int64
	// MustExist and MustNotExist: before the operation the entity is stored, or is not
	// ([ErrMustExist], [ErrMustNotExist]).
	MustExist, MustNotExist bool
}

// EntityWrite is a list of operations to commit as one revision, or not at all.
type EntityWrite struct {
	// Ops are applied in order, each to the result of the ones before it.
	Ops []Op
	// Caller is stored in the history.
	Caller string
	// Reason is what the caller said; it is recorded.
	Reason string
	// PolicyRevision is the [DB.PolicyRevision] that the operations were checked against:
	// 0 if there was no bundle.
	PolicyRevision int64
	// At, if its number is not 0, is the position that the operations and their
	// preconditions were checked at. If the database does not have it, as after a
	// failover, the error is [ErrOtherHistory].
	At Position
	// Import, if not nil, is the progress of an import, which is stored even if the write
	// changes nothing.
	Import *ImportStep
	// MayDrop, if not nil, is called with the types of the stored entities that no operation names, and
	// whose memberships a cascade removes. Its error refuses the write, and is returned wrapped.
	MayDrop func(types []string) error
	// Once, if not nil, makes the write happen once, even if it changes nothing.
	Once *Once[WriteResult]
}

// WriteResult is the result of a write.
type WriteResult struct {
	// Revision is the revision of the write. If nothing changed, no revision was made,
	// and this is the newest one.
	Revision int64
	// Mark is the mark of the revision.
	Mark uuid.UUID
	// Changed is the number of entities that were written or deleted.
	Changed int
	// Import is the new progress of the import of the write.
	Import Import
}

// maxCascade bounds the memberships that the deletes of one write may remove.
const maxCascade = 10_000

// MaxEntityBytes bounds an entity: its attributes and tags as JSON without white space, and the
// types and ids of its parents.
const MaxEntityBytes = 256 << 10

// EntityTooLargeError refuses an entity that would have more than [MaxEntityBytes].
type EntityTooLargeError struct{ Bytes int }

// Error has the size and the limit.
func (e EntityTooLargeError) Error() string {
	return fmt.Sprintf("has %d bytes of attributes, tags and parents; the limit is %d", e.Bytes, MaxEntityBytes)
}

// OpError refuses an operation.
type OpError struct {
	Index int   // of the operation, from 0
	UID   UID   // its entity
	Err   error // ErrMustExist, ErrMustNotExist, ErrStale, ErrNotFound, ErrCycle, ErrTooManyMembers, HasMembersError, EntityTooLargeError, or bad JSON
}

// Error names the operation, the entity and the reason.
func (e *OpError) Error() string { return fmt.Sprintf("operation %d: %v: %v", e.Index, e.UID, e.Err) }

// Unwrap returns the reason.
func (e *OpError) Unwrap() error { return e.Err }

// HasMembersError refuses to delete an entity that other entities name as parent.
type HasMembersError struct {
	Count int // of those entities
}

// Error says how many entities name it as parent.
func (e HasMembersError) Error() string { return fmt.Sprintf("is a parent of %d entities", e.Count) }

// errUnchanged rolls back a write that changes nothing.
var errUnchanged = errors.New("unchanged")

// WriteEntities applies the operations as one revision. If it returns an error, nothing
// was written, except that the outcome is unknown if the connection broke during the
// commit. A refused operation is an [*OpError]. After [ErrPolicyChanged] or
// [ErrOtherHistory], check the operations again and retry. The error is [ErrRepeated] if there is an
// answer for the key of Once already.
//
// An entity that several operations change gets one new version, or none if it is equal
// to what is stored in the end.
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
		if types := p.memberTypes(); w.MayDrop != nil && len(types) > 0 {
			if err := w.MayDrop(types); err != nil {
				return err
			}
		}
		if err := checkMemberships(ctx, tx, p); err != nil {
			return err
		}
		changed := p.changed()
		if len(changed) == 0 {
			result.Revision = n - 1 // this transaction has the lock, so there is no newer one
			if result.Mark, err = readMark(ctx, tx, n-1); err != nil {
				return err
			}
			if w.Import == nil && w.Once == nil {
				return errUnchanged
			}
			// Only the import or the answer is committed, so the number is given back.
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
			if result.Import, err = moveImport(ctx, tx, *w.Import, w.Caller, result.Revision); err != nil {
				return err
			}
		}
		return w.Once.keep(ctx, tx, w.Caller, result)
	})
	if err != nil && !errors.Is(err, errUnchanged) {
		return WriteResult{}, err
	}
	return result, nil
}

// lockAndRead takes the revision lock, and reads what the operations need: the entities
// that they name, and the members that cascades affect.
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

	// One round trip of several statements. Each sees what was committed before it began,
	// so those after the first see all that was committed before the lock was taken.
	var batch pgx.Batch
	batch.Queue("update revision set n = n + 1 returning n").QueryRow(func(row pgx.Row) error {
		return row.Scan(&n)
	})
	batch.Queue(selectNewestPublish).QueryRow(func(row pgx.Row) error {
		var policies int64
		if err := row.Scan(&policies); err != nil {
			return err
		}
		if policies != w.PolicyRevision {
			return ErrPolicyChanged
		}
		return nil
	})
	checkPosition(&batch, w.At, ErrOtherHistory)
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
		// After the entities: the sweep raises oldest before it removes versions.
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
			limit $2`, cascades, maxCascade+1).Query(func(rows pgx.Rows) error {
			type member struct {
				N int64
				entityRow
			}
			found, err := pgx.CollectRows(rows, pgx.RowToStructByName[member])
			for i, m := range found {
				op := cascadeOps[m.N-1]
				if i == maxCascade {
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

// checkMemberships refuses a plan in which a deleted entity still has members, or in
// which an entity is its own ancestor.
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

// writeVersions ends the live versions of the changed entities, and inserts the new
// versions and the event, in one round trip. It returns the mark of the revision.
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
	batch.Queue("insert into revisions (n, caller) values ($1, $2) returning mark", n, w.Caller).QueryRow(
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
	if db.changes.makeEvent != nil {
		c, err := changedEntities(n, w.Caller, changed)
		if err != nil {
			return mark, err
		}
		c.Reason = w.Reason
		if err := db.changes.record(ctx, &batch, c); err != nil {
			return mark, err
		}
	}
	return mark, tx.SendBatch(ctx, &batch).Close()
}
