package cedarpost_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/access/issuertest"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// Users are named by their tokens. Answers are kept for each token, and no value shows one.
func TestPrincipalToken(t *testing.T) {
	issuer := issuertest.Start(t, jose.ES256)
	issuers, err := access.ReadIssuers([]byte(fmt.Sprintf("issuers: [{name: users, issuer: '%s', ca_file: '%s', principal_audiences: [shop]}]", issuer.URL, issuer.CAFile)))
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := access.NewTokens(access.TokensConfig{Issuers: issuers})
	if err != nil {
		t.Fatal(err)
	}
	s := servertest.New(t, func(c *server.Config) { c.Tokens, c.DecisionTimeout = tokens, time.Minute })
	t.Cleanup(tokens.Close)
	s.MustLoadShop()
	var paths []string
	for _, f := range servertest.ShopFiles(t) {
		if f.Path != "bundle.yaml" {
			paths = append(paths, f.Path, string(f.Content))
		}
	}
	s.MustApply("shop", append(paths, "bundle.yaml", "principal_tokens: {users: {type: Shop::User, context: {mfa: mfa}}}")...)
	ask := func(subject, audience string) cedarpost.Check {
		check := view("", "42")
		text := issuer.Sign(t, nil, issuer.Claims(t, time.Now(), map[string]any{"sub": subject, "aud": audience, "mfa": true}))
		check.Principal, check.Context, check.PrincipalToken = cedarpost.EntityUID{}, nil, cedarpost.NewPrincipalToken(text)
		asJSON, err := json.Marshal(check)
		if shown := fmt.Sprintf("%v %+v %#v %s", check, &check, check, asJSON); err != nil || strings.Contains(shown, text) || strings.Contains(shown, text[len(text)-40:]) {
			t.Errorf("a check shows its token: %s, %v", shown, err)
		}
		return check
	}
	c := dial(t, s)
	leased(t, c)
	bob, carol := ask("bob", "shop"), ask("carol", "shop")
	want := mustAsk(t, c, cedarpost.Check{Principal: user("bob"), Action: bob.Action, Resource: bob.Resource, Context: map[string]any{"mfa": true}, AllFields: true})
	if !want.Allowed() {
		t.Fatalf("bob may not view order 42: %v", want)
	}
	eventually(t, "bob's answer is reused", func() bool {
		r := mustAsk(t, c, bob)
		if !r.Allowed() || !slices.Equal(r.Fields().Permitted(), want.Fields().Permitted()) {
			t.Fatalf("bob: %v, want %v", r, want)
		}
		return r.Reused()
	})
	if r := mustAsk(t, c, carol); r.Allowed() || r.Reused() {
		t.Errorf("carol: %v", r)
	}
	stranger := ask("bob", "billing")
	both, open, large, odd := bob, bob, bob, bob
	both.Principal, open.FailOpen = user("bob"), "a reason"
	large.PrincipalToken, odd.PrincipalToken = cedarpost.NewPrincipalToken(strings.Repeat("x", 16<<10+1)), cedarpost.NewPrincipalToken("a.b.c\r\n")
	coalescing := dial(t, s, func(cfg *cedarpost.Config) { cfg.Coalesce = true })
	for _, client := range []*cedarpost.Client{c, coalescing} {
		for name, bad := range map[string]struct {
			check cedarpost.Check
			want  error
		}{
			"another audience": {stranger, cedarpost.ErrPrincipalToken}, "both": {both, cedarpost.ErrInvalid}, "fail open": {open, cedarpost.ErrInvalid},
			"too large": {large, cedarpost.ErrInvalid}, "line break": {odd, cedarpost.ErrInvalid},
		} {
			r, err := client.Authorize(t.Context(), bad.check)
			if !errors.Is(err, bad.want) || r.Allowed() || errors.Is(err, cedarpost.ErrUnauthenticated) {
				t.Errorf("%s: %v, %v", name, r, err)
			}
		}
		answers := client.AuthorizeBatch(t.Context(), []cedarpost.Check{bob, stranger, carol})
		if answers[0].Err != nil || !answers[0].Allowed() || !errors.Is(answers[1].Err, cedarpost.ErrPrincipalToken) || answers[2].Err != nil || answers[2].Allowed() {
			t.Errorf("a batch: %v", answers)
		}
	}
	// An error about something else of the question is not one about the token.
	bad := bob
	bad.Context = map[string]any{"mfa": true}
	if _, err := c.Authorize(t.Context(), bad); !errors.Is(err, cedarpost.ErrInvalid) || errors.Is(err, cedarpost.ErrPrincipalToken) {
		t.Errorf("a context that the token fills: %v", err)
	}
}
