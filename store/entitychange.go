package store

import (
	"context"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ChangeKind says what a change did to an entity.
type ChangeKind int

// The kinds of changes.
const (
	EntityCreated ChangeKind = iota + 1
	EntityChanged
	EntityDeleted
)

// EntityChange is a change of one entity.
type EntityChange struct {
	Revision int64
	At       time.Time // by the clock of the database
	Caller   string
	UID      UID `db:"-"`
	Kind     ChangeKind
}

// ChangeQuery filters the changes of entities. A change must match every field that is
// set. The zero value of a field does not filter.
type ChangeQuery struct {
	UID      *UID
	Type     string
	Caller   string
	From, To time.Time // from (inclusive), to (exclusive)

	// BeforeRevision and AfterUID are Revision and UID of the last change of the page
	// before. 0 begins with the newest change.
	BeforeRevision int64
	AfterUID       UID
	// Limit is the size of a page.
	Limit int
}

// QueryEntityChanges reads a page of changes, the newest first. Those of one revision are
// in order of type and id. It leaves out the oldest revision of the history, whose
// changes are not known any more.
func (db *DB) QueryEntityChanges(ctx context.Context, q ChangeQuery) (page []EntityChange, err error) {
	defer wrap(&err, "query entity changes")
	if q.BeforeRevision == 0 {
		q.BeforeRevision = math.MaxInt64
	}
	query := selectChanges
	args := []any{pgx.QueryExecModeCacheDescribe, // as in QueryDecisions
		q.BeforeRevision, q.AfterUID.Type, q.AfterUID.ID, q.Type, orNull(q.Caller), orNull(q.From), orNull(q.To), q.Limit}
	if q.UID != nil {
		query, args = selectChangesOf, append(args, q.UID.Type, q.UID.ID)
	}
	var oldest int64
	err = db.admin.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		rows, _ := conn.Query(ctx, query, args...)
		if page, err = pgx.CollectRows(rows, scanChange); err != nil {
			return err
		}
		// After the page: see checkSwept.
		return conn.QueryRow(ctx, selectOldest).Scan(&oldest)
	})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(page, func(c EntityChange) bool { return c.Revision <= oldest }), nil
}

func scanChange(r pgx.CollectableRow) (EntityChange, error) {
	type row struct {
		EntityChange
		Type, ID string
	}
	c, err := pgx.RowToStructByName[row](r)
	c.UID = UID{c.Type, c.ID}
	return c.EntityChange, err
}

// selectChanges reads entries from the newest revision to older ones. The kind of a
// change follows from the versions that begin and end at its revision, which are looked
// up for the page alone.
const selectChanges = `
	select page.revision, page.at, page.caller, page.type, page.id,
	       case when made.since is null then 3 when before.until = page.revision then 2 else 1 end as kind
	from (
		select e.revision, r.at, r.caller, e.type, e.id
		from revision_entries e
		join revisions r on r.n = e.revision
		where e.kind = 'entity' and (starts_with($4, '` + OwnNamespace + `::') or not starts_with(e.type, '` + OwnNamespace + `::'))
		  and e.revision <= $1 and r.n <= $1 and (e.revision < $1 or (e.type, e.id) > ($2, $3))
		  and ($4 = '' or e.type = $4)
		  and ($5::text is null or r.caller = $5)
		  and ($6::timestamptz is null or r.at >= $6)
		  and ($7::timestamptz is null or r.at < $7)
		order by e.revision desc, e.type, e.id
		limit $8
	) as page
	left join lateral (
		select since from entities
		where type = page.type and id = page.id and since = page.revision
	) as made on true
	left join lateral (
		select until from entities
		where type = page.type and id = page.id and since < page.revision
		order by since desc limit 1
	) as before on true
	order by page.revision desc, page.type, page.id`

// selectChangesOf reads the versions of one entity, the newest first, by the primary key.
// A version begins with a change. It ends with another change, unless the next version
// begins at the same revision.
const selectChangesOf = `
	select change.revision, r.at, r.caller, $9 as type, $10 as id, change.kind
	from (
		select since, until, lag(since) over newest as next, lead(until) over newest as previous
		from entities
		where type = $9 and id = $10 and since <= $1
		window newest as (order by since desc)
	) as version
	cross join lateral (values
		(case when until is distinct from next then until end, 3),
		(since, case when previous = since then 2 else 1 end)
	) as change (revision, kind)
	join revisions r on r.n = change.revision
	where change.revision <= $1 and r.n <= $1 and (change.revision < $1 or ($9, $10) > ($2, $3))
	  and ($4 = '' or $4 = $9)
	  and ($5::text is null or r.caller = $5)
	  and ($6::timestamptz is null or r.at >= $6)
	  and ($7::timestamptz is null or r.at < $7)
	order by version.since desc, change.revision desc
	limit $8`
