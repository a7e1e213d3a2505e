package server

import (
	"context"
	"fmt"
	"path"
	"strings"

	"github.com/cedarpost/cedarpost/server/stored"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// eventLog records what is not a decision, in the same log.
type eventLog struct {
	recorder *recorder
	server   string // its name
}

// newEvent completes a record and makes the row of it.
func newEvent(ctx context.Context, ids *ids, server string, rec *cedarpostv1.EventRecord) (store.Event, error) {
	id, at, err := ids.next()
	if err != nil {
		return store.Event{}, err
	}
	rec.EventId, rec.Time, rec.Server, rec.TraceId = id.String(), timestamppb.New(at), server, traceFrom(ctx)
	if rec.Caller == "" {
		rec.Caller = callerFrom(ctx)
	}
	bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(rec)
	if err != nil {
		return store.Event{}, fmt.Errorf("event: %w", err)
	}
	return eventRow(rec, bytes)
}

// add records an event, and returns only after its commit.
func (l *eventLog) add(ctx context.Context, rec *cedarpostv1.EventRecord) error {
	e, err := newEvent(ctx, l.recorder.ids, l.server, rec)
	if err != nil {
		return err
	}
	return l.recorder.record(ctx, nil, []store.Event{e})
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
	if procedure, ok := ctx.Value(procedureKey).(string); ok {
		return path.Base(procedure)
	}
	return map[string]string{store.KindEntity: "WriteEntities", store.KindBundle: "ApplyBundle", store.KindKey: "CreateKey"}[kind]
}

// maxLoggedRequest bounds what of a request is kept.
const maxLoggedRequest = 4 << 10

// read records that the log was read. Nothing of what was read may leave before it
// returns nil. rows is how many are given out, -1 when that is not known yet.
func (l *eventLog) read(ctx context.Context, procedure string, req proto.Message, rows int) error {
	text, err := protojson.Marshal(req)
	if err != nil {
		return err
	}
	if len(text) > maxLoggedRequest {
		text = []byte(strings.ToValidUTF8(string(text[:maxLoggedRequest]), ""))
	}
	return l.add(ctx, &cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_LOG_READ, Subject: procedure,
		Detail: &cedarpostv1.EventRecord_LogRead{LogRead: &cedarpostv1.LogRead{Procedure: procedure, Request: string(text), Rows: int64(rows)}},
	})
}
