package store

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
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

// Event is a record of another kind than a decision: the columns to find it by,
// and the record itself.
type Event struct {
	// ID is a UUIDv7.
	ID uuid.UUID
	// At is the millisecond time inside ID, in UTC. It is read, never written.
	At time.Time
	// Kind is one word; Subject is what it is about.
	Kind, Caller, Server, Subject string
	Revision                      int64  // of a change; 0 of anything else
	RequestID, TraceID            string // may be empty
	// Decisions are those that it reports the uses of.
	Decisions []uuid.UUID
	Record    []byte // stored and given back byte for byte
	// Batch and Pos say which leaf of which batch it is. They are read, never written.
	Batch uuid.UUID
	Pos   int
	// CRC is the checksum of the record when it was written. It is read, never written.
	CRC int32
}

// LogWriter appends batches to the log over a connection of its own, so that
// recording never waits for a connection behind reads. It connects when it first
// writes, and again after a connection broke.
type LogWriter struct {
	sessions *sessions
	config   *pgx.ConnConfig
	id       uuid.UUID
	server   string
	mode     auditlog.Mode
	bound    int

	trouble atomic.Bool // the last attempt broke off

	mu      sync.Mutex // held for the whole of an append
	seq     int64      // of the next batch
	unclean []auditlog.Unclean
	known   bool      // registered in the database
	conn    *pgx.Conn // nil: not connected
	buf     []byte    // reused from batch to batch, unless it grew large
}

// keptBuffer is what a writer keeps between batches. They are seldom larger.
const keptBuffer = 1 << 20

// NewLogWriter returns a writer that is not connected yet, of a named server that
// can lose so many answered decisions in a crash: 0 in strict mode. One append at a
// time goes through it: for more, make more.
func (db *DB) NewLogWriter(server string, mode auditlog.Mode, bound int) *LogWriter {
	return &LogWriter{sessions: &db.sessions, config: as(db.conn, writerRole), id: uuid.New(), server: server, mode: mode, bound: bound}
}

// Appended says where a batch came to stand.
type Appended struct {
	// Leaf is its place in the log, from 0.
	Leaf int64
	// Position is the newest revision, read while the batch was written.
	Position Position
	// Asked is when the batch was sent: the position is not older.
	Asked time.Time
}

// Append records decisions and events as one batch, all or none, and returns only
// after the commit. All must be of one day (UTC), for days are dropped whole.
//
// When the reply to a commit is lost, it is found out whether it took place, for as
// long as ctx lives: nothing is ever recorded twice. Only if that ends without an
// answer may the batch be in the log although there is an error. The error is
// [ErrNoPartition] when the log has no place for that day, and [ErrBehind] when the
// database does not have the revision that a decision was made at. It is
// [ErrRecorded] when an append before this one, of which no more was heard, went
// through.
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
	w.seq++ // even if it is refused: an attempt may yet go through under this number
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
		w.drop()
		select {
		case <-ctx.Done():
			return done, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// try sends the batch, unless it is in the log by an earlier attempt. An error with
// refused is the server's word that this attempt wrote nothing.
func (w *LogWriter) try(ctx context.Context, b sealedBatch, again bool, decisions []Decision, events []Event) (done Appended, refused bool, err error) {
	if again {
		if done.Leaf, err = w.find(ctx, b); !errors.Is(err, pgx.ErrNoRows) {
			return done, false, err
		}
	}
	done.Asked = time.Now()
	done.Leaf, done.Position, err = w.send(ctx, b, decisions, events)
	var pgErr *pgconn.PgError
	switch {
	case !errors.As(err, &pgErr):
		return done, false, err
	case again && pgErr.ConstraintName == "audit_batches_writer_writer_seq_key":
		// The earlier attempt went through just now.
		done.Leaf, err = w.find(ctx, b)
		return done, false, err
	case pgErr.Code == "CP001": // of log_guard
		err = fmt.Errorf("%w: %w", ErrBehind, err)
	case pgErr.Code == "23505" && (strings.HasPrefix(pgErr.TableName, "decisions_") || strings.HasPrefix(pgErr.TableName, "events_")):
		err = fmt.Errorf("%w: %w", ErrRecorded, err)
	case isNoPartition(err):
		err = fmt.Errorf("%w: %w", ErrNoPartition, err)
	case pgErr.Code == "26000": // invalid_sql_statement_name: what connect prepared is not there
		err = fmt.Errorf("%w (%w)", ErrPooler, err)
		w.drop()
	}
	// SQLSTATE class 57: the commit may have happened, so this is not a refusal.
	return done, pgErr.Code[:2] != "57", err
}

// Trouble reports whether the last attempt broke off, while it may still be tried
// again.
func (w *LogWriter) Trouble() bool { return w.trouble.Load() }

// sealedBatch is what log_append takes.
type sealedBatch struct {
	id            uuid.UUID
	seq           int64
	rows          int
	header        []byte
	first, latest time.Time
	unclean       []auditlog.Unclean
}

// sealBatch hashes the rows, and makes the header that commits to them.
func sealBatch(h auditlog.Header, decisions []Decision, events []Event) sealedBatch {
	b := sealedBatch{id: uuid.New(), seq: h.WriterSeq, rows: len(decisions) + len(events), unclean: h.Unclean}
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

// call is the statement that appends the batch. Nothing in it comes from outside:
// numbers, UUIDs, times and hex digits.
func (b sealedBatch) call(writer uuid.UUID) string {
	day, first, latest := time.Now().UTC(), "null", "null"
	if b.rows > 0 {
		day = b.first
		first, latest = "'"+b.first.Format(time.RFC3339Nano)+"'", "'"+b.latest.Format(time.RFC3339Nano)+"'"
	}
	return fmt.Sprintf(`('%s', '%s', %d, %d, '\x%s', '%s', %s, %s)`,
		b.id, writer, b.seq, b.rows, hex.EncodeToString(b.header), day.Format(time.DateOnly), first, latest)
}

// connect makes sure that there is a connection, and that the database knows the
// writer.
func (w *LogWriter) connect(ctx context.Context) (err error) {
	if w.conn != nil {
		return nil
	}
	w.sessions.tried.Store(false) // there may be a pooler now that was not there before
	conn, err := w.sessions.connect(ctx, w.config)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			closeConn(conn)
		}
	}()
	// The lock says that the writer lives; it ends with the session. It is shared,
	// for the session of a connection that broke may linger.
	_, err = conn.Exec(ctx, "select pg_advisory_lock_shared(hashtextextended($1, 0))", w.lockName(w.id))
	if err != nil {
		return err
	}
	for _, sql := range []string{
		"prepare log_append(uuid, uuid, bigint, int, bytea, date, timestamptz, timestamptz) as select log_append($1, $2, $3, $4, $5, $6, $7, $8)",
		"prepare log_guard(bigint, uuid) as select log_guard($1, $2)",
		"prepare log_position as " + selectPosition,
	} {
		if _, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
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

// register adds the writer, and finds those of the same server that ended without
// a word: the next batch says so.
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
		// Another server of the same name may be alive.
		var dead bool
		err := conn.QueryRow(ctx, "select pg_try_advisory_xact_lock(hashtextextended($1, 0))", w.lockName(u.Writer)).Scan(&dead)
		if err != nil {
			return err
		}
		if dead {
			w.unclean = append(w.unclean, u)
		}
	}
	return nil
}

// find looks for a batch whose reply was lost.
func (w *LogWriter) find(ctx context.Context, b sealedBatch) (leaf int64, err error) {
	err = w.conn.QueryRow(ctx, "select seq from audit_batches where writer = $1 and writer_seq = $2", w.id, b.seq).Scan(&leaf)
	return leaf, err
}

// send writes the batch in one round trip: a simple query of several statements,
// which is one transaction, with the rows right behind it. Whatever is committed by
// the end of it was there, so the position read on the way is not newer.
func (w *LogWriter) send(ctx context.Context, b sealedBatch, decisions []Decision, events []Event) (leaf int64, p Position, err error) {
	conn := w.conn.PgConn()
	deadline, _ := ctx.Deadline()
	if err := conn.Conn().SetDeadline(deadline); err != nil {
		return 0, p, err
	}
	var sql strings.Builder
	// Not only in the session: what is answered has to be on disk.
	sql.WriteString(durableCommit + ";")
	front := conn.Frontend()
	w.buf = w.buf[:0]
	defer func() {
		if cap(w.buf) > keptBuffer {
			w.buf = nil
		}
	}()
	if len(decisions) > 0 {
		sql.WriteString(copyDecisions + ";")
		w.buf = appendDecisions(w.buf, b.id, decisions)
	}
	cut := len(w.buf)
	if len(events) > 0 {
		sql.WriteString(copyEvents + ";")
		w.buf = appendEvents(w.buf, b.id, events, len(decisions))
	}
	if i := newest(decisions); i >= 0 {
		fmt.Fprintf(&sql, "execute log_guard(%d, '%s');", decisions[i].Revision, decisions[i].Mark)
	}
	for _, u := range b.unclean {
		fmt.Fprintf(&sql, "update audit_writers set ended = true where writer = '%s';", u.Writer)
	}
	sql.WriteString("execute log_append" + b.call(w.id) + ";execute log_position")
	front.SendQuery(&pgproto3.Query{String: sql.String()})
	for _, part := range [][]byte{w.buf[:cut], w.buf[cut:]} {
		for chunk := part; len(chunk) > 0; {
			n := min(len(chunk), 1<<16)
			front.Send(&pgproto3.CopyData{Data: chunk[:n]})
			chunk = chunk[n:]
		}
		if len(part) > 0 {
			front.Send(&pgproto3.CopyDone{})
		}
	}
	if err := front.Flush(); err != nil {
		return 0, p, err
	}
	if leaf, p, err = receive(conn); err != nil {
		return 0, p, err
	}
	_ = conn.Conn().SetDeadline(time.Time{}) // fails only on a connection that the next use finds broken
	return leaf, p, nil
}

// newest finds the decision at the newest revision that has a mark, or -1. The
// database that has it has those before it too.
func newest(decisions []Decision) int {
	found := -1
	for i := range decisions {
		if decisions[i].Mark != uuid.Nil && (found < 0 || decisions[i].Revision > decisions[found].Revision) {
			found = i
		}
	}
	return found
}

// receive reads to the end of the query: one row of log_append, one of
// log_position.
func receive(conn *pgconn.PgConn) (leaf int64, p Position, err error) {
	var rows [][]string
	for {
		msg, receiveErr := conn.ReceiveMessage(context.Background())
		if receiveErr != nil {
			return 0, p, errors.Join(err, receiveErr)
		}
		switch msg := msg.(type) {
		case *pgproto3.ErrorResponse:
			err = pgconn.ErrorResponseToPgError(msg)
		case *pgproto3.DataRow:
			row := make([]string, len(msg.Values))
			for i, v := range msg.Values {
				row[i] = string(v)
			}
			rows = append(rows, row)
		case *pgproto3.ReadyForQuery:
			if err != nil {
				return 0, p, err
			}
			return readAppended(rows)
		}
	}
}

func readAppended(rows [][]string) (leaf int64, p Position, err error) {
	// log_guard's row comes first, if it was called.
	if len(rows) == 3 {
		rows = rows[1:]
	}
	if len(rows) != 2 || len(rows[0]) != 1 || len(rows[1]) != 4 {
		return 0, p, errors.New("the server's answer is not that of log_append")
	}
	var errs [5]error
	leaf, errs[0] = strconv.ParseInt(rows[0][0], 10, 64)
	p.Database, errs[1] = uuid.Parse(rows[1][0])
	timeline, err := strconv.ParseUint(rows[1][1], 10, 32)
	p.Timeline, errs[2] = uint32(timeline), err
	p.Number, errs[3] = strconv.ParseInt(rows[1][2], 10, 64)
	p.Mark, errs[4] = uuid.Parse(rows[1][3])
	return leaf, p, errors.Join(errs[:]...)
}

// Close says that the writer ends, after the append in progress. One that is not
// closed counts as crashed.
func (w *LogWriter) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		// Without it the next batch of this server reports a crash that was none.
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
