package store

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
)

// LogRows are the rows of some batches.
type LogRows struct {
	Decisions []Decision
	Events    []Event
}

// RowsOf reads at most limit decisions and limit events of batches, in order of batch and
// place. It reads rows from the times between FirstAt and LastAt of the batches only.
func (db *DB) RowsOf(ctx context.Context, batches []Batch, limit int) (out LogRows, err error) {
	defer wrap(&err, "read rows of batches")
	var ids []uuid.UUID
	var from, to time.Time
	for _, b := range batches {
		if b.FirstAt.IsZero() {
			continue
		}
		ids = append(ids, b.ID)
		if from.IsZero() || b.FirstAt.Before(from) {
			from = b.FirstAt
		}
		if b.LastAt.After(to) {
			to = b.LastAt
		}
	}
	if len(ids) == 0 {
		return out, nil
	}
	var batch pgx.Batch
	batch.Queue(`
		select `+decisionColumns+`
		from decisions
		where at >= $1 and at <= $2 and batch = any($3)
		order by batch, pos
		limit $4`, from, to, ids, limit).Query(func(rows pgx.Rows) (err error) {
		out.Decisions, err = pgx.CollectRows(rows, scanDecision)
		return err
	})
	batch.Queue(`
		select `+eventColumns+`
		from events
		where at >= $1 and at <= $2 and batch = any($3)
		order by batch, pos
		limit $4`, from, to, ids, limit).Query(func(rows pgx.Rows) (err error) {
		out.Events, err = pgx.CollectRows(rows, scanEvent)
		return err
	})
	return out, db.audit.SendBatch(ctx, &batch).Close()
}

// GetEvent reads one event by its id. The error is [ErrNotFound] if there is none.
func (db *DB) GetEvent(ctx context.Context, id uuid.UUID) (_ Event, err error) {
	defer wrap(&err, "get event")
	rows, _ := db.audit.Query(ctx, `
		select `+eventColumns+`
		from events r
		where at = $1 and event_id = $2 and `+ofBatch, idTime(id), id)
	e, err := pgx.CollectExactlyOneRow(rows, scanEvent)
	return e, notFound(err)
}

// DayGone reports whether the log has no partition of a day, neither attached nor
// detached.
func (db *DB) DayGone(ctx context.Context, day time.Time) (gone bool, err error) {
	defer wrap(&err, "look for a day of the log")
	err = db.audit.QueryRow(ctx,
		"select to_regclass('decisions_' || $1) is null and to_regclass('events_' || $1) is null", day.Format("20060102")).Scan(&gone)
	return gone, err
}

// DayDropped reports whether a day of the log was dropped: an event says so of that day
// or of a later one, and days are dropped oldest first.
func (db *DB) DayDropped(ctx context.Context, day time.Time) (dropped bool, err error) {
	if dropped, err = db.DayGone(ctx, day); err != nil || !dropped {
		return false, err
	}
	defer wrap(&err, "look for a dropped day of the log")
	err = db.audit.QueryRow(ctx, `
		select exists (select from events r where kind = 'retention_drop' and subject >= $1 and `+ofBatch+`)
		   and exists (select from audit_batches where day <= $2)`, day.Format(time.DateOnly), day).Scan(&dropped)
	return dropped, err
}

// StrayRow is a row of the log that does not belong to the batch that it names.
type StrayRow struct {
	Event bool // or a decision
	ID    uuid.UUID
	At    string // as Postgres prints it, because it may be a time that no batch can have
	// Leaf is the leaf of the batch, nil if there is no such batch.
	Leaf *int64
}

// A row belongs to a batch if its time and its place are within those of the batch. Rows
// of a day belong to batches of that day, so only those are joined ($3).
const strayRows = `
	select %[1]t as event, %[2]s as id, r.at::text as at, b.seq as leaf
	from %[3]s r
	left join (select batch, seq, rows, first_at, last_at from audit_batches where $3::date is null or day = $3) b
	  on b.batch = r.batch
	where ($1::timestamptz is null or r.at >= $1) and ($2::timestamptz is null or r.at < $2)
	  and (r.at between b.first_at and b.last_at and r.pos >= 0 and r.pos < b.rows) is not true
	limit $4`

// StrayRows finds rows that belong to no batch of the log, at most limit of each day,
// from a day on. The zero time is before all days. It reads the days one by one, and
// batches that are added meanwhile do no harm.
func (db *DB) StrayRows(ctx context.Context, from time.Time, limit int) (found []StrayRow, err error) {
	defer wrap(&err, "look for rows of no batch")
	rows, _ := db.audit.Query(ctx, `
		select distinct to_date(substring(relname from '_([0-9]{8})$'), 'YYYYMMDD') as day
		from pg_inherits join pg_class on pg_class.oid = inhrelid
		where inhparent in ('decisions'::regclass, 'events'::regclass)
		order by day`)
	days, err := pgx.CollectRows(rows, pgx.RowTo[*time.Time])
	if err != nil {
		return nil, err
	}
	// The days, and the times before, between and after them.
	type span struct{ from, to, day *time.Time }
	var spans []span
	var end *time.Time
	if !from.IsZero() {
		start := from.UTC().Truncate(24 * time.Hour)
		end = &start
	}
	for _, day := range days {
		if day == nil || end != nil && day.Before(*end) {
			continue
		}
		next := day.AddDate(0, 0, 1)
		spans = append(spans, span{end, day, nil}, span{day, &next, day})
		end = &next
	}
	spans = append(spans, span{end, nil, nil})
	err = pgx.BeginTxFunc(ctx, db.audit, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "set local statement_timeout = 0"); err != nil { // a large day takes long
			return err
		}
		for _, s := range spans {
			for _, query := range []string{
				fmt.Sprintf(strayRows, false, "r.decision_id", "decisions"), fmt.Sprintf(strayRows, true, "r.event_id", "events"),
			} {
				rows, _ := tx.Query(ctx, query, pgx.QueryExecModeCacheDescribe, s.from, s.to, s.day, limit)
				some, err := pgx.CollectRows(rows, pgx.RowToStructByName[StrayRow])
				if err != nil {
					return err
				}
				found = append(found, some...)
			}
		}
		return nil
	})
	return found, err
}

// OddLogTables names the tables of the log that can hide rows from a reader: those that
// are not plain or partitioned tables, and those with row security.
func (db *DB) OddLogTables(ctx context.Context) (_ []string, err error) {
	defer wrap(&err, "look at the tables of the log")
	rows, _ := db.audit.Query(ctx, `
		select name
		from unnest(array['decisions', 'events', 'audit_batches', 'audit_nodes', 'checkpoints']) as name
		join pg_class on pg_class.oid = to_regclass(name)
		where relrowsecurity or relkind not in ('r', 'p') or relkind = 'p' and name not in ('decisions', 'events')
		union all
		select inhrelid::regclass::text
		from pg_inherits join pg_class on pg_class.oid = inhrelid
		where inhparent in ('decisions'::regclass, 'events'::regclass) and (relrowsecurity or relkind <> 'r')
		order by 1`)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// DoubledBatches finds batches that share their id, or their writer and number, with
// another batch. It returns at most limit leaves.
func (db *DB) DoubledBatches(ctx context.Context, limit int) (leaves []int64, err error) {
	defer wrap(&err, "look for batches that are there twice")
	err = pgx.BeginTxFunc(ctx, db.audit, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "set local statement_timeout = 0"); err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, `
			select max(seq) from audit_batches group by batch having count(*) > 1
			union
			select max(seq) from audit_batches group by writer, writer_seq having count(*) > 1
			order by 1 limit $1`, limit)
		leaves, err = pgx.CollectRows(rows, pgx.RowTo[int64])
		return err
	})
	return leaves, err
}

// TileLevel says which tiles of one level of the tree are stored.
type TileLevel struct {
	Level       int
	First, Last int64 // the smallest and the largest number of a stored tile
}

// TileLevels reads which tiles of the tree are stored, by level.
func (db *DB) TileLevels(ctx context.Context) (_ []TileLevel, err error) {
	defer wrap(&err, "read the levels of the tree")
	rows, _ := db.audit.Query(ctx, "select level, min(tile) as first, max(tile) as last from audit_nodes group by level order by level")
	return pgx.CollectRows(rows, pgx.RowToStructByName[TileLevel])
}

// ReadTiles reads tiles of the tree. The result lacks those that are not stored.
func (db *DB) ReadTiles(ctx context.Context, ids []auditlog.TileID) (tiles map[auditlog.TileID][]byte, err error) {
	defer wrap(&err, "read tiles")
	tiles = map[auditlog.TileID][]byte{}
	var levels, numbers []int64
	for _, id := range ids {
		levels, numbers = append(levels, int64(id.Level)), append(numbers, id.Tile)
	}
	rows, _ := db.audit.Query(ctx, `
		select n.level, n.tile, n.hashes
		from unnest($1::bigint[], $2::bigint[]) as named (level, tile)
		join audit_nodes n on n.level = named.level and n.tile = named.tile`, levels, numbers)
	var id auditlog.TileID
	var hashes []byte
	_, err = pgx.ForEachRow(rows, []any{&id.Level, &id.Tile, &hashes}, func() error {
		tiles[id] = bytes.Clone(hashes)
		return nil
	})
	return tiles, err
}

// Tiles returns a reader of the tree's tiles, which reads each tile once. Its error is
// [ErrNotFound] if a tile is not stored.
func (db *DB) Tiles(ctx context.Context) auditlog.Tiles {
	known := map[auditlog.TileID][]byte{}
	return func(ids []auditlog.TileID) (data [][]byte, err error) {
		var unknown []auditlog.TileID
		for _, id := range ids {
			if known[id] == nil {
				unknown = append(unknown, id)
			}
		}
		if len(unknown) > 0 {
			tiles, err := db.ReadTiles(ctx, unknown)
			if err != nil {
				return nil, err
			}
			maps.Copy(known, tiles)
		}
		for _, id := range ids {
			if known[id] == nil {
				return nil, fmt.Errorf("%w: tile %d of level %d", ErrNotFound, id.Tile, id.Level)
			}
			data = append(data, known[id])
		}
		return data, nil
	}
}

// Checkpoint is a signed checkpoint.
type Checkpoint struct {
	Origin string
	Size   int64
	Note   []byte
	At     time.Time // set by the database
}

const selectCheckpoints = "select origin, size, note, at from checkpoints"

// LatestCheckpoint reads the largest checkpoint of a log, or the newest of any log
// when origin is empty. The error is [ErrNotFound] if there is none.
func (db *DB) LatestCheckpoint(ctx context.Context, origin string) (_ Checkpoint, err error) {
	defer wrap(&err, "read checkpoint")
	// This runs every few seconds, so it reads one row for each origin from the index, and
	// not all checkpoints.
	const query = `
		with recursive origins as (
			(select origin from checkpoints where origin >= $1 order by origin limit 1)
			union all
			select (select c.origin from checkpoints c where c.origin > origins.origin order by c.origin limit 1)
			from origins where $1 = '' and origins.origin is not null
		)
		select newest.origin, newest.size, newest.note, newest.at
		from origins
		cross join lateral (select * from checkpoints c where c.origin = origins.origin order by size desc limit 1) as newest
		where $1 in ('', newest.origin)
		order by size desc, at desc
		limit 1`
	rows, _ := db.audit.Query(ctx, query, origin)
	return oneCheckpoint(rows)
}

// CheckpointUpTo reads the largest checkpoint that covers at most so many batches. The
// error is [ErrNotFound] if there is none.
func (db *DB) CheckpointUpTo(ctx context.Context, size int64) (_ Checkpoint, err error) {
	defer wrap(&err, "read checkpoint")
	rows, _ := db.audit.Query(ctx, selectCheckpoints+" where size <= $1 order by size desc, at desc limit 1", size)
	return oneCheckpoint(rows)
}

// CheckpointOf reads the checkpoint of a size: that of an origin, or if it has none, the
// newest of another origin. The error is [ErrNotFound] if there is none.
func (db *DB) CheckpointOf(ctx context.Context, origin string, size int64) (_ Checkpoint, err error) {
	defer wrap(&err, "read checkpoint")
	rows, _ := db.audit.Query(ctx, selectCheckpoints+" where size = $1 order by origin = $2 desc, at desc limit 1", size, origin)
	return oneCheckpoint(rows)
}

// Checkpoints reads at most limit checkpoints that come after one, by size and origin.
func (db *DB) Checkpoints(ctx context.Context, after Checkpoint, limit int) (_ []Checkpoint, err error) {
	defer wrap(&err, "read checkpoints")
	rows, _ := db.audit.Query(ctx, selectCheckpoints+" where (size, origin) > ($1, $2) order by size, origin limit $3", after.Size, after.Origin, limit)
	return pgx.CollectRows(rows, pgx.RowToStructByName[Checkpoint])
}

// NewestCheckpoints reads at most limit checkpoints of a log that are smaller than a
// size, the largest first.
func (db *DB) NewestCheckpoints(ctx context.Context, origin string, below int64, limit int) (_ []Checkpoint, err error) {
	defer wrap(&err, "read checkpoints")
	rows, _ := db.audit.Query(ctx, selectCheckpoints+" where origin = $1 and size < $2 order by size desc limit $3", origin, below, limit)
	return pgx.CollectRows(rows, pgx.RowToStructByName[Checkpoint])
}

func oneCheckpoint(rows pgx.Rows) (Checkpoint, error) {
	c, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[Checkpoint])
	return c, notFound(err)
}

// SaveTree stores tiles, in order of level, and the checkpoint that covers them. The
// database refuses tiles that do not follow from the batches. If there is a checkpoint of
// that origin and size, it stays, and this one is not stored.
func (db *DB) SaveTree(ctx context.Context, tiles []auditlog.TileData, c Checkpoint) (err error) {
	defer wrap(&err, "save tree")
	var levels []int16
	var numbers []int64
	var hashes [][]byte
	for _, t := range tiles {
		levels, numbers, hashes = append(levels, int16(t.Level)), append(numbers, t.Tile), append(hashes, t.Hashes)
	}
	_, err = db.admin.Exec(ctx, "select log_checkpoint($1, $2, $3, $4, $5, $6)", levels, numbers, hashes, c.Origin, c.Size, c.Note)
	return err
}

// KnowsCheckpointKey reports whether an event says that checkpoints are signed with
// that verifier key.
func (db *DB) KnowsCheckpointKey(ctx context.Context, verifierKey string) (known bool, err error) {
	defer wrap(&err, "look for a checkpoint key")
	err = db.audit.QueryRow(ctx,
		"select exists (select from events r where kind = 'checkpoint_key' and subject = $1 and "+ofBatch+")", verifierKey).Scan(&known)
	return known, err
}

// EachTruncation calls fn with the records of the newest events that state a truncation, at
// most limit, newest first. A record of more than size bytes is nil: it is not read.
func (db *DB) EachTruncation(ctx context.Context, size, limit int, fn func(record []byte)) (err error) {
	defer wrap(&err, "read statements of truncation")
	rows, _ := db.audit.Query(ctx, `
		select case when octet_length(record) <= $1 then record end
		from events r
		where kind = 'log_truncated' and `+ofBatch+`
		order by at desc, event_id desc
		limit $2`, size, limit)
	var record []byte
	_, err = pgx.ForEachRow(rows, []any{&record}, func() error {
		fn(bytes.Clone(record))
		return nil
	})
	return err
}
