package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
)

// Event is a record that is not a decision: the columns to find it by, and the record
// itself.
type Event struct {
	// ID is a UUIDv7.
	ID uuid.UUID
	// At is the time in ID, in milliseconds and UTC. A read fills it in. A write ignores
	// it.
	At time.Time
	// Kind is one word. Subject is what the event is about.
	Kind, Caller, Server, Subject string
	Revision                      int64  // of a change; 0 for other kinds
	RequestID, TraceID            string // may be empty
	// Decisions are the decisions whose uses it reports.
	Decisions []uuid.UUID
	Record    []byte // stored and read byte for byte
	// Batch is its batch in the log, and Pos its place in the batch. A read fills them
	// in. A write ignores them.
	Batch uuid.UUID
	Pos   int
	// CRC is the checksum of the record from when it was written. A read fills it in.
	CRC int32
}

// LogWriter appends batches to the log over a connection of its own, so that recording
// never waits for a connection that reads use. It connects at the first write, and again
// after the connection broke.
type LogWriter struct {
	sessions *sessions
	config   *pgx.ConnConfig
	id       uuid.UUID
	server   string
	mode     auditlog.Mode
	bound    int

	trouble atomic.Bool // the last attempt failed without a refusal

	mu      sync.Mutex // held for the whole of an append
	seq     int64      // of the next batch
	unclean []auditlog.Unclean
	known   bool      // registered in the database
	conn    *pgx.Conn // nil: not connected
	buf     []byte    // used again for the next batch, unless it grew large
}

// keptBuffer is the largest buffer that a writer keeps for the next batch. Most batches
// are smaller.
const keptBuffer = 1 << 20

// NewLogWriter returns a writer for a server, which does not connect yet. bound is the
// largest number of answered decisions that a crash of the server can lose: 0 in strict
// mode. A writer appends one batch at a time. For more at a time, make more writers.
func (db *DB) NewLogWriter(server string, mode auditlog.Mode, bound int) *LogWriter {
	return &LogWriter{sessions: &db.sessions, config: as(db.connConfig, writerRole), id: uuid.New(), server: server, mode: mode, bound: bound}
}

// Appended says where a batch is in the log.
type Appended struct {
	// Leaf is its place in the log, from 0.
	Leaf int64
	// Position is the newest revision, read while the batch was written.
	Position Position
	// Asked is the time when the batch was sent. The position is not older.
	Asked time.Time
}

// Append records decisions and events as one batch, all or none, and returns after the
// commit. All must be of one day (UTC), because days are dropped as a whole.
//
// If the reply to a commit is lost, Append finds out until ctx ends whether the commit
// happened, so nothing is recorded twice. If ctx ends before that, the batch may be in
// the log although Append returns an error. The error is [ErrNoPartition] if the log has
// no partition for the day, [ErrBehind] if the database does not have the revision that a
// decision was made at, and [ErrRecorded] if an earlier append, whose outcome was
// unknown, succeeded.
func (w *LogWriter) Append(ctx context.Context, decisions []Decision, events []Event) (done Appended, err error) {
	defer wrap(&err, "append to the log")
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.connect(ctx); err != nil {
		return done, err // nothing was sent
	}
	b := sealBatch(auditlog.Header{
		Writer: w.id, WriterSeq: w.seq, Server: w.server, Mode: w.mode, Unclean: w.unclean,
	}, decisions, events)
	w.seq++ // even if it is refused: an attempt under this number may still succeed
	for again := false; ; again = true {
		var refused bool
		if err = w.connect(ctx); err == nil {
			done, refused, err = w.try(ctx, b, again, decisions, events)
		}
		w.trouble.Store(err != nil && !refused)
		if err == nil {
			w.unclean = nil
		}
		if err == nil || refused {
			return done, err
		}
		// The statement is not canceled in Postgres. A cancel request would also end a commit's wait
		// for a synchronous standby: find would then see a batch that a failover can lose. What runs
		// on ends by itself, or at statement_timeout.
		w.drop()
		select {
		case <-ctx.Done():
			return done, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// try sends the batch, unless an earlier attempt put it into the log. If refused is true,
// the server says that this attempt wrote nothing.
func (w *LogWriter) try(ctx context.Context, b sealedBatch, again bool, decisions []Decision, events []Event) (done Appended, refused bool, err error) {
	if again {
		if done.Leaf, err = w.find(ctx, b); !errors.Is(err, pgx.ErrNoRows) {
			return done, false, err
		}
	}
	done.Asked = time.Now()
	span := traceAppend(ctx)
	done.Leaf, done.Position, err = w.send(ctx, b, decisions, events)
	endAppend(span, err)
	var pgErr *pgconn.PgError
	switch {
	case !errors.As(err, &pgErr):
		return done, false, err
	case again && pgErr.ConstraintName == "audit_batches_writer_writer_seq_key":
		// The earlier attempt succeeded in the meantime.
		done.Leaf, err = w.find(ctx, b)
		return done, false, err
	case pgErr.Code == "CP001": // of append_batch
		err = fmt.Errorf("%w: %w", ErrBehind, err)
	case pgErr.Code == "23505" && (strings.HasPrefix(pgErr.TableName, "decisions_") || strings.HasPrefix(pgErr.TableName, "events_")):
		err = fmt.Errorf("%w: %w", ErrRecorded, err)
	case isNoPartition(err):
		err = fmt.Errorf("%w: %w", ErrNoPartition, err)
	case pgErr.Code == "26000": // invalid_sql_statement_name: the statement that connect prepared is missing
		err = fmt.Errorf("%w (%w)", ErrPooler, err)
		w.drop()
	}
	// SQLSTATE class 57: the commit may have happened, so this is not a refusal.
	return done, pgErr.Code[:2] != "57", err
}

// MergeLogKeys merges what appends have added to the index of decisions by principal and resource
// since the last merge. It does not stop appends. Without it, an append does it now and then, which
// takes up to seconds.
func (db *DB) MergeLogKeys(ctx context.Context) (err error) {
	defer wrap(&err, "merge the index of decisions")
	_, err = db.admin.Exec(ctx, "select merge_log_keys()")
	return err
}

// probeRows and probeRecord are the rows of a probe, and the bytes of the record of each.
const (
	probeRows   = 256
	probeRecord = 1 << 10
)

// Probe finds out whether the log has room: it writes some hundred kilobytes of decisions of
// today into it, and takes them back. An empty batch alone often fits into a full disk.
func (w *LogWriter) Probe(ctx context.Context) (err error) {
	defer wrap(&err, "probe the log")
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.connect(ctx); err != nil {
		return err
	}
	decisions := make([]Decision, probeRows)
	for i := range decisions {
		id, err := uuid.NewV7()
		if err != nil {
			return err
		}
		record := make([]byte, probeRecord)
		_, _ = rand.Read(record) // never fails
		decisions[i] = Decision{ID: id, Server: w.server, Record: record}
	}
	tx, err := w.conn.Begin(ctx)
	if err == nil {
		_, err = w.conn.PgConn().CopyFrom(ctx, bytes.NewReader(appendDecisions(nil, uuid.New(), decisions)), copyDecisions)
		if undo := tx.Rollback(ctx); err == nil {
			err = undo
		}
	}
	if w.conn.IsClosed() {
		w.drop()
	}
	return err
}

// IsDiskFull reports whether an error is that the disk of the database is full.
func IsDiskFull(err error) bool { return sqlState(err) == "53100" }

// IsReadOnly reports whether an error is that the database accepts no writes.
func IsReadOnly(err error) bool { return sqlState(err) == "25006" }

// Trouble reports whether the last attempt failed without a refusal. It may be tried again
// now.
func (w *LogWriter) Trouble() bool { return w.trouble.Load() }

// sealedBatch holds the arguments of append_batch.
type sealedBatch struct {
	id            uuid.UUID
	seq           int64
	rows          int
	header        []byte
	first, latest time.Time
	unclean       []auditlog.Unclean
}

// newBatchID makes the id of a batch. Ids of one time are close together in the index of the ids,
// so a commit changes no page of it that was not used for long.
func newBatchID() uuid.UUID { return uuid.Must(uuid.NewV7()) }

// sealBatch hashes the rows, and makes the header that commits to them.
func sealBatch(h auditlog.Header, decisions []Decision, events []Event) sealedBatch {
	b := sealedBatch{id: newBatchID(), seq: h.WriterSeq, rows: len(decisions) + len(events), unclean: h.Unclean}
	leaves := make([]tlog.Hash, 0, b.rows)
	add := func(id uuid.UUID, record []byte) {
		at := idTime(id)
		if len(leaves) == 0 || at.Before(b.first) {
			b.first = at
		}
		if at.After(b.latest) {
			b.latest = at
		}
		leaves = append(leaves, auditlog.Hash(record))
	}
	for i := range decisions {
		add(decisions[i].ID, decisions[i].Record)
	}
	for i := range events {
		add(events[i].ID, events[i].Record)
	}
	h.Batch, h.Made, h.Rows, h.Root = b.id, time.Now(), b.rows, auditlog.Root(leaves)
	h.First, h.Last = b.first, b.latest
	b.header = h.Bytes()
	return b
}

// args returns the arguments of append_batch, in binary. d is the decision whose revision the
// database must have, or nil.
func (b sealedBatch) args(writer uuid.UUID, d *Decision) [][]byte {
	day, first, latest := time.Now(), []byte(nil), []byte(nil)
	if b.rows > 0 {
		day, first, latest = b.first, binaryTime(b.first), binaryTime(b.latest)
	}
	var revision, mark []byte
	if d != nil {
		revision, mark = binaryInt64(d.Revision), d.Mark[:]
	}
	return [][]byte{
		b.id[:], writer[:], binaryInt64(b.seq), binaryInt32(b.rows), b.header, binaryDate(day), first, latest, revision, mark,
	}
}

// connect connects if there is no connection, and registers the writer in the database.
func (w *LogWriter) connect(ctx context.Context) (err error) {
	if w.conn != nil {
		return nil
	}
	w.sessions.tried.Store(false) // there may be a pooler now that was not there at the last connection
	conn, err := w.sessions.connect(ctx, w.config)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			closeConn(conn)
		}
	}()
	// The lock says that the writer lives, and ends with the session. It is shared,
	// because the session of a broken connection may still exist. Only register looks for
	// it, and never waits for it: if another login holds it, this writer goes on without it.
	_, err = conn.Exec(ctx, "select pg_try_advisory_lock_shared(hashtextextended($1, 0))", w.lockName(w.id))
	if err != nil {
		return err
	}
	// PREPARE as SQL: a pooler that keeps prepared statements for clients that share sessions does not
	// notice these.
	for _, sql := range []string{
		"prepare append_batch(uuid, uuid, bigint, int, bytea, date, timestamptz, timestamptz, bigint, uuid) as " + appendBatch,
		"prepare writers_ended(uuid[]) as update audit_writers set ended = true where writer = any($1)",
	} {
		if _, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
	}
	for name, sql := range map[string]string{"decisions": copyDecisions, "events": copyEvents} {
		if _, err := conn.Prepare(ctx, name, sql); err != nil { // PREPARE takes no COPY
			return err
		}
	}
	if !w.known {
		if err := w.register(ctx, conn); err != nil {
			return err
		}
		w.known = true
	}
	w.conn = conn
	return nil
}

func (w *LogWriter) lockName(id uuid.UUID) string { return "cedarpost.writer." + id.String() }

// register adds the writer, and finds writers of the same server that ended without a
// call of Close. The next batch names them.
func (w *LogWriter) register(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, "insert into audit_writers (writer, server, bound) values ($1, $2, $3) on conflict do nothing",
		w.id, w.server, w.bound)
	if err != nil {
		return err
	}
	rows, _ := conn.Query(ctx, `
		select writer, bound from audit_writers
		where server = $1 and writer <> $2 and not ended
		order by started_at
		limit 500 -- a header has to hold them; the next batch has the next ones`, w.server, w.id)
	open, err := pgx.CollectRows(rows, pgx.RowToStructByPos[auditlog.Unclean])
	if err != nil {
		return err
	}
	for _, u := range open {
		// Another server of the same name may be alive. The lock counts only if a login of
		// a server holds it, because every login can take it.
		var dead bool
		err := conn.QueryRow(ctx, `
			select not exists (
				select from pg_locks join pg_stat_activity using (pid)
				where locktype = 'advisory' and granted and objsubid = 1
				  and database = (select oid from pg_database where datname = current_database())
				  and (classid::bigint << 32 | objid::bigint) = hashtextextended($1, 0)
				  and pg_has_role(usesysid, $2, 'MEMBER'))`, w.lockName(u.Writer), writerRole).Scan(&dead)
		if err != nil {
			return err
		}
		if dead {
			w.unclean = append(w.unclean, u)
		}
	}
	return nil
}

// find looks for a batch that was sent and has no reply.
func (w *LogWriter) find(ctx context.Context, b sealedBatch) (leaf int64, err error) {
	err = w.conn.QueryRow(ctx, "select seq from audit_batches where writer = $1 and writer_seq = $2", w.id, b.seq).Scan(&leaf)
	return leaf, err
}

const appendBatch = `
	select leaf, database, timeline, newest, newest_mark
	from append_batch($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)`

// send writes the batch in one round trip: statements up to a Sync are one transaction, and the
// rows follow their statement. The position is read in that
// transaction, so it is not newer than the commit.
func (w *LogWriter) send(ctx context.Context, b sealedBatch, decisions []Decision, events []Event) (leaf int64, p Position, err error) {
	conn := w.conn.PgConn()
	deadline, _ := ctx.Deadline()
	if err := conn.Conn().SetDeadline(deadline); err != nil {
		return 0, p, err
	}
	defer func() {
		if cap(w.buf) > keptBuffer {
			w.buf = nil
		}
	}()
	if w.buf, err = w.request(w.buf[:0], b, decisions, events); err != nil {
		return 0, p, err
	}
	// Past the buffer of pgx, which would copy all rows once more. pgx sends nothing meanwhile.
	if _, err := conn.Conn().Write(w.buf); err != nil {
		return 0, p, err
	}
	if leaf, p, err = receive(conn); err != nil {
		return 0, p, err
	}
	_ = conn.Conn().SetDeadline(time.Time{}) // fails only on a broken connection, which the next use finds out
	return leaf, p, nil
}

// request appends the messages of a commit to buf. The error is that one of them is too long for
// the protocol.
func (w *LogWriter) request(buf []byte, b sealedBatch, decisions []Decision, events []Event) (_ []byte, err error) {
	if len(decisions) > 0 {
		buf, err = appendCopy(buf, "decisions", func(buf []byte) []byte { return appendDecisions(buf, b.id, decisions) })
	}
	if err == nil && len(events) > 0 {
		buf, err = appendCopy(buf, "events", func(buf []byte) []byte { return appendEvents(buf, b.id, events, len(decisions)) })
	}
	if err == nil && len(b.unclean) > 0 {
		ended := make([][]byte, len(b.unclean))
		for i := range b.unclean {
			ended[i] = b.unclean[i].Writer[:]
		}
		buf, err = appendExecute(buf, "writers_ended", appendArray(nil, uuidOID, ended)[4:]) // without the length
	}
	if err == nil {
		var guarded *Decision
		if i := newest(decisions); i >= 0 {
			guarded = &decisions[i]
		}
		buf, err = appendExecute(buf, "append_batch", b.args(w.id, guarded)...)
	}
	if err != nil {
		return buf, err
	}
	return (&pgproto3.Sync{}).Encode(buf)
}

// appendExecute appends the messages that run a prepared statement. Arguments and results are
// binary.
func appendExecute(buf []byte, statement string, args ...[]byte) (_ []byte, err error) {
	bind := pgproto3.Bind{PreparedStatement: statement, ParameterFormatCodes: []int16{pgx.BinaryFormatCode}, Parameters: args, ResultFormatCodes: []int16{pgx.BinaryFormatCode}}
	if buf, err = bind.Encode(buf); err != nil {
		return buf, err
	}
	return (&pgproto3.Execute{}).Encode(buf)
}

// appendCopy appends the messages of a prepared COPY. rows appends its data, which are one message.
func appendCopy(buf []byte, statement string, rows func([]byte) []byte) (_ []byte, err error) {
	if buf, err = appendExecute(buf, statement); err != nil {
		return buf, err
	}
	length := len(buf) + 1
	buf = rows(append(buf, 'd', 0, 0, 0, 0))
	size := len(buf) - length
	if size > maxMessage {
		return buf, fmt.Errorf("the rows have %d bytes, more than one message can have", size)
	}
	binary.BigEndian.PutUint32(buf[length:], uint32(size))
	return (&pgproto3.CopyDone{}).Encode(buf)
}

// maxMessage is the largest message that Postgres takes.
const maxMessage = 1<<30 - 1

// newest returns the index of the decision with a mark that has the newest revision, or
// -1. A database with that revision has the earlier ones too.
func newest(decisions []Decision) int {
	found := -1
	for i := range decisions {
		if decisions[i].Mark != uuid.Nil && (found < 0 || decisions[i].Revision > decisions[found].Revision) {
			found = i
		}
	}
	return found
}

// receive reads the reply to send, which has one row: that of append_batch.
func receive(conn *pgconn.PgConn) (leaf int64, p Position, err error) {
	rows := 0
	for {
		msg, receiveErr := conn.ReceiveMessage(context.Background())
		if receiveErr != nil {
			return 0, p, errors.Join(err, receiveErr)
		}
		switch msg := msg.(type) {
		case *pgproto3.ErrorResponse:
			err = pgconn.ErrorResponseToPgError(msg)
		case *pgproto3.DataRow:
			rows++
			leaf, p, err = readAppended(msg.Values)
		case *pgproto3.ReadyForQuery:
			if err == nil && rows != 1 {
				err = errNotAppended
			}
			return leaf, p, err
		}
	}
}

var errNotAppended = errors.New("the server's answer is not that of append_batch")

func readAppended(row [][]byte) (leaf int64, p Position, err error) {
	if len(row) != 5 || len(row[0]) != 8 || len(row[1]) != 16 || len(row[2]) != 8 || len(row[3]) != 8 || len(row[4]) != 16 {
		return 0, p, errNotAppended
	}
	p = Position{
		Database: uuid.UUID(row[1]), Timeline: uint32(binary.BigEndian.Uint64(row[2])),
		Number: int64(binary.BigEndian.Uint64(row[3])), Mark: uuid.UUID(row[4]),
	}
	return int64(binary.BigEndian.Uint64(row[0])), p, nil
}

// Close waits for the append in progress, and marks the writer as ended. A writer that is
// not closed counts as crashed.
func (w *LogWriter) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		// Without it the next batch of this server would report a crash that did not
		// happen.
		_, _ = w.conn.Exec(ctx, "update audit_writers set ended = true where writer = $1", w.id)
	}
	w.drop()
}

func (w *LogWriter) drop() {
	if w.conn != nil {
		closeConn(w.conn)
		w.conn = nil
	}
}
