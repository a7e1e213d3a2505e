package cedarpost

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect/v2"
)

// ErrPrincipalToken says that the access token of the check's user is not accepted, or does not fit the
// bundle. It says nothing about the program that asks. The program answers its user with 401, so that the
// user gets a new token.
var ErrPrincipalToken = errors.New("cedarpost: the access token of the user is not accepted")

// PrincipalToken is the access token of an end user. Functions that print, log or encode values do not show
// it, because its text is behind a function. Make it with [NewPrincipalToken]. The zero value is no token.
type PrincipalToken struct{ text func() string }

// NewPrincipalToken returns a token with the text that a request to your service has after "Bearer". The
// service checks it.
func NewPrincipalToken(text string) PrincipalToken {
	if text == "" {
		return PrincipalToken{}
	}
	return PrincipalToken{func() string { return text }}
}

// IsZero reports whether there is no token.
func (t PrincipalToken) IsZero() bool { return t.text == nil }

// appendHash appends the token to a key: its hash, so that the cache does not have the token itself.
func (t PrincipalToken) appendHash(b []byte) []byte {
	hash := sha256.Sum256([]byte(t.text()))
	return append(b, hash[:]...)
}

// maxPrincipalToken is the limit of the service.
const maxPrincipalToken = 16 << 10

// check refuses a token that cannot be sent, and a check that cannot have a token. It is called before a kept
// answer is looked up, too. No error has the text of the token.
func (t PrincipalToken) check(c *Check) error {
	if t.IsZero() {
		return nil
	}
	text := t.text()
	switch {
	case c.Principal != EntityUID{}:
		return errors.New("give either Principal or PrincipalToken, not both")
	case c.FailOpen != "":
		// The report of such a check names its principal, which only the service knows.
		return errors.New("a check with a PrincipalToken cannot fail open")
	case len(text) > maxPrincipalToken:
		return fmt.Errorf("%w: it has %d bytes, more than %d", ErrPrincipalToken, len(text), maxPrincipalToken)
	case strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }):
		return fmt.Errorf("%w: it has a character that no token has", ErrPrincipalToken)
	}
	return nil
}

// kind returns the error of this package for one that is about the token, or nil: the service says so at
// the beginning of its message (principal_token in cedarpost/v1/authorization.proto).
func (t PrincipalToken) kind(err error) error {
	ce, ok := errors.AsType[*connect.Error](err)
	switch {
	case !ok || t.IsZero() || !ce.IsRemote() || !strings.HasPrefix(ce.Message(), "principal_token:"):
		return nil
	case ce.Code() == connect.CodeFailedPrecondition: // the issuer is away
		return ErrUnavailable
	}
	return ErrPrincipalToken
}
