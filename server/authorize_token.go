package server

import (
	"context"
	"errors"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/wire"
)

// principalTokenError is the error of a question whose principal_token is not accepted. It is not an
// [access.TokenError], which is about the token of a caller: the caller of the question is authenticated.
type principalTokenError struct{ reason access.TokenReason }

// Error returns the text for the caller. It has nothing of the token.
func (e *principalTokenError) Error() string {
	if e.reason == access.TokenNoKeys {
		return "principal_token: the keys of its issuer cannot be fetched now"
	}
	return "principal_token: " + (&access.TokenError{Reason: e.reason}).Error()
}

// code is never one that says that the service is away or overloaded, because a user chooses the token.
func (e *principalTokenError) code() connect.Code {
	if e.reason == access.TokenNoKeys {
		return connect.CodeFailedPrecondition
	}
	return connect.CodeInvalidArgument
}

// readTokens replaces the principal_token of each check that has one by the principal that it stands for
// and the attributes of the context that its claims fill. Nothing after it sees the token, so nothing can
// record it, and a replay needs none. The error of one check is in its answer. The error that it returns
// is that of ctx.
func (s *authorizationService) readTokens(ctx context.Context, set *engine.Set, checks []*cedarpostv1.AuthorizeRequest, answers []answer, now time.Time) error {
	byToken := func(c *cedarpostv1.AuthorizeRequest) bool { return c.GetPrincipalToken() != "" }
	if !slices.ContainsFunc(checks, byToken) {
		return nil
	}
	// A token whose keys are not known must not use up the time of all checks.
	bounded, cancel := context.WithTimeout(ctx, s.keyWait)
	defer cancel()
	for i, c := range checks {
		if !byToken(c) {
			continue
		}
		a := &answers[i]
		if a.ends, a.err = s.readToken(bounded, set, c, now); a.err == nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err // keys may be missing because the call has ended
		}
		s.noteUndecided(ctx, c, a.err)
	}
	return nil
}

// readToken replaces the principal_token of one check, and returns when the token ends.
func (s *authorizationService) readToken(ctx context.Context, set *engine.Set, c *cedarpostv1.AuthorizeRequest, now time.Time) (ends time.Time, err error) {
	raw := c.GetPrincipalToken()
	c.PrincipalToken = ""
	if s.gate.tokens == nil {
		return ends, &principalTokenError{access.TokenUnknownIssuer}
	}
	p, err := s.gate.tokens.Principal(ctx, raw, now)
	if refused, ok := errors.AsType[*access.TokenError](err); ok {
		return ends, &principalTokenError{refused.Reason}
	} else if err != nil {
		return ends, err
	}
	action := wire.UID(c.GetAction())
	how, err := set.PrincipalToken(action, p.Issuer)
	if err != nil {
		return ends, err
	}
	if len(how.Audiences) > 0 && !p.IsFor(how.Audiences) {
		return ends, &principalTokenError{access.TokenWrongAudience}
	}
	id, err := p.ID(how.IDClaim, how.IDPrefix)
	if err != nil {
		return ends, badToken(err)
	}
	c.Principal = &cedarpostv1.EntityUid{Type: how.Type, Id: id}
	for _, attr := range how.Context {
		as, declared := set.ClaimAttribute(action, attr.Name)
		if !declared {
			continue
		}
		// This is refused even if the token does not have the claim: the caller must not fill it instead.
		if _, sent := c.GetContext().GetFields()[attr.Name]; sent {
			return ends, &engine.RequestError{Message: "context." + attr.Name + " is filled from the principal_token and cannot be sent with one"}
		}
		value, err := p.Attribute(attr.Claim, as)
		if err != nil {
			return ends, badToken(err)
		}
		if value == nil {
			continue
		}
		v, err := structpb.NewValue(value)
		if err != nil {
			return ends, badToken(err)
		}
		if c.GetContext().GetFields() == nil {
			c.Context = &structpb.Struct{Fields: map[string]*structpb.Value{}}
		}
		c.Context.Fields[attr.Name] = v
	}
	return p.Expires, nil
}

// badToken returns the error of a token that is accepted but does not fit the bundle.
func badToken(err error) error {
	return &engine.RequestError{Message: "principal_token: " + err.Error()}
}
