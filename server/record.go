package server

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/cedarpost/cedarpost/server/snapshot"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// The record of a decision holds all that deciding again takes, but for policies
// and stored entities, which the revision names: the question as it was evaluated,
// with what the server filled in, the entities that came with it, and the outcome
// with its reasons. Whatever a decision comes to depend on has to come in here, or
// replays go wrong.

// row turns a result into the record of it, and the answer. loading is a part of
// took.
func (s *authorizationService) row(ctx context.Context, snap *snapshot.Snapshot, req *cedarpostv1.AuthorizeRequest, e *engine.Evaluation, res *engine.Result, loading, took time.Duration) (row store.Decision, resp *cedarpostv1.AuthorizeResponse, err error) {
	id, at, err := s.ids.next()
	if err != nil {
		return row, nil, err
	}
	resp = wire.Response(res)
	resp.DecisionId = id.String()
	resp.Revision = snapshot.EncodeRevision(snap.Position, snap.Position.Number)
	resp.CacheHint = s.hint(snap, req, e)

	rec := &cedarpostv1.DecisionRecord{
		DecisionId: resp.DecisionId, Time: timestamppb.New(at), Revision: snap.Position.Number,
		Caller: callerFrom(ctx), Server: s.name,
		Principal: req.Principal, Action: req.Action, Resource: req.Resource,
		FieldsAsked: req.Fields,
		Decision:    resp.Decision, DeniedAt: resp.DeniedAt, Fields: resp.Fields,
		DeterminingPolicies: resp.DeterminingPolicies, Errors: resp.Errors, ErrorsOmitted: resp.ErrorsOmitted,
		Obligations: resp.Obligations, Advice: resp.Advice,
		RequestId: req.RequestId, TraceId: traceFrom(ctx),
		EvaluationTime: durationpb.New(took), LoadTime: durationpb.New(loading),
		Engine: engine.Version, Mode: string(s.mode), MayBeKept: resp.CacheHint.GetMaxAge(),
	}
	mask := func(path string, value any) any {
		hash := s.mask.hash(value)
		rec.Masked = append(rec.Masked, path)
		return map[string]any{"__masked": hex.EncodeToString(hash)}
	}
	if rec.Context, err = structpb.NewStruct(snap.Set.MaskContext(e.Question, mask)); err != nil {
		return row, nil, fmt.Errorf("record context: %w", err)
	}
	if rec.Entities, err = maskEntities(snap.Set, e.Question, req.Entities, mask); err != nil {
		return row, nil, err
	}
	record, err := proto.MarshalOptions{Deterministic: true}.Marshal(rec)
	if err != nil {
		return row, nil, fmt.Errorf("record: %w", err)
	}
	row, err = decisionRow(rec, record)
	row.Mark = snap.Position.Mark
	return row, resp, err
}

// maskEntities is the entities of a request as they are recorded: as they came,
// where the schema marks nothing in them.
func maskEntities(set *engine.Set, q *engine.Question, came []*cedarpostv1.Entity, mask engine.Mask) ([]*cedarpostv1.Entity, error) {
	out := came
	for i, e := range came {
		attrs, tags, marked := set.MaskEntity(q, wire.UID(e.GetUid()), i, mask)
		if !marked {
			continue
		}
		masked := &cedarpostv1.Entity{Uid: e.Uid, Parents: e.Parents}
		for _, part := range []struct {
			plain map[string]any
			into  **structpb.Struct
		}{{attrs, &masked.Attrs}, {tags, &masked.Tags}} {
			var err error
			if *part.into, err = structpb.NewStruct(part.plain); err != nil {
				return nil, fmt.Errorf("record entity: %w", err)
			}
		}
		if &out[0] == &came[0] {
			out = slices.Clone(came) // the request is the caller's
		}
		out[i] = masked
	}
	return out, nil
}
