package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// ReplayDecision implements cedarpost.v1.AuditService.
func (s *auditService) ReplayDecision(ctx context.Context, req *cedarpostv1.ReplayDecisionRequest) (*cedarpostv1.ReplayDecisionResponse, error) {
	id, err := uuid.Parse(req.GetDecisionId())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, "decision_id: not a UUID")
	}
	row, missing, err := s.decision(ctx, id, "ReplayDecision")
	if err != nil {
		return nil, err
	}
	var out *cedarpostv1.ReplayDecisionResponse
	var rec *cedarpostv1.DecisionRecord
	rows := 0
	if !missing {
		rows, rec = 1, decisionlog.ReadDecision(row)
		if rec.Damaged == "" {
			if out, err = s.replay(ctx, rec, req.GetExplain()); err != nil {
				return nil, err
			}
		}
	}
	if err := s.recorder.RecordLogRead(ctx, cedarpostv1connect.AuditServiceReplayDecisionProcedure, req, rows); err != nil {
		return nil, err
	}
	if missing {
		return nil, s.notFound(ctx, id, "no decision %s is recorded")
	}
	if rec.Damaged != "" {
		return nil, damageError(rec)
	}
	return out, nil
}

// replay decides the question of a record again, at its revision, and compares the outcomes.
// An error means that nothing was compared, and says nothing about the record.
func (s *auditService) replay(ctx context.Context, rec *cedarpostv1.DecisionRecord, explain bool) (*cedarpostv1.ReplayDecisionResponse, error) {
	out := &cedarpostv1.ReplayDecisionResponse{Recorded: rec}
	if len(rec.GetMasked()) > 0 {
		out.Outcome = cedarpostv1.ReplayDecisionResponse_NOT_REPLAYABLE
		out.Reason = "values are masked: " + some(rec.GetMasked())
		return out, nil
	}
	var err error
	out.Replayed, out.Explanation, err = s.decideAgain(ctx, rec, explain)
	var bad *engine.RequestError
	var unfit *stored.UnfitError
	switch why := notReplayableReason(err); {
	case why != "":
		out.Outcome, out.Reason = cedarpostv1.ReplayDecisionResponse_NOT_REPLAYABLE, why
		return out, nil
	case errors.As(err, &bad), errors.As(err, &unfit), errors.Is(err, engine.ErrTooManyAncestors):
		// It was decided before, so the question or the data must have been altered.
		out.Differences = []string{"decision: recorded " + rec.GetDecision().String() + ", replayed to an error: " + err.Error()}
	case err != nil:
		return nil, err
	default:
		out.Differences = differences(rec, out.Replayed)
	}
	out.Outcome = cedarpostv1.ReplayDecisionResponse_EQUAL
	if len(out.Differences) > 0 {
		out.Outcome = cedarpostv1.ReplayDecisionResponse_DIFFERENT
		if rec.GetEngine() != engine.Version {
			out.Reason = fmt.Sprintf("another engine decided: recorded %s, replayed %s", rec.GetEngine(), engine.Version)
		}
	}
	return out, nil
}

// decideAgain returns the outcome of the question of a record and, if it is wanted, its explanation
// without the values of entities and the policies of other bundles that the caller may not read.
func (s *auditService) decideAgain(ctx context.Context, rec *cedarpostv1.DecisionRecord, explain bool) (*cedarpostv1.DecisionRecord, *cedarpostv1.Explanation, error) {
	set, err := s.past.Policies(ctx, rec.GetRevision())
	if err != nil {
		return nil, nil, err
	}
	ask := wire.Ask(&cedarpostv1.AuthorizeRequest{
		Principal: rec.Principal, Action: rec.Action, Resource: rec.Resource,
		Context: rec.Context, Fields: rec.FieldsAsked, Entities: rec.Entities,
	}, 0)
	ask.Recorded, ask.NothingMasked = true, len(rec.GetMasked()) == 0
	work := s.shares.Call(ctx, access.CallerFrom(ctx))
	defer work.Rest()
	evaluation, err := s.past.Prepare(ctx, rec.GetRevision(), set, ask, work.Pause)
	if err != nil {
		return nil, nil, err
	}
	res, err := evaluation.Decide()
	if err != nil {
		return nil, nil, err
	}
	again := outcomeOf(wire.Response(res))
	if !explain {
		return again, nil, nil
	}
	x, err := evaluation.Explain(res)
	if err != nil {
		return nil, nil, err
	}
	rights := access.RightsFrom(ctx)
	hideValues(x, unreadable(set, rights))
	explanation, hidden := wire.Explanation(x), foreignPolicy(evaluation.Question.Bundle(), rights)
	hideExplained(explanation, again.GetDecision(), slices.ContainsFunc(again.GetDeterminingPolicies(), hidden), hidden)
	return again, explanation, nil
}

// outcomeOf returns the outcome of a response in the form of a record.
func outcomeOf(res *cedarpostv1.AuthorizeResponse) *cedarpostv1.DecisionRecord {
	return &cedarpostv1.DecisionRecord{
		Decision: res.Decision, DeniedAt: res.DeniedAt, Fields: res.Fields,
		DeterminingPolicies: res.DeterminingPolicies, Errors: res.Errors, ErrorsOmitted: res.ErrorsOmitted,
		Obligations: res.Obligations, Advice: res.Advice,
	}
}

// differences describes in words each part in which two outcomes differ.
func differences(rec, again *cedarpostv1.DecisionRecord) []string {
	var c comparison
	c.text("decision", rec.GetDecision().String(), again.GetDecision().String())
	c.text("denied at", deniedAtText(rec), deniedAtText(again))
	c.text("fields", askedOrNot(rec.Fields), askedOrNot(again.Fields))
	c.list("permitted fields", rec.GetFields().GetPermitted(), again.GetFields().GetPermitted())
	c.list("denied fields", rec.GetFields().GetDenied(), again.GetFields().GetDenied())
	messages(&c, "policies", rec.GetDeterminingPolicies(), again.GetDeterminingPolicies(), wire.PolicyName)
	messages(&c, "errors", rec.GetErrors(), again.GetErrors(), func(e *cedarpostv1.PolicyError) string {
		return wire.PolicyName(e.GetPolicy()) + " (" + e.GetMessage() + ")"
	})
	c.text("errors omitted", fmt.Sprint(rec.GetErrorsOmitted()), fmt.Sprint(again.GetErrorsOmitted()))
	messages(&c, "obligations", rec.GetObligations(), again.GetObligations(), func(o *cedarpostv1.Obligation) string {
		return o.GetText() + " of " + wire.PolicyName(o.GetPolicy())
	})
	messages(&c, "advice", rec.GetAdvice(), again.GetAdvice(), func(a *cedarpostv1.Advice) string {
		return a.GetText() + " of " + wire.PolicyName(a.GetPolicy()) + " for " + some(a.GetPaths())
	})
	return c.found
}

func deniedAtText(rec *cedarpostv1.DecisionRecord) string {
	if rec.DeniedAt == nil {
		return "nothing"
	}
	return rec.GetDeniedAt().String()
}

func askedOrNot(f *cedarpostv1.Fields) string {
	if f == nil {
		return "none decided"
	}
	return "decided"
}

// comparison collects differences in words.
type comparison struct{ found []string }

func (c *comparison) text(part, recorded, replayed string) {
	if recorded != replayed {
		c.found = append(c.found, fmt.Sprintf("%s: recorded %s, replayed %s", part, recorded, replayed))
	}
}

func (c *comparison) list(part string, recorded, replayed []string) {
	if slices.Equal(recorded, replayed) {
		return
	}
	gone, come := without(recorded, replayed), without(replayed, recorded)
	switch {
	case len(gone) > 0 && len(come) > 0:
		c.text(part, some(gone), some(come))
	case len(gone) > 0:
		c.found = append(c.found, fmt.Sprintf("%s: only recorded: %s", part, some(gone)))
	case len(come) > 0:
		c.found = append(c.found, fmt.Sprintf("%s: only replayed: %s", part, some(come)))
	default:
		c.text(part, some(recorded), some(replayed)) // another order, or another count of an element
	}
}

// messages is comparison.list for lists of messages. It compares the messages themselves,
// because their words can be shortened.
func messages[T proto.Message](c *comparison, part string, recorded, replayed []T, text func(T) string) {
	if slices.EqualFunc(recorded, replayed, func(a, b T) bool { return proto.Equal(a, b) }) {
		return
	}
	before := len(c.found)
	words := func(list []T) (out []string) {
		for _, m := range list {
			out = append(out, text(m))
		}
		return out
	}
	if c.list(part, words(recorded), words(replayed)); len(c.found) == before {
		c.found = append(c.found, part+": not the same")
	}
}

func without(list, other []string) (out []string) {
	in := make(map[string]bool, len(other))
	for _, s := range other {
		in[s] = true
	}
	for _, s := range list {
		if !in[s] {
			out = append(out, s)
		}
	}
	return out
}

// some returns the first elements of a list in words.
func some(list []string) string {
	const most = 10
	switch n := len(list); {
	case n == 0:
		return "none"
	case n > most:
		return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), n-most)
	}
	return strings.Join(list, ", ")
}

// notReplayableReason says why a decision cannot be replayed on this server; it is "" for an
// error that has another meaning. The text has no ids, so many decisions have the same one.
func notReplayableReason(err error) string {
	switch {
	case errors.Is(err, store.ErrSwept):
		return "history no longer goes back to its revision"
	case errors.Is(err, store.ErrNotFound):
		return "this database has no such revision"
	case errors.Is(err, stored.ErrCompile):
		return "the policies of its revision do not compile with " + engine.Version
	case errors.Is(err, store.ErrTooLarge):
		return fmt.Sprintf("its entities weigh more than the %d bytes that a replay loads", snapshot.MaxPastWeight)
	}
	return ""
}
