package store

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// Batch is one commit to the log.
type Batch struct {
	// Leaf is its place, from 0. ID is what its rows name it by.
	Leaf int64
	ID   uuid.UUID
	// Writer is the process that wrote it, WriterSeq counts its batches.
	Writer    uuid.UUID
	WriterSeq int64
	// Day is the day of its rows, UTC.
	Day time.Time
	// Rows is how many it was written with. FirstAt and LastAt bound their time, and
	// are zero if there are none.
	Rows            int
	FirstAt, LastAt time.Time
	// Header holds the exact bytes that were hashed.
	Header []byte
	// Entries are its rows in order, once [DB.ReadEntries] read them. A batch of a day
	// that was dropped has none; one that lost rows has a gap in their places.
	Entries []Entry
}

// Entry is the record of one row.
type Entry struct {
	// Pos is its place in the batch.
	Pos int
	// Event tells the record of an event from that of a decision.
	Event bool
	// ID and At are those of the row.
	ID     uuid.UUID
	At     time.Time
	Record []byte
	// CRC is the checksum of the record when it was written.
	CRC int32
}

// ofBatch is the condition that a row r of decisions or events belongs to a batch of the
// log: no reader shows one that was put beside the log. That the row is one of those
// that the header commits to is for a verification to find.
const ofBatch = `exists (
			select from audit_batches b
			where b.batch = r.batch and r.at between b.first_at and b.last_at and r.pos >= 0 and r.pos < b.rows)`

// NextLeaf is how many batches the log has.
func (db *DB) NextLeaf(ctx context.Context) (leaf int64, err error) {
	defer wrap(&err, "read the end of the log")
	err = db.audit.QueryRow(ctx, "select coalesce(max(seq), -1) + 1 from audit_batches").Scan(&leaf)
	return leaf, err
}

// FirstLeaf is the place of the oldest batch that is still there: 0, unless the owner of
// the database removed those of dropped days.
func (db *DB) FirstLeaf(ctx context.Context) (leaf int64, err error) {
	defer wrap(&err, "read the beginning of the log")
	err = db.audit.QueryRow(ctx, "select coalesce(min(seq), 0) from audit_batches").Scan(&leaf)
	return leaf, err
}

// FindBatch finds the first batch, from a leaf on, that has rows from a time on; if
// there is none yet, the place of the next one. Batches after it can still be of
// rows before that time: servers do not commit in the order of their clocks.
func (db *DB) FindBatch(ctx context.Context, leaf int64, at time.Time) (_ int64, err error) {
	defer wrap(&err, "find a batch")
	// A batch with rows of a day is of that day. Whatever the servers' clocks, none of
	// the days from there on has one before the smallest of these.
	const query = `
		with day as (
			select min(first.seq) as seq
			from generate_series(
			         greatest($2::date, (select min(day) from audit_batches)),
			         (select max(day) from audit_batches), '1 day') as d (day)
			cross join lateral (
				select seq from audit_batches where day = d.day::date order by day, seq limit 1) as first)
		select coalesce(
			(select seq from audit_batches
			 where seq >= greatest($1, coalesce((select seq from day), 9223372036854775807)) and last_at >= $3
			 order by seq limit 1),
			greatest($1, (select max(seq) + 1 from audit_batches)))`
	err = db.audit.QueryRow(ctx, query, leaf, at.UTC(), at).Scan(&leaf)
	return leaf, err
}

// EndOf is the place after the last batch that has rows of a time, from (the zero time:
// any) to (exclusive). Batches before it can have rows of another time.
func (db *DB) EndOf(ctx context.Context, from, to time.Time) (leaf int64, err error) {
	defer wrap(&err, "find the last batch of a time")
	// A batch is of one day, so rows are looked at on the first day and on the last.
	const query = `
		select coalesce(max(of_day.seq), -1) + 1
		from generate_series(
		         greatest($1::date, (select min(day) from audit_batches)),
		         least($2::date, (select max(day) from audit_batches)), '1 day') as d (day)
		cross join lateral (
			select seq from audit_batches
			where day = d.day::date and (first_at is null or ($3::timestamptz is null or last_at >= $3) and first_at < $4)
			order by day desc, seq desc limit 1) as of_day`
	err = db.audit.QueryRow(ctx, query, orNull(from.UTC()), to.UTC(), orNull(from), to).Scan(&leaf)
	return leaf, err
}

const selectBatches = `
	select seq, batch, writer, writer_seq, rows, header,
	       case when isfinite(day) then day end as day,
	       case when isfinite(first_at) then first_at end as first_at,
	       case when isfinite(last_at) then last_at end as last_at
	from audit_batches`

// batchRow is a row of audit_batches.
type batchRow struct {
	Seq             int64
	Batch           uuid.UUID
	Writer          uuid.UUID
	WriterSeq       int64
	Day             *time.Time
	Rows            int
	Header          []byte
	FirstAt, LastAt *time.Time
}

func scanBatch(row pgx.CollectableRow) (Batch, error) {
	r, err := pgx.RowToStructByName[batchRow](row)
	return Batch{
		Leaf: r.Seq, ID: r.Batch, Writer: r.Writer, WriterSeq: r.WriterSeq, Day: orZero(r.Day), Rows: r.Rows, Header: r.Header,
		FirstAt: orZero(r.FirstAt).UTC(), LastAt: orZero(r.LastAt).UTC(),
	}, err
}

// Batches reads batches without their rows, in the order of the log.
func (db *DB) Batches(ctx context.Context, leaf int64, limit int) (_ []Batch, err error) {
	defer wrap(&err, "read batches")
	rows, _ := db.audit.Query(ctx, selectBatches+" where seq >= $1 order by seq limit $2", leaf, limit)
	return pgx.CollectRows(rows, scanBatch)
}

// BatchByID reads one batch without its rows. The error is [ErrNotFound] if there is
// none.
func (db *DB) BatchByID(ctx context.Context, id uuid.UUID) (_ Batch, err error) {
	defer wrap(&err, "read batch")
	rows, _ := db.audit.Query(ctx, selectBatches+" where batch = $1", id)
	b, err := pgx.CollectExactlyOneRow(rows, scanBatch)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotFound
	}
	return b, err
}

// The lateral join looks at the time of each batch alone, which is narrow, and
// leaves out all partitions but one. Without `offset 0` the planner might turn it
// into a join of the whole log.
const readEntries = `
		select b.n - 1 as n, r.pos, r.event, r.id, r.at, r.record, r.crc
		from unnest($1::uuid[], $2::timestamptz[], $3::timestamptz[]) with ordinality as b (batch, first_at, last_at, n)
		cross join lateral (
			select pos, false as event, decision_id as id, at, record, crc from decisions
			where at >= b.first_at and at <= b.last_at and batch = b.batch
			union all
			select pos, true, event_id, at, record, crc from events
			where at >= b.first_at and at <= b.last_at and batch = b.batch
			offset 0) as r
		order by b.n, r.pos`

// ReadEntries fills in the entries of as many of the batches as have no more than so
// many bytes together, but of one at least, and says of how many.
func (db *DB) ReadEntries(ctx context.Context, batches []Batch, maxBytes int) (n int, err error) {
	defer wrap(&err, "read the rows of batches")
	var ids []uuid.UUID
	var first, last []time.Time
	for _, b := range batches {
		ids, first, last = append(ids, b.ID), append(first, b.FirstAt), append(last, b.LastAt)
	}
	rows, err := db.audit.Query(ctx, readEntries, ids, first, last)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	var entry Entry
	at := 0
	size := 0
	for rows.Next() {
		if err := rows.Scan(&at, &entry.Pos, &entry.Event, &entry.ID, &entry.At, &entry.Record, &entry.CRC); err != nil {
			return 0, err
		}
		size += len(entry.Record)
		if size > maxBytes && at > 0 {
			// What was read of this one is read again with the next.
			batches[at].Entries = nil
			return at, nil
		}
		batches[at].Entries = append(batches[at].Entries, entry)
	}
	return len(batches), rows.Err()
}
