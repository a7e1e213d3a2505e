package access

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/server/access/issuertest"
)

// settings returns the settings of an issuer, with the defaults of a file.
func settings(t testing.TB, i *issuertest.Issuer, name string, change ...func(*Issuer)) Issuer {
	t.Helper()
	text := fmt.Sprintf("issuers: [{name: %s, issuer: '%s', audience: %s, ca_file: '%s'}]", name, i.URL, issuertest.Audience, i.CAFile)
	issuers, err := ReadIssuers([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(&issuers[0])
	}
	return issuers[0]
}

func withGroups(i *Issuer) {
	i.GroupsClaim = "groups"
	i.Grants = map[string][]TokenGrant{
		"staff":  {{"enforcer", "shop"}},
		"admins": {{"operator", "*"}, {"enforcer", "shop"}},
	}
}

// newTokens returns a verifier and its log.
func newTokens(t testing.TB, issuers ...Issuer) (*Tokens, *bytes.Buffer) {
	t.Helper()
	log := new(bytes.Buffer)
	tokens, err := NewTokens(TokensConfig{Issuers: issuers, Log: slog.New(slog.NewTextHandler(log, nil)), fetchTimeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tokens.Close)
	return tokens, log
}

// settled waits until no keys are fetched.
func settled(t testing.TB, tokens *Tokens) {
	t.Helper()
	for _, i := range *tokens.issuers.Load() {
		i.keys.mu.Lock()
		done := i.keys.fetching
		i.keys.mu.Unlock()
		if done != nil {
			select {
			case <-done:
			case <-time.After(time.Minute):
				t.Fatal("a fetch does not end")
			}
		}
	}
}

func wantReason(t testing.TB, err error, want TokenReason) {
	t.Helper()
	refused, ok := errors.AsType[*TokenError](err)
	if !ok || refused.Reason != want {
		t.Errorf("%+v (%v), want %s", refused, err, want)
	}
}

// A client gets a token from a real provider, and is a caller with the grants of its groups.
func TestTokenOfARealProvider(t *testing.T) {
	for _, algorithm := range []jose.SignatureAlgorithm{jose.RS256, jose.ES256} {
		i := issuertest.Start(t, algorithm)
		i.SetClaims("orders", map[string]any{
			"groups": []string{"staff", "admins", "others", "staff"}, "acr": "2", "amr": []string{"pwd", "otp"}, "auth_time": 1764300000, "scope": "read write",
		})
		tokens, _ := newTokens(t, settings(t, i, "staff", withGroups))
		raw := i.Token(t, "orders")
		if !LooksLikeToken(raw) {
			t.Error("the provider's token does not look like a token")
		}
		token, err := tokens.Verify(t.Context(), raw, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if left := time.Until(token.Expires); left <= 0 || left > 6*time.Minute {
			t.Errorf("expires in %v", left)
		}
		token.Expires = time.Time{}
		want := Token{
			Issuer: "staff", Subject: "orders", Name: "orders", Groups: []string{"admins", "staff"}, Grants: []TokenGrant{{"operator", "*"}, {"enforcer", "shop"}},
			Claims: TokenClaims{ACR: "2", AMR: []string{"pwd", "otp"}, AuthTime: time.Unix(1764300000, 0), Scope: []string{"read", "write"}, ClientID: "orders"},
		}
		if !reflect.DeepEqual(token, want) || token.CallerName() != "token:staff/orders" {
			t.Errorf("%+v, want %+v", token, want)
		}
		for range 3 {
			if _, err := tokens.Verify(t.Context(), raw, time.Now()); err != nil {
				t.Error(err)
			}
		}
		if i.Fetches() != 1 || i.Discoveries() != 1 {
			t.Errorf("%d fetches, %d discoveries", i.Fetches(), i.Discoveries())
		}
	}
}

// Two issuers may have the same subject. They are two callers, and neither can sign for the other.
func TestAttackSameSubjectOfTwoIssuers(t *testing.T) {
	a, b := issuertest.Start(t, jose.RS256), issuertest.Start(t, jose.RS256)
	tokens, _ := newTokens(t, settings(t, a, "a", withGroups), settings(t, b, "b"))
	now := time.Now()
	groups := map[string]any{"sub": "ann", "groups": []string{"admins"}}
	ofA, errA := tokens.Verify(t.Context(), a.Sign(t, nil, a.Claims(t, now, groups)), now)
	ofB, errB := tokens.Verify(t.Context(), b.Sign(t, nil, b.Claims(t, now, groups)), now)
	if errA != nil || errB != nil || ofA.CallerName() != "token:a/ann" || ofB.CallerName() != "token:b/ann" || len(ofA.Grants) != 2 || len(ofB.Grants) != 0 {
		t.Errorf("%+v, %v; %+v, %v", ofA, errA, ofB, errB)
	}
	_, err := tokens.Verify(t.Context(), b.Sign(t, nil, a.Claims(t, now, groups)), now)
	wantReason(t, err, TokenUnknownKey)
	if a.KeyID() != b.KeyID() {
		t.Error("the keys of the two issuers should have the same id here")
	}
	t.Logf("attack: the same subject at two issuers: two callers; an issuer that signs as the other, with the same key id: refused")
}

// hostile are tokens that are refused, and why.
func hostile(t *testing.T, i *issuertest.Issuer, now time.Time) map[string]struct {
	raw    string
	reason TokenReason
} {
	t.Helper()
	list := map[string]struct {
		raw    string
		reason TokenReason
	}{}
	add := func(what string, reason TokenReason, raw string) {
		list[what] = struct {
			raw    string
			reason TokenReason
		}{raw, reason}
	}
	header := func(members map[string]any) string { return i.Sign(t, members, i.Claims(t, now, nil)) }
	changed := func(change map[string]any) string { return i.Sign(t, nil, i.Claims(t, now, change)) }
	at := func(d time.Duration) int64 { return now.Add(d).Unix() }
	good := header(nil)
	parts := strings.Split(good, ".")
	attacker, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	attackerEC, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := func(key any, members map[string]any) string {
		text, err := json.Marshal(members)
		if err != nil {
			t.Fatal(err)
		}
		return issuertest.Sign(t, key, text, i.Claims(t, now, nil))
	}

	for _, none := range []string{"none", "None", "NONE", "nOnE", ""} {
		unsigned := forged([]byte("x"), map[string]any{"alg": none, "kid": i.KeyID()})
		add("alg "+none+" with a signature", TokenAlgorithm, unsigned)
		add("alg "+none+" without one", TokenAlgorithm, unsigned[:strings.LastIndex(unsigned, ".")+1])
	}
	add("no alg", TokenAlgorithm, header(map[string]any{"alg": nil}))
	public, err := x509.MarshalPKIXPublicKey(i.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	for what, secret := range map[string][]byte{
		"PEM": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), "DER": public, "modulus": i.PublicKey().(*rsa.PublicKey).N.Bytes(), "nothing": {},
	} {
		add("HMAC with the public key as "+what, TokenAlgorithm, forged(secret, map[string]any{"alg": "HS256", "kid": i.KeyID()}))
		add("HMAC that says RS256, with the public key as "+what, TokenUnknownKey, forged(secret, map[string]any{"alg": "RS256", "kid": i.KeyID()}))
	}
	add("HMAC with the key of kind oct in the key set", TokenAlgorithm, forged([]byte(octKey), map[string]any{"alg": "HS256", "kid": "oct"}))
	add("RS256 of a key of kind oct", TokenUnknownKey, forged([]byte(octKey), map[string]any{"alg": "RS256", "kid": "oct"}))
	add("PS256 with a key for RS256", TokenUnknownKey, header(map[string]any{"alg": "PS256"}))
	add("ES256 with a key of RSA", TokenUnknownKey, header(map[string]any{"alg": "ES256"}))
	add("RS512, which is not configured", TokenAlgorithm, header(map[string]any{"alg": "RS512"}))

	add("signed by somebody else with the right key id", TokenUnknownKey, forged(attacker, map[string]any{"alg": "RS256", "kid": i.KeyID()}))
	add("signed by somebody else without key id", TokenUnknownKey, forged(attacker, map[string]any{"alg": "RS256"}))
	add("signed by somebody else with ES256", TokenUnknownKey, forged(attackerEC, map[string]any{"alg": "ES256", "kid": i.KeyID()}))
	jwk := jose.JSONWebKey{Key: attacker.Public(), KeyID: i.KeyID(), Algorithm: "RS256", Use: "sig"}
	add("a key in the header", TokenHeader, forged(attacker, map[string]any{"alg": "RS256", "kid": i.KeyID(), "jwk": jwk}))
	for _, name := range []string{"jku", "x5u"} {
		add(name+" in the header", TokenHeader, forged(attacker, map[string]any{"alg": "RS256", "kid": i.KeyID(), name: i.URL + "/keys"}))
		add(name+" in the header of a genuine token", TokenHeader, header(map[string]any{name: "https://169.254.169.254/"}))
	}
	add("a certificate in the header", TokenHeader, header(map[string]any{"x5c": []string{"MIIB"}}))
	add("a critical header", TokenHeader, header(map[string]any{"crit": []string{"exp"}, "exp": 1}))
	add("a critical header that libraries know", TokenHeader, header(map[string]any{"crit": []string{"b64"}, "b64": true}))
	add("an empty list of critical headers", TokenHeader, header(map[string]any{"crit": []string{}}))
	add("compressed", TokenHeader, header(map[string]any{"zip": "DEF"}))
	add("a key id of 300 bytes", TokenMalformed, header(map[string]any{"kid": strings.Repeat("k", 300)}))
	add("a key id that is a path", TokenUnknownKey, header(map[string]any{"kid": "../../../../dev/null"}))
	add("a key id that is SQL", TokenUnknownKey, header(map[string]any{"kid": "' UNION SELECT 'x' --"}))
	add("a key id that is a number", TokenMalformed, header(map[string]any{"kid": 1}))
	add("a token of another type", TokenType, header(map[string]any{"typ": "dpop+jwt"}))
	add("a logout token", TokenType, header(map[string]any{"typ": "logout+jwt"}))
	add("the header has alg twice", TokenMalformed, i.SignText(t, `{"alg":"none","alg":"RS256","kid":"`+i.KeyID()+`"}`, i.Claims(t, now, nil)))
	add("the header has ALG", TokenAlgorithm, i.SignText(t, `{"ALG":"RS256","kid":"`+i.KeyID()+`"}`, i.Claims(t, now, nil)))

	add("expired", TokenExpired, changed(map[string]any{"exp": at(-time.Minute), "iat": at(-time.Hour)}))
	add("from the future", TokenNotYetValid, changed(map[string]any{"iat": at(time.Minute), "exp": at(time.Hour)}))
	add("not yet valid", TokenNotYetValid, changed(map[string]any{"nbf": at(time.Minute)}))
	add("too old, with an exp in ten years", TokenTooOld, changed(map[string]any{"iat": at(-3 * time.Hour), "exp": at(90_000 * time.Hour)}))
	add("without exp", TokenClaimsNotValid, changed(map[string]any{"exp": nil}))
	add("without iat", TokenClaimsNotValid, changed(map[string]any{"iat": nil}))
	for what, value := range map[string]any{"text": "1e99", "negative": -1, "far": 1e300, "list": []int{1}} {
		add("exp is "+what, TokenClaimsNotValid, changed(map[string]any{"exp": value}))
		add("nbf is "+what, TokenClaimsNotValid, changed(map[string]any{"nbf": value}))
	}
	add("for another audience", TokenWrongAudience, changed(map[string]any{"aud": "billing"}))
	add("for several others", TokenWrongAudience, changed(map[string]any{"aud": []string{"billing", "Cedarpost", "cedarpost "}}))
	add("for nobody", TokenWrongAudience, changed(map[string]any{"aud": nil}))
	add("aud is an empty list", TokenWrongAudience, changed(map[string]any{"aud": []string{}}))
	add("aud has a number", TokenWrongAudience, changed(map[string]any{"aud": []any{"cedarpost", 1}}))
	add("aud has null", TokenWrongAudience, changed(map[string]any{"aud": []any{"cedarpost", nil}}))
	add("of another issuer", TokenUnknownIssuer, changed(map[string]any{"iss": "https://evil.example"}))
	add("of the issuer with a slash", TokenUnknownIssuer, changed(map[string]any{"iss": i.URL + "/"}))
	add("of no issuer", TokenUnknownIssuer, changed(map[string]any{"iss": nil}))
	add("iss is a list", TokenUnknownIssuer, changed(map[string]any{"iss": []string{i.URL}}))
	add("bound to a key of the client", TokenBound, changed(map[string]any{"cnf": map[string]any{"jkt": "x"}}))
	for what, sub := range map[string]any{
		"missing": nil, "empty": "", "a number": 7, "long": strings.Repeat("a", 300), "with a line break": "ann\nbob", "with a space at its end": "ann ",
		"with text that turns its order": "ann\u202e", "with an invisible character": "a\u200bnn",
	} {
		add("sub is "+what, TokenClaimsNotValid, changed(map[string]any{"sub": sub}))
	}
	for name, value := range map[string]any{"acr": 1, "amr": []any{1}, "scope": 1, "client_id": []string{"a"}, "auth_time": "now", "groups": map[string]any{"admins": true}} {
		add(name+" of another kind", TokenClaimsNotValid, changed(map[string]any{name: value}))
	}
	twice := strings.Replace(string(i.Claims(t, now, nil)), `"sub":"ann"`, `"sub":"ann","sub":"root"`, 1)
	add("sub stands twice", TokenMalformed, i.Sign(t, nil, []byte(twice)))
	add("text that is not UTF-8", TokenMalformed, i.Sign(t, nil, bytes.Replace(i.Claims(t, now, nil), []byte("ann"), []byte("a\xff"), 1)))
	add("no claims", TokenMalformed, i.Sign(t, nil, nil))
	add("null", TokenMalformed, i.Sign(t, nil, []byte("null")))
	add("a list", TokenMalformed, i.Sign(t, nil, []byte("[]")))
	add("nested deep", TokenMalformed, i.Sign(t, nil, []byte(strings.Repeat("[", 11_000))))
	add("huge", TokenTooLarge, changed(map[string]any{"more": strings.Repeat("x", maxTokenBytes)}))

	root := base64.RawURLEncoding.EncodeToString(i.Claims(t, now, map[string]any{"sub": "root"}))
	add("other claims under its signature", TokenUnknownKey, parts[0]+"."+root+"."+parts[2])
	add("cut off", TokenUnknownKey, good[:len(good)-6])
	add("without signature", TokenUnknownKey, parts[0]+"."+parts[1]+".")
	add("four dots", TokenMalformed, good+".x.y")
	add("two parts", TokenMalformed, parts[0]+"."+parts[1])
	add("a line break in it", TokenMalformed, parts[0]+"\n."+parts[1]+"."+parts[2])
	add("padded", TokenMalformed, parts[0]+"=."+parts[1]+"."+parts[2])
	add("dots alone", TokenMalformed, "..")
	return list
}

const octKey = "a secret that a provider publishes by mistake"

// Each hostile token is refused for its reason. The caller learns nothing but that the token is
// not accepted, has expired or is too old, and neither error nor log has the token.
func TestAttackHostileTokens(t *testing.T) {
	i := issuertest.Start(t, jose.RS256)
	i.AddKeys(jose.JSONWebKey{Key: []byte(octKey), KeyID: "oct"})
	tokens, log := newTokens(t, settings(t, i, "staff", withGroups))
	now := time.Now()
	list := hostile(t, i, now)
	texts := map[string]bool{}
	for what, c := range list {
		token, err := tokens.Verify(t.Context(), c.raw, now)
		refused, ok := errors.AsType[*TokenError](err)
		if !ok || refused.Reason != c.reason || !reflect.DeepEqual(token, Token{}) {
			t.Errorf("%s: %+v, %+v (%v), want %s", what, token, refused, err, c.reason)
			continue
		}
		texts[err.Error()] = true
		if parts := strings.Split(c.raw, "."); len(parts) > 1 && parts[1] != "" && strings.Contains(err.Error()+log.String(), parts[1]) {
			t.Errorf("%s: error or log has the token", what)
		}
	}
	if len(texts) != 3 || !texts["the access token is older than this server accepts (max_age of the issuer); get a new one"] {
		t.Errorf("the texts for callers are %v", texts)
	}
	if i.Fetches() != 1 {
		t.Errorf("the key set was fetched %d times", i.Fetches())
	}
	// The same checks let a good token through.
	if _, err := tokens.Verify(t.Context(), i.Sign(t, nil, i.Claims(t, now, nil)), now); err != nil {
		t.Error(err)
	}
	t.Logf("attack: %d hostile tokens (alg none, RS/HS confusion, keys in the header, duplicates, …): %d refused, each for its reason, with %d fetch of keys", len(list), len(list), i.Fetches())
}

// The key set may have keys that are of no use. They turn nothing off, and verify nothing.
func TestKeysThatAreOfNoUse(t *testing.T) {
	t.Setenv("GODEBUG", "rsa1024min=0")
	i := issuertest.Start(t, jose.ES256)
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i.AddKeys(
		jose.JSONWebKey{Key: short.Public(), KeyID: "short", Algorithm: "RS256", Use: "sig"},
		jose.JSONWebKey{Key: private.Public(), KeyID: "for encryption", Use: "enc"},
		jose.JSONWebKey{Key: private, KeyID: "private", Algorithm: "ES256", Use: "sig"},
	)
	tokens, _ := newTokens(t, settings(t, i, "staff"))
	now := time.Now()
	for header, key := range map[string]any{
		`{"alg":"RS256","kid":"short"}`:          short,
		`{"alg":"ES256","kid":"for encryption"}`: private,
		`{"alg":"ES256","kid":"private"}`:        private,
	} {
		_, err := tokens.Verify(t.Context(), issuertest.Sign(t, key, []byte(header), i.Claims(t, now, nil)), now)
		wantReason(t, err, TokenUnknownKey)
	}
	if _, err := tokens.Verify(t.Context(), i.Sign(t, nil, i.Claims(t, now, nil)), now); err != nil {
		t.Error(err)
	}
	// A token may come without the id of its key.
	if _, err := tokens.Verify(t.Context(), i.Sign(t, map[string]any{"kid": nil}, i.Claims(t, now, nil)), now); err != nil {
		t.Error(err)
	}
}

// What an issuer's settings say about callers, groups and types.
func TestSettingsOfAnIssuer(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	now := time.Now()
	for _, c := range []struct {
		name   string
		change func(*Issuer)
		header map[string]any
		claims map[string]any
		caller string // empty: refused
		grants int
	}{
		{"the type JWT", nil, map[string]any{"typ": "JWT"}, nil, "ann", 0},
		{"the long name of the type", nil, map[string]any{"typ": "application/AT+JWT"}, nil, "ann", 0},
		{"no type", nil, map[string]any{"typ": nil}, nil, "ann", 0},
		{"access tokens only, and a JWT", func(i *Issuer) { i.AccessTokensOnly = true }, map[string]any{"typ": "JWT"}, nil, "", 0},
		{"access tokens only, and one", func(i *Issuer) { i.AccessTokensOnly = true }, nil, nil, "ann", 0},
		{"another claim", func(i *Issuer) { i.CallerClaim = "preferred_username" }, nil, map[string]any{"preferred_username": "Ann Özil"}, "Ann Özil", 0},
		{"another claim is missing", func(i *Issuer) { i.CallerClaim = "preferred_username" }, nil, nil, "", 0},
		{"an e-mail address", func(i *Issuer) { i.CallerClaim = "email" }, nil, map[string]any{"email": "ann@example.org", "email_verified": true}, "ann@example.org", 0},
		{"an address that is not verified", func(i *Issuer) { i.CallerClaim = "email" }, nil, map[string]any{"email": "ann@example.org", "email_verified": false}, "", 0},
		{"an address that may be verified", func(i *Issuer) { i.CallerClaim = "email" }, nil, map[string]any{"email": "ann@example.org"}, "", 0},
		{"a pointer", func(i *Issuer) { i.CallerClaim = "/user/id" }, nil, map[string]any{"user": map[string]any{"id": "7"}}, "7", 0},
		{"a pointer that leads nowhere", func(i *Issuer) { i.CallerClaim = "/user/id" }, nil, map[string]any{"user": "7"}, "", 0},
		{"a group", withGroups, nil, map[string]any{"groups": "staff"}, "ann", 1},
		{"no groups", withGroups, nil, nil, "ann", 0},
		{"groups without grants", withGroups, nil, map[string]any{"groups": []string{"Staff", "admin", ""}}, "ann", 0},
		{"groups by a pointer", func(i *Issuer) { withGroups(i); i.GroupsClaim = "/realm_access/roles" }, nil,
			map[string]any{"realm_access": map[string]any{"roles": []string{"admins"}}}, "ann", 2},
		{"the claim is a URL", func(i *Issuer) { withGroups(i); i.GroupsClaim = "https://example.org/groups" }, nil,
			map[string]any{"https://example.org/groups": []string{"admins"}}, "ann", 2},
		{"several audiences", nil, nil, map[string]any{"aud": []string{"billing", "cedarpost"}}, "ann", 0},
		{"times with fractions", nil, nil, map[string]any{"exp": float64(now.Unix()) + 60.5}, "ann", 0},
	} {
		s := settings(t, i, "staff")
		if c.change != nil {
			c.change(&s)
		}
		tokens, _ := newTokens(t, s)
		token, err := tokens.Verify(t.Context(), i.Sign(t, c.header, i.Claims(t, now, c.claims)), now)
		if (err == nil) != (c.caller != "") || token.Name != c.caller || len(token.Grants) != c.grants {
			t.Errorf("%s: %+v, %v", c.name, token, err)
		}
	}
}

// A token is accepted exactly between its times, with the leeway on both sides, and not for longer
// than the maximum age, also when it was verified before.
func TestTimesOfTokens(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	s := settings(t, i, "staff")
	tokens, _ := newTokens(t, s)
	start := time.Now().Truncate(time.Second)
	if _, err := tokens.Verify(t.Context(), i.Sign(t, nil, i.Claims(t, start, nil)), start); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		seconds := func(what string) time.Duration {
			return time.Duration(rapid.Int64Range(-9000, 9000).Draw(rt, what)) * time.Second
		}
		now := start.Add(time.Duration(rapid.Int64Range(0, 200).Draw(rt, "now")) * time.Second)
		issued, expires, notBefore := now.Add(seconds("iat")), now.Add(seconds("exp")), now.Add(seconds("nbf"))
		raw := i.Sign(t, nil, i.Claims(t, now, map[string]any{"iat": issued.Unix(), "exp": expires.Unix(), "nbf": notBefore.Unix()}))
		valid := func(at time.Time) bool {
			return !issued.After(at.Add(s.Leeway)) && !notBefore.After(at.Add(s.Leeway)) && at.Before(expires.Add(s.Leeway)) && at.Before(issued.Add(s.MaxAge+s.Leeway))
		}
		for _, at := range []time.Time{now, now.Add(time.Second), now.Add(time.Minute)} {
			token, err := tokens.Verify(t.Context(), raw, at)
			if (err == nil) != valid(at) {
				rt.Fatalf("iat %v, nbf %v, exp %v from now: %v", issued.Sub(at), notBefore.Sub(at), expires.Sub(at), err)
			}
			if err == nil && !at.Before(token.Expires) {
				rt.Fatalf("the accepted token expired at %v, and it is %v", token.Expires, at)
			}
		}
	})
}

// An API key never looks like a token, and a token always does.
func TestLooksLikeToken(t *testing.T) {
	for _, s := range []string{"", ".", "a.b", "cdp_0a1b_c2VjcmV0LXNlY3JldA_d3e4", keyPrefix + "eyJhbGciOiJub25lIn0"} {
		if LooksLikeToken(s) {
			t.Errorf("%q", s)
		}
	}
	for _, s := range []string{"..", "a.b.c", "a.b.c.d.e"} {
		if !LooksLikeToken(s) {
			t.Errorf("%q", s)
		}
	}
}

// Only tokens that the issuer signed are accepted, and no error has the text of a token.
func FuzzVerify(f *testing.F) {
	i := issuertest.Start(f, jose.ES256)
	tokens, _ := newTokens(f, settings(f, i, "staff", withGroups))
	now := time.Now()
	good := i.Sign(f, nil, i.Claims(f, now, map[string]any{"groups": []string{"staff"}}))
	if _, err := tokens.Verify(context.Background(), good, now); err != nil {
		f.Fatal(err)
	}
	signed := good[:strings.LastIndex(good, ".")]
	f.Add([]byte(`{"alg":"ES256","kid":"key-1"}`), i.Claims(f, now, nil), []byte("x"), good)
	f.Add([]byte(`{"alg":"none"}`), []byte(`{"iss":1}`), []byte(nil), "..")
	f.Add([]byte(`{"alg":"ES256","crit":[]}`), []byte(`{"aud":["a"],"iss":"`+i.URL+`"}`), []byte(nil), "a.b.c")
	f.Fuzz(func(t *testing.T, header, payload, signature []byte, raw string) {
		encode := base64.RawURLEncoding.EncodeToString
		for _, text := range []string{raw, encode(header) + "." + encode(payload) + "." + encode(signature)} {
			_, err := tokens.Verify(t.Context(), text, now)
			if err == nil && !strings.HasPrefix(text, signed+".") {
				t.Errorf("accepted: %q", text)
			}
			if refused, ok := errors.AsType[*TokenError](err); err != nil && (!ok || refused.Reason == "" || len(text) > 60 && strings.Contains(err.Error(), text)) {
				t.Errorf("%q: %v", text, err)
			}
		}
		// The checks of the claims, for an issuer that signs everything.
		if _, c, reason := parseToken(encode(header) + "." + encode(payload) + "."); reason == "" {
			s := settings(t, i, "staff", withGroups)
			token, reason := s.read(c, now)
			if reason == "" && (!goodName(token.Name) || len(token.Name) > maxCallerClaim || !now.Before(token.Expires) || !slices.IsSorted(token.Groups)) {
				t.Errorf("%s: %+v", payload, token)
			}
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	for _, algorithm := range []jose.SignatureAlgorithm{jose.RS256, jose.ES256} {
		i := issuertest.Start(b, algorithm)
		tokens, _ := newTokens(b, settings(b, i, "staff", withGroups))
		now := time.Now()
		raw := i.Sign(b, nil, i.Claims(b, now, map[string]any{"groups": []string{"staff"}}))
		b.Run(string(algorithm)+" again", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := tokens.Verify(b.Context(), raw, now); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(string(algorithm)+" first", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := tokens.verify(b.Context(), raw, forCaller, now); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
