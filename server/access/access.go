// Package access authenticates callers, says what they may do, and limits their rate.
// [Authenticate] is the only function that reads credentials, for every protocol. [Rights.May] is
// the only one that decides what a caller may do; it asks the engine, with the policies of the
// bundle admin.
package access

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cedarpost/cedarpost/store"
)

// Kind says how a caller authenticated.
type Kind string

const (
	// APIKey is the kind of a caller that sent an API key.
	APIKey Kind = "api_key"
	// AccessToken is the kind of a caller that sent an access token of a configured issuer.
	AccessToken Kind = "token"
)

// A Caller is an authenticated client of Cedarpost. The zero value is no caller.
type Caller struct {
	// Name is unique among all callers. The log records it, and grants name it.
	Name string
	// Kind says how the caller authenticated.
	Kind Kind
	// KeyID is the id of the API key; "" for other kinds.
	KeyID string
	// Ends is when the key, the token or the certificate ends; zero: never.
	Ends time.Time

	token *verifiedToken // nil for other kinds
}

// Grants returns the grants that come with the caller's token, besides the stored ones. They end
// with the token.
func (c Caller) Grants() (list []store.Grant) {
	if c.token == nil {
		return nil
	}
	token := &c.token.token
	for _, g := range token.Grants {
		list = append(list, store.Grant{Caller: c.Name, Role: g.Role, Bundle: g.Bundle, ExpiresAt: &token.Expires, GrantedBy: "issuer " + token.Issuer})
	}
	return list
}

// Keys are the API keys that are not revoked. It is an interface because package snapshot, which
// has them, is not imported here.
type Keys interface {
	// Key returns the API key with a hash, which can have expired. hash is the SHA-256 of its text.
	Key(hash [sha256.Size]byte) (key store.Key, known bool)
	// HasKey reports whether a caller of this name has the key with this id, and it has not ended at a
	// time.
	HasKey(name, id string, now time.Time) bool
}

// Credentials are what callers are authenticated by.
type Credentials struct {
	// Keys returns the API keys that are not revoked now.
	Keys func() (Keys, error)
	// Tokens verifies access tokens. Nil: none is accepted.
	Tokens *Tokens
	// Certificates verifies client certificates. Nil: none is accepted.
	Certificates *Certificates
}

// IsLive reports whether the caller of a call that takes long is still authenticated, over a
// connection with this TLS state: with an API key, if that key is live, whatever other keys the caller
// has; with a token, until that ends, or its issuer is removed or changed, or the issuer withdraws the
// key that signed it; with a certificate, if the certificate is still valid.
func (c Caller) IsLive(credentials Credentials, state *tls.ConnectionState, now time.Time) bool {
	switch c.Kind {
	case APIKey:
		keys, err := credentials.Keys()
		return err == nil && keys.HasKey(c.Name, c.KeyID, now)
	case AccessToken:
		return credentials.Tokens.accepts(c.token, now)
	case Certificate:
		same, err := credentials.Certificates.Caller(state)
		return err == nil && same.Name == c.Name
	}
	return false
}

// UnauthenticatedError is the error of a call whose caller is not authenticated.
type UnauthenticatedError struct {
	// Reason is for the log, one of a few: "no credentials", "unknown key", "truncated key",
	// "expired key", "no issuers", "token: …" or "client certificate: …".
	Reason string
}

// Error returns the text for the caller. It is the same for every reason, so that it does
// not help to guess a key, except for an expired key: only a caller that has sent the whole key gets
// that text.
func (e *UnauthenticatedError) Error() string {
	if e == errExpiredKey {
		return "the API key has expired; an operator makes a new one (cedarpost keys create)"
	}
	return `missing or unknown API key, access token or client certificate; send "Authorization: Bearer <key or token>"`
}

var (
	errNoCredentials = &UnauthenticatedError{"no credentials"}
	errUnknownKey    = &UnauthenticatedError{"unknown key"}
	errTruncatedKey  = &UnauthenticatedError{"truncated key"}
	errExpiredKey    = &UnauthenticatedError{"expired key"}
	errNoIssuers     = &UnauthenticatedError{"no issuers"}
)

// Authenticate returns the caller of a call with these headers, over a connection with this
// TLS state, which is nil without TLS. A client certificate counts only for a call without an
// Authorization header: a wrong key beside a good certificate is refused. The error is an
// [UnauthenticatedError], a [TokenError], or that of Credentials.Keys. Only a token of an issuer
// whose keys are not known yet makes it wait, at most until ctx ends.
//
// API keys are random 256-bit values and are looked up by their hash, so the time of the
// lookup says nothing about them.
func Authenticate(ctx context.Context, header http.Header, state *tls.ConnectionState, credentials Credentials, now time.Time) (c Caller, err error) {
	values := header.Values("Authorization")
	if len(values) == 0 {
		return credentials.Certificates.Caller(state)
	}
	scheme, secret, _ := strings.Cut(values[0], " ")
	secret = strings.Trim(secret, " ")
	switch {
	case len(values) > 1 || !strings.EqualFold(scheme, "bearer"):
		return c, errUnknownKey
	case LooksLikeToken(secret):
		return credentials.tokenCaller(ctx, secret, now)
	case isTruncated(secret):
		return c, errTruncatedKey
	}
	all, err := credentials.Keys()
	if err != nil {
		return c, err
	}
	key, known := all.Key(sha256.Sum256([]byte(secret)))
	switch {
	case !known:
		return c, errUnknownKey
	case !key.Live(now):
		return c, errExpiredKey
	}
	c = Caller{Name: key.Name, Kind: APIKey, KeyID: key.ID}
	if key.ExpiresAt != nil {
		c.Ends = *key.ExpiresAt
	}
	return c, nil
}

// tokenCaller returns the caller of an access token.
func (cr Credentials) tokenCaller(ctx context.Context, raw string, now time.Time) (c Caller, err error) {
	if cr.Tokens == nil {
		return c, errNoIssuers
	}
	v, err := cr.Tokens.look(ctx, raw, forCaller, now)
	if err != nil {
		return c, err
	}
	return Caller{Name: v.token.CallerName(), Kind: AccessToken, Ends: v.token.Expires, token: v}, nil
}

type (
	callerKey struct{}
	rightsKey struct{}
)

// HeldRights are the rights of the caller of one call. A call that takes long replaces them by those
// that the caller has by then. It is safe for concurrent use.
type HeldRights struct{ now atomic.Pointer[Rights] }

// Set replaces the rights.
func (h *HeldRights) Set(r *Rights) { h.now.Store(r) }

// WithRights returns a context for a call of a caller with the rights that h holds, now and later.
func WithRights(ctx context.Context, h *HeldRights) context.Context {
	return context.WithValue(ctx, rightsKey{}, h)
}

// RightsFrom returns the newest rights of a context, or those of nobody.
func RightsFrom(ctx context.Context) *Rights {
	if h, ok := ctx.Value(rightsKey{}).(*HeldRights); ok {
		if r := h.now.Load(); r != nil {
			return r
		}
	}
	return &Rights{decider: nobody}
}

// nobody permits nothing.
var nobody *Decider

// WithCaller returns a context for a call of this caller.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerFrom returns the caller of a context, or the zero value if it has none.
func CallerFrom(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}
