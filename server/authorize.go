package server

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// authorizationService decides. The steps of a call are: snapshot, question, slice,
// decision, record, answer. No answer leaves before its record is committed. A failure of any
// step is an error, never an allow.
type authorizationService struct {
	db       *store.DB
	follower *snapshot.Follower
	gate     *gate
	recorder *decisionlog.Recorder
	// record commits rows with the recorder.
	record func(context.Context, []store.Decision, []store.Event) error
	limits *access.Limiter
	places *access.Places // for calls that decide
	shares *access.Shares
	metric *decisionMetrics
	noted  *decisionlog.Noted

	keyWait   time.Duration         // for the keys of issuers, in one call
	maxReuse  time.Duration         // how long callers may keep an answer; 0 or less: not at all
	watchers  *sharedPlaces[string] // for watches, by caller
	heartbeat time.Duration         // between two messages of a watch, if nothing changes
	stopping  <-chan struct{}       // closed when the server stops
}

// Authorize implements cedarpost.v1.AuthorizationService.
func (s *authorizationService) Authorize(ctx context.Context, req *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
	v, err := s.view(ctx, req.GetConsistency())
	if err != nil {
		return nil, err
	}
	answers, err := s.decide(ctx, v, []*cedarpostv1.AuthorizeRequest{req})
	if err != nil {
		return nil, err
	}
	if answers[0].err != nil {
		return nil, answers[0].err
	}
	return answers[0].response, nil
}

// AuthorizeBatch implements cedarpost.v1.AuthorizationService.
func (s *authorizationService) AuthorizeBatch(ctx context.Context, req *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
	rights := access.RightsFrom(ctx)
	if !s.limits.Allow(rights, len(req.GetChecks())-1) { // the edge has counted one
		s.noted.Probing(ctx, decisionlog.ProbingRateLimited, "", "AuthorizeBatch")
		return nil, s.limits.Refusal(rights)
	}
	v, err := s.view(ctx, req.GetConsistency())
	if err != nil {
		return nil, err
	}
	answers, err := s.decide(ctx, v, req.GetChecks())
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.AuthorizeBatchResponse{Revision: snapshot.EncodeRevision(v.Position, v.Position.Number)}
	for _, a := range answers {
		r := &cedarpostv1.AuthorizeBatchResult{Result: &cedarpostv1.AuthorizeBatchResult_Response{Response: a.response}}
		if a.err != nil {
			pe := publicError(cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure, a.err)
			r.Result = &cedarpostv1.AuthorizeBatchResult_Error{Error: &cedarpostv1.BatchError{Code: pe.Code().String(), Message: pe.Message()}}
		}
		out.Results = append(out.Results, r)
	}
	return out, nil
}

// GetRevision implements cedarpost.v1.AuthorizationService.
func (s *authorizationService) GetRevision(ctx context.Context, _ *cedarpostv1.GetRevisionRequest) (*cedarpostv1.GetRevisionResponse, error) {
	p, err := s.db.Current(ctx)
	if err != nil {
		return nil, err
	}
	return &cedarpostv1.GetRevisionResponse{Revision: snapshot.EncodeRevision(p, p.Number)}, nil
}

// view returns the view that the caller's consistency asks for.
func (s *authorizationService) view(ctx context.Context, c *cedarpostv1.Consistency) (v snapshot.View, err error) {
	switch {
	case c.GetFullyConsistent():
		return s.follower.FullyConsistent(ctx)
	case c.GetAtLeastAsFresh() != nil:
		v, _, err = s.follower.AtRevision(ctx, c.GetAtLeastAsFresh())
		return v, err
	}
	return s.follower.Current()
}

// answer is the outcome of one check: a recorded response, or an error.
type answer struct {
	response *cedarpostv1.AuthorizeResponse
	err      error
	ends     time.Time // when the token ends that named the principal; zero: none did
}

// decide makes and records the decisions of checks, all at one view. The error that it
// returns concerns all checks; the error in an answer concerns one.
func (s *authorizationService) decide(ctx context.Context, v snapshot.View, checks []*cedarpostv1.AuthorizeRequest) (_ []answer, err error) {
	answers := make([]answer, len(checks))
	// Before the call has a place: a token whose issuer does not answer makes it wait, and users
	// choose their tokens.
	if err := s.readTokens(ctx, v.Set, checks, answers, time.Now()); err != nil {
		return nil, err
	}
	work := s.shares.Call(ctx, access.CallerFrom(ctx))
	defer func() {
		work.Rest()
		work.Place.Leave()
		err = work.Outcome(err)
	}()
	if work.Place, err = s.places.Enter(ctx, callerFrom(ctx), len(checks)); err != nil {
		return nil, err
	}
	began := time.Now()
	asks := make([]engine.Ask, 0, len(checks))
	asked := make([]int, 0, len(checks)) // the checks that are in asks
	for i, c := range checks {
		if answers[i].err == nil {
			asks, asked = append(asks, wire.Ask(c, began.UnixMilli())), append(asked, i)
		}
	}
	if len(asked) == 0 {
		return answers, nil
	}
	batch := deciding{view: v, checks: checks, answers: answers, asked: asked, began: began}
	err = s.metric.load.run(ctx, func(ctx context.Context, _ trace.Span) (err error) {
		batch.evaluations, batch.loading, err = v.Prepare(ctx, asks, work.Pause)
		return err
	})
	if err != nil {
		return nil, err
	}
	var rows []store.Decision
	err = s.metric.decide.run(ctx, func(ctx context.Context, span trace.Span) (err error) {
		if span != nil {
			span.SetAttributes(attribute.Int("cedarpost.checks", len(checks)))
		}
		rows, err = s.decideAll(ctx, &batch, work)
		return err
	})
	if err != nil {
		return nil, err
	}
	work.Rest()
	err = s.metric.record.run(ctx, func(ctx context.Context, _ trace.Span) error { return s.record(ctx, rows, nil) })
	if err != nil {
		return nil, err
	}
	if err := v.Answerable(); err != nil {
		return nil, err
	}
	rights := access.RightsFrom(ctx)
	for n, i := range asked {
		if a := answers[i]; a.response != nil {
			hidePolicies(a.response, v.Set, batch.evaluations[n].Question.Bundle(), rights)
			s.metric.decisions.count(checks[i].GetAction(), a.response.Decision == cedarpostv1.Decision_ALLOW, a.response.GetDeniedAt())
		}
	}
	return answers, nil
}

// deciding is what the decisions of one call are made from.
type deciding struct {
	view        snapshot.View
	checks      []*cedarpostv1.AuthorizeRequest
	answers     []answer
	asked       []int // the checks that have evaluations
	evaluations []engine.Evaluation
	loading     time.Duration
	began       time.Time
}

// decideAll makes the decisions of a call. It fills in the answers, and returns the rows to record.
func (s *authorizationService) decideAll(ctx context.Context, d *deciding, work *access.Work) ([]store.Decision, error) {
	v := d.view
	rows := make([]store.Decision, 0, len(d.checks))
	for n, i := range d.asked {
		c, a, e := d.checks[i], &d.answers[i], &d.evaluations[n]
		if err := work.Err(); err != nil {
			return nil, err
		}
		work.Next()
		var res *engine.Result
		if res, a.err = e.Decide(); a.err != nil {
			s.noteUndecided(ctx, c, a.err)
			continue
		}
		a.response = wire.Response(res)
		a.response.Revision = snapshot.EncodeRevision(v.Position, v.Position.Number)
		a.response.CacheHint = s.hint(v, c, e, a.ends)
		row, err := s.recorder.NewDecision(ctx, decisionlog.Decision{
			Request: c, Evaluation: e, Set: v.Set, Position: v.Position, Response: a.response,
			FieldForbids: res.FieldForbids, Loading: d.loading, Took: time.Since(d.began),
		})
		if err != nil {
			return nil, err
		}
		rows = append(rows, row)
		if c.Explain {
			s.noteExplained(ctx, c)
			x, err := e.Explain(res)
			if err != nil {
				return nil, err
			}
			hideValues(x, foreign(v.Set, e.Question.Bundle(), access.RightsFrom(ctx)))
			a.response.Explanation = wire.Explanation(x)
		}
	}
	return rows, nil
}

// hint says how long the caller may keep an answer, and by what tags. It is nil if the answer
// must not be kept. ends is when the token of the question ends; zero: it has none.
func (s *authorizationService) hint(v snapshot.View, req *cedarpostv1.AuthorizeRequest, e *engine.Evaluation, ends time.Time) *cedarpostv1.CacheHint {
	keep := s.maxReuse
	if !ends.IsZero() {
		keep = min(keep, time.Until(ends).Truncate(time.Millisecond))
	}
	if !req.WantCacheHint || req.Explain || keep <= 0 {
		return nil
	}
	tags, ok := v.HintTags(e)
	if !ok {
		return nil
	}
	return &cedarpostv1.CacheHint{MaxAge: durationpb.New(keep), Tags: tags}
}
