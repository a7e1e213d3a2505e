package main

import (
	"context"
	"net/http"
	"strings"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// session is what authentication found out about a request.
type session struct {
	user string
	mfa  bool
}

// sessions has the sessions by access token. A real program has its OpenID Connect
// middleware instead. The rest of the program needs only the session.
var sessions = map[string]session{
	"bobs-token":      {user: "bob"},
	"carols-token":    {user: "carol"},
	"alices-token":    {user: "alice"}, // support
	"erins-token":     {user: "erin"},  // finance
	"erins-mfa-token": {user: "erin", mfa: true},
	"daves-token":     {user: "dave"}, // a manager
	"daves-mfa-token": {user: "dave", mfa: true},
}

type sessionKey struct{}

// authenticate puts the session into the context. It lets requests without a session
// through: the guard refuses them on routes that need a principal.
func authenticate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if s, ok := sessions[token]; ok && bearer {
			r = r.WithContext(context.WithValue(r.Context(), sessionKey{}, s))
		}
		next.ServeHTTP(w, r)
	})
}

// principal returns the principal of a request for the guard.
func principal(ctx context.Context) (cedarpost.EntityUID, error) {
	s, ok := ctx.Value(sessionKey{}).(session)
	if !ok {
		return cedarpost.EntityUID{}, enforce.ErrNoPrincipal
	}
	return cedarpost.UID("Shop::User", s.user), nil
}

// factors is the context that all actions of the shop declare.
func factors(ctx context.Context) (map[string]any, error) {
	s, _ := ctx.Value(sessionKey{}).(session)
	return map[string]any{"mfa": s.mfa}, nil
}
