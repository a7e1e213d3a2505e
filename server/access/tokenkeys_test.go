package access

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cedarpost/cedarpost/server/access/issuertest"
)

// A flood of tokens with unknown key ids makes one fetch in 30 s, and honest callers are served
// meanwhile.
func TestAttackUnknownKeyFlood(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	tokens, _ := newTokens(t, settings(t, i, "staff"))
	start := time.Now()
	good := i.Sign(t, nil, i.Claims(t, start, nil))
	if _, err := tokens.Verify(t.Context(), good, start); err != nil {
		t.Fatal(err)
	}
	payload := i.Claims(t, start, nil)
	const calls, clients = 800, 8
	flood := func(now time.Time) {
		var all sync.WaitGroup
		for c := range clients {
			all.Go(func() {
				for n := range calls / clients {
					raw := issuertest.Sign(t, []byte("x"), fmt.Appendf(nil, `{"alg":"ES256","kid":"%d-%d"}`, c, n), payload)
					_, err := tokens.Verify(t.Context(), raw, now)
					wantReason(t, err, TokenUnknownKey)
					if n%20 == 0 {
						if _, err := tokens.Verify(t.Context(), i.Sign(t, nil, payload), now); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		all.Wait()
	}
	before := i.Fetches()
	flood(start.Add(fetchInterval - time.Second))
	atOnce := i.Fetches() - before
	flood(start.Add(fetchInterval))
	flood(start.Add(2*fetchInterval - time.Second))
	settled(t, tokens)
	later := i.Fetches() - before
	if atOnce != 0 || later != 1 {
		t.Errorf("%d fetches within 30 s of the first one, %d within the next 30 s", atOnce, later)
	}
	t.Logf("attack: %d tokens with unknown key ids: %d fetch of keys in 30 s, honest tokens are accepted meanwhile", 3*calls, later)
}

// An issuer that does not answer holds up only calls whose token no known key has signed, and only
// so many of them.
func TestAttackUnknownKeysOfASlowIssuer(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	tokens, _ := newTokens(t, settings(t, i, "staff"))
	start := time.Now()
	if _, err := tokens.Verify(t.Context(), i.Sign(t, nil, i.Claims(t, start, nil)), start); err != nil {
		t.Fatal(err)
	}
	i.Hold()
	now := start.Add(time.Minute)
	unknown := i.Sign(t, map[string]any{"kid": "unknown"}, i.Claims(t, now, nil))
	keys := (*tokens.issuers.Load())[i.URL].keys
	waiting := func() int {
		keys.mu.Lock()
		defer keys.mu.Unlock()
		return keys.waiting
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range maxWaiting {
		all.Go(func() {
			_, err := tokens.Verify(ctx, unknown, now)
			wantReason(t, err, TokenNoKeys) // the fetch is still under way
			if err != nil && !strings.Contains(err.Error(), "try again in a minute") {
				t.Error(err)
			}
		})
	}
	for end := time.Now().Add(time.Minute); waiting() < maxWaiting && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	// These do not wait, so they would not end if they did.
	for range 300 {
		_, err := tokens.Verify(t.Context(), unknown, now)
		wantReason(t, err, TokenUnknownKey)
		if _, err := tokens.Verify(t.Context(), i.Sign(t, nil, i.Claims(t, now, nil)), now); err != nil {
			t.Error(err)
		}
	}
	held := waiting()
	cancel() // a call that waits ends with its caller
	all.Wait()
	i.Release()
	settled(t, tokens)
	if held != maxWaiting || waiting() != 0 {
		t.Errorf("%d calls waited, %d still do", held, waiting())
	}
	t.Logf("attack: %d tokens with unknown keys while the issuer does not answer: %d wait, the others are refused at once, known keys are not held up", maxWaiting+300, held)
}

// An issuer changes its keys. Tokens of the new key are accepted within 30 s, and those of the old
// one no longer, even if they were accepted before.
func TestIssuerChangesItsKeys(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	tokens, _ := newTokens(t, settings(t, i, "staff"))
	start := time.Now()
	verify := func(raw string, after time.Duration) error {
		_, err := tokens.Verify(t.Context(), raw, start.Add(after))
		return err
	}
	sign := func() string {
		return i.Sign(t, nil, i.Claims(t, start, map[string]any{"exp": start.Add(time.Hour).Unix()}))
	}
	old := sign()
	if err := verify(old, 0); err != nil {
		t.Fatal(err)
	}
	i.NewKey(t)
	wantReason(t, verify(sign(), fetchInterval-time.Second), TokenUnknownKey)
	if err := verify(old, fetchInterval-time.Second); err != nil {
		t.Errorf("the old key, before the keys are fetched again: %v", err)
	}
	if err := verify(sign(), fetchInterval); err != nil {
		t.Errorf("the new key: %v", err)
	}
	wantReason(t, verify(old, fetchInterval), TokenUnknownKey)

	// A key is withdrawn, and no token of another one comes: the keys are fetched again after a while.
	old = sign()
	if err := verify(old, time.Minute); err != nil {
		t.Fatal(err)
	}
	i.NewKey(t)
	if err := verify(old, fetchInterval+refreshAge); err != nil {
		t.Errorf("at the refresh age: %v", err)
	}
	if err := verify(old, fetchInterval+refreshAge+time.Second); err != nil { // starts the fetch, and does not wait
		t.Errorf("after the refresh age: %v", err)
	}
	settled(t, tokens)
	wantReason(t, verify(old, fetchInterval+refreshAge+2*time.Second), TokenUnknownKey)
	if n := i.Fetches(); n != 3 {
		t.Errorf("%d fetches", n)
	}
}

// An issuer is away: its last keys are used for an hour, and it is asked once in 30 s. When it is back,
// its tokens are accepted again.
func TestIssuerIsAway(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	tokens, log := newTokens(t, settings(t, i, "staff"))
	start := time.Now()
	verify := func(after time.Duration) error {
		now := start.Add(after)
		_, err := tokens.Verify(t.Context(), i.Sign(t, nil, i.Claims(t, now, nil)), now)
		settled(t, tokens)
		return err
	}
	i.SetAway(true)
	wantReason(t, verify(0), TokenNoKeys) // from the start
	wantReason(t, verify(fetchInterval-time.Second), TokenNoKeys)
	if n := i.Discoveries(); n != 1 {
		t.Errorf("the issuer was asked %d times in 30 s", n)
	}
	i.SetAway(false)
	if err := verify(fetchInterval); err != nil {
		t.Fatal(err)
	}
	asked := i.Discoveries()
	i.SetAway(true)
	steps := 0
	for at := time.Duration(0); at <= maxKeyAge; at += 10 * time.Second {
		if err := verify(fetchInterval + at); err != nil {
			t.Fatalf("after %v: %v", at, err)
		}
		steps++
	}
	if n := i.Discoveries() - asked; n > int64(maxKeyAge/fetchInterval) || n < int64((maxKeyAge-refreshAge)/fetchInterval)-2 {
		t.Errorf("the issuer was asked %d times in an hour", n)
	}
	wantReason(t, verify(fetchInterval+maxKeyAge+10*time.Second), TokenNoKeys)
	i.SetAway(false)
	if err := verify(2*fetchInterval + maxKeyAge + 10*time.Second); err != nil {
		t.Errorf("the issuer is back: %v", err)
	}
	if !strings.Contains(log.String(), "issuer=staff") || !strings.Contains(log.String(), "status 503") {
		t.Errorf("the log: %.500s", log)
	}
}

// Metadata and key sets of a hostile or broken issuer lead to no other host, and to no keys.
func TestAttackHostileIssuer(t *testing.T) {
	var elsewhere atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(other.Close)
	honest := issuertest.Start(t, jose.ES256)
	var metadata, keys atomic.Pointer[string]
	var server *httptest.Server
	server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := &metadata
		if r.URL.Path == "/keys" {
			answer = &keys
		}
		text := strings.ReplaceAll(*answer.Load(), "SELF", server.URL)
		if to, ok := strings.CutPrefix(text, "redirect "); ok {
			http.Redirect(w, r, to, http.StatusFound)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, text)
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	issuers, err := ReadIssuers(fmt.Appendf(nil, "issuers: [{name: evil, issuer: '%s', audience: cedarpost, ca_file: '%s'}]", server.URL, caFile))
	if err != nil {
		t.Fatal(err)
	}
	key, err := jose.JSONWebKey{Key: honest.PublicKey(), KeyID: honest.KeyID()}.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	const good = `{"issuer":"SELF","jwks_uri":"SELF/keys"}`
	goodKeys := `{"keys":[` + string(key) + `]}`
	cases := [][2]string{
		{`{"issuer":"` + honest.URL + `","jwks_uri":"SELF/keys"}`, goodKeys},
		{`{"issuer":"SELF","jwks_uri":"` + other.URL + `/keys"}`, goodKeys},
		{`{"issuer":"SELF","jwks_uri":"` + honest.URL + `/keys"}`, goodKeys},
		{`{"issuer":"SELF","jwks_uri":"https://169.254.169.254/latest/meta-data"}`, goodKeys},
		{`{"issuer":"SELF","jwks_uri":"file:///etc/passwd"}`, goodKeys},
		{`{"issuer":"SELF"}`, goodKeys},
		{`{"issuer":"SELF","issuer":"SELF","jwks_uri":"SELF/keys"}`, goodKeys},
		{`[]`, goodKeys},
		{strings.Repeat(" ", maxMetadataBytes) + good, goodKeys},
		{"redirect " + other.URL, goodKeys},
		{good, "redirect " + other.URL},
		{good, `{"keys":[]}`},
		{good, `{"keys":null}`},
		{good, `{}`},
		{good, `{"keys":[{"kty":"oct","k":"AAAA","kid":"key-1"}]}`},
		{good, `{"keys":[{"kty":"EC","crv":"P-256","x":"AAAA","y":"AAAA","kid":"key-1"}]}`},
		{good, `{"keys":[` + strings.Repeat(`{},`, maxKeys) + `{}]}`},
		{good, `{"keys":[` + strings.Repeat(" ", maxKeysBytes) + `]}`},
		{good, `{"keys":` + strings.Repeat(`[`, 10_000)},
	}
	now := time.Now()
	payload := strings.ReplaceAll(string(honest.Claims(t, now, nil)), honest.URL, server.URL)
	raw := honest.Sign(t, nil, []byte(payload))
	verify := func(c [2]string) error {
		metadata.Store(&c[0])
		keys.Store(&c[1])
		tokens, _ := newTokens(t, issuers...)
		_, err := tokens.Verify(t.Context(), raw, now)
		return err
	}
	if err := verify([2]string{good, goodKeys}); err != nil {
		t.Fatalf("an honest issuer: %v", err)
	}
	for _, c := range cases {
		wantReason(t, verify(c), TokenNoKeys)
		if t.Failed() {
			t.Fatalf("%.200s %.200s", c[0], c[1])
		}
	}
	if elsewhere.Load() > 0 || honest.Fetches() > 0 {
		t.Errorf("%d calls to another server, %d to another issuer", elsewhere.Load(), honest.Fetches())
	}
	t.Logf("attack: an issuer with hostile metadata and key sets: %d of %d without effect, 0 calls to other hosts", len(cases), len(cases))
}

// A call that takes long ends with what its token was accepted by: the time, the key that signed it,
// the settings of the issuer, and the issuer itself.
func TestAttackTokenOutlivesItsIssuer(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	as := func(change ...func(*Issuer)) Issuer { return settings(t, i, "staff", change...) }
	start := time.Now()
	ended := 0
	for what, end := range map[string]func(*Tokens) (after time.Duration){
		"the token expires": func(*Tokens) time.Duration { return time.Hour + as().Leeway },
		"the issuer withdraws the key": func(tokens *Tokens) time.Duration {
			i.NewKey(t)
			_, err := tokens.Verify(t.Context(), i.Sign(t, nil, i.Claims(t, start, nil)), start.Add(fetchInterval))
			if err != nil {
				t.Error(err)
			}
			return fetchInterval
		},
		"the issuer is removed": func(tokens *Tokens) time.Duration {
			if err := tokens.Replace(nil); err != nil {
				t.Error(err)
			}
			return 0
		},
		"the grants of its groups change": func(tokens *Tokens) time.Duration {
			if err := tokens.Replace([]Issuer{as(withGroups)}); err != nil {
				t.Error(err)
			}
			return 0
		},
	} {
		tokens, _ := newTokens(t, as())
		raw := i.Sign(t, nil, i.Claims(t, start, map[string]any{"exp": start.Add(time.Hour).Unix()}))
		credentials := Credentials{Tokens: tokens}
		c, err := credentials.tokenCaller(t.Context(), raw, start)
		if err != nil || !c.IsLive(credentials, nil, start) {
			t.Fatalf("%s: %+v, %v", what, c, err)
		}
		if c.IsLive(credentials, nil, start.Add(end(tokens))) {
			t.Errorf("%s: the caller is live", what)
			continue
		}
		ended++
	}
	t.Logf("attack: a call goes on after its token is not accepted any more: %d of 4 ends noticed", ended)
}
