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
	// NotDenied: the check was allowed.
	NotDenied DeniedAt = ""
	// AtFunction: this principal may not do the action on any resource.
	AtFunction DeniedAt = "FUNCTION"
	// AtObject: other resources may be allowed, this one is not.
	AtObject DeniedAt = "OBJECT"
	// AtField: the resource is allowed, but not every field that was required.
	AtField DeniedAt = "FIELD"
)

// Result is an answer. It is a small value that may be copied and kept. Its zero value
// denies.
type Result struct {
	response *cedarpostv1.AuthorizeResponse // shared with other results: never change it
	source   source
}

type source uint8

const (
	decided source = iota
	reused
	failedOpen
)

// Allowed says whether the principal may do the action, within the permitted fields. An
// allow may have obligations; a caller that does not meet them must deny.
func (r Result) Allowed() bool {
	return r.source == failedOpen || r.response.GetDecision() == cedarpostv1.Decision_ALLOW
}

// DeniedAt says which of the three checks denied.
func (r Result) DeniedAt() DeniedAt {
	if r.response == nil || r.response.DeniedAt == nil {
		return NotDenied
	}
	return DeniedAt(r.response.GetDeniedAt().String())
}

// Fields returns the fields that were asked for, as permitted and denied ones. A result
// that failed open has none.
func (r Result) Fields() Fields { return Fields{r.response.GetFields()} }

// Obligation is a duty that comes with an allow.
type Obligation struct {
	// Policy is the permit that has the obligation, as "bundle/id".
	Policy string
	// Text is the text of its @obligation annotation.
	Text string
}

// Obligations returns the duties that the caller has to meet, or treat the allow as a deny.
// Most answers have none.
func (r Result) Obligations() []Obligation {
	var out []Obligation
	for _, o := range r.response.GetObligations() {
		out = append(out, Obligation{policyName(o.GetPolicy()), o.GetText()})
	}
	return out
}

// Advice is a hint that comes with a denial of the resource or of some fields.
type Advice struct {
	// Policy is the forbid that has the advice, as "bundle/id".
	Policy string
	// Text is the text of its @advice annotation, for example "step_up_mfa".
	Text string
	// Paths are the fields that it denied. It is empty when it denied the resource.
	Paths []string
}

// Advice returns what would lead to an allow. A policy that denies because it could not be
// evaluated gives no advice.
func (r Result) Advice() []Advice {
	var out []Advice
	for _, a := range r.response.GetAdvice() {
		out = append(out, Advice{policyName(a.GetPolicy()), a.GetText(), slices.Clone(a.GetPaths())})
	}
	return out
}

// DeterminingPolicies returns the policies that made the decision, as "bundle/id".
func (r Result) DeterminingPolicies() []string {
	var out []string
	for _, p := range r.response.GetDeterminingPolicies() {
		out = append(out, policyName(p))
	}
	return out
}

func policyName(p *cedarpostv1.PolicyRef) string { return p.GetBundle() + "/" + p.GetId() }

// DecisionID returns the id of the decision's record in the service's log. A result that
// failed open has none.
func (r Result) DecisionID() string { return r.response.GetDecisionId() }

// Revision returns the token of the revision that the check was decided at, for
// [Check].AtLeastAsFresh. A reused answer holds at later revisions too.
func (r Result) Revision() string { return r.response.GetRevision().GetToken() }

// Reused says whether the answer came from the client's cache.
func (r Result) Reused() bool { return r.source == reused }

// FailedOpen says that there was no answer and the check was let through because it has a
// FailOpen.
func (r Result) FailedOpen() bool { return r.source == failedOpen }

// Fields are the fields asked for, as permitted and denied ones. The zero value permits
// none.
type Fields struct{ fields *cedarpostv1.Fields }

// Permits says whether a leaf path is permitted.
func (f Fields) Permits(path string) bool { return slices.Contains(f.fields.GetPermitted(), path) }

// Permitted returns the leaf paths that may be seen or written. Empty means none.
func (f Fields) Permitted() []string { return slices.Clone(f.fields.GetPermitted()) }

// Denied returns the leaf paths that may not be seen or written, and paths that are in no
// catalogue.
func (f Fields) Denied() []string { return slices.Clone(f.fields.GetDenied()) }

// All yields the permitted paths without a copy.
func (f Fields) All() iter.Seq[string] { return slices.Values(f.fields.GetPermitted()) }
