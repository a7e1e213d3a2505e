package enforce

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// Kind is a way to refuse a request.
type Kind uint8

// The ways to refuse.
const (
	// Forbidden: the check was denied. 403, permission_denied.
	Forbidden Kind = iota + 1
	// Hidden: the check was denied at the object, on a route that does not reveal whether
	// the object exists. 404, not_found.
	Hidden
	// NoPrincipal: the request has no principal. 401, unauthenticated.
	NoPrincipal
	// StepUp: the check was denied, and would be allowed after a better authentication. 401,
	// unauthenticated.
	StepUp
	// Unmet: the check was allowed, but an obligation was not met. 403, permission_denied.
	Unmet
	// Unavailable: there is no decision now, but there may be one later. 503, unavailable.
	Unavailable
	// Fault: the program asks a question that is not valid, or a function of it failed. 500,
	// internal.
	Fault
	// Malformed: what the client sent cannot be checked. 400, invalid_argument.
	Malformed
	// TooLarge: the body is larger than the route reads for a check. 413,
	// resource_exhausted.
	TooLarge
	// WrongType: the body is of a type that cannot be checked. 415, invalid_argument.
	WrongType
	// Unmapped: no route is mapped for the request. 404, permission_denied.
	Unmapped
	// Conflict: the check names a revision that the service does not have any more, so data
	// that the request builds on may be lost. The client has to read it again; repeating the
	// request does not help. 409, aborted.
	Conflict

	kinds
)

// Refusal says how a request is refused. The client gets the kind, the decision's id, the
// denied fields that it named itself, and what to do. It never gets a policy or Err.
type Refusal struct {
	Kind Kind
	// DecisionID is the id of the decision's record. The client does not get it with Hidden,
	// because it would reveal that there is an object.
	DecisionID string
	// At is the check that denied.
	At cedarpost.DeniedAt
	// Fields are the fields of a write that were asked for by name and denied.
	Fields []string
	// Challenge is the value of WWW-Authenticate, or "".
	Challenge string
	// RetryAfter is how long to wait, or 0.
	RetryAfter time.Duration
	// Err is the cause, for the program's own log.
	Err error
}

// Error describes the refusal, with its cause, for the program's own log.
func (r *Refusal) Error() string {
	text := "enforce: " + r.Kind.Title()
	if r.Err != nil {
		text += ": " + r.Err.Error()
	}
	return text
}

// Unwrap returns the cause.
func (r *Refusal) Unwrap() error { return r.Err }

var titles = [kinds]string{
	Forbidden: "Forbidden", Hidden: "Not Found", NoPrincipal: "Unauthorized", StepUp: "Unauthorized", Unmet: "Forbidden",
	Unavailable: "Service Unavailable", Fault: "Internal Server Error", Malformed: "Bad Request",
	TooLarge: "Content Too Large", WrongType: "Unsupported Media Type", Unmapped: "Not Found",
	Conflict: "Conflict",
}

var details = [kinds]string{
	Forbidden:   "You may not do this.",
	NoPrincipal: "Sign in first.",
	StepUp:      "This needs a stronger or a more recent sign-in.",
	Unmet:       "You may not do this now.",
	Unavailable: "It could not be decided whether you may do this. Try again.",
	Fault:       "The service made a mistake.",
	Malformed:   "The request cannot be understood.",
	TooLarge:    "The body is too large.",
	WrongType:   "The body is of a type that is not taken here.",
	Conflict:    "What this builds on may have been lost. Read it again, and then try again.",
}

// Title returns the name of the kind's HTTP status.
func (k Kind) Title() string { return titles[k] }

// Detail returns the text for a client, or "".
func (k Kind) Detail() string { return details[k] }

// denied makes the refusal of a denial. A denial at the function is never hidden: it holds
// for every object, so it reveals nothing about this one. A denial at a field is not hidden
// either, because the object was allowed. A denial at the object is hidden even if there is
// an advice: the advice comes from a policy that looks at the object, so it would reveal that
// the object exists, also to a user who could never get access.
func (g *Guard) denied(result cedarpost.Result, check cedarpost.Check, hide bool) *Refusal {
	r := &Refusal{Kind: Forbidden, DecisionID: result.DecisionID(), At: result.DeniedAt()}
	if r.At == cedarpost.AtField {
		for _, path := range result.Fields().Denied() {
			if slices.Contains(check.Fields, path) {
				r.Fields = append(r.Fields, path)
			}
		}
	}
	if hide && r.At != cedarpost.AtFunction && r.At != cedarpost.AtField {
		r.Kind = Hidden
		return r
	}
	if challenge, ok := g.stepUp(result); ok {
		r.Kind, r.Challenge = StepUp, challenge.header()
	}
	return r
}

// stepUp returns the challenge that would lead to an allow. There is one only if every
// policy that denied advises a step-up, and every denied field was denied by such a policy.
// Otherwise the user would sign in again and still be refused.
func (g *Guard) stepUp(result cedarpost.Result) (Challenge, bool) {
	var all Challenge
	var policies, paths []string
	for _, advice := range result.Advice() {
		challenge, ok := g.cfg.StepUp[advice.Text]
		if !ok {
			continue
		}
		all = all.and(challenge)
		policies = append(policies, advice.Policy)
		paths = append(paths, advice.Paths...)
	}
	if len(policies) == 0 {
		return Challenge{}, false
	}
	if result.DeniedAt() == cedarpost.AtField {
		// A field can also be denied because no policy permits it. Then it has no advice.
		for _, path := range result.Fields().Denied() {
			if !slices.Contains(paths, path) {
				return Challenge{}, false
			}
		}
	}
	for _, policy := range result.DeterminingPolicies() {
		if !slices.Contains(policies, policy) {
			return Challenge{}, false
		}
	}
	return all, true
}

// Challenge says how a user has to sign in, in the terms of RFC 9470.
type Challenge struct {
	// ACRValues are the authentication contexts that suffice, the preferred one first.
	ACRValues []string
	// MaxAge is the greatest age that a sign-in may have. 0: any.
	MaxAge time.Duration
}

func (c Challenge) check() error {
	if len(c.ACRValues) == 0 && c.MaxAge == 0 {
		return errors.New("it asks for nothing")
	}
	if c.MaxAge < 0 || c.MaxAge%time.Second != 0 {
		return fmt.Errorf("MaxAge %v is not a number of seconds", c.MaxAge)
	}
	for _, v := range c.ACRValues {
		if v == "" || strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r == '"' || r == '\\' || r > '~' }) {
			return fmt.Errorf("%q cannot be an ACR value", v)
		}
	}
	return nil
}

// and returns a challenge that asks for what both ask for.
func (c Challenge) and(d Challenge) Challenge {
	joined := Challenge{slices.Clone(c.ACRValues), c.MaxAge}
	for _, v := range d.ACRValues {
		if !slices.Contains(joined.ACRValues, v) {
			joined.ACRValues = append(joined.ACRValues, v)
		}
	}
	if d.MaxAge != 0 && (c.MaxAge == 0 || d.MaxAge < c.MaxAge) {
		joined.MaxAge = d.MaxAge
	}
	return joined
}

// header writes the challenge (https://www.rfc-editor.org/rfc/rfc9470#section-3).
func (c Challenge) header() string {
	var b strings.Builder
	b.WriteString(`Bearer error="insufficient_user_authentication", error_description="A stronger or more recent authentication is required"`)
	if len(c.ACRValues) > 0 {
		b.WriteString(`, acr_values="` + strings.Join(c.ACRValues, " ") + `"`)
	}
	if c.MaxAge > 0 {
		b.WriteString(`, max_age="` + strconv.FormatInt(int64(c.MaxAge/time.Second), 10) + `"`)
	}
	return b.String()
}
