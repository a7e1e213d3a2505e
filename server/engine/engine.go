// Package engine decides. It compiles the text of bundles to a [Set]. From a Set, a
// question and the entities that the question can touch it makes a [Result]. It uses no
// clock, network or database: equal inputs always give an equal result, which makes it
// possible to replay recorded decisions. It knows Cedar, and neither Postgres nor the
// wire format.
package engine

import (
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
)

// Version names the rules of this engine. It is part of every record, and changes when
// the same question could get another answer.
const Version = "cedarpost-3 cedar-go-1.9.0"

// DeniedAt says which of the three checks denied.
type DeniedAt int

// The three checks, in the order they are made.
const (
	// NotDenied is the zero value, of an allow.
	NotDenied DeniedAt = iota
	// AtFunction means that no resource of this type could be allowed.
	AtFunction
	// AtObject means that this resource is not allowed.
	AtObject
	// AtField means that all fields asked for are required, and some are denied.
	AtField
)

// PolicyRef names a policy: its bundle and its @id within the bundle.
type PolicyRef struct {
	Bundle, ID string
}

// String returns "bundle/id".
func (r PolicyRef) String() string { return r.Bundle + "/" + r.ID }

func (r PolicyRef) compare(o PolicyRef) int {
	if c := strings.Compare(r.Bundle, o.Bundle); c != 0 {
		return c
	}
	return strings.Compare(r.ID, o.ID)
}

// PolicyError is a policy whose evaluation failed. Message is Cedar's, unless it could
// contain a value that the schema marks @sensitive.
type PolicyError struct {
	Policy  PolicyRef
	Message string
}

// Obligation is the @obligation of a permit that determined an allow.
type Obligation struct {
	Policy PolicyRef
	Text   string
}

// Advice is the @advice of a forbid that is satisfied and so denied the object
// (Paths empty) or some fields. A forbid that denies because it failed gives no
// advice: following it would not help.
type Advice struct {
	Policy PolicyRef
	Text   string
	Paths  []string
}

// Result is a decision with its reasons. All lists are in a stable order.
type Result struct {
	Allowed  bool
	DeniedAt DeniedAt
	// Permitted and Denied split the fields asked for; both nil when none were.
	Permitted, Denied []string
	// Policies determined the decision: object policies by bundle and id, then
	// field policies by bundle and id that are not among them.
	Policies []PolicyRef
	// Errors has each policy that failed once, with its first message.
	Errors      []PolicyError
	Obligations []Obligation
	Advice      []Advice

	// FieldForbids are the forbids, as "bundle/id" and in no order, that denied fields of an allowed
	// decision. They are not among Policies, because the decision does not depend on them.
	FieldForbids []string

	adviceAt map[PolicyRef]int // where the advice of a policy is
}

// verdict is the outcome of one Cedar evaluation, with this service's rule for forbids
// that fail.
type verdict struct {
	allowed bool
	reasons []*policy
	errors  []PolicyError
	failed  []*policy // of reasons, the forbids that deny because they failed
}

// advising are the reasons that give their advice.
func (v verdict) advising() []*policy {
	if len(v.failed) == 0 {
		return v.reasons
	}
	return slices.DeleteFunc(slices.Clone(v.reasons), func(p *policy) bool { return slices.Contains(v.failed, p) })
}

// decide makes the three checks of a question. The slice must be complete:
// toLoad has returned nothing.
func (s *Set) decide(q *Question, sl *Slice) (*Result, error) {
	entities, err := sl.entities()
	if err != nil {
		return nil, err
	}
	res := s.judge(q, entities)
	// If the work had to end, res is made from some of the policies only.
	if err := entities.meter.failed(); err != nil {
		return nil, err
	}
	return res, nil
}

// judge makes the three checks. Its result counts only if the meter of the entities has not
// failed.
func (s *Set) judge(q *Question, entities *entities) *Result {
	res := &Result{}
	if q.inapplicable {
		// The schema rules the combination out, so no policy can allow it and
		// none is asked. https://docs.cedarpolicy.com/policies/validation.html
		res.DeniedAt = AtFunction
		res.denyAll(q)
		return res
	}

	cands := q.action.index.candidates(q.request.Principal, q.request.Resource, entities)
	q.masked.guard(cands, entities.meter)
	object := s.evaluate(cands, q.request, entities)
	res.Errors = object.errors
	if !object.allowed {
		res.DeniedAt = AtObject
		if s.deniedAtFunction(q, object, entities) {
			res.DeniedAt = AtFunction
		}
		res.Policies = refs(object.reasons)
		res.advise(object.advising(), "")
		res.denyAll(q)
		return res
	}

	fields := s.decideFields(q, entities, res)
	// If all fields are required and there is none, the type has no catalogue: it must
	// not be open to every write.
	if q.requireAll && (len(res.Denied) > 0 || len(res.Permitted) == 0) {
		res.DeniedAt = AtField
		// Denied keeps the paths that caused the denial; nothing is permitted.
		res.Permitted = []string{}
		res.Policies = refs(fields.forbids)
		return res
	}
	res.Allowed = true
	both := slices.Clone(object.reasons)
	for _, p := range fields.permits {
		if !slices.Contains(object.reasons, p) {
			both = append(both, p)
		}
	}
	res.Policies, res.FieldForbids = refs(both), fields.denied
	for _, p := range both {
		if p.obligation != "" {
			res.Obligations = append(res.Obligations, Obligation{p.ref, p.obligation})
		}
	}
	return res
}

// evaluate runs candidate policies. It is Cedar's
// authorization algorithm (https://docs.cedarpolicy.com/auth/authorization.html)
// with one switch: a forbid that fails counts as satisfied unless its bundle
// says on_forbid_error: skip.
func (s *Set) evaluate(cands policies, req cedar.Request, e *entities) verdict {
	decision, diag := cedar.Authorize(metered{cands, e.meter}, e, req)
	v := verdict{allowed: bool(decision)}
	if len(diag.Errors) == 0 {
		v.reasons = cands.find(diag.Reasons)
		return v
	}
	i := 0
	for _, pe := range diag.Errors {
		// Errors come in the order of the candidates.
		for cands[i].name != pe.PolicyID {
			i++
		}
		p := cands[i]
		v.errors = append(v.errors, PolicyError{p.ref, s.message(p, req, e, pe.Message)})
		if p.forbid && !s.bundles[p.ref.Bundle].skipForbidErrors {
			v.failed = append(v.failed, p)
		}
	}
	reasons := cands.find(diag.Reasons)
	if len(v.failed) > 0 {
		if v.allowed {
			reasons = nil
		}
		v.allowed = false
		reasons = append(reasons, v.failed...)
		slices.SortFunc(reasons, comparePolicies)
	}
	v.reasons = reasons
	return v
}

// advise adds the advice of forbids that denied the object (path empty) or a
// field.
func (r *Result) advise(reasons []*policy, path string) {
	for _, p := range reasons {
		if !p.forbid || p.advice == "" {
			continue
		}
		i, listed := r.adviceAt[p.ref]
		if !listed {
			if r.adviceAt == nil {
				r.adviceAt = map[PolicyRef]int{}
			}
			i = len(r.Advice)
			r.adviceAt[p.ref] = i
			r.Advice = append(r.Advice, Advice{Policy: p.ref, Text: p.advice})
		}
		if path != "" {
			r.Advice[i].Paths = append(r.Advice[i].Paths, path)
		}
	}
}

// denyAll denies every field asked for.
func (r *Result) denyAll(q *Question) {
	if q.fieldsAsked {
		r.Permitted = []string{}
		r.Denied = q.allPaths()
	}
}

func refs(policies []*policy) []PolicyRef {
	out := make([]PolicyRef, len(policies))
	for i, p := range policies {
		out[i] = p.ref
	}
	return out
}
