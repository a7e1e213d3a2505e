package store

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// Batch is one commit to the log.
type Batch struct {
	// Leaf is its place in the log, from 0. Its rows name it by ID.
	Leaf int64
	ID   uuid.UUID
	// Writer is the process that wrote it. WriterSeq counts the batches of the writer.
	Writer    uuid.UUID
	WriterSeq int64
	// Day is the day of its rows, UTC.
	Day time.Time
	// Rows is the number of rows that it was written with. FirstAt and LastAt are the
	// times of the earliest and the latest of them, zero if there are none.
	Rows            int
	FirstAt, LastAt time.Time
	// Header holds the exact bytes that were hashed.
	Header []byte
	// Entries are its rows in order, after [DB.ReadEntries] has read them. If the day was
	// dropped there are none. If rows were lost, their places are missing.
	Entries []Entry
}

// Entry is the record of one row.
type Entry struct {
	// Pos is its place in the batch.
	Pos int
	// Event is true for an event, and false for a decision.
	Event bool
	// ID and At are those of the row.
	ID     uuid.UUID
	At     time.Time
	Record []byte
	// CRC is the checksum of the record from when it was written.
	CRC int32
}

// ofBatch is the condition that a row r of decisions or events belongs to a batch of the
// log, so that no reader shows a row that was inserted without a batch. It does not prove
// that the header of the batch commits to the row: a verification does.
const ofBatch = `exists (
			select from audit_batches b
			where b.batch = r.batch and r.at between b.first_at and b.last_at and r.pos >= 0 and r.pos < b.rows)`

// NextLeaf returns the leaf of the next batch, which is the number of batches in the log.
func (db *DB) NextLeaf(ctx context.Context) (leaf int64, err error) {
	defer wrap(&err, "read the end of the log")
	err = db.audit.QueryRow(ctx, "select coalesce(max(seq), -1) + 1 from audit_batches").Scan(&leaf)
	return leaf, err
}

// FirstLeaf returns the leaf of the oldest batch that is still stored: 0, unless the
// owner of the database removed the batches of dropped days.
func (db *DB) FirstLeaf(ctx context.Context) (leaf int64, err error) {
	defer wrap(&err, "read the beginning of the log")
	err = db.audit.QueryRow(ctx, "select coalesce(min(seq), 0) from audit_batches").Scan(&leaf)
	return leaf, err
}

// FindBatch returns the leaf of the first batch, at or after a leaf, that has rows at or
// after a time. If there is none yet, it returns the leaf of the next batch. Later
// batches can have rows of an earlier time, because servers do not commit in the order of
// their clocks.
func (db *DB) FindBatch(ctx context.Context, leaf int64, at time.Time) (_ int64, err error) {
	defer wrap(&err, "find a batch")
	// All rows of a batch are of its day. So no batch of that day or of a later one comes
	// before the smallest of these leaves, whatever the clocks of the servers say.
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

// EndOf returns the leaf after the last batch that has rows between two times: from
// (inclusive, zero for no bound) and to (exclusive). Earlier batches can have rows of
// other times.
func (db *DB) EndOf(ctx context.Context, from, to time.Time) (leaf int64, err error) {
	defer wrap(&err, "find the last batch of a time")
	// A batch is of one day, so the times of its rows matter on the first and the last
	// day only.
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
	return b, notFound(err)
}

// For each batch, the lateral join reads the time of that batch alone, which is in one
// partition. Without `offset 0` the planner might join the whole log.
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

// ReadEntries fills in the entries of the first of the batches: as many as have at most
// maxBytes together, and at least one. It returns how many.
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
			// The caller reads this batch again, with the next ones.
			batches[at].Entries = nil
			return at, nil
		}
		batches[at].Entries = append(batches[at].Entries, entry)
	}
	return len(batches), rows.Err()
}
