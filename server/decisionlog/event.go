package decisionlog

import (
	"context"
	"fmt"
	"path"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// An event is everything that the log records besides decisions: changes, reads of the log,
// failed authentication, and what a server does to the log.

// newEvent sets the id, the time, the server and the call of a record, and returns its row.
// It keeps a caller that the record already has.
func newEvent(ctx context.Context, ids *ids, server string, rec *cedarpostv1.EventRecord) (store.Event, error) {
	id, at, err := ids.next()
	if err != nil {
		return store.Event{}, err
	}
	c := callFrom(ctx)
	rec.EventId, rec.Time, rec.Server, rec.TraceId = id.String(), timestamppb.New(at), server, c.TraceID
	if rec.Caller == "" {
		rec.Caller = c.Caller
	}
	bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(rec)
	if err != nil {
		return store.Event{}, fmt.Errorf("event: %w", err)
	}
	return eventRow(rec, bytes)
}

// NewEvent sets the id, the time, the server and the call of rec, and returns the row for
// [Recorder.Record]. It keeps a caller that rec already has. It commits nothing.
func (r *Recorder) NewEvent(ctx context.Context, rec *cedarpostv1.EventRecord) (store.Event, error) {
	return newEvent(ctx, r.ids, r.cfg.Name, rec)
}

// RecordEvent completes rec as [Recorder.NewEvent] does and commits it. It returns nil only
// after the commit; its other errors are those of [Recorder.Record].
func (r *Recorder) RecordEvent(ctx context.Context, rec *cedarpostv1.EventRecord) error {
	e, err := r.NewEvent(ctx, rec)
	if err != nil {
		return err
	}
	return r.Record(ctx, nil, []store.Event{e})
}

// maxLoggedRequest bounds the text of a request in the record of a read, in bytes.
const maxLoggedRequest = 4 << 10

// RecordLogRead records that the log was read. The caller must not give out any of the data
// before it returns nil. procedure is the RPC, and req its request, of which the record has
// the first 4 KiB as JSON. rows is the number of rows that are given out; -1 means that it
// is not known yet.
func (r *Recorder) RecordLogRead(ctx context.Context, procedure string, req proto.Message, rows int) error {
	text, err := protojson.Marshal(req)
	if err != nil {
		return err
	}
	if len(text) > maxLoggedRequest {
		text = []byte(strings.ToValidUTF8(string(text[:maxLoggedRequest]), ""))
	}
	return r.RecordEvent(ctx, &cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_LOG_READ, Subject: procedure,
		Detail: &cedarpostv1.EventRecord_LogRead{LogRead: &cedarpostv1.LogRead{Procedure: procedure, Request: string(text), Rows: int64(rows)}},
	})
}

// EventKind returns a kind as the column of the events has it.
func EventKind(k cedarpostv1.EventRecord_Kind) string { return strings.ToLower(k.String()) }

// eventsOf returns a function that makes the events of one kind. The store calls it inside
// of the transaction that the event is about, so it has ids of its own.
func eventsOf[T any](server string, record func(context.Context, T) *cedarpostv1.EventRecord) func(context.Context, T) (store.Event, error) {
	ids := newIDs(nil, nil)
	return func(ctx context.Context, about T) (store.Event, error) {
		return newEvent(ctx, ids, server, record(ctx, about))
	}
}

// ChangeEvents returns the function that makes the event of a change, for
// [store.Config.Event]. server is the name of the server in the events.
func ChangeEvents(server string) func(context.Context, store.Changed) (store.Event, error) {
	return eventsOf(server, changeRecord)
}

// maxListed bounds the entities that the record of a change lists.
const maxListed = 100

func changeRecord(ctx context.Context, c store.Changed) *cedarpostv1.EventRecord {
	if c.Kind == store.KindBreakGlass {
		return &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_BREAK_GLASS, Caller: c.Caller, Subject: c.ID, Revision: c.Revision,
			Detail: &cedarpostv1.EventRecord_BreakGlass{BreakGlass: &cedarpostv1.BreakGlass{
				Bundle: c.ID, Version: c.Version, Change: c.OfChange, Reason: c.Reason, Rules: c.Rules,
			}},
		}
	}
	change := &cedarpostv1.Change{
		Operation: operationFrom(ctx, c), EntityCount: int32(len(c.Entities)), Before: c.Before, After: c.After,
		Version: c.Version, Stored: c.Stored, KeyCaller: c.KeyCaller, Reason: c.Reason,
	}
	subject := c.ID
	for _, uid := range c.Entities[:min(len(c.Entities), maxListed)] {
		change.Entities = append(change.Entities, stored.ToProto(uid))
	}
	if len(c.Entities) == 1 {
		subject = wire.UID(change.Entities[0]).String()
	} else if len(c.Entities) > 1 {
		subject = store.CallerOfGrants(c.Entities) // "" for other entities
	}
	return &cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_CHANGE, Caller: c.Caller, Subject: subject, Revision: c.Revision,
		Detail: &cedarpostv1.EventRecord_Change{Change: change},
	}
}

// operationFrom returns the name of the RPC that makes a change. A command of the server
// calls no RPC; its change gets the name of the RPC that makes changes of this kind.
func operationFrom(ctx context.Context, c store.Changed) string {
	if procedure := callFrom(ctx).Procedure; procedure != "" {
		return path.Base(procedure)
	}
	if len(c.Entities) > 0 && c.Entities[0].Type == store.GrantType {
		return "PutGrant"
	}
	return map[string]string{store.KindEntity: "WriteEntities", store.KindBundle: "ApplyBundle", store.KindKey: "CreateKey"}[c.Kind]
}

// DatabaseEvents returns the function that makes the event of a database that gets another
// id, for [store.ClaimDatabase]. server is the name of the server in the events.
func DatabaseEvents(server string) func(context.Context, store.Renewed) (store.Event, error) {
	return eventsOf(server, func(_ context.Context, r store.Renewed) *cedarpostv1.EventRecord {
		return &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_DATABASE_RENEWED, Subject: r.After.String(),
			Detail: &cedarpostv1.EventRecord_DatabaseRenewed{DatabaseRenewed: &cedarpostv1.DatabaseRenewed{
				Before: r.Before.String(), After: r.After.String(), Copied: r.Copied,
			}},
		}
	})
}

// StateRootEvents returns the function that makes the event of a state root, for
// [store.DB.WriteStateRoot]. server is the name of the server in the events.
func StateRootEvents(server string) func(context.Context, store.StateRoot) (store.Event, error) {
	return eventsOf(server, func(_ context.Context, root store.StateRoot) *cedarpostv1.EventRecord {
		return &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_STATE_ROOT, Subject: fmt.Sprint(root.Revision), Revision: root.Revision,
			Detail: &cedarpostv1.EventRecord_StateRoot{StateRoot: &cedarpostv1.StateRoot{
				Revision: root.Revision, Root: root.Root[:], Entities: root.Entities, Bundles: root.Bundles, Keys: root.Keys,
			}},
		}
	})
}
