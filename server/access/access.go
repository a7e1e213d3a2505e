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
	"time"

	"github.com/cedarpost/cedarpost/store"
)

// Kind says how a caller authenticated.
type Kind string

// APIKey is the kind of a caller that sent an API key.
const APIKey Kind = "api_key"

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
}

// Grants returns the grants that come with the caller's token, besides the stored ones.
func (c Caller) Grants() []store.Grant { return nil }

// Keys are the API keys that are not revoked. It is an interface because package snapshot, which
// has them, is not imported here.
type Keys interface {
	// Key returns the API key with a hash, which can have expired. hash is the SHA-256 of its text.
	Key(hash [sha256.Size]byte) (key store.Key, known bool)
	// HasCaller reports whether a caller of this name has a key that has not ended at a time.
	HasCaller(name string, now time.Time) bool
}

// IsLive reports whether the caller may go on with a call that takes long. A caller with an
// API key may while it has a live key. A caller of no kind may not.
func (c Caller) IsLive(keys Keys, now time.Time) bool {
	return c.Kind == APIKey && keys.HasCaller(c.Name, now)
}

// UnauthenticatedError is the error of a call whose caller is not authenticated.
type UnauthenticatedError struct {
	// Reason is for the log: "no credentials", "unknown key", "truncated key" or "expired key".
	Reason string
}

// Error returns the text for the caller. It is the same for every reason, so that it does
// not help to guess a key.
func (e *UnauthenticatedError) Error() string {
	return `missing or unknown API key; send "Authorization: Bearer <key>"`
}

var (
	errNoCredentials = &UnauthenticatedError{"no credentials"}
	errUnknownKey    = &UnauthenticatedError{"unknown key"}
	errTruncatedKey  = &UnauthenticatedError{"truncated key"}
	errExpiredKey    = &UnauthenticatedError{"expired key"}
)

// Authenticate returns the caller of a call with these headers, over a connection with this
// TLS state, which is nil without TLS and is not used yet. keys returns the API keys that are not
// revoked now. The error is an [UnauthenticatedError], or that of keys.
//
// API keys are random 256-bit values and are looked up by their hash, so the time of the
// lookup says nothing about them.
func Authenticate(header http.Header, _ *tls.ConnectionState, keys func() (Keys, error), now time.Time) (c Caller, err error) {
	values := header.Values("Authorization")
	if len(values) == 0 {
		return c, errNoCredentials
	}
	scheme, secret, _ := strings.Cut(values[0], " ")
	secret = strings.TrimSpace(secret)
	switch {
	case len(values) > 1 || !strings.EqualFold(scheme, "bearer"):
		return c, errUnknownKey
	case isTruncated(secret):
		return c, errTruncatedKey
	}
	all, err := keys()
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

type (
	callerKey struct{}
	rightsKey struct{}
)

// WithRights returns a context for a call of a caller with these rights.
func WithRights(ctx context.Context, r *Rights) context.Context {
	return context.WithValue(ctx, rightsKey{}, r)
}

// RightsFrom returns the rights of a context, or those of nobody.
func RightsFrom(ctx context.Context) *Rights {
	if r, ok := ctx.Value(rightsKey{}).(*Rights); ok {
		return r
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
