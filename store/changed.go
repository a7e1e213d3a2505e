package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"slices"
	"sync/atomic"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
)

// Changed is what a write is about to change, once it holds the lock of its
// revision.
type Changed struct {
	Revision int64
	// Caller writes it; Kind is that of a [Change].
	Caller, Kind string
	// Entities are those that get a new version or go, by type and id.
	Entities []UID
	// ID is the bundle's name or the API key's id.
	ID string
	// Version is the bundle's new one.
	Version int64
	// Before and After are digests: the bundle's, or one over all the entities or the
	// key (see docs/audit.md), nil when there was or will be nothing.
	Before, After []byte
	// Stored is the digest over all that is stored of the bundle.
	Stored []byte
}

// changeLog puts the event of each write into the log, in the transaction of the
// write: there is no change without its record. Every batch is of one event.
type changeLog struct {
	event  func(context.Context, Changed) (Event, error)
	writer uuid.UUID
	server string
	seq    atomic.Int64
}

// record queues the event of a change, unless nobody makes events.
func (l *changeLog) record(ctx context.Context, batch *pgx.Batch, c Changed) error {
	if l.event == nil {
		return nil
	}
	e, err := l.event(ctx, c)
	if err != nil {
		return err
	}
	l.queue(batch, e)
	return nil
}

// queue adds the statements that put an event into the log.
func (l *changeLog) queue(batch *pgx.Batch, e Event) {
	b := sealBatch(auditlog.Header{
		Writer: l.writer, WriterSeq: l.seq.Add(1) - 1, Server: l.server, Mode: auditlog.Strict,
	}, nil, []Event{e})
	batch.Queue(`
		insert into events (event_id, at, kind, caller, server, subject, revision, request_id, trace_id, decisions, record, batch, pos, crc)
		values ($1, $2, $3, $4, $5, $6, $7, $8, $9, '{}', $10, $11, 0, $12)`,
		e.ID, idTime(e.ID), e.Kind, e.Caller, e.Server, e.Subject, orNull(e.Revision), orNull(e.RequestID), orNull(e.TraceID), e.Record, b.id, Checksum(e.Record))
	// Last of all, for its lock is held to the commit.
	batch.Queue("select log_append($1, $2, $3, $4, $5, $6, $7, $8)",
		b.id, l.writer, b.seq, b.rows, b.header, b.first, b.first, b.latest)
}

// send is record for a write that has nothing else to send with it.
func (l *changeLog) send(ctx context.Context, tx pgx.Tx, c Changed) error {
	var batch pgx.Batch
	if err := l.record(ctx, &batch, c); err != nil || batch.Len() == 0 {
		return err
	}
	return tx.SendBatch(ctx, &batch).Close()
}

// changedEntities describes what a plan does to entities.
func changedEntities(n int64, caller string, drafts []*draft) (c Changed, err error) {
	sorted := slices.SortedFunc(slices.Values(drafts), func(a, b *draft) int { return a.uid.compare(b.uid) })
	c = Changed{Revision: n, Caller: caller, Kind: KindEntity, Entities: make([]UID, len(sorted))}
	var before, after bytes.Buffer
	for i, d := range sorted {
		c.Entities[i] = d.uid
		if err := appendCanonical(&before, d.before); err != nil {
			return c, err
		}
		if err := appendCanonical(&after, d.now); err != nil {
			return c, err
		}
	}
	c.Before, c.After = digest(&before), digest(&after)
	return c, nil
}

func digest(b *bytes.Buffer) []byte {
	if b.Len() == 0 {
		return nil
	}
	sum := sha256.Sum256(b.Bytes())
	return sum[:]
}

// appendCanonical writes an entity as one line of JSON that does not depend on how
// Postgres prints it: members in order of their names, no spaces, numbers as they
// are written.
func appendCanonical(b *bytes.Buffer, e *Entity) error {
	if e == nil {
		return nil
	}
	values, err := canonical(e)
	if err != nil {
		return err
	}
	b.Write(jsonLine(values...))
	return nil
}

// canonical are the values of an entity's line.
func canonical(e *Entity) ([]any, error) {
	attrs, err := decode(e.Attrs)
	if err != nil {
		return nil, err
	}
	tags, err := decode(e.Tags)
	if err != nil {
		return nil, err
	}
	parents := make([][2]string, len(e.Parents))
	for i, p := range e.Parents {
		parents[i] = [2]string{p.Type, p.ID}
	}
	return []any{e.Type, e.ID, attrs, tags, parents}, nil
}

// jsonLine is an array of values as one line of JSON: text, numbers, and what decode
// returns.
func jsonLine(values ...any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(values); err != nil {
		panic(err) // none of these values fails
	}
	return b.Bytes()
}
