// Package issuertest starts a real OpenID provider, of github.com/zitadel/oidc, for tests of access
// tokens. It runs on this machine, over TLS. A test can also have the provider's key sign what no
// honest provider would sign.
package issuertest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// Audience is the audience of the tokens that a client gets from the provider.
const Audience = "cedarpost"

// secret is the secret of every client.
const secret = "secret-of-a-client"

// An Issuer is a provider that runs. Every client id may get tokens by client credentials; the
// token's subject is the client id.
type Issuer struct {
	// URL is the issuer, as it stands in tokens.
	URL string
	// CAFile is the PEM file with the authority of the provider's certificate.
	CAFile string

	server *httptest.Server
	store  *storage

	discoveries, fetches, tokens atomic.Int64
	away                         atomic.Bool
	held                         atomic.Pointer[chan struct{}]
}

// Start starts a provider whose keys are for RS256 or ES256. It ends with the test.
func Start(t testing.TB, algorithm jose.SignatureAlgorithm) *Issuer {
	t.Helper()
	i := &Issuer{store: &storage{algorithm: algorithm, claims: map[string]map[string]any{}}}
	if err := i.store.newKey(); err != nil {
		t.Fatal(err)
	}
	var provider http.Handler
	i.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/.well-known/openid-configuration":
			i.discoveries.Add(1)
		case "/keys":
			i.fetches.Add(1)
		case "/oauth/token":
			i.tokens.Add(1)
		}
		if held := i.held.Load(); held != nil {
			select {
			case <-*held:
			case <-r.Context().Done():
			}
		}
		if i.away.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		provider.ServeHTTP(w, r)
	}))
	i.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	i.server.StartTLS()
	t.Cleanup(func() {
		i.Release()
		i.server.CloseClientConnections()
		i.server.Close()
	})
	i.URL = i.server.URL
	i.CAFile = filepath.Join(t.TempDir(), "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.server.Certificate().Raw})
	if err := os.WriteFile(i.CAFile, text, 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := op.NewProvider(&op.Config{}, i.store, op.StaticIssuer(i.URL), op.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	provider = p
	return i
}

// Host returns the host and port of the provider.
func (i *Issuer) Host() string { return i.server.Listener.Addr().String() }

// Fetches returns how often the key set was asked for.
func (i *Issuer) Fetches() int64 { return i.fetches.Load() }

// Discoveries returns how often the provider's metadata were asked for.
func (i *Issuer) Discoveries() int64 { return i.discoveries.Load() }

// Requests returns how often a token was asked for.
func (i *Issuer) Requests() int64 { return i.tokens.Load() }

// SetAway makes the provider answer each call with 503, or answer again.
func (i *Issuer) SetAway(away bool) { i.away.Store(away) }

// Hold makes the provider keep each call waiting until Release.
func (i *Issuer) Hold() {
	c := make(chan struct{})
	i.held.Store(&c)
}

// Release answers the calls that wait.
func (i *Issuer) Release() {
	if c := i.held.Swap(nil); c != nil {
		close(*c)
	}
}

// NewKey makes the provider sign with a new key, and publish that key alone.
func (i *Issuer) NewKey(t testing.TB) {
	t.Helper()
	if err := i.store.newKey(); err != nil {
		t.Fatal(err)
	}
}

// AddKeys makes the provider publish further keys, as they are.
func (i *Issuer) AddKeys(keys ...jose.JSONWebKey) {
	i.store.mu.Lock()
	defer i.store.mu.Unlock()
	i.store.more = append(i.store.more, keys...)
}

// SetClaims gives the tokens of a client further claims.
func (i *Issuer) SetClaims(client string, claims map[string]any) {
	i.store.mu.Lock()
	defer i.store.mu.Unlock()
	i.store.claims[client] = claims
}

// ClientCredentials returns how a client gets its tokens, with the context to use for it.
func (i *Issuer) ClientCredentials(ctx context.Context, client string) (context.Context, *clientcredentials.Config) {
	return context.WithValue(ctx, oauth2.HTTPClient, i.server.Client()),
		&clientcredentials.Config{ClientID: client, ClientSecret: secret, TokenURL: i.URL + "/oauth/token", AuthStyle: oauth2.AuthStyleInHeader}
}

// Token gets a token for a client, as a service would.
func (i *Issuer) Token(t testing.TB, client string) string {
	t.Helper()
	ctx, config := i.ClientCredentials(t.Context(), client)
	token, err := config.Token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return token.AccessToken
}

// KeyID returns the id of the provider's key.
func (i *Issuer) KeyID() string { return i.store.key().KeyID }

// PublicKey returns the provider's public key.
func (i *Issuer) PublicKey() crypto.PublicKey {
	key := i.store.key()
	return key.Public().Key
}

// Sign signs a payload with the provider's key. The header has alg, kid and typ, and what is in
// header beside or instead of them. A nil value takes a member away.
func (i *Issuer) Sign(t testing.TB, header map[string]any, payload []byte) string {
	t.Helper()
	members := map[string]any{"alg": i.store.algorithm, "kid": i.KeyID(), "typ": "at+jwt"}
	for name, value := range header {
		if members[name] = value; value == nil {
			delete(members, name)
		}
	}
	text, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	return Sign(t, i.store.key().Key, text, payload)
}

// SignText is like Sign, with a header as it is to be sent.
func (i *Issuer) SignText(t testing.TB, header string, payload []byte) string {
	t.Helper()
	return Sign(t, i.store.key().Key, []byte(header), payload)
}

// Sign signs a header and a payload, whatever they are, as RS256 or ES256 does (RFC 7518, sections
// 3.3 and 3.4), or as HS256 does if the key is a []byte.
func Sign(t testing.TB, key any, header, payload []byte) string {
	t.Helper()
	input := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload)
	hash := sha256.Sum256([]byte(input))
	var signature []byte
	var err error
	switch key := key.(type) {
	case *rsa.PrivateKey:
		signature, err = rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, hash[:])
	case *ecdsa.PrivateKey:
		var r, s *big.Int
		if r, s, err = ecdsa.Sign(rand.Reader, key, hash[:]); err == nil {
			signature = append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
		}
	case []byte:
		mac := hmac.New(sha256.New, key)
		_, _ = mac.Write([]byte(input))
		signature = mac.Sum(nil)
	default:
		err = fmt.Errorf("no signature with a %T", key)
	}
	if err != nil {
		t.Fatal(err)
	}
	return input + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// Claims returns the payload of a token that is valid now, with further claims or other values.
// A nil value takes a claim away.
func (i *Issuer) Claims(t testing.TB, now time.Time, change map[string]any) []byte {
	t.Helper()
	claims := map[string]any{
		"iss": i.URL, "sub": "ann", "aud": Audience, "iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(), "client_id": "app", "jti": "1",
	}
	for name, value := range change {
		if claims[name] = value; value == nil {
			delete(claims, name)
		}
	}
	text, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// storage is what the provider asks its owner for. The methods of the embedded interface are for
// grants that it does not offer.
type storage struct {
	op.Storage

	algorithm jose.SignatureAlgorithm

	mu      sync.Mutex
	signing jose.JSONWebKey
	number  int
	more    []jose.JSONWebKey
	claims  map[string]map[string]any // client → further claims
}

func (s *storage) newKey() error {
	var key any
	var err error
	switch s.algorithm {
	case jose.RS256:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	case jose.ES256:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	default:
		err = fmt.Errorf("no key for %s", s.algorithm)
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.number++
	s.signing = jose.JSONWebKey{Key: key, KeyID: fmt.Sprintf("key-%d", s.number), Algorithm: string(s.algorithm), Use: "sig"}
	return nil
}

func (s *storage) key() jose.JSONWebKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.signing
}

type providerKey struct{ jose.JSONWebKey }

func (k providerKey) SignatureAlgorithm() jose.SignatureAlgorithm {
	return jose.SignatureAlgorithm(k.JSONWebKey.Algorithm)
}
func (k providerKey) Algorithm() jose.SignatureAlgorithm { return k.SignatureAlgorithm() }
func (k providerKey) Key() any                           { return k.JSONWebKey.Key }
func (k providerKey) ID() string                         { return k.KeyID }
func (k providerKey) Use() string                        { return k.JSONWebKey.Use }

// Health makes the provider ready.
func (s *storage) Health(context.Context) error { return nil }

// SigningKey returns the key that signs.
func (s *storage) SigningKey(context.Context) (op.SigningKey, error) {
	return providerKey{s.key()}, nil
}

// SignatureAlgorithms returns the algorithm of the key.
func (s *storage) SignatureAlgorithms(context.Context) ([]jose.SignatureAlgorithm, error) {
	return []jose.SignatureAlgorithm{s.algorithm}, nil
}

// KeySet returns the keys that are published.
func (s *storage) KeySet(context.Context) ([]op.Key, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys := []op.Key{providerKey{s.signing.Public()}}
	for _, k := range s.more {
		keys = append(keys, providerKey{k})
	}
	return keys, nil
}

// CreateAccessToken says how long a token lives.
func (s *storage) CreateAccessToken(context.Context, op.TokenRequest) (string, time.Time, error) {
	return rand.Text(), time.Now().Add(5 * time.Minute), nil
}

// GetPrivateClaimsFromScopes returns the further claims of a client's tokens.
func (s *storage) GetPrivateClaimsFromScopes(_ context.Context, _, clientID string, _ []string) (map[string]any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.claims[clientID], nil
}

// ClientCredentials checks the secret of a client.
func (s *storage) ClientCredentials(_ context.Context, id, given string) (op.Client, error) {
	if given != secret {
		return nil, errors.New("a wrong secret")
	}
	return client{id: id}, nil
}

// ClientCredentialsTokenRequest returns the subject and audience of a client's tokens.
func (s *storage) ClientCredentialsTokenRequest(_ context.Context, id string, scopes []string) (op.TokenRequest, error) {
	return request{id, scopes}, nil
}

type request struct {
	client string
	scopes []string
}

func (r request) GetSubject() string    { return r.client }
func (r request) GetAudience() []string { return []string{Audience} }
func (r request) GetScopes() []string   { return r.scopes }

// client is a client of the provider. The methods of the embedded interface are for other grants.
type client struct {
	op.Client
	id string
}

func (c client) GetID() string { return c.id }
func (c client) GrantTypes() []oidc.GrantType {
	return []oidc.GrantType{oidc.GrantTypeClientCredentials}
}
func (c client) AccessTokenType() op.AccessTokenType { return op.AccessTokenTypeJWT }
func (c client) ClockSkew() time.Duration            { return 0 }
func (c client) RestrictAdditionalAccessTokenScopes() func([]string) []string {
	return func(scopes []string) []string { return scopes }
}
