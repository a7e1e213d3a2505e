package server

import (
	"slices"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
)

// hidePolicies removes from an answer which policies of other bundles, such as guardrails, joined the
// decision, unless the caller may read these bundles. What they oblige and advise stays. The record
// has everything.
func hidePolicies(out *cedarpostv1.AuthorizeResponse, bundle string, r *access.Rights) {
	hidden := func(p *cedarpostv1.PolicyRef) bool {
		return p.GetBundle() != bundle && !r.May("GetBundle", access.Target{Bundle: p.GetBundle()})
	}
	decided := slices.ContainsFunc(out.DeterminingPolicies, hidden)
	out.DeterminingPolicies = slices.DeleteFunc(out.DeterminingPolicies, hidden)
	out.Errors = slices.DeleteFunc(out.Errors, func(e *cedarpostv1.PolicyError) bool { return hidden(e.GetPolicy()) })
	for _, o := range out.Obligations {
		if hidden(o.GetPolicy()) {
			o.Policy = nil
		}
	}
	for _, a := range out.Advice {
		if hidden(a.GetPolicy()) {
			a.Policy = nil
		}
	}
	x := out.Explanation
	if x == nil {
		return
	}
	n := len(x.Policies)
	x.Policies = slices.DeleteFunc(x.Policies, func(p *cedarpostv1.PolicyExplanation) bool { return hidden(p.GetPolicy()) })
	x.Omitted += int32(n - len(x.Policies))
	if decided {
		x.Summary = out.Decision.String() + ", because of a policy of another bundle, which this caller may not read"
	}
}
