package server

import (
	"regexp"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
)

// withheldEntity stands for a value of an entity that the caller may not read, and for an error about it.
const withheldEntity = "(withheld: about an entity that this caller may not read)"

// foreign returns a function that reports whether entities of a type are of another bundle than the
// question, and the caller may not read them.
func foreign(set *engine.Set, bundle string, r *access.Rights) func(cedar.EntityType) bool {
	hidden := unreadable(set, r)
	return func(typ cedar.EntityType) bool { return owner(set, typ) != bundle && hidden(typ) }
}

// unreadable returns a function that reports whether the caller may not read entities of a type.
func unreadable(set *engine.Set, r *access.Rights) func(cedar.EntityType) bool {
	return func(typ cedar.EntityType) bool {
		return !r.May("GetEntity", access.Target{Bundle: owner(set, typ), EntityType: string(typ)})
	}
}

// inText matches the type of an entity in an error of an evaluation.
var inText = regexp.MustCompile(`((?:[A-Za-z_][A-Za-z0-9_]*::)+)"`)

// withoutEntities returns an error of an evaluation, or what stands for it if it names an entity that
// the caller may not read.
func withoutEntities(text string, hidden func(cedar.EntityType) bool) string {
	for _, m := range inText.FindAllStringSubmatch(text, -1) {
		if hidden(cedar.EntityType(strings.TrimSuffix(m[1], "::"))) {
			return withheldEntity
		}
	}
	return text
}

// hideValues removes from an explanation the values of hidden entities, and the errors about them. What a
// policy of one bundle reads of another one still decides.
func hideValues(x *engine.Explanation, hidden func(cedar.EntityType) bool) {
	for i := range x.Policies {
		p := &x.Policies[i]
		reads := false
		for j := range p.Values {
			if v := &p.Values[j]; slices.ContainsFunc(v.Reads, hidden) {
				v.Value, reads = withheldEntity, true
			}
		}
		if p.Outcome == engine.Failed && (reads || withoutEntities(p.Reason, hidden) != p.Reason) {
			p.Reason = "its condition cannot be evaluated: " + withheldEntity
		}
	}
}

// foreignPolicy returns a function that reports whether a policy is of another bundle than the question, and
// the caller may not read it.
func foreignPolicy(bundle string, r *access.Rights) func(*cedarpostv1.PolicyRef) bool {
	return func(p *cedarpostv1.PolicyRef) bool {
		return p.GetBundle() != bundle && !r.May("GetBundle", access.Target{Bundle: p.GetBundle()})
	}
}

// hidePolicies removes from an answer which policies of other bundles, such as guardrails, joined the
// decision, unless the caller may read these bundles. What they oblige and advise stays. Errors about
// entities of other bundles that the caller may not read lose their text. The record has everything.
func hidePolicies(out *cedarpostv1.AuthorizeResponse, set *engine.Set, bundle string, r *access.Rights) {
	hidden := foreignPolicy(bundle, r)
	decided := slices.ContainsFunc(out.DeterminingPolicies, hidden)
	out.DeterminingPolicies = slices.DeleteFunc(out.DeterminingPolicies, hidden)
	out.Errors = slices.DeleteFunc(out.Errors, func(e *cedarpostv1.PolicyError) bool { return hidden(e.GetPolicy()) })
	for _, e := range out.Errors {
		e.Message = withoutEntities(e.Message, foreign(set, bundle, r))
	}
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
	if out.Explanation != nil {
		hideExplained(out.Explanation, out.Decision, decided, hidden)
	}
}

// hideExplained removes hidden policies from an explanation. decided says whether one of them determined
// the decision.
func hideExplained(x *cedarpostv1.Explanation, decision cedarpostv1.Decision, decided bool, hidden func(*cedarpostv1.PolicyRef) bool) {
	n := len(x.Policies)
	x.Policies = slices.DeleteFunc(x.Policies, func(p *cedarpostv1.PolicyExplanation) bool { return hidden(p.GetPolicy()) })
	x.Omitted += int32(n - len(x.Policies))
	if decided {
		x.Summary = decision.String() + ", because of a policy of another bundle, which this caller may not read"
	}
}
