package store

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// UID names an entity. Neither part holds a zero byte; Type holds no space.
type UID struct {
	Type string
	ID   string
}

// String returns Type::"ID", for messages.
func (u UID) String() string { return fmt.Sprintf("%s::%q", u.Type, u.ID) }

// parent is the UID in the form of the parents column.
func (u UID) parent() string { return u.Type + " " + u.ID }

// compare orders UIDs in the order of the tables.
func (u UID) compare(v UID) int {
	if c := strings.Compare(u.Type, v.Type); c != 0 {
		return c
	}
	return strings.Compare(u.ID, v.ID)
}

// split turns UIDs into the two arrays that SQL unnests.
func split(uids []UID) (types, ids []string) {
	types, ids = make([]string, len(uids)), make([]string, len(uids))
	for i, u := range uids {
		types[i], ids[i] = u.Type, u.ID
	}
	return types, ids
}

// Entity is one version of a stored entity.
type Entity struct {
	UID
	// Attrs and Tags are JSON objects as Postgres prints them, which are equal to what
	// was written but not the same bytes. In a write, empty stands for {}.
	Attrs, Tags []byte
	// Parents is the set of direct parents, whether or not they are stored. A read
	// returns it in order of type and id.
	Parents []UID
	// Since is the revision that wrote this version. Writes ignore it.
	Since int64
}

// entityRow is a row of entities; scanEntity makes it an Entity.
type entityRow struct {
	Type    string
	ID      string
	Attrs   []byte
	Tags    []byte
	Parents []string
	Since   int64
}

func (r entityRow) entity() Entity {
	e := Entity{UID: UID{r.Type, r.ID}, Attrs: r.Attrs, Tags: r.Tags, Since: r.Since}
	if len(r.Parents) > 0 {
		e.Parents = make([]UID, len(r.Parents))
	}
	for i, p := range r.Parents {
		e.Parents[i].Type, e.Parents[i].ID, _ = strings.Cut(p, " ")
	}
	return e
}

func scanEntity(row pgx.CollectableRow) (Entity, error) {
	r, err := pgx.RowToStructByName[entityRow](row)
	return r.entity(), err
}

// What entities weigh when they are loaded: about the work that they cause, in bytes.
const (
	entityWeight = 256 // besides its attributes, tags and parents
	parentWeight = 64  // besides its type and id
	weightUnit   = entityWeight
)

// Weight returns what the entity weighs in a load: the bytes of its attributes and tags as
// JSON and of the names of its parents, 256 for the entity and 64 for each parent.
func (e *Entity) Weight() int64 {
	w := int64(entityWeight + len(e.Attrs) + len(e.Tags))
	for _, p := range e.Parents {
		w += int64(parentWeight + len(p.Type) + 1 + len(p.ID))
	}
	return w
}

// TooLargeError refuses a load of entities that weigh more than it may read. It is an
// [ErrTooLarge].
type TooLargeError struct {
	// Most is the most that the load may weigh: see [Entity.Weight].
	Most int64
	// Entities and Parents count what was read of it before the load ended.
	Entities, Parents int
	// Heaviest is the entity that weighs most of them, and Weight what it weighs.
	Heaviest UID
	Weight   int64
}

// Error says what was read, and which entity weighs most.
func (e *TooLargeError) Error() string {
	return fmt.Sprintf("weigh more than %d bytes: %d entities with %d parents so far, %d bytes of them for %s", e.Most, e.Entities, e.Parents, e.Weight, e.Heaviest)
}

// Is makes it an [ErrTooLarge].
func (e *TooLargeError) Is(target error) bool { return target == ErrTooLarge }

// selectSlice reads the entities that $2 and $3 name, with their ancestors, at revision $1.
// It ends after $4 units of weight.
//
// UNION drops what was reached before, so that cycles end. The lateral joins look up one
// entity at a time by the primary key. Without them the planner would read all entities,
// because it cannot know how few of them are asked for.
//
// Each entity has one row for each unit that it weighs, and only the first is returned. So
// the limit bounds all that the query does: it fetches an entity before it follows the
// parents of that entity, and stops when the limit is reached. A limit of entities alone
// would not bound the parents, which may all be the same few entities.
const selectSlice = `
	with recursive reached (type, id) as (
		select type collate "C", id collate "C"
		from unnest($2::text[], $3::text[]) as named (type, id)
		union
		select split_part(parent, ' ', 1) collate "C",
		       substr(parent, strpos(parent, ' ') + 1) collate "C"
		from reached
		join lateral (
			select parents, until from entities
			where type = reached.type and id = reached.id and since <= $1
			order by since desc limit 1
		) e on e.until is null or e.until > $1
		cross join unnest(e.parents) as parent
	)
	select type, id, attrs, tags, parents, since
	from (
		select reached.type, reached.id, e.attrs, e.tags, e.parents, e.since, unit
		from reached
		join lateral (
			select attrs::text as attrs, tags::text as tags, parents, since, until,
			       ` + weightOfRow + ` as weight
			from entities
			where type = reached.type and id = reached.id and since <= $1
			order by since desc limit 1
		) e on e.until is null or e.until > $1
		cross join lateral generate_series(1, e.weight / ` + weightUnitText + `) as unit
		limit $4
	) as units
	where unit = 1`

// weightOfRow is [Entity.Weight] in SQL, and weightUnitText is weightUnit.
const (
	weightUnitText = "256"
	weightOfRow    = `256 + octet_length(attrs::text) + octet_length(tags::text)
			       + 64 * cardinality(parents) + octet_length(array_to_string(parents, ''))`
)

// LoadEntities reads the named entities as they were at the revision, with all their
// ancestors: each once, in any order, in one round trip. Entities that are not stored are
// left out. The error is a [TooLargeError] if all together weigh more than most, and
// [ErrSwept] if history does not go back to the revision.
func (db *DB) LoadEntities(ctx context.Context, revision int64, uids []UID, most int64) (_ []Entity, err error) {
	defer wrap(&err, "load entities")
	return loadEntities(ctx, db.pool, revision, uids, most)
}

func loadEntities(ctx context.Context, pool *pgxpool.Pool, revision int64, uids []UID, most int64) (found []Entity, err error) {
	var batch pgx.Batch
	queueSlice(&batch, revision, uids, most, &found)
	batch.Queue(selectOldest).QueryRow(func(row pgx.Row) error { return checkSwept(row, revision) })
	if err := pool.SendBatch(ctx, &batch).Close(); err != nil {
		return nil, err
	}
	return found, nil
}

// LoadEntitiesAt is LoadEntities at a position. It reads from a standby that has the
// position, if there is one. The error is [ErrBehind] if the primary does not have it
// either, as after a failover: the revision is lost, or its number means another content
// now. A load that may weigh more than [LargeLoad] has more time on a standby.
func (db *DB) LoadEntitiesAt(ctx context.Context, at Position, uids []UID, most int64) (_ []Entity, err error) {
	defer wrap(&err, "load entities")
	if at.Number == 0 {
		return nil, nil // before the first write
	}
	for _, s := range db.standbys.inTurn() {
		if found, ok, err := s.load(ctx, at, uids, most); ok {
			return found, err
		}
	}
	return loadAt(ctx, db.pool, at, uids, most)
}

// loadAt reads a slice in one round trip. It looks for the position in the same round
// trip, because each connection can lead to another server than the one that the position
// was read from.
func loadAt(ctx context.Context, pool *pgxpool.Pool, at Position, uids []UID, most int64) (found []Entity, err error) {
	var batch pgx.Batch
	// First the position: what the second statement sees is not older.
	checkPosition(&batch, at, ErrBehind)
	queueSlice(&batch, at.Number, uids, most, &found)
	if err := pool.SendBatch(ctx, &batch).Close(); err != nil {
		return nil, err
	}
	return found, nil
}

func queueSlice(batch *pgx.Batch, revision int64, uids []UID, most int64, found *[]Entity) {
	types, ids := split(uids)
	batch.Queue(selectSlice, revision, types, ids, most/weightUnit+1).Query(func(rows pgx.Rows) (err error) {
		*found, err = collectSlice(rows, most)
		return err
	})
}

// collectSlice refuses a part of a slice: a decision on a part of the ancestors could be
// wrong.
func collectSlice(rows pgx.Rows, most int64) ([]Entity, error) {
	found, err := pgx.CollectRows(rows, scanEntity)
	if err != nil {
		return nil, err
	}
	large := TooLargeError{Most: most, Entities: len(found)}
	var all int64
	for i := range found {
		e := &found[i]
		w := e.Weight()
		all += w
		large.Parents += len(e.Parents)
		if w > large.Weight {
			large.Weight, large.Heaviest = w, e.UID
		}
	}
	if all > most { // so it is if the query has reached its limit
		return nil, &large
	}
	return found, nil
}

// StoredAt returns which of the named entities are stored at a position. The error is
// [ErrBehind] if the database does not have it.
func (db *DB) StoredAt(ctx context.Context, at Position, uids []UID) (found []UID, err error) {
	defer wrap(&err, "look for entities")
	if at.Number == 0 {
		return nil, nil // before the first write
	}
	types, ids := split(uids)
	var batch pgx.Batch
	checkPosition(&batch, at, ErrBehind)
	batch.Queue(`
		select named.type, named.id
		from unnest($2::text[], $3::text[]) as named (type, id)
		join lateral (
			select until from entities
			where type = named.type collate "C" and id = named.id collate "C" and since <= $1
			order by since desc limit 1
		) e on e.until is null or e.until > $1`, at.Number, types, ids).Query(func(rows pgx.Rows) (err error) {
		found, err = pgx.CollectRows(rows, pgx.RowToStructByPos[UID])
		return err
	})
	return found, db.admin.SendBatch(ctx, &batch).Close()
}

// GetEntity reads one entity as it was at the revision. The error is [ErrNotFound] if it
// was not stored then, and [ErrSwept] if history does not go back to the revision.
func (db *DB) GetEntity(ctx context.Context, revision int64, uid UID) (e Entity, err error) {
	defer wrap(&err, "get entity")
	var found []Entity
	var batch pgx.Batch
	batch.Queue(`
		select type, id, attrs, tags, parents, since
		from entities
		where type = $2 and id = $3 and since <= $1 and (until is null or until > $1)`,
		revision, uid.Type, uid.ID).Query(func(rows pgx.Rows) (err error) {
		found, err = pgx.CollectRows(rows, scanEntity)
		return err
	})
	batch.Queue(selectOldest).QueryRow(func(row pgx.Row) error { return checkSwept(row, revision) })
	if err := db.admin.SendBatch(ctx, &batch).Close(); err != nil {
		return e, err
	}
	if len(found) == 0 {
		return e, ErrNotFound
	}
	return found[0], nil
}

// EachEntity calls fn with every entity of the types, or of all types if types is nil, as
// they were at the revision, in any order. It streams them, so fn may be slow. The first
// error of fn ends the stream and is returned. If history does not go back to the
// revision, the error is [ErrSwept] and fn is not called.
func (db *DB) EachEntity(ctx context.Context, revision int64, types []string, fn func(Entity) error) (err error) {
	defer wrap(&err, "read entities")
	const query = `
		select type, id, attrs, tags, parents, since
		from entities
		where ($2::text[] is null or type = any($2))
		  and since <= $1 and (until is null or until > $1)`
	return pgx.BeginTxFunc(ctx, db.admin, oneSnapshot, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "set local statement_timeout = 0"); err != nil {
			return err
		}
		if err := checkSwept(tx.QueryRow(ctx, selectOldest), revision); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, query, pgx.QueryExecModeCacheDescribe, revision, types)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			e, err := scanEntity(rows)
			if err != nil {
				return err
			}
			if err := fn(e); err != nil {
				return err
			}
		}
		return rows.Err()
	})
}
