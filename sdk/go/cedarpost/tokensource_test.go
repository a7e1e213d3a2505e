package cedarpost

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/go-jose/go-jose/v4"

	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/access/issuertest"
)

// credentialsOf returns a source of tokens for the client orders, and the settings it was made with.
func credentialsOf(t *testing.T, i *issuertest.Issuer, change ...func(*ClientCredentials)) *credentials {
	t.Helper()
	_, config := i.ClientCredentials(t.Context(), "orders")
	c := ClientCredentials{TokenURL: config.TokenURL, ClientID: config.ClientID, Secret: config.ClientSecret, CAFile: i.CAFile, Timeout: time.Hour}
	for _, f := range change {
		f(&c)
	}
	source, err := NewClientCredentials(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		i.Release()
		source.(*credentials).settled()
	})
	return source.(*credentials)
}

// settled waits until no token is asked for.
func (s *credentials) settled() {
	s.mu.Lock()
	done := s.fetching
	s.mu.Unlock()
	if done != nil {
		<-done
	}
}

// at sets when the next token is asked for and when the present one ends, from now.
func (s *credentials) at(renew, end time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.renew, s.end, s.asked = now.Add(renew), now.Add(end), time.Time{}
}

// A client with client credentials gets a token from a real provider, and a service that verifies
// tokens answers it.
func TestClientCredentials(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	issuers, err := access.ReadIssuers(fmt.Appendf(nil, "issuers: [{name: staff, issuer: '%s', audience: cedarpost, ca_file: '%s'}]", i.URL, i.CAFile))
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := access.NewTokens(access.TokensConfig{Issuers: issuers})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tokens.Close)
	var mu sync.Mutex
	callers := map[string]int{}
	source := credentialsOf(t, i)
	c := both(func(ctx context.Context) error {
		info, _ := connect.CallInfoForServerContext(ctx)
		raw, _ := strings.CutPrefix(info.RequestHeader().Get("Authorization"), "Bearer ")
		token, err := tokens.Verify(ctx, raw, time.Now())
		if err != nil {
			return connect.NewError(connect.CodeUnauthenticated, err.Error())
		}
		mu.Lock()
		defer mu.Unlock()
		callers[token.CallerName()]++
		return nil
	}).serve(t, uncached, func(cfg *Config) { cfg.TokenSource = source })
	var all sync.WaitGroup
	const calls = 50
	for range calls {
		all.Go(func() {
			if r, err := c.Authorize(t.Context(), hitCheck); err != nil || !r.Allowed() {
				t.Errorf("%v, %v", r.Allowed(), err)
			}
		})
	}
	all.Wait()
	if n := i.Requests(); n != 1 || callers["token:staff/orders"] != calls || len(callers) != 1 {
		t.Errorf("%d requests for a token; callers %v", n, callers)
	}

	// The next token is asked for before the first one ends, and no call waits for it.
	first, _ := source.Token(t.Context())
	i.Hold()
	source.at(-time.Second, time.Hour)
	if again, err := source.Token(t.Context()); again != first || err != nil {
		t.Errorf("while the next token is asked for: %v", err)
	}
	i.Release()
	source.settled()
	if next, err := source.Token(t.Context()); next == first || err != nil {
		t.Errorf("the next token: %v", err)
	}

	// While the issuer is away, the token is used until it ends. Then nothing is sent, and no check
	// fails open: it is not the service that is away.
	i.SetAway(true)
	source.at(-time.Second, time.Hour)
	if r, err := c.Authorize(t.Context(), hitCheck); err != nil || !r.Allowed() {
		t.Errorf("the issuer is away, and the token is valid: %v", err)
	}
	source.settled()
	source.at(-time.Second, -time.Second)
	open := hitCheck
	open.FailOpen = "it must work"
	r, err := c.Authorize(t.Context(), open)
	if !errors.Is(err, ErrNoToken) || errors.Is(err, ErrUnauthenticated) || r.Allowed() || r.FailedOpen() || !strings.Contains(err.Error(), "503") {
		t.Errorf("no valid token: %v, %v", r.Allowed(), err)
	}
	asked := i.Requests()
	source.mu.Lock()
	source.asked = time.Now().Add(time.Hour) // the last request failed just now, however slow this test is
	source.mu.Unlock()
	for range 20 {
		if _, err := c.Authorize(t.Context(), open); !errors.Is(err, ErrNoToken) {
			t.Error(err)
		}
	}
	if n := i.Requests() - asked; n != 0 {
		t.Errorf("an issuer that just failed was asked %d times", n)
	}
	i.SetAway(false)
	source.at(-time.Second, -time.Second)
	if r, err := c.Authorize(t.Context(), open); err != nil || !r.Allowed() || r.FailedOpen() {
		t.Errorf("the issuer is back: %v, %v", r.Allowed(), err)
	}

	// A call that waits for the first token ends with its own deadline.
	source.at(-time.Second, -time.Second)
	i.Hold()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if r, err := c.Authorize(ctx, open); !errors.Is(err, context.DeadlineExceeded) || r.Allowed() {
		t.Errorf("a call with a deadline: %v, %v", r.Allowed(), err)
	}
}

// The secret is read again for each token. Errors say what the issuer said, without the secret.
func TestClientCredentialsFromAFile(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	_, config := i.ClientCredentials(t.Context(), "orders")
	file := filepath.Join(t.TempDir(), "secret")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("wr0ng\n")
	source := credentialsOf(t, i, func(c *ClientCredentials) { c.Secret, c.SecretFile = "", file })
	if _, err := source.Token(t.Context()); err == nil || !strings.Contains(err.Error(), "invalid_client") || strings.Contains(err.Error(), "wr0ng") {
		t.Errorf("a wrong secret: %v", err)
	}
	write(config.ClientSecret + "\n")
	source.at(-time.Second, -time.Second)
	if token, err := source.Token(t.Context()); err != nil || !access.LooksLikeToken(token) {
		t.Errorf("the right secret: %v", err)
	}
}

// An issuer whose answers are of no use gives no token, learns no more than it has to, and puts
// nothing into errors.
func TestAttackHostileTokenEndpoint(t *testing.T) {
	var answer func(http.ResponseWriter, *http.Request)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(w, r) }))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	elsewhere := 0
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere++ }))
	t.Cleanup(other.Close)
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	says := func(code int, contentType, body string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			w.WriteHeader(code)
			_, _ = io.WriteString(w, body)
		}
	}
	const secret = "s3cret"
	cases := map[string]struct {
		answer func(http.ResponseWriter, *http.Request)
		says   string
	}{
		"an error that repeats the secret": {says(400, "application/json", `{"error":"invalid_client","error_description":"s3cret","error_uri":"s3cret"}`), "invalid_client"},
		"a page that repeats it":           {says(500, "text/html", "s3cret"), "500"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		}, "redirect"},
		"a token that breaks the header": {says(200, "application/json", `{"access_token":"a\r\nX: s3cret","token_type":"Bearer"}`), "no token that can be sent"},
		"no token":                       {says(200, "application/json", `{"token_type":"Bearer"}`), "token"},
		"a token of another type":        {says(200, "application/json", `{"access_token":"a","token_type":"mac"}`), "not bearer"},
		"a token that has ended":         {says(200, "application/json", `{"access_token":"a","token_type":"Bearer","expires_in":-5}`), "ended already"},
		"an answer without end": {func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}, ""},
	}
	for what, c := range cases {
		answer = c.answer
		source, err := NewClientCredentials(ClientCredentials{TokenURL: server.URL + "/token", ClientID: "orders", Secret: secret, CAFile: caFile, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		token, err := source.Token(t.Context())
		if err == nil || token != "" || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %q, %v", what, token, err)
		}
	}
	if elsewhere > 0 {
		t.Error("the redirect was followed")
	}
	t.Logf("attack: a hostile token endpoint: %d of %d answers give no token; no error has the secret", len(cases), len(cases))
}

// Settings that are not valid are refused, without the secret.
func TestTokenSourcesThatCannotBe(t *testing.T) {
	open := filepath.Join(t.TempDir(), "open")
	if err := errors.Join(os.WriteFile(open, []byte("s3cret"), 0o600), os.Chmod(open, 0o644)); err != nil {
		t.Fatal(err)
	}
	good := ClientCredentials{TokenURL: "https://a.example/token", ClientID: "orders", Secret: "s3cret"}
	for says, change := range map[string]func(*ClientCredentials){
		"TokenURL must":       func(c *ClientCredentials) { c.TokenURL = "http://a.example/token" },
		"TokenURL must be":    func(c *ClientCredentials) { c.TokenURL = "https://u:s3cret@a.example/token" },
		"ClientID is missing": func(c *ClientCredentials) { c.ClientID = "" },
		"give one of":         func(c *ClientCredentials) { c.Secret = "" },
		"one of SecretFile":   func(c *ClientCredentials) { c.SecretFile = open },
		"all users":           func(c *ClientCredentials) { c.Secret, c.SecretFile = "", open },
		"no such file":        func(c *ClientCredentials) { c.Secret, c.SecretFile = "", open+"x" },
		"CA file":             func(c *ClientCredentials) { c.CAFile = open },
	} {
		c := good
		change(&c)
		if _, err := NewClientCredentials(c); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%v, want %q", err, says)
		}
	}
	if _, err := NewClientCredentials(good); err != nil {
		t.Error(err)
	}
	if _, err := StaticToken("a b"); err == nil {
		t.Error("a token with a space")
	}
	if _, err := FileToken(open, nil); err == nil || !strings.Contains(err.Error(), "all users") {
		t.Error(err)
	}
	static, err := StaticToken(" key\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, cfg := range []Config{{TokenSource: static, Token: "key"}, {TokenSource: static, TokenFile: open}} {
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "one of the three") {
			t.Error(err)
		}
	}
}

// A source of the configuration replaces the key of the environment. A source that fails is no
// service that is away.
func TestTokenSource(t *testing.T) {
	t.Setenv("CEDARPOST_TOKEN", "of the environment, and not valid")
	static, err := StaticToken(" key\n")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte("key\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fromFile, err := FileToken(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	for what, source := range map[string]TokenSource{"static": static, "file": fromFile} {
		c := both(func(ctx context.Context) error {
			info, _ := connect.CallInfoForServerContext(ctx)
			if got := info.RequestHeader().Get("Authorization"); got != "Bearer key" {
				return connect.NewError(connect.CodeUnauthenticated, "no")
			}
			return nil
		}).serve(t, uncached, func(cfg *Config) { cfg.TokenSource = source })
		if r, err := c.Authorize(t.Context(), hitCheck); err != nil || !r.Allowed() {
			t.Errorf("%s: %v", what, err)
		}
	}
}
