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

// Kind is how a request is refused.
type Kind uint8

// The ways to refuse.
const (
	// Forbidden: it was denied. 403, permission_denied.
	Forbidden Kind = iota + 1
	// Hidden: it was denied at the object, on a route that does not say whether there
	// is one. 404, not_found.
	Hidden
	// NoPrincipal: nobody makes the request. 401, unauthenticated.
	NoPrincipal
	// StepUp: it was denied, and would not be after a better authentication. 401,
	// unauthenticated.
	StepUp
	// Unmet: it was allowed, but an obligation was not met. 403, permission_denied.
	Unmet
	// Unavailable: there is no decision; later there may be. 503, unavailable.
	Unavailable
	// Fault: the service asks wrongly, or something of it failed. 500, internal.
	Fault
	// Malformed: what the client sent cannot be asked about. 400, invalid_argument.
	Malformed
	// TooLarge: the body is larger than what is read for a check. 413,
	// resource_exhausted.
	TooLarge
	// WrongType: the body is of a type that cannot be checked. 415, invalid_argument.
	WrongType
	// Unmapped: no route is mapped for it. 404, permission_denied.
	Unmapped
	// Conflict: the check names a revision that the service does not know any more, so what
	// the request builds on may be lost. The client has to read again; the same request
	// alone does not help. 409, aborted.
	Conflict

	kinds
)

// Refusal says how a request is refused. What a client is told of it is the kind, the
// decision's id, the fields it named itself, and what to do; never a policy, and never
// Err.
type Refusal struct {
	Kind Kind
	// DecisionID finds the record of the decision. A hidden refusal does not say it:
	// that there is a decision would tell that there is an object.
	DecisionID string
	// At is where it was denied.
	At cedarpost.DeniedAt
	// Fields are those of the fields asked for by name that were denied to a write.
	Fields []string
	// Challenge is the value of WWW-Authenticate, or "".
	Challenge string
	// RetryAfter is how long to wait, or 0.
	RetryAfter time.Duration
	// Err is the cause, for the service's own log.
	Err error
}

// Error says what the refusal is, for the service itself.
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

// Title is the name of the kind's HTTP status.
func (k Kind) Title() string { return titles[k] }

// Detail is what a client is told, or "".
func (k Kind) Detail() string { return details[k] }

// denied makes the refusal of a denial. A denial at the function is never hidden: it
// holds for every object, so it tells nothing about this one. Neither is one at a
// field: the object itself was allowed. One at the object is hidden whatever would help:
// the advice of a policy that looks at the object tells that there is one, also to
// somebody whom nothing would let at it.
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

// stepUp returns what would lead to an allow. It is offered only where nothing else
// stands in the way: every policy that denied advises it, and every field that was
// denied was denied by one that does. A user who signs in again and then still is
// refused was sent for nothing.
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
		// Nothing may permit a field, so that no policy stands for its denial.
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

// Challenge is how a user has to sign in, as RFC 9470 says it to a client.
type Challenge struct {
	// ACRValues are the authentication contexts that do, the preferred one first.
	ACRValues []string
	// MaxAge is how long ago the sign-in may be at most. 0: it does not matter.
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

// and joins what two pieces of advice ask for.
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
