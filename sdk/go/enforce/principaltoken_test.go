package enforce_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// A request is checked for the user whose token it has. A token that is not accepted is a mistake of the
// client, and not of the program.
func TestPrincipalToken(t *testing.T) {
	service := cedarposttest.NewFS(t, vault)
	bob := cedarpost.UID("Vault::User", "bob")
	good, weak := service.PrincipalToken(bob, map[string]any{"mfa": true}), service.PrincipalToken(bob, map[string]any{"mfa": false})
	cfg := config(t)
	cfg.Client, cfg.Principal = service.Client(), nil
	if _, err := enforce.New(cfg); err == nil {
		t.Error("a guard without a principal")
	}
	var text string
	cfg.PrincipalToken = func(context.Context) (cedarpost.PrincipalToken, error) {
		if text == "none" {
			return cedarpost.PrincipalToken{}, enforce.ErrNoPrincipal
		}
		return cedarpost.NewPrincipalToken(text), nil
	}
	g := newGuard(t, cfg)
	for name, c := range map[string]struct {
		token     string
		context   map[string]any
		kind      enforce.Kind // 0: allowed
		challenge string
	}{
		"a token":                        {good, nil, 0, ""},
		"one of a weaker sign-in":        {weak, nil, enforce.StepUp, `Bearer error="insufficient_user_authentication"`},
		"an unknown token":               {good + "x", nil, enforce.NoPrincipal, `Bearer error="invalid_token"`},
		"a text that is no token":        {"a b", nil, enforce.NoPrincipal, `Bearer error="invalid_token"`},
		"a large text":                   {strings.Repeat("x", 20000), nil, enforce.NoPrincipal, `Bearer error="invalid_token"`},
		"no token":                       {"", nil, enforce.NoPrincipal, "Bearer"},
		"no principal":                   {"none", nil, enforce.NoPrincipal, "Bearer"},
		"a context that the token fills": {good, map[string]any{"mfa": true}, enforce.Fault, ""},
	} {
		text = c.token
		_, r := ask(g, open("1", c.context))
		switch {
		case c.kind == 0:
			if r != nil {
				t.Errorf("%s: %v", name, r)
			}
		case r == nil || r.Kind != c.kind || !strings.HasPrefix(r.Challenge, c.challenge) || strings.Contains(r.Error(), "unsigned"):
			t.Errorf("%s: %+v", name, r)
		}
	}
	for _, d := range service.Decisions() {
		if d.Principal != bob {
			t.Errorf("decided for %v", d)
		}
	}
	cfg.Principal = func(context.Context) (cedarpost.EntityUID, error) { return bob, errors.New("never called") }
	if _, err := enforce.New(cfg); err == nil {
		t.Error("a guard with a principal and a token")
	}
}
