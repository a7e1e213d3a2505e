package engine

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/eval"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// MaxExplained caps the policies that an explanation lists.
const MaxExplained = 200

const (
	maxExplainedValue  = 200 // bytes of one value
	maxExplainedFields = 500
	withheld           = "(withheld: @sensitive)"
)

// Outcome is the result of one policy in an explanation.
type Outcome int

// The outcomes, in the order in which an explanation lists them: the most informative
// first.
const (
	Satisfied Outcome = iota + 1
	Failed
	ConditionFalse
	ScopeMismatch
)

// Explanation lists the result of each policy of an action. Omitted counts the policies
// that it leaves out.
type Explanation struct {
	Summary  string
	Policies []PolicyExplanation
	Omitted  int
}

// PolicyExplanation is the result of one policy. Paths are the fields that it was
// evaluated for; it is empty for the object check.
type PolicyExplanation struct {
	Policy    PolicyRef
	Forbid    bool
	Outcome   Outcome
	Reason    string
	Condition string
	Values    []ExplainedValue
	Paths     []string
	File      string
	Line      int
}

// ExplainedValue is an expression and its value, both as Cedar text.
type ExplainedValue struct {
	Expression, Value string
	// Reads are the types of the entities whose attributes the expression reads.
	Reads []cedar.EntityType
}

// explain says why a question was decided as it was. It looks at every policy of
// the action, also those that the index passes over, and evaluates condition by
// condition; it takes no part in the decision.
func (s *Set) explain(q *Question, sl *Slice, res *Result) (*Explanation, error) {
	e, err := sl.entities()
	if err != nil {
		return nil, err
	}
	x := &Explanation{Summary: inWords(q, res)}
	if q.inapplicable {
		return x, nil
	}
	mismatched := 0
	q.action.index.each(func(p *policy) {
		one, ok := s.explainPolicy(q, p, q.request, e)
		if !ok {
			x.Omitted++
			return
		}
		if one.Outcome == ScopeMismatch {
			if mismatched++; mismatched > MaxExplained {
				x.Omitted++
				return
			}
		}
		x.Policies = append(x.Policies, one)
	})
	if q.fieldsAsked && (res.Allowed || res.DeniedAt == AtField) {
		x.addFields(s, q, e)
	}
	slices.SortStableFunc(x.Policies, func(a, b PolicyExplanation) int {
		return cmp.Or(
			cmp.Compare(min(len(a.Paths), 1), min(len(b.Paths), 1)),
			cmp.Compare(a.Outcome, b.Outcome), a.Policy.compare(b.Policy))
	})
	if n := len(x.Policies); n > MaxExplained {
		x.Policies, x.Omitted = x.Policies[:MaxExplained], x.Omitted+n-MaxExplained
	}
	switch err := e.meter.failed(); {
	case errors.Is(err, ErrTooCostly):
		x.Summary += " Not everything is explained, because that would take too much work."
	case err != nil:
		return nil, err
	}
	return x, nil
}

func inWords(q *Question, res *Result) string {
	switch {
	case q.inapplicable:
		return fmt.Sprintf("Denied: the schema does not let %s apply to a principal of type %s and a resource of type %s.",
			q.request.Action, q.request.Principal.Type, q.request.Resource.Type)
	case res.Allowed:
		return "Allowed: at least one permit is satisfied and no forbid is."
	case res.DeniedAt == AtField:
		return "Denied: the object is allowed, but not all of the fields that were required."
	case len(res.Policies) > 0:
		return "Denied: a forbid is satisfied or failed, and a forbid outweighs every permit."
	case res.DeniedAt == AtFunction:
		return fmt.Sprintf("Denied: no permit is satisfied, and none could be for any resource of type %s.", q.request.Resource.Type)
	}
	return "Denied: no permit is satisfied for this resource."
}

// addFields explains the ".field" action for the policies whose scope can match. Fields
// for which a policy has the same outcome are listed together.
func (x *Explanation) addFields(s *Set, q *Question, e *entities) {
	type group struct {
		policy            PolicyRef
		outcome           Outcome
		reason, condition string
	}
	at := map[group]int{}
	cands := q.action.field.index.candidates(q.request.Principal, q.request.Resource, e)
	classes := s.classesFor(q, cands)
	explained := map[int][]PolicyExplanation{}
	for i, l := range q.leaves {
		if i == maxExplainedFields {
			x.Summary += fmt.Sprintf(" Only the first %d fields are explained.", i)
			break
		}
		class := l.index
		if classes != nil {
			class = classes[l.index]
		}
		list, ok := explained[class]
		if !ok {
			req := q.request
			req.Action = q.action.field.uid
			req.Context = withField(membersOf(q.request.Context), l.uid)
			for _, c := range cands {
				one, ok := s.explainPolicy(q, c, req, e)
				if !ok {
					return
				}
				list = append(list, one)
			}
			explained[class] = list
		}
		for _, p := range list {
			g := group{p.Policy, p.Outcome, p.Reason, p.Condition}
			i, ok := at[g]
			if !ok {
				i = len(x.Policies)
				at[g] = i
				// The value of context.field differs from path to path.
				p.Values = slices.DeleteFunc(slices.Clone(p.Values), func(v ExplainedValue) bool { return v.Expression == "context.field" })
				x.Policies = append(x.Policies, p)
			}
			x.Policies[i].Paths = append(x.Policies[i].Paths, l.path)
		}
	}
}

// explainPolicy explains the outcome of one policy. ok is false if the budget of the meter
// does not suffice.
func (s *Set) explainPolicy(q *Question, p *policy, req cedar.Request, e *entities) (x PolicyExplanation, ok bool) {
	if !e.meter.spend(stepsOfExplanation) {
		return x, false
	}
	x = s.outcomeOf(q, p, req, e)
	return x, e.meter.failed() == nil
}

// outcomeOf is explainPolicy without the check of the budget. Most policies do not match by their
// scope, so the conditions count only after it.
func (s *Set) outcomeOf(q *Question, p *policy, req cedar.Request, e *entities) PolicyExplanation {
	x := PolicyExplanation{Policy: p.ref, Forbid: p.forbid, Outcome: Satisfied, File: p.file, Line: p.line}
	tree := p.tree()
	for _, sc := range []struct {
		what string
		node xast.IsScopeNode
		uid  cedar.EntityUID
	}{{"principal", tree.Principal, req.Principal}, {"resource", tree.Resource, req.Resource}} {
		if why := scopeMismatch(sc.what, sc.node, sc.uid, e); why != "" {
			x.Outcome, x.Reason = ScopeMismatch, why
			return x
		}
	}
	if !e.meter.spend(explainings * p.cost) {
		return x
	}
	env := eval.Env{Entities: e, Principal: req.Principal, Action: req.Action, Resource: req.Resource, Context: req.Context}
	for _, c := range tree.Conditions {
		negated := c.Condition == xast.ConditionUnless
		for _, part := range conjuncts(c.Body, negated) {
			v, err := eval.Eval(mapNode(part, exactNode), env)
			if err == nil && v == cedar.Boolean(true) {
				continue
			}
			x.Condition = cedarText(part)
			x.Values = s.values(q, part, env)
			x.Outcome, x.Reason = ConditionFalse, "its condition is false"
			if err != nil {
				x.Outcome, x.Reason = Failed, "its condition cannot be evaluated: "+s.message(p, req, e, err.Error())
			}
			if p.forbid && x.Outcome == ConditionFalse {
				x.Reason += ", so it does not forbid"
			}
			return x
		}
	}
	x.Reason = "its scope matches and its conditions hold"
	return x
}

// scopeMismatch says why a scope does not match the entity, "" if it matches.
func scopeMismatch(what string, n xast.IsScopeNode, uid cedar.EntityUID, e *entities) string {
	sc := scopeOf(n)
	switch {
	case sc.hasType && !sc.hasUID && sc.typ != uid.Type:
		return fmt.Sprintf("it is about a %s of type %s, and this is a %s", what, sc.typ, uid.Type)
	case sc.hasUID && !sc.in && sc.uid != uid:
		return fmt.Sprintf("it is about the %s %s only", what, sc.uid)
	case sc.hasUID && sc.in:
		ent, _ := e.Get(uid)
		if sc.uid != uid && !ent.Parents.Contains(sc.uid) {
			return fmt.Sprintf("the %s %s is not in %s", what, uid, sc.uid)
		}
		if sc.hasType && sc.typ != uid.Type {
			return fmt.Sprintf("it is about a %s of type %s, and this is a %s", what, sc.typ, uid.Type)
		}
	}
	return ""
}

// values evaluates the attribute paths and variables that a condition looks at.
func (s *Set) values(q *Question, n xast.IsNode, env eval.Env) []ExplainedValue {
	var out []ExplainedValue
	seen := map[string]bool{}
	xast.Inspect(xast.NewNode(n), func(n xast.IsNode) bool {
		sensitive, ok := s.path(q, n)
		if !ok {
			return true
		}
		text := cedarText(n)
		if text == "context" || seen[text] {
			return false
		}
		seen[text] = true
		value := withheld
		if !sensitive {
			v, err := eval.Eval(n, env)
			if err != nil {
				value = "cannot be evaluated: " + err.Error()
			} else {
				value = shorten(cedarValue(v))
			}
		}
		out = append(out, ExplainedValue{text, value, s.typesRead(q, n)})
		return false
	})
	return out
}

// path says whether n is a variable or a path of attributes below one, and
// whether an attribute on the way is marked @sensitive, or holds one that is.
func (s *Set) path(q *Question, n xast.IsNode) (sensitive, ok bool) {
	t, sensitive, ok := s.pathType(q, n)
	return sensitive || s.holdsSensitive(t), ok
}

func (s *Set) pathType(q *Question, n xast.IsNode) (t resolved.IsType, sensitive, ok bool) {
	switch n := n.(type) {
	case xast.NodeTypeVariable:
		switch n.Name {
		case "principal":
			t = resolved.EntityType(q.request.Principal.Type)
		case "resource":
			t = resolved.EntityType(q.request.Resource.Type)
		case "context":
			t = q.action.appliesTo.Context
			if q.action.field != nil {
				t = q.action.field.appliesTo.Context
			}
		}
		return t, false, true
	case xast.NodeTypeAccess:
		t, sensitive, ok = s.pathType(q, n.Arg)
		if !ok {
			return nil, false, false
		}
		var shape resolved.RecordType
		switch t := t.(type) {
		case resolved.EntityType:
			shape = s.schema.Entities[cedar.EntityType(t)].Shape
		case resolved.RecordType:
			shape = t
		}
		attr, known := shape[n.Value]
		if !known {
			return nil, sensitive, true
		}
		_, marked := attr.Annotations["sensitive"]
		if isContext(n.Arg) {
			// X and "X.field" both declare the context; a mark on either counts.
			_, also := q.action.appliesTo.Context[n.Value].Annotations["sensitive"]
			marked = marked || also
		}
		return attr.Type, sensitive || marked, true
	}
	return nil, false, false
}

// typesRead lists the types of the entities whose attributes a path reads.
func (s *Set) typesRead(q *Question, n xast.IsNode) (list []cedar.EntityType) {
	for {
		access, ok := n.(xast.NodeTypeAccess)
		if !ok {
			return list
		}
		n = access.Arg
		if t, _, _ := s.pathType(q, n); t != nil {
			if typ, ok := t.(resolved.EntityType); ok {
				list = append(list, cedar.EntityType(typ))
			}
		}
	}
}

// holdsSensitive says whether a record has an attribute marked @sensitive.
func (s *Set) holdsSensitive(t resolved.IsType) bool {
	switch t := t.(type) {
	case resolved.RecordType:
		for _, a := range t {
			if _, marked := a.Annotations["sensitive"]; marked || s.holdsSensitive(a.Type) {
				return true
			}
		}
	case resolved.SetType:
		return s.holdsSensitive(t.Element)
	}
	return false
}

// cedarText writes an expression as Cedar text.
func cedarText(n xast.IsNode) string {
	p := &xast.Policy{
		Effect: xast.EffectPermit, Principal: xast.ScopeTypeAll{}, Action: xast.ScopeTypeAll{}, Resource: xast.ScopeTypeAll{},
		Conditions: []xast.ConditionType{{Condition: xast.ConditionWhen, Body: n}},
	}
	text := string(cedar.NewPolicyFromAST((*ast.Policy)(p)).MarshalCedar())
	_, text, _ = strings.Cut(text, "when {")
	text, _, _ = cutLast(text, "}")
	return strings.TrimSpace(text)
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

func shorten(s string) string {
	if len(s) <= maxExplainedValue {
		return s
	}
	return strings.ToValidUTF8(s[:maxExplainedValue], "") + "…"
}
