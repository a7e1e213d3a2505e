package server

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

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
func (s *authorizationService) row(ctx context.Context, snap *snapshot, req *cedarpostv1.AuthorizeRequest, e *engine.Evaluation, res *engine.Result, loading, took time.Duration) (row store.Decision, resp *cedarpostv1.AuthorizeResponse, err error) {
	id, at, err := s.ids.next()
	if err != nil {
		return row, nil, err
	}
	resp = wire.Response(res)
	resp.DecisionId = id.String()
	resp.Revision = encodeRevision(snap.position, snap.position.Number)
	resp.CacheHint = s.hint(snap, req, e)

	row = store.Decision{
		ID: id, At: at, Revision: snap.position.Number, Mark: snap.position.Mark, Caller: callerFrom(ctx), Server: s.name,
		Principal: protoToStore(req.Principal), Action: protoToStore(req.Action), Resource: protoToStore(req.Resource),
		Allowed: res.Allowed, DeniedAt: int16(res.DeniedAt), Fields: decidedFields(res.Permitted, res.Denied),
		RequestID: req.RequestId, TraceID: traceFrom(ctx),
	}
	for _, p := range res.Policies {
		row.Policies = append(row.Policies, p.String())
	}
	rec := &cedarpostv1.DecisionRecord{
		DecisionId: resp.DecisionId, Time: timestamppb.New(at), Revision: row.Revision,
		Caller: row.Caller, Server: s.name,
		Principal: req.Principal, Action: req.Action, Resource: req.Resource,
		FieldsAsked: req.Fields,
		Decision:    resp.Decision, DeniedAt: resp.DeniedAt, Fields: resp.Fields,
		DeterminingPolicies: resp.DeterminingPolicies, Errors: resp.Errors, ErrorsOmitted: resp.ErrorsOmitted,
		Obligations: resp.Obligations, Advice: resp.Advice,
		RequestId: req.RequestId, TraceId: row.TraceID,
		EvaluationTime: durationpb.New(took), LoadTime: durationpb.New(loading),
		Engine: engine.Version, Mode: string(s.mode), MayBeKept: resp.CacheHint.GetMaxAge(),
	}
	mask := func(path string, value any) any {
		hash := s.mask.hash(value)
		rec.Masked, row.Masked = append(rec.Masked, path), append(row.Masked, hash)
		return map[string]any{"__masked": hex.EncodeToString(hash)}
	}
	if rec.Context, err = structpb.NewStruct(snap.set.MaskContext(e.Question, mask)); err != nil {
		return row, nil, fmt.Errorf("record context: %w", err)
	}
	if rec.Entities, err = maskEntities(snap.set, e.Question, req.Entities, mask); err != nil {
		return row, nil, err
	}
	if row.Record, err = (proto.MarshalOptions{Deterministic: true}).Marshal(rec); err != nil {
		return row, nil, fmt.Errorf("record: %w", err)
	}
	return row, resp, nil
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

// decidedFields is the column that decisions about a field are found by: "+path"
// or "-path", in order.
func decidedFields(permitted, denied []string) []string {
	size := len(permitted) + len(denied)
	if size == 0 {
		return nil
	}
	out := make([]string, 0, size)
	for _, list := range [][]string{permitted, denied} {
		for _, path := range list {
			size += len(path)
		}
	}
	var all strings.Builder // one allocation for all of them
	all.Grow(size)
	add := func(sign byte, paths []string) {
		for _, path := range paths {
			start := all.Len()
			all.WriteByte(sign)
			all.WriteString(path)
			out = append(out, all.String()[start:])
		}
	}
	add('+', permitted)
	add('-', denied)
	slices.Sort(out)
	return out
}
