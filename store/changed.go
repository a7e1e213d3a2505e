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
	// Caller writes it. Kind is the kind of the [Change], or [KindBreakGlass].
	Caller, Kind string
	// Entities are those that get a new version or are deleted, by type and id.
	Entities []UID
	// ID is the bundle's name or the API key's id.
	ID string
	// KeyCaller is the caller that has the API key.
	KeyCaller string
	// Version is the new version of the bundle, or the one that ended if there is no After.
	Version int64
	// Before and After are digests of the old and the new state: that of the bundle, or
	// one over all the entities or the key (see docs/audit.md). Nil stands for no state.
	Before, After []byte
	// Stored is the digest over all that is stored of the bundle.
	Stored []byte
	// Reason is what the caller said about the change.
	Reason string
	// OfChange and Rules are those of a [BreakGlass]: the change that is published, "" if there is none, and
	// the rules.
	OfChange string
	Rules    []string
}

// KindBreakGlass is the kind of a [Changed] about a publish past rules. That of the publish itself comes
// before it.
const KindBreakGlass = "break_glass"

// changeLog puts the event of each write into the log, in the transaction of the write,
// so that no change is without a record. Each batch has one event.
type changeLog struct {
	makeEvent func(context.Context, Changed) (Event, error) // nil: writes leave no event
	writer    uuid.UUID
	server    string
	seq       atomic.Int64
}

// record queues the event of a change, if events are made.
func (l *changeLog) record(ctx context.Context, batch *pgx.Batch, c Changed) error {
	if l.makeEvent == nil {
		return nil
	}
	e, err := l.makeEvent(ctx, c)
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
	// The last statement, because its lock is held until the commit.
	batch.Queue("select log_append($1, $2, $3, $4, $5, $6, $7, $8)",
		b.id, l.writer, b.seq, b.rows, b.header, b.first, b.first, b.latest)
}

// send is record for a write that has no other statements to send with the event.
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

// appendCanonical appends an entity as one line of JSON, which does not depend on how
// Postgres prints JSON: members are in order of their names, there are no spaces, and
// numbers are as they were written.
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

// canonical returns the values of an entity's line.
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

// jsonLine writes values as one line of JSON, an array. They are texts, numbers, or what
// decode returns.
func jsonLine(values ...any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(values); err != nil {
		panic(err) // none of these values fails to encode
	}
	return b.Bytes()
}
