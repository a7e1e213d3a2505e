package store

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// EventQuery filters the events of the log. An event must match every field that is set.
// The zero value of a field does not filter.
type EventQuery struct {
	From, To              time.Time // from (inclusive), to (exclusive)
	Kind, Caller, Subject string
	// Also are further subjects, if Subject is set: an event may be about any of them.
	Also []string

	// BeforeAt and BeforeID are At and ID of the last event of the page before.
	BeforeAt time.Time
	BeforeID uuid.UUID
	// Limit is the size of a page. Room bounds its bytes.
	Limit int
	Room  Room
}

// eventRow is a row of events.
type eventRow struct {
	EventID   uuid.UUID
	At        time.Time
	Kind      string
	Caller    string
	Server    string
	Subject   string
	Revision  *int64
	RequestID *string
	TraceID   *string
	Decisions []uuid.UUID
	Record    []byte
	Batch     uuid.UUID
	Pos       int
	CRC       int32
}

func scanEvent(row pgx.CollectableRow) (Event, error) {
	r, err := pgx.RowToStructByNameLax[eventRow](row)
	return Event{
		ID: r.EventID, At: r.At.UTC(), Kind: r.Kind, Caller: r.Caller, Server: r.Server, Subject: r.Subject,
		Revision: orZero(r.Revision), RequestID: orZero(r.RequestID), TraceID: orZero(r.TraceID),
		Decisions: r.Decisions, Record: r.Record, Batch: r.Batch, Pos: r.Pos, CRC: r.CRC,
	}, err
}

const queryEvents = `
		select ` + eventColumns + `
		from events r
		where ($1::timestamptz is null or at >= $1)
		  and ($2::timestamptz is null or at < $2)
		  and ($3::text is null or kind = $3)
		  and ($4::text is null or caller = $4)
		  and ($5::text is null or subject = $5)
		  and ($6::timestamptz is null or at <= $6)
		  and ($6::timestamptz is null or (at, event_id) < ($6, $7))
		  and ` + ofBatch + `
		order by at desc, event_id desc
		limit $8`

// args returns the arguments of queryEvents, as [DecisionQuery.args] does.
func (q EventQuery) args() []any {
	return []any{
		pgx.QueryExecModeCacheDescribe,
		orNull(q.From), orNull(q.To), orNull(q.Kind), orNull(q.Caller), orNull(q.Subject),
		orNull(q.BeforeAt), q.BeforeID, q.Limit,
	}
}

// queryEventsOfAny is queryEvents for several subjects. It sorts all events of them, and no caller
// has many.
var queryEventsOfAny = strings.Replace(queryEvents, "($5::text is null or subject = $5)", "subject = any ($5::text[])", 1)

// QueryEvents reads a page of events, the newest first. Those of one millisecond are in
// descending order of id.
func (db *DB) QueryEvents(ctx context.Context, q EventQuery) (page []Event, err error) {
	defer wrap(&err, "query events")
	query, args := queryEvents, q.args()
	if q.Subject != "" && len(q.Also) > 0 {
		query, args[5] = queryEventsOfAny, append([]string{q.Subject}, q.Also...)
	}
	page, _, err = readPage(ctx, db.audit, "events_page", query, args, q.Limit, q.Room, scanEvent)
	return page, err
}

// AccessOf reads the ids of all API keys that a caller has or had, and the entities of its grants, as
// far back as the history of entities is kept. Events of their changes have them as subjects.
func (db *DB) AccessOf(ctx context.Context, caller string) (keys []string, grants []UID, err error) {
	defer wrap(&err, "read the keys and grants of a caller")
	rows, _ := db.audit.Query(ctx, "select id from audited_keys() where name = $1", caller)
	if keys, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
		return nil, nil, err
	}
	rows, _ = db.audit.Query(ctx, `
		select distinct type, id
		from entities
		where type = $1 and right(id, length($2)) = $2`, GrantType, " "+caller)
	grants, err = pgx.CollectRows(rows, pgx.RowToStructByPos[UID])
	// A name can end with another name and a space before it.
	return keys, slices.DeleteFunc(grants, func(u UID) bool { return callerOfGrant(u) != caller }), err
}

// UsesQuery asks for reports about the uses of some decisions.
type UsesQuery struct {
	Decisions []uuid.UUID
	// Callers are the callers whose reports are read.
	Callers []string
	// From and To bound the time of the reports, both inclusive.
	From, To time.Time
	// Limit is the largest number of reports to read.
	Limit int
}

// The index has only rows whose decisions are not empty, and the planner does not
// conclude by itself that an array that overlaps another is not empty. It also expects
// many rows for a few ids: without `offset 0` it would read all rows of the time in
// order, up to the limit.
const queryUses = `
		select ` + eventColumns + `
		from (
			select ` + eventColumns + `
			from events r
			where at >= $1 and at <= $2 and kind = 'reuse'
			  and decisions && $3 and decisions <> '{}'
			  and caller = any($4)
			  and ` + ofBatch + `
			offset 0) as reports
		order by at, event_id
		limit $5`

// EachUse calls fn with each report that names one of the decisions, the oldest first. It
// streams them, because there can be many.
func (db *DB) EachUse(ctx context.Context, q UsesQuery, fn func(Event) error) (err error) {
	defer wrap(&err, "read uses of decisions")
	rows, err := db.audit.Query(ctx, queryUses, pgx.QueryExecModeCacheDescribe, q.From, q.To, q.Decisions, q.Callers, q.Limit)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		e, err := scanEvent(rows)
		if err == nil {
			err = fn(e)
		}
		if err != nil {
			return err
		}
	}
	return rows.Err()
}
