package cedarpost

import (
	"iter"
	"slices"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// DeniedAt says which of the three checks denied.
type DeniedAt string

// Where a check can be denied.
const (
	// NotDenied: it was allowed.
	NotDenied DeniedAt = ""
	// AtFunction: this principal has no use of the action at all.
	AtFunction DeniedAt = "FUNCTION"
	// AtObject: other resources may be allowed, this one is not.
	AtObject DeniedAt = "OBJECT"
	// AtField: the resource is allowed, but not every field that was required.
	AtField DeniedAt = "FIELD"
)

// Result is an answer. It is a small value that may be copied and kept; its zero
// value denies.
type Result struct {
	response *cedarpostv1.AuthorizeResponse // shared, never changed
	source   source
}

type source uint8

const (
	decided source = iota
	reused
	failedOpen
)

// Allowed says whether the principal may, within the permitted fields. An allow may
// carry obligations; who does not meet them has to deny.
func (r Result) Allowed() bool {
	return r.source == failedOpen || r.response.GetDecision() == cedarpostv1.Decision_ALLOW
}

// DeniedAt says where it was denied.
func (r Result) DeniedAt() DeniedAt {
	if r.response == nil || r.response.DeniedAt == nil {
		return NotDenied
	}
	return DeniedAt(r.response.GetDeniedAt().String())
}

// Fields are the fields that were asked for, split. What failed open has none.
func (r Result) Fields() Fields { return Fields{r.response.GetFields()} }

// Obligation is a duty that comes with an allow.
type Obligation struct {
	// Policy is the permit that carries it, "bundle/id".
	Policy string
	// Text is that of its @obligation annotation.
	Text string
}

// Obligations are what has to be met for the allow to count. They are often none.
func (r Result) Obligations() []Obligation {
	var out []Obligation
	for _, o := range r.response.GetObligations() {
		out = append(out, Obligation{policyName(o.GetPolicy()), o.GetText()})
	}
	return out
}

// Advice is a hint that comes with a denial, of the whole or of some fields.
type Advice struct {
	// Policy is the forbid that carries it, "bundle/id".
	Policy string
	// Text is that of its @advice annotation, "step_up_mfa".
	Text string
	// Paths are the fields it denied; none when it denied the whole.
	Paths []string
}

// Advice is what would help. A policy that denies because it could not be evaluated
// gives none.
func (r Result) Advice() []Advice {
	var out []Advice
	for _, a := range r.response.GetAdvice() {
		out = append(out, Advice{policyName(a.GetPolicy()), a.GetText(), slices.Clone(a.GetPaths())})
	}
	return out
}

// DeterminingPolicies are the policies that made the decision, "bundle/id".
func (r Result) DeterminingPolicies() []string {
	var out []string
	for _, p := range r.response.GetDeterminingPolicies() {
		out = append(out, policyName(p))
	}
	return out
}

func policyName(p *cedarpostv1.PolicyRef) string { return p.GetBundle() + "/" + p.GetId() }

// DecisionID is the id of the decision's record in the service's log. What failed
// open has none.
func (r Result) DecisionID() string { return r.response.GetDecisionId() }

// Revision is the token of the revision that it was decided at, for
// [Check].AtLeastAsFresh. An answer from the cache holds at later ones too.
func (r Result) Revision() string { return r.response.GetRevision().GetToken() }

// Reused says whether the answer came from the client's cache.
func (r Result) Reused() bool { return r.source == reused }

// FailedOpen says that there was no answer, and the check was let through because
// its FailOpen says so.
func (r Result) FailedOpen() bool { return r.source == failedOpen }

// Fields are the fields asked for, those that are permitted and those that are not.
// The zero value permits none.
type Fields struct{ fields *cedarpostv1.Fields }

// Permits says whether a leaf path is among the permitted ones.
func (f Fields) Permits(path string) bool { return slices.Contains(f.fields.GetPermitted(), path) }

// Permitted are the leaf paths that may be seen or written. Empty means none.
func (f Fields) Permitted() []string { return slices.Clone(f.fields.GetPermitted()) }

// Denied are the leaf paths that may not, and paths that no catalogue knows.
func (f Fields) Denied() []string { return slices.Clone(f.fields.GetDenied()) }

// All yields the permitted paths without a copy.
func (f Fields) All() iter.Seq[string] { return slices.Values(f.fields.GetPermitted()) }
