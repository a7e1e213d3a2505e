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

// newEvent completes a record with an id, a time and the call of the context, and returns
// the row of it.
func newEvent(ctx context.Context, ids *ids, server string, rec *cedarpostv1.EventRecord) (store.Event, error) {
	id, at, err := ids.next()
	if err != nil {
		return store.Event{}, err
	}
	rec.EventId, rec.Time, rec.Server, rec.TraceId = id.String(), timestamppb.New(at), server, CallFrom(ctx).TraceID
	if rec.Caller == "" {
		rec.Caller = CallFrom(ctx).Caller
	}
	bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(rec)
	if err != nil {
		return store.Event{}, fmt.Errorf("event: %w", err)
	}
	return eventRow(rec, bytes)
}

// Event completes a record with an id, a time and the call of the context, and returns the
// row of it, to be recorded.
func (r *Recorder) Event(ctx context.Context, rec *cedarpostv1.EventRecord) (store.Event, error) {
	return newEvent(ctx, r.ids, r.cfg.Name, rec)
}

// AddEvent records an event. It returns nil only after the commit.
func (r *Recorder) AddEvent(ctx context.Context, rec *cedarpostv1.EventRecord) error {
	e, err := r.Event(ctx, rec)
	if err != nil {
		return err
	}
	return r.Record(ctx, nil, []store.Event{e})
}

// maxListed bounds the entities that the record of a change lists.
const maxListed = 100

// ChangeEvents returns what makes the records of changes, for store.Config.Event.
// server is the name of the server.
func ChangeEvents(server string) func(context.Context, store.Changed) (store.Event, error) {
	ids := newIDs(nil, nil)
	return func(ctx context.Context, c store.Changed) (store.Event, error) {
		change := &cedarpostv1.Change{
			Operation: operationFrom(ctx, c.Kind), EntityCount: int32(len(c.Entities)), Before: c.Before, After: c.After,
			Version: c.Version, Stored: c.Stored,
		}
		subject := c.ID
		for _, uid := range c.Entities[:min(len(c.Entities), maxListed)] {
			change.Entities = append(change.Entities, stored.ToProto(uid))
		}
		if len(c.Entities) == 1 {
			subject = wire.UID(change.Entities[0]).String()
		}
		return newEvent(ctx, ids, server, &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_CHANGE, Caller: c.Caller, Subject: subject, Revision: c.Revision,
			Detail: &cedarpostv1.EventRecord_Change{Change: change},
		})
	}
}

// DatabaseEvents returns what makes the records of databases that get another id, for
// [store.ClaimDatabase]. server is the name of the server.
func DatabaseEvents(server string) func(context.Context, store.Renewed) (store.Event, error) {
	ids := newIDs(nil, nil)
	return func(ctx context.Context, r store.Renewed) (store.Event, error) {
		return newEvent(ctx, ids, server, &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_DATABASE_RENEWED, Subject: r.After.String(),
			Detail: &cedarpostv1.EventRecord_DatabaseRenewed{DatabaseRenewed: &cedarpostv1.DatabaseRenewed{
				Before: r.Before.String(), After: r.After.String(), Copied: r.Copied,
			}},
		})
	}
}

// operationFrom is the method that was called, or what a command does.
func operationFrom(ctx context.Context, kind string) string {
	if procedure := CallFrom(ctx).Procedure; procedure != "" {
		return path.Base(procedure)
	}
	return map[string]string{store.KindEntity: "WriteEntities", store.KindBundle: "ApplyBundle", store.KindKey: "CreateKey"}[kind]
}

// maxLoggedRequest bounds what of a request is kept.
const maxLoggedRequest = 4 << 10

// AddRead records that the log was read. Nothing that was read may leave before it returns
// nil. rows is how many rows are given out; -1 means that this is not known yet.
func (r *Recorder) AddRead(ctx context.Context, procedure string, req proto.Message, rows int) error {
	text, err := protojson.Marshal(req)
	if err != nil {
		return err
	}
	if len(text) > maxLoggedRequest {
		text = []byte(strings.ToValidUTF8(string(text[:maxLoggedRequest]), ""))
	}
	return r.AddEvent(ctx, &cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_LOG_READ, Subject: procedure,
		Detail: &cedarpostv1.EventRecord_LogRead{LogRead: &cedarpostv1.LogRead{Procedure: procedure, Request: string(text), Rows: int64(rows)}},
	})
}

// EventKind is a kind as the column has it.
func EventKind(k cedarpostv1.EventRecord_Kind) string { return strings.ToLower(k.String()) }

// StateRootEvents returns what makes the records of state roots, for
// [store.DB.WriteStateRoot]. server is the name of the server.
func StateRootEvents(server string) func(context.Context, store.StateRoot) (store.Event, error) {
	ids := newIDs(nil, nil)
	return func(ctx context.Context, root store.StateRoot) (store.Event, error) {
		return newEvent(ctx, ids, server, &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_STATE_ROOT, Subject: fmt.Sprint(root.Revision), Revision: root.Revision,
			Detail: &cedarpostv1.EventRecord_StateRoot{StateRoot: &cedarpostv1.StateRoot{
				Revision: root.Revision, Root: root.Root[:], Entities: root.Entities, Bundles: root.Bundles, Keys: root.Keys,
			}},
		})
	}
}
