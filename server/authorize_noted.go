package server

import (
	"context"
	"errors"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/wire"
)

// noteExplained notes that an answer was explained. Explanations show what policies depend on.
func (s *authorizationService) noteExplained(ctx context.Context, c *cedarpostv1.AuthorizeRequest) {
	s.note(ctx, decisionlog.ProbingExplained, c)
}

// noteUndecided notes a question that was not decided because of what it asks: it has no record.
func (s *authorizationService) noteUndecided(ctx context.Context, c *cedarpostv1.AuthorizeRequest, err error) {
	if errors.Is(err, engine.ErrTooCostly) || errors.Is(err, engine.ErrTooLarge) {
		s.metric.tooCostly.Inc()
		s.note(ctx, decisionlog.ProbingCostly, c)
	} else if _, ok := errors.AsType[*engine.RequestError](err); ok {
		s.note(ctx, decisionlog.ProbingInvalid, c)
	} else if token, ok := errors.AsType[*principalTokenError](err); ok {
		s.metric.tokensRefused.WithLabelValues(string(token.reason)).Inc()
		s.note(ctx, decisionlog.ProbingToken+string(token.reason), c)
	}
}

// note notes a question. The example is what was asked and not the error, whose text can have
// values that the schema marks @sensitive.
func (s *authorizationService) note(ctx context.Context, reason string, c *cedarpostv1.AuthorizeRequest) {
	principal := ""
	if c.GetPrincipal() != nil { // it is nil if a token was not accepted
		principal = wire.UID(c.GetPrincipal()).String()
	}
	s.noted.Probing(ctx, reason, principal,
		wire.UID(c.GetAction()).String()+" on "+wire.UID(c.GetResource()).String())
}
