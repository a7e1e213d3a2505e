package store

import (
	"context"
	"errors"
	"fmt"
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

// RowsOf reads the rows of batches, decisions and events each in the order of batch
// and place.
func (db *DB) RowsOf(ctx context.Context, batches []Batch) (out LogRows, err error) {
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
		select decision_id, at, revision, caller, server,
		       principal_type, principal_id, action_type, action_id, resource_type, resource_id,
		       allowed, denied_at, policies, request_id, trace_id, fields, masked, record, batch, pos, crc
		from decisions
		where at >= $1 and at <= $2 and batch = any($3)
		order by batch, pos`, from, to, ids).Query(func(rows pgx.Rows) (err error) {
		out.Decisions, err = pgx.CollectRows(rows, scanDecision)
		return err
	})
	batch.Queue(`
		select event_id, at, kind, caller, server, subject, revision, request_id, trace_id, decisions, record, batch, pos, crc
		from events
		where at >= $1 and at <= $2 and batch = any($3)
		order by batch, pos`, from, to, ids).Query(func(rows pgx.Rows) (err error) {
		out.Events, err = pgx.CollectRows(rows, scanEvent)
		return err
	})
	return out, db.audit.SendBatch(ctx, &batch).Close()
}

// GetEvent reads one event by its id. The error is [ErrNotFound] if there is none.
func (db *DB) GetEvent(ctx context.Context, id uuid.UUID) (_ Event, err error) {
	defer wrap(&err, "get event")
	rows, _ := db.audit.Query(ctx, `
		select event_id, at, kind, caller, server, subject, revision, request_id, trace_id, record, batch, pos
		from events
		where at = $1 and event_id = $2`, idTime(id), id)
	e, err := pgx.CollectExactlyOneRow(rows, scanEvent)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotFound
	}
	return e, err
}

// DayDropped reports whether an event says that a day of the log, as 2026-01-31, was
// dropped.
func (db *DB) DayDropped(ctx context.Context, day string) (dropped bool, err error) {
	defer wrap(&err, "look for a dropped day")
	err = db.audit.QueryRow(ctx,
		"select exists (select from events where kind = 'retention_drop' and subject = $1)", day).Scan(&dropped)
	return dropped, err
}

// Tiles returns a reader of the tree's tiles. What it read it does not read again.
func (db *DB) Tiles(ctx context.Context) auditlog.Tiles {
	known := map[auditlog.TileID][]byte{}
	return func(ids []auditlog.TileID) (data [][]byte, err error) {
		defer wrap(&err, "read tiles")
		var levels, tiles []int64
		for _, id := range ids {
			if known[id] == nil {
				levels, tiles = append(levels, int64(id.Level)), append(tiles, id.Tile)
			}
		}
		if len(levels) > 0 {
			rows, _ := db.audit.Query(ctx, `
				select n.level, n.tile, n.hashes
				from unnest($1::bigint[], $2::bigint[]) as named (level, tile)
				join audit_nodes n on n.level = named.level and n.tile = named.tile`, levels, tiles)
			var id auditlog.TileID
			var hashes []byte
			_, err := pgx.ForEachRow(rows, []any{&id.Level, &id.Tile, &hashes}, func() error {
				known[id] = append([]byte(nil), hashes...)
				return nil
			})
			if err != nil {
				return nil, err
			}
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

// Checkpoint is a signed checkpoint, as it was given out.
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
	rows, _ := db.audit.Query(ctx, selectCheckpoints+" where $1 = '' or origin = $1 order by size desc, at desc limit 1", origin)
	return oneCheckpoint(rows)
}

// CheckpointOf reads the checkpoint of a size, the newest if several logs have one.
// The error is [ErrNotFound] if there is none.
func (db *DB) CheckpointOf(ctx context.Context, size int64) (_ Checkpoint, err error) {
	defer wrap(&err, "read checkpoint")
	rows, _ := db.audit.Query(ctx, selectCheckpoints+" where size = $1 order by at desc limit 1", size)
	return oneCheckpoint(rows)
}

// Checkpoints reads at most limit checkpoints larger than a size, in order.
func (db *DB) Checkpoints(ctx context.Context, after int64, limit int) (_ []Checkpoint, err error) {
	defer wrap(&err, "read checkpoints")
	rows, _ := db.audit.Query(ctx, selectCheckpoints+" where size > $1 order by size, at limit $2", after, limit)
	return pgx.CollectRows(rows, pgx.RowToStructByName[Checkpoint])
}

func oneCheckpoint(rows pgx.Rows) (Checkpoint, error) {
	c, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[Checkpoint])
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotFound
	}
	return c, err
}

// SaveTree stores tiles and the checkpoint that covers them. A tile only grows. The
// checkpoint is not stored twice: the error of a second one is Postgres's.
func (db *DB) SaveTree(ctx context.Context, tiles []auditlog.TileData, c Checkpoint) (err error) {
	defer wrap(&err, "save tree")
	var batch pgx.Batch
	for _, t := range tiles {
		batch.Queue(`
			insert into audit_nodes (level, tile, hashes) values ($1, $2, $3)
			on conflict (level, tile) do update set hashes = excluded.hashes
			where length(audit_nodes.hashes) <= length(excluded.hashes)`, t.Level, t.Tile, t.Hashes)
	}
	batch.Queue("insert into checkpoints (origin, size, note) values ($1, $2, $3)", c.Origin, c.Size, c.Note)
	return pgx.BeginFunc(ctx, db.admin, func(tx pgx.Tx) error { return tx.SendBatch(ctx, &batch).Close() })
}

// KnowsCheckpointKey reports whether an event says that checkpoints are signed with
// that verifier key.
func (db *DB) KnowsCheckpointKey(ctx context.Context, verifierKey string) (known bool, err error) {
	defer wrap(&err, "look for a checkpoint key")
	err = db.audit.QueryRow(ctx,
		"select exists (select from events where kind = 'checkpoint_key' and subject = $1)", verifierKey).Scan(&known)
	return known, err
}
