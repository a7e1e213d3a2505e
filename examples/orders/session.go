package main

import (
	"context"
	"net/http"
	"strings"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// session is what authentication knows of a request.
type session struct {
	user string
	mfa  bool
}

// sessions stands for the check of an access token: its key is the token. A service has
// its OpenID Connect middleware here. What comes after needs only what it found out.
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

// authenticate puts the session into the context. It lets strangers through, as nobody:
// the guard refuses them where somebody is needed.
func authenticate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if s, ok := sessions[token]; ok && bearer {
			r = r.WithContext(context.WithValue(r.Context(), sessionKey{}, s))
		}
		next.ServeHTTP(w, r)
	})
}

// principal tells the guard whose request it is.
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
