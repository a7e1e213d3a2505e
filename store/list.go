package store

import (
	"context"
	"encoding/json"
	"errors"
	"maps"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// EntityQuery says which entities to list. An entity must match every field that is set.
// The zero value of a field does not filter.
type EntityQuery struct {
	Type string
	// Ancestor selects the entities below it: its members, their members, and so on.
	// ParentTypes are the types whose entities can have members. Members of entities of
	// other types are not looked for, so that a group of a million users needs no million
	// lookups.
	Ancestor    *UID
	ParentTypes []string
	// Attrs is a JSON object. It selects the entities whose attributes of the same names
	// have equal values.
	Attrs []byte

	// After is the UID of the last entity of the page before. The zero UID is before all
	// entities. If Type is set, only its ID counts.
	After UID
	// Limit is the size of a page. Room bounds its bytes.
	Limit int
	Room  Room
}

// MaxGroups bounds the groups below an ancestor that a listing looks into.
const MaxGroups = 10_000

// ListEntities reads a page of entities as they were at the revision, in order of type
// and id. The error is [ErrTooManyGroups] if there are more than [MaxGroups] groups below
// the ancestor, and [ErrSwept] if history does not go back to the revision.
func (db *DB) ListEntities(ctx context.Context, revision int64, q EntityQuery) (page []Entity, err error) {
	defer wrap(&err, "list entities")
	l := listing{revision: revision, attrs: q.Attrs}
	if l.whole, err = wholeValues(q.Attrs); err != nil {
		return nil, err
	}
	err = db.admin.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		if q.Ancestor != nil {
			if l.groups, err = groupsBelow(ctx, conn, revision, *q.Ancestor, q.ParentTypes); err != nil {
				return err
			}
		}
		for _, r := range q.ranges() {
			room := q.Room
			if room != nil && len(page) > 0 {
				// The page has an entity already, so it can end before the first one of this range.
				room = func(bytes int) error {
					if err := q.Room(bytes); err != nil {
						return errNoRoom
					}
					return nil
				}
			}
			found, cut, err := readPage(ctx, conn, "entities_page", listEntities, l.args(r, q.Limit-len(page)), q.Limit-len(page), room, scanEntity)
			if errors.Is(err, errNoRoom) {
				break
			}
			if err != nil {
				return err
			}
			if page = append(page, found...); cut || len(page) == q.Limit {
				break
			}
		}
		return checkSwept(conn.QueryRow(ctx, selectOldest), revision)
	})
	if err != nil {
		return nil, err
	}
	return page, nil
}

// listRange is a range of types and ids. A bound that is nil does not apply.
type listRange struct{ typ, afterID, afterType *string }

// ranges returns the ranges after q.After, in order. An index can begin at each of them,
// and the planner can estimate each. It would estimate (type, id) > (…, …) as type > ….
func (q *EntityQuery) ranges() []listRange {
	var all listRange
	if q.Type != "" {
		all.typ = &q.Type
	}
	if q.After == (UID{}) {
		return []listRange{all}
	}
	if q.Type != "" { // callers send After back to us, so it never widens the query
		return []listRange{{typ: &q.Type, afterID: &q.After.ID}}
	}
	return []listRange{{typ: &q.After.Type, afterID: &q.After.ID}, {afterType: &q.After.Type}}
}

// groupsBelow finds the ancestor and all entities of the types below it, one level at a
// time. It returns them in the form of the parents column.
func groupsBelow(ctx context.Context, q querier, revision int64, ancestor UID, types []string) ([]string, error) {
	groups := []string{ancestor.parent()}
	known := map[string]bool{groups[0]: true}
	for level := groups; len(level) > 0; {
		members := listing{revision: revision, groups: level}
		level = nil
		for i := range types {
			rows, _ := q.Query(ctx, listUIDs, members.args(listRange{typ: &types[i]}, MaxGroups+1)...)
			found, err := pgx.CollectRows(rows, pgx.RowToStructByPos[UID])
			if err != nil {
				return nil, err
			}
			for _, uid := range found {
				if group := uid.parent(); !known[group] {
					known[group] = true
					level = append(level, group)
				}
			}
		}
		if groups = append(groups, level...); len(groups) > MaxGroups {
			return nil, ErrTooManyGroups
		}
	}
	return groups, nil
}

// listing is the part of a query that is the same for all ranges.
type listing struct {
	revision int64
	groups   []string // only their direct members; nil: all
	attrs    []byte   // only those with these attributes; nil: all
	whole    []byte   // the attrs for which @> would accept a part of the value
}

// errNoRoom ends the read of a range of entities before its first one.
var errNoRoom = errors.New("no room")

// args returns the arguments of listEntities and listUIDs for the first entities of a range. The
// statement is planned for the values of each call: then a filter that is not set costs nothing,
// and one that is set finds its index if it selects few entities.
func (l *listing) args(r listRange, limit int) []any {
	return []any{pgx.QueryExecModeCacheDescribe, l.revision, r.typ, r.afterID, r.afterType, l.groups, l.attrs, l.whole, limit}
}

// The versions that were live at revision $1 are in two places, and each is read:
// versions that are still live, which have indexes, and versions that ended later, which
// are few unless the revision is old. listUIDs reads no more than it needs: groups can be large.
const (
	listEntities = `
	select type, id, attrs, tags, parents, since
	from (
		(select type, id, attrs, tags, parents, since` + fromLive + `
		union all
		(select type, id, attrs, tags, parents, since` + fromEnded
	listUIDs = `
	select type, id
	from (
		(select type, id` + fromLive + `
		union all
		(select type, id` + fromEnded
	fromLive = `
		 from entities
		 where until is null` + isListed + `
		 order by type, id
		 limit $8)`
	fromEnded = `
		 from entities
		 where until > $1` + isListed + `
		 order by type, id
		 limit $8)
	) as live
	order by type, id
	limit $8`
)

// && can use the index on parents, but compares every group with every row, which the
// planner does not know. With many groups, = any finds each parent by its hash.
const isListed = `
		 and since <= $1
		 and (starts_with($2, '` + OwnNamespace + `::') is true or not starts_with(type, '` + OwnNamespace + `::'))
		 and ($2::text is null or type = $2)
		 and ($3::text is null or id > $3)
		 and ($4::text is null or type > $4)
		 and ($5::text[] is null or case when cardinality($5) <= 100 then parents && $5
			else exists (select from unnest(parents) as parent where parent = any ($5)) end)
		 and ($6::jsonb is null or attrs @> $6)
		 and ($7::jsonb is null or not exists (
			select from jsonb_each($7) as wanted where attrs -> wanted.key <> wanted.value))`

// wholeValues returns the members of a JSON object that are arrays or objects, nil if
// there are none. @> accepts a part of such a value, so they are compared once more.
func wholeValues(object []byte) ([]byte, error) {
	if object == nil {
		return nil, nil
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(object, &members); err != nil {
		return nil, err
	}
	maps.DeleteFunc(members, func(_ string, v json.RawMessage) bool { return v[0] != '[' && v[0] != '{' })
	if len(members) == 0 {
		return nil, nil
	}
	return json.Marshal(members)
}
