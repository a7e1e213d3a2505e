package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// Decision is a recorded decision: the columns to find it by, and the record
// itself.
type Decision struct {
	// ID is a UUIDv7.
	ID uuid.UUID
	// At is the millisecond time inside ID, in UTC. It is read, never written:
	// writes take it from ID, so that the two cannot disagree.
	At        time.Time
	Revision  int64
	Caller    string
	Server    string
	Principal UID
	Action    UID
	Resource  UID
	Allowed   bool
	DeniedAt  int16    // 1 function, 2 object, 3 field; 0 allowed
	Policies  []string // "bundle/id" of the determining ones
	RequestID string   // may be empty
	TraceID   string   // may be empty
	Record    []byte   // stored and given back byte for byte
}

// DecisionWriter appends to the decision log over a connection of its own, so
// that recording never waits for a connection behind reads. It connects when it
// first writes, and again after any error.
type DecisionWriter struct {
	config *pgx.ConnConfig

	mu   sync.Mutex // held for the whole of a write
	conn *pgx.Conn  // nil: not connected
	buf  []byte     // reused from write to write, unless it grew large
}

// keptBuffer is what a writer keeps between writes. Batches are seldom larger.
const keptBuffer = 1 << 20

// NewDecisionWriter returns a writer that is not connected yet. One write at a
// time goes through it: for more, make more.
func (db *DB) NewDecisionWriter() *DecisionWriter {
	return &DecisionWriter{config: db.conn.Copy()}
}

// Write records the decisions, all or none, and returns nil only after the commit.
// After an error they may or may not have been recorded; the ids tell. The error
// is [ErrNoPartition] when the log has no place for one of them.
func (w *DecisionWriter) Write(ctx context.Context, decisions []Decision) (err error) {
	defer func() {
		// pgx may go on reading the buffer after a failed copy.
		if err != nil {
			w.buf = nil
		}
	}()
	defer wrap(&err, "record decisions")
	if len(decisions) == 0 {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buf = appendCopy(w.buf[:0], decisions)
	defer func() {
		if cap(w.buf) > keptBuffer {
			w.buf = nil
		}
	}()
	if w.conn == nil {
		if w.conn, err = pgx.ConnectConfig(ctx, w.config.Copy()); err != nil {
			return err
		}
	}
	// One COPY outside of a transaction is one, and one round trip. Conn.CopyFrom
	// would take another to ask for the columns' types.
	if _, err = w.conn.PgConn().CopyFrom(ctx, bytes.NewReader(w.buf), copyDecisions); err != nil {
		w.drop()
		if isNoPartition(err) {
			err = fmt.Errorf("%w: %w", ErrNoPartition, err)
		}
	}
	return err
}

// Close closes the connection, after the write in progress. A write after that
// connects again.
func (w *DecisionWriter) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drop()
}

func (w *DecisionWriter) drop() {
	if w.conn != nil {
		closeConn(w.conn)
		w.conn = nil
	}
}

const copyDecisions = `
	copy decisions (decision_id, at, revision, caller, server,
	                principal_type, principal_id, action_type, action_id, resource_type, resource_id,
	                allowed, denied_at, policies, request_id, trace_id, record)
	from stdin (format binary)`

// appendCopy encodes the rows of copyDecisions in the binary format of COPY.
func appendCopy(b []byte, decisions []Decision) []byte {
	b = append(b, "PGCOPY\n\xff\r\n\x00\x00\x00\x00\x00\x00\x00\x00\x00"...)
	for i := range decisions {
		d := &decisions[i]
		b = binary.BigEndian.AppendUint16(b, 17)
		b = appendField(b, d.ID[:])
		b = appendInt64(b, idTime(d.ID).UnixMicro()-postgresEpoch)
		b = appendInt64(b, d.Revision)
		for _, s := range [...]string{
			d.Caller, d.Server,
			d.Principal.Type, d.Principal.ID, d.Action.Type, d.Action.ID, d.Resource.Type, d.Resource.ID,
		} {
			b = appendField(b, s)
		}
		b = appendLen(b, 1)
		if d.Allowed {
			b = append(b, 1)
		} else {
			b = append(b, 0)
		}
		if d.DeniedAt == 0 {
			b = appendLen(b, null)
		} else {
			b = appendLen(b, 2)
			b = binary.BigEndian.AppendUint16(b, uint16(d.DeniedAt))
		}
		b = appendTextArray(b, d.Policies)
		b = appendOptional(b, d.RequestID)
		b = appendOptional(b, d.TraceID)
		b = appendField(b, d.Record)
	}
	return binary.BigEndian.AppendUint16(b, 0xffff)
}

const (
	null          = -1
	textOID       = 25
	postgresEpoch = 946684800_000000 // 2000-01-01 in microseconds since 1970
)

func appendLen(b []byte, n int) []byte { return binary.BigEndian.AppendUint32(b, uint32(int32(n))) }

func appendField[T string | []byte](b []byte, value T) []byte {
	return append(appendLen(b, len(value)), value...)
}

func appendOptional(b []byte, s string) []byte {
	if s == "" {
		return appendLen(b, null)
	}
	return appendField(b, s)
}

func appendInt64(b []byte, n int64) []byte {
	return binary.BigEndian.AppendUint64(appendLen(b, 8), uint64(n))
}

func appendTextArray(b []byte, list []string) []byte {
	if len(list) == 0 {
		b = appendLen(b, 12)
		b = appendLen(b, 0) // dimensions
		b = appendLen(b, 0) // no nulls
		return appendLen(b, textOID)
	}
	size := 20
	for _, s := range list {
		size += 4 + len(s)
	}
	b = appendLen(b, size)
	b = appendLen(b, 1) // dimension
	b = appendLen(b, 0) // no nulls
	b = appendLen(b, textOID)
	b = appendLen(b, len(list))
	b = appendLen(b, 1) // the first index
	for _, s := range list {
		b = appendField(b, s)
	}
	return b
}

// idTime is the time inside a UUIDv7.
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
	Record        []byte
}

func scanDecision(row pgx.CollectableRow) (Decision, error) {
	r, err := pgx.RowToStructByName[decisionRow](row)
	return Decision{
		ID: r.DecisionID, At: r.At.UTC(), Revision: r.Revision, Caller: r.Caller, Server: r.Server,
		Principal: UID{r.PrincipalType, r.PrincipalID},
		Action:    UID{r.ActionType, r.ActionID},
		Resource:  UID{r.ResourceType, r.ResourceID},
		Allowed:   r.Allowed, DeniedAt: orZero(r.DeniedAt), Policies: r.Policies,
		RequestID: orZero(r.RequestID), TraceID: orZero(r.TraceID), Record: r.Record,
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
		select decision_id, at, revision, caller, server,
		       principal_type, principal_id, action_type, action_id, resource_type, resource_id,
		       allowed, denied_at, policies, request_id, trace_id, record
		from decisions
		where at = $1 and decision_id = $2`
	rows, _ := db.admin.Query(ctx, query, idTime(id), id)
	d, err := pgx.CollectExactlyOneRow(rows, scanDecision)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotFound
	}
	return d, err
}

// DecisionQuery filters the decision log. The zero value of a field does not
// filter; what is given must all match.
type DecisionQuery struct {
	From, To                    time.Time // from (inclusive), to (exclusive)
	Principal, Action, Resource *UID
	Allowed                     *bool
	DeniedAt                    int16
	Policy                      string // "bundle/id", one of the determining ones
	Caller                      string
	RequestID                   string

	// BeforeAt and BeforeID continue after a page: At and ID of its last decision.
	BeforeAt time.Time
	BeforeID uuid.UUID
	// Limit is the size of a page.
	Limit int
}

// QueryDecisions reads a page of decisions, newest first; those of the same
// millisecond by id, backwards.
func (db *DB) QueryDecisions(ctx context.Context, q DecisionQuery) (_ []Decision, err error) {
	defer wrap(&err, "query decisions")
	// `at <= $14` follows from the line after it, but only it leaves partitions out.
	const query = `
		select decision_id, at, revision, caller, server,
		       principal_type, principal_id, action_type, action_id, resource_type, resource_id,
		       allowed, denied_at, policies, request_id, trace_id, record
		from decisions
		where ($1::timestamptz is null or at >= $1)
		  and ($2::timestamptz is null or at < $2)
		  and ($3::text is null or principal_type = $3 and principal_id = $4)
		  and ($5::text is null or action_type = $5 and action_id = $6)
		  and ($7::text is null or resource_type = $7 and resource_id = $8)
		  and ($9::boolean is null or allowed = $9)
		  and ($10::smallint is null or denied_at = $10 and not allowed)
		  and ($11::text is null or $11 = any(policies))
		  and ($12::text is null or caller = $12)
		  and ($13::text is null or request_id = $13)
		  and ($14::timestamptz is null or at <= $14)
		  and ($14::timestamptz is null or (at, decision_id) < ($14, $15))
		order by at desc, decision_id desc
		limit $16`
	principalType, principalID := uidArgs(q.Principal)
	actionType, actionID := uidArgs(q.Action)
	resourceType, resourceID := uidArgs(q.Resource)
	// Planned anew for these values each time: a filter that is not there then costs
	// nothing, and one that is finds its index.
	rows, _ := db.admin.Query(ctx, query, pgx.QueryExecModeCacheDescribe,
		orNull(q.From), orNull(q.To),
		principalType, principalID, actionType, actionID, resourceType, resourceID,
		q.Allowed, orNull(q.DeniedAt), orNull(q.Policy), orNull(q.Caller), orNull(q.RequestID),
		orNull(q.BeforeAt), q.BeforeID, q.Limit)
	return pgx.CollectRows(rows, scanDecision)
}

// orNull makes the zero value null.
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
