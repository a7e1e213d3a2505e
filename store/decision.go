package store

import (
	"context"
	"encoding/binary"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// Decision is a recorded decision: the columns to find it by, and the record
// itself.
type Decision struct {
	// ID is a UUIDv7.
	ID uuid.UUID
	// At is the time in ID, in milliseconds and UTC. A read fills it in. A write ignores
	// it and takes the time from ID, so that the two cannot disagree.
	At       time.Time
	Revision int64
	// Mark is the mark of the revision. If it is set, a write makes sure that the
	// database has that revision. It is neither stored nor read.
	Mark uuid.UUID
	// FieldForbids are policies, as "bundle/id", that denied fields and did not determine the decision.
	// Explained says that somebody tried the question out. Both are neither stored nor read: they say
	// which policies count as used.
	FieldForbids []string
	Explained    bool

	Caller    string
	Server    string
	Principal UID
	Action    UID
	Resource  UID
	Allowed   bool
	DeniedAt  int16    // 1 function, 2 object, 3 field; 0 allowed
	Policies  []string // "bundle/id" of the determining policies
	RequestID string   // may be empty
	TraceID   string   // may be empty
	Fields    []string // leaf paths that were decided, "+path" or "-path"
	Masked    [][]byte // keyed hashes that the record has in place of sensitive values
	Record    []byte   // stored and read byte for byte
	// Batch is its batch in the log, and Pos its place in the batch. A read fills them
	// in. A write ignores them.
	Batch uuid.UUID
	Pos   int
	// CRC is the checksum of the record from when it was written. A read fills it in.
	CRC int32
}

// idTime returns the time in a UUIDv7.
func idTime(id uuid.UUID) time.Time {
	return time.UnixMilli(int64(binary.BigEndian.Uint64(id[:8]) >> 16)).UTC()
}

// decisionRow is a row of decisions.
type decisionRow struct {
	DecisionID    uuid.UUID
	At            time.Time
	Revision      int64
	Caller        string
	Server        string
	PrincipalType string
	PrincipalID   string
	ActionType    string
	ActionID      string
	ResourceType  string
	ResourceID    string
	Allowed       bool
	DeniedAt      *int16
	Policies      []string
	RequestID     *string
	TraceID       *string
	Fields        []string
	Masked        [][]byte
	Record        []byte
	Batch         uuid.UUID
	Pos           int
	CRC           int32
}

func scanDecision(row pgx.CollectableRow) (Decision, error) {
	r, err := pgx.RowToStructByNameLax[decisionRow](row)
	return Decision{
		ID: r.DecisionID, At: r.At.UTC(), Revision: r.Revision, Caller: r.Caller, Server: r.Server,
		Principal: UID{r.PrincipalType, r.PrincipalID},
		Action:    UID{r.ActionType, r.ActionID},
		Resource:  UID{r.ResourceType, r.ResourceID},
		Allowed:   r.Allowed, DeniedAt: orZero(r.DeniedAt), Policies: r.Policies,
		RequestID: orZero(r.RequestID), TraceID: orZero(r.TraceID), Fields: r.Fields, Masked: r.Masked,
		Record: r.Record, Batch: r.Batch, Pos: r.Pos, CRC: r.CRC,
	}, err
}

func orZero[T any](p *T) (value T) {
	if p != nil {
		value = *p
	}
	return value
}

// GetDecision reads one decision by its id. The error is [ErrNotFound] if there is
// none.
func (db *DB) GetDecision(ctx context.Context, id uuid.UUID) (_ Decision, err error) {
	defer wrap(&err, "get decision")
	const query = `
		select ` + decisionColumns + `
		from decisions r
		where at = $1 and decision_id = $2 and ` + ofBatch
	rows, _ := db.audit.Query(ctx, query, idTime(id), id)
	d, err := pgx.CollectExactlyOneRow(rows, scanDecision)
	return d, notFound(err)
}

// DecisionQuery filters the decision log. A decision must match every field that is set.
// The zero value of a field does not filter.
type DecisionQuery struct {
	From, To                    time.Time // from (inclusive), to (exclusive)
	Principal, Action, Resource *UID
	Allowed                     *bool
	DeniedAt                    int16
	Policy                      string // "bundle/id" of a determining policy
	Caller, RequestID, TraceID  string
	Revision                    int64
	Field                       string   // a leaf path that was permitted or denied
	PermittedField              string   // a leaf path that was permitted
	DeniedField                 string   // a leaf path that was denied
	Masked                      []byte   // a keyed hash in the record
	ActionTypes                 []string // nil: all
	// Sample is how many of 65,536 decisions are selected, by random bits of their ids; 0: all.
	Sample int

	// BeforeAt and BeforeID are At and ID of the last decision of the page before.
	BeforeAt time.Time
	BeforeID uuid.UUID
	// Limit is the size of a page, or the number of groups. Room bounds the bytes of a page.
	Limit int
	Room  Room
}

// decisionKeys is the expression of the index decisions_keys: a hash of the principal, and one of
// the resource. principalKey and resourceKey are those of the arguments of decisionFilter. Different
// names can have the same hash, so the names are compared as well. Case keeps the planner from
// multiplying the frequency of a hash by that of its name, which is the same: of a busy principal it
// would expect too few rows, and read all days for a page.
const (
	decisionKeys = `array[
			hashtextextended(principal_id, hashtextextended(principal_type, 0)),
			hashtextextended(resource_id, hashtextextended(resource_type, 1))]`
	principalKey = `hashtextextended($4, hashtextextended($3, 0))`
	resourceKey  = `hashtextextended($8, hashtextextended($7, 1))`
)

// decisionFilter is a condition on rows that are named r. Its parameters are those of
// [DecisionQuery.args]. `at <= $18` follows from the line after it, but Postgres needs it
// to leave partitions out.
const decisionFilter = `
		where ($1::timestamptz is null or at >= $1)
		  and ($2::timestamptz is null or at < $2)
		  and ($3::text is null or ` + decisionKeys + ` @> array[` + principalKey + `]
		       and case when principal_type = $3 then principal_id = $4 else false end)
		  and ($5::text is null or action_type = $5 and action_id = $6)
		  and ($7::text is null or ` + decisionKeys + ` @> array[` + resourceKey + `]
		       and case when resource_type = $7 then resource_id = $8 else false end)
		  and ($9::boolean is null or allowed = $9)
		  and ($10::smallint is null or denied_at = $10 and not allowed)
		  and ($11::text is null or policies @> array[$11])
		  and ($12::text is null or caller = $12)
		  and ($13::text is null or request_id = $13)
		  and ($14::text is null or trace_id = $14)
		  and ($15::bigint is null or revision = $15)
		  and ($16::text is null or fields && array['+' || $16, '-' || $16])
		  and ($17::bytea is null or masked @> array[$17])
		  and ($21::text[] is null or action_type = any($21))
		  and ($22::integer is null or get_byte(uuid_send(decision_id), 14) * 256 + get_byte(uuid_send(decision_id), 15) < $22)
		  and ($23::text is null or fields @> array['+' || $23])
		  and ($24::text is null or fields @> array['-' || $24])
		  and ($18::timestamptz is null or at <= $18)
		  and ($18::timestamptz is null or (at, decision_id) < ($18, $19))
		  and ` + ofBatch

// args returns the arguments of decisionFilter, and before the last two the limit, $20. The first one makes
// Postgres plan the statement anew for the values of each call: then a filter that is not
// set costs nothing, and one that is set finds its index.
func (q DecisionQuery) args() []any {
	principalType, principalID := uidArgs(q.Principal)
	actionType, actionID := uidArgs(q.Action)
	resourceType, resourceID := uidArgs(q.Resource)
	return []any{
		pgx.QueryExecModeCacheDescribe,
		orNull(q.From), orNull(q.To),
		principalType, principalID, actionType, actionID, resourceType, resourceID,
		q.Allowed, orNull(q.DeniedAt), orNull(q.Policy), orNull(q.Caller), orNull(q.RequestID), orNull(q.TraceID),
		orNull(q.Revision), orNull(q.Field), q.Masked,
		orNull(q.BeforeAt), q.BeforeID, q.Limit, q.ActionTypes, orNull(q.Sample),
		orNull(q.PermittedField), orNull(q.DeniedField),
	}
}

const queryDecisions = `
		select ` + decisionColumns + `
		from decisions r` + decisionFilter + `
		order by at desc, decision_id desc
		limit $20`

// QueryDecisions reads a page of decisions, the newest first. Those of one millisecond
// are in descending order of id.
func (db *DB) QueryDecisions(ctx context.Context, q DecisionQuery) (_ []Decision, err error) {
	defer wrap(&err, "query decisions")
	page, _, err := readPage(ctx, db.audit, "decisions_page", queryDecisions, q.args(), q.Limit, q.Room, scanDecision)
	return page, err
}

// orNull turns the zero value into null.
func orNull[T comparable](value T) *T {
	if value == *new(T) {
		return nil
	}
	return &value
}

func uidArgs(uid *UID) (typ, id *string) {
	if uid == nil {
		return nil, nil
	}
	return &uid.Type, &uid.ID
}
