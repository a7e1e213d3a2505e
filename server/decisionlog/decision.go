package decisionlog

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
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

// The record of a decision has everything that a replay needs, except what its revision
// names, the policies and the stored entities. So it has the question as it was evaluated,
// with the values that the server filled in, the entities of the request, and the outcome
// with its reasons. Whatever else decisions depend on in the future must be added here, or
// replays decide something else.

// Decision is a decision that is to be recorded.
type Decision struct {
	// Request is the question as the caller asked it.
	Request *cedarpostv1.AuthorizeRequest
	// Evaluation is what the engine made of it.
	Evaluation *engine.Evaluation
	// Set holds the policies that decided, and Position is the position of their revision.
	Set      *engine.Set
	Position store.Position
	// Response is the answer. [Recorder.NewDecision] sets its DecisionId.
	Response *cedarpostv1.AuthorizeResponse
	// FieldForbids are those of the result. They are not recorded, and count as used.
	FieldForbids []string
	// Took is how long the decision took, and Loading how much of that the loading of
	// entities took.
	Loading, Took time.Duration
}

// NewDecision makes the record of a decision and returns the row for [Recorder.Record]. It
// masks values that the schema marks @sensitive, and sets the id of the response. It commits
// nothing.
func (r *Recorder) NewDecision(ctx context.Context, d Decision) (row store.Decision, err error) {
	id, at, err := r.ids.next()
	if err != nil {
		return row, err
	}
	req, resp, c := d.Request, d.Response, callFrom(ctx)
	resp.DecisionId = id.String()
	rec := &cedarpostv1.DecisionRecord{
		DecisionId: resp.DecisionId, Time: timestamppb.New(at), Revision: d.Position.Number,
		Caller: c.Caller, Server: r.cfg.Name,
		Principal: req.Principal, Action: req.Action, Resource: req.Resource,
		FieldsAsked: req.Fields,
		Decision:    resp.Decision, DeniedAt: resp.DeniedAt, Fields: resp.Fields,
		DeterminingPolicies: resp.DeterminingPolicies, Errors: resp.Errors, ErrorsOmitted: resp.ErrorsOmitted,
		Obligations: resp.Obligations, Advice: resp.Advice,
		RequestId: req.RequestId, TraceId: c.TraceID,
		EvaluationTime: durationpb.New(d.Took), LoadTime: durationpb.New(d.Loading),
		Engine: engine.Version, Mode: string(r.cfg.Mode), MayBeKept: resp.CacheHint.GetMaxAge(),
	}
	mask := func(path string, value any) any {
		hash := r.mask.hash(value)
		rec.Masked = append(rec.Masked, path)
		return map[string]any{engine.MaskedKey: hex.EncodeToString(hash)}
	}
	if rec.Context, err = structpb.NewStruct(d.Set.MaskContext(d.Evaluation.Question, mask)); err != nil {
		return row, fmt.Errorf("record context: %w", err)
	}
	if rec.Entities, err = maskEntities(d.Set, d.Evaluation.Question, req.Entities, mask); err != nil {
		return row, err
	}
	record, err := proto.MarshalOptions{Deterministic: true}.Marshal(rec)
	if err != nil {
		return row, fmt.Errorf("record: %w", err)
	}
	row, err = DecisionRow(rec, record)
	row.Mark, row.FieldForbids, row.Explained = d.Position.Mark, d.FieldForbids, req.Explain
	return row, err
}

// maskEntities returns the entities of a request as they are recorded: with hashes in place
// of values that the schema marks @sensitive. It does not change sent.
func maskEntities(set *engine.Set, q *engine.Question, sent []*cedarpostv1.Entity, mask engine.Mask) ([]*cedarpostv1.Entity, error) {
	out := sent
	for i, e := range sent {
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
		if &out[0] == &sent[0] {
			out = slices.Clone(sent)
		}
		out[i] = masked
	}
	return out, nil
}
