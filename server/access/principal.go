package access

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cedarpost/cedarpost/server/engine"
)

// maxIDBytes is the limit of the contract for the id of an entity.
const maxIDBytes = 1024

// Principal is what the access token of an end user says: who the principal of a question is. It
// authenticates no caller.
type Principal struct {
	// Issuer is the short name of the issuer.
	Issuer string
	// Expires is when the token is no longer accepted, as in [Token].
	Expires time.Time

	claims claims
}

// Principal returns what the access token of an end user says, if a configured issuer has signed it for
// one of the issuer's PrincipalAudiences and it is valid at the time now. The error is a [TokenError].
func (t *Tokens) Principal(ctx context.Context, raw string, now time.Time) (Principal, error) {
	v, err := t.look(ctx, raw, forPrincipal, now)
	if err != nil {
		return Principal{}, err
	}
	return Principal{Issuer: v.token.Issuer, Expires: v.token.Expires, claims: v.claims}, nil
}

// IsFor reports whether the token is for one of the audiences.
func (p Principal) IsFor(audiences []string) bool { return p.claims.isFor(audiences) }

// ID returns prefix followed by the claim that names the principal. The claim must be a text that people
// can read in the log. If it is email, the issuer must have verified it.
func (p Principal) ID(claim, prefix string) (string, error) {
	name, ok := p.claims.name(claim)
	if !ok || len(prefix)+len(name) > maxIDBytes {
		return "", fmt.Errorf("the claim %q is missing, or cannot name a principal: it must be a text of visible characters, with 1 to %d bytes, and an email must be verified", claim, maxIDBytes-len(prefix))
	}
	return prefix + name, nil
}

// Attribute returns the value that a claim gives to an attribute of the context, in the form of the
// contract (cedarpost/v1/cedar.proto). It is nil if the token does not have the claim. The error names the
// claim, and has nothing of its value.
func (p Principal) Attribute(claim string, as engine.ClaimType) (any, error) {
	value := p.claims.at(claim)
	if value == nil {
		return nil, nil
	}
	var out any
	var ok bool
	var want string
	switch as {
	case engine.ClaimString:
		want = "a text"
		out, ok = p.claims.text(claim)
	case engine.ClaimBool:
		want = "true or false"
		out, ok = value.Kind() == 't', value.Kind() == 't' || value.Kind() == 'f'
	case engine.ClaimLong:
		want = "a whole number of 64 bits"
		out, ok = longOf(value)
	case engine.ClaimStrings:
		want = "a text or an array of texts"
		var list []string
		// In these two claims, spaces separate the texts (RFC 8693, section 4.2).
		if list, ok = p.claims.texts(claim, claim == "scope" || claim == "scp"); ok {
			all := make([]any, len(list))
			for i, s := range list {
				all[i] = s
			}
			out = all
		}
	case engine.ClaimDatetime:
		want = "a number of seconds since 1970"
		var at time.Time
		if at, _, ok = p.claims.time(claim); ok {
			out = map[string]any{"__extn": map[string]any{"fn": "datetime", "arg": at.UTC().Format("2006-01-02T15:04:05.000Z")}}
		}
	default:
		want = "of a type that the attribute can have"
	}
	if !ok {
		return nil, fmt.Errorf("the claim %q is not %s", claim, want)
	}
	return out, nil
}

// longOf returns a JSON number as a Long of the contract: a number, or a string of digits where JSON
// numbers are not exact.
func longOf(value jsontext.Value) (any, bool) {
	const exact = 1<<53 - 1
	var n int64
	if value.Kind() != '0' || json.Unmarshal(value, &n) != nil {
		return nil, false
	}
	if n > exact || n < -exact {
		return strconv.FormatInt(n, 10), true
	}
	return float64(n), true
}
