// Package access authenticates callers and limits their rate. [Authenticate] is the only
// function that reads credentials, for every protocol.
package access

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"net/http"
	"strings"
)

// Kind says how a caller authenticated.
type Kind string

// APIKey is the kind of a caller that sent an API key.
const APIKey Kind = "api_key"

// A Caller is an authenticated client of Cedarpost. The zero value is no caller.
type Caller struct {
	// Name is unique among the callers of a kind. The log records it.
	Name string
	// Kind says how the caller authenticated.
	Kind Kind
}

// Keys are the live API keys. It is an interface because package snapshot, which has them, is not
// imported here.
type Keys interface {
	// Caller returns the name of the caller that has a key. hash is the SHA-256 of the key.
	Caller(hash [sha256.Size]byte) (name string, known bool)
	// HasCaller reports whether a caller of this name has a live key.
	HasCaller(name string) bool
}

// IsLive reports whether the caller may go on with a call that takes long. A caller with an
// API key may while it has a live key. A caller of no kind may not.
func (c Caller) IsLive(keys Keys) bool { return c.Kind == APIKey && keys.HasCaller(c.Name) }

// UnauthenticatedError is the error of a call whose caller is not authenticated.
type UnauthenticatedError struct {
	// Reason is for the log: "no credentials" or "unknown key".
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
)

// Authenticate returns the caller of a call with these headers, over a connection with this
// TLS state, which is nil without TLS and is not used yet. keys returns the API keys that are
// live now. The error is an [UnauthenticatedError], or that of keys.
//
// API keys are random 256-bit values and are looked up by their hash, so the time of the
// lookup says nothing about them.
func Authenticate(header http.Header, _ *tls.ConnectionState, keys func() (Keys, error)) (Caller, error) {
	values := header.Values("Authorization")
	if len(values) == 0 {
		return Caller{}, errNoCredentials
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if len(values) > 1 || !strings.EqualFold(scheme, "bearer") {
		return Caller{}, errUnknownKey
	}
	live, err := keys()
	if err != nil {
		return Caller{}, err
	}
	name, known := live.Caller(sha256.Sum256([]byte(strings.TrimSpace(token))))
	if !known {
		return Caller{}, errUnknownKey
	}
	return Caller{name, APIKey}, nil
}

type callerKey struct{}

// WithCaller returns a context for a call of this caller.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerFrom returns the caller of a context, or the zero value if it has none.
func CallerFrom(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}
