package store

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// EventQuery filters the events of the log. The zero value of a field does not
// filter; what is given must all match.
type EventQuery struct {
	From, To              time.Time // from (inclusive), to (exclusive)
	Kind, Caller, Subject string

	// BeforeAt and BeforeID continue after a page: At and ID of its last event.
	BeforeAt time.Time
	BeforeID uuid.UUID
	// Limit is the size of a page.
	Limit int
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

// args are the arguments of queryEvents, as those of [DecisionQuery].
func (q EventQuery) args() []any {
	return []any{
		pgx.QueryExecModeCacheDescribe,
		orNull(q.From), orNull(q.To), orNull(q.Kind), orNull(q.Caller), orNull(q.Subject),
		orNull(q.BeforeAt), q.BeforeID, q.Limit,
	}
}

// QueryEvents reads a page of events, newest first; those of the same millisecond by
// id, backwards.
func (db *DB) QueryEvents(ctx context.Context, q EventQuery) (_ []Event, err error) {
	defer wrap(&err, "query events")
	rows, _ := db.audit.Query(ctx, queryEvents, q.args()...)
	return pgx.CollectRows(rows, scanEvent)
}

// UsesQuery asks for reports of the uses of some decisions.
type UsesQuery struct {
	Decisions []uuid.UUID
	// Callers are those whose reports are wanted.
	Callers []string
	// From and To bound the time of the reports, both inclusive.
	From, To time.Time
	// Limit is how many reports are read at most.
	Limit int
}

// What is not empty is in an index, and the planner has to be told that what
// overlaps is not empty. It takes a few ids for many rows: without `offset 0` it
// would rather read all of the time in order, up to the limit.
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

// EachUse calls fn with each report that names one of the decisions, the oldest
// first. They are not gathered: there can be many.
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
