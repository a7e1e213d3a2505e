package engine

import (
	"iter"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// A field is decided by evaluating the ".field" action with the field in context.field.
// Many fields must get the same answer, so evaluating each of them is a waste. A policy
// can distinguish two fields only by what it does with context.field, and nearly all
// policies use only "context.field in G" and "context.field == F", with G and F as
// literals. Such an expression is called a probe. Fields for which every probe of every
// policy has the same value form one class: no policy can distinguish them, so one
// evaluation decides all of them. A policy that does anything else with context.field,
// or uses the context as a whole, is called opaque. If a candidate policy is opaque,
// the request is decided field by field.
//
// Most policies are a conjunction of parts that consist of probes alone and of parts that do
// not look at the field. The second parts have the same value for all fields, so they are
// evaluated once for all classes.

// fieldUse is what a policy does with context.field.
type fieldUse struct {
	opaque bool
	probes []probe
	// lead is the policy's first condition if it consists of probes alone. If lead is
	// false, the policy is false and cannot fail: Cedar evaluates conditions in order
	// and stops at the first false one.
	lead probeExpr
	// when is the conjunction of the parts that consist of probes alone; nil: there are none.
	// apart is the policy without them. It is nil if another part looks at the field.
	when  probeExpr
	apart *cedar.Policy
}

func (u fieldUse) looks() bool { return u.opaque || len(u.probes) > 0 }

// probe tests whether a field is equal to an entity, or in it.
type probe struct {
	uid   cedar.EntityUID
	equal bool
}

func (p probe) ask(field cedar.Entity) bool {
	return field.UID == p.uid || (!p.equal && field.Parents.Contains(p.uid))
}

// probeExpr is a Boolean expression over probes alone.
type probeExpr interface{ ask(field cedar.Entity) bool }

type (
	anyOf  []probeExpr
	allOf  []probeExpr
	negate struct{ probeExpr }
)

func (l anyOf) ask(f cedar.Entity) bool {
	return slices.ContainsFunc(l, func(e probeExpr) bool { return e.ask(f) })
}

func (l allOf) ask(f cedar.Entity) bool {
	return !slices.ContainsFunc(l, func(e probeExpr) bool { return !e.ask(f) })
}

func (n negate) ask(f cedar.Entity) bool { return !n.probeExpr.ask(f) }

// usesField finds what a policy does with context.field.
func usesField(tree *xast.Policy) fieldUse {
	var u fieldUse
	for _, c := range tree.Conditions {
		u.find(c.Body)
	}
	if len(tree.Conditions) > 0 {
		first := tree.Conditions[0]
		parts := conjuncts(first.Body, first.Condition == xast.ConditionUnless)
		if lead, ok := probesOnly(parts[0]); ok {
			u.lead = lead
		}
	}
	return u
}

// split separates what the policy asks about the field from the rest.
func (u *fieldUse) split(tree *xast.Policy, compiled *cedar.Policy) {
	if !u.looks() {
		u.apart = compiled
		return
	}
	var when allOf
	var rest []xast.ConditionType
	for _, c := range tree.Conditions {
		for _, part := range conjuncts(c.Body, c.Condition == xast.ConditionUnless) {
			if probes, ok := probesOnly(part); ok {
				when = append(when, probes)
				continue
			}
			var use fieldUse
			if use.find(part); use.looks() {
				return
			}
			rest = append(rest, xast.ConditionType{Condition: xast.ConditionWhen, Body: part})
		}
	}
	apart := *tree
	apart.Annotations, apart.Conditions = nil, rest
	u.when, u.apart = when, exact(cedar.NewPolicyFromAST((*ast.Policy)(&apart)))
}

// find walks n and sorts each use of the context into probes and the rest.
func (u *fieldUse) find(n xast.IsNode) {
	if p, ok := probesOf(n); ok {
		u.probes = append(u.probes, p...)
		return
	}
	switch t := n.(type) {
	case xast.NodeTypeVariable:
		u.opaque = u.opaque || t.Name == "context"
		return
	case xast.NodeTypeAccess:
		if isContext(t.Arg) {
			u.opaque = u.opaque || t.Value == "field"
			return
		}
	case xast.NodeTypeHas:
		if isContext(t.Arg) {
			return
		}
	}
	first := true
	xast.Inspect(xast.NewNode(n), func(child xast.IsNode) bool {
		if first {
			first = false
			return true
		}
		u.find(child)
		return false
	})
}

func isContext(n xast.IsNode) bool {
	v, ok := n.(xast.NodeTypeVariable)
	return ok && v.Name == "context"
}

func isContextField(n xast.IsNode) bool {
	a, ok := n.(xast.NodeTypeAccess)
	return ok && a.Value == "field" && isContext(a.Arg)
}

// probesOf recognizes "context.field == F", "F == context.field",
// "context.field in G" and "context.field in [F, G]".
func probesOf(n xast.IsNode) ([]probe, bool) {
	switch t := n.(type) {
	case xast.NodeTypeEquals:
		if isContextField(t.Right) {
			t.Left, t.Right = t.Right, t.Left
		}
		if uid, ok := entityLiteral(t.Right); ok && isContextField(t.Left) {
			return []probe{{uid, true}}, true
		}
	case xast.NodeTypeIn:
		if !isContextField(t.Left) {
			return nil, false
		}
		if uid, ok := entityLiteral(t.Right); ok {
			return []probe{{uid, false}}, true
		}
		if set, ok := t.Right.(xast.NodeTypeSet); ok {
			out := make([]probe, 0, len(set.Elements))
			for _, e := range set.Elements {
				uid, ok := entityLiteral(e)
				if !ok {
					return nil, false
				}
				out = append(out, probe{uid, false})
			}
			return out, true
		}
	}
	return nil, false
}

func entityLiteral(n xast.IsNode) (cedar.EntityUID, bool) {
	v, ok := n.(xast.NodeValue)
	if !ok {
		return cedar.EntityUID{}, false
	}
	uid, ok := v.Value.(cedar.EntityUID)
	return uid, ok
}

// probesOnly turns n into a probeExpr when it consists of probes alone.
func probesOnly(n xast.IsNode) (probeExpr, bool) {
	if list, ok := probesOf(n); ok {
		out := make(anyOf, len(list))
		for i, p := range list {
			out[i] = p
		}
		return out, true
	}
	switch t := n.(type) {
	case xast.NodeTypeOr:
		l, okL := probesOnly(t.Left)
		r, okR := probesOnly(t.Right)
		return anyOf{l, r}, okL && okR
	case xast.NodeTypeAnd:
		l, okL := probesOnly(t.Left)
		r, okR := probesOnly(t.Right)
		return allOf{l, r}, okL && okR
	case xast.NodeTypeNot:
		e, ok := probesOnly(t.Arg)
		return negate{e}, ok
	}
	return nil, false
}

// classify sorts the leaves of each resource type that a ".field" action takes
// into classes. It runs when the action's index is complete.
func (s *Set) classify(f *action) {
	asked := map[probe]bool{}
	var probes []probe
	f.index.each(func(p *policy) {
		for _, q := range p.field.probes {
			if !asked[q] {
				asked[q] = true
				probes = append(probes, q)
			}
		}
	})
	f.classes = map[cedar.EntityType][]int{}
	f.probed = map[cedar.EntityType]map[*policy]probed{}
	for _, t := range f.appliesTo.Resources {
		cat := s.catalogues[t]
		if cat == nil {
			continue
		}
		ids := map[string]int{}
		classes := make([]int, len(cat.leaves))
		for i, l := range cat.leaves {
			signature := make([]byte, (len(probes)+7)/8)
			for j, p := range probes {
				if p.ask(s.static[l.uid]) {
					signature[j/8] |= 1 << (j % 8)
				}
			}
			id, ok := ids[string(signature)]
			if !ok {
				id = len(ids)
				ids[string(signature)] = id
			}
			classes[i] = id
		}
		f.classes[t] = classes
		f.probed[t] = s.probeClasses(f, cat, classes, len(ids))
	}
}

// probed says for which classes of fields parts of a policy are true.
type probed struct{ lead, when classSet }

// classSet is a set of classes, one bit for each; nil: all classes.
type classSet []uint64

func (l classSet) has(class int) bool { return l == nil || l[class/64]&(1<<(class%64)) != 0 }

// probeClasses evaluates the probes of each policy once for each class.
func (s *Set) probeClasses(f *action, cat *catalogue, classes []int, n int) map[*policy]probed {
	one := make([]cedar.Entity, n) // a leaf of each class
	for i, c := range classes {
		one[c] = s.static[cat.leaves[i].uid]
	}
	where := func(e probeExpr) classSet {
		if e == nil {
			return nil
		}
		bits := make(classSet, (n+63)/64)
		for c, field := range one {
			if e.ask(field) {
				bits[c/64] |= 1 << (c % 64)
			}
		}
		return bits
	}
	out := map[*policy]probed{}
	f.index.each(func(p *policy) {
		if p.field.lead != nil || p.field.when != nil {
			out[p] = probed{where(p.field.lead), where(p.field.when)}
		}
	})
	return out
}

// fieldReasons are the policies behind the fields of one decision, each once. The forbids are in denied
// if the decision does not depend on them, because not all fields are required.
type fieldReasons struct {
	permits, forbids []*policy
	denied           []string // "bundle/id"
}

// decideFields evaluates the ".field" action once for each class of the leaves asked
// for, and fills Permitted, Denied, Errors and Advice. A path that is not in the
// catalogue is denied and is no error, so that an endpoint that got a new column goes on
// working.
func (s *Set) decideFields(q *Question, e *entities, res *Result) fieldReasons {
	var out fieldReasons
	if !q.fieldsAsked {
		return out
	}
	res.Permitted = make([]string, 0, len(q.leaves))
	res.Denied = []string{}
	seen := map[*policy]bool{}
	var failed map[PolicyRef]bool
	s.eachField(q, e, func(l leaf, v verdict) {
		e.meter.spend(stepsOfReason * int64(len(v.reasons)+len(v.errors)))
		if len(v.errors) > 0 && failed == nil {
			failed = map[PolicyRef]bool{}
			for _, pe := range res.Errors { // a policy can be about the object and its fields
				failed[pe.Policy] = true
			}
		}
		for _, pe := range v.errors {
			if !failed[pe.Policy] {
				failed[pe.Policy] = true
				res.Errors = append(res.Errors, pe)
			}
		}
		list := &out.forbids
		if v.allowed {
			res.Permitted = append(res.Permitted, l.path)
			list = &out.permits
		} else {
			res.Denied = append(res.Denied, l.path)
			res.advise(v.advising(), l.path)
		}
		for _, p := range v.reasons {
			switch {
			case seen[p]:
				continue
			case v.allowed || q.requireAll:
				*list = append(*list, p)
			default:
				out.denied = append(out.denied, string(p.name))
			}
			seen[p] = true
		}
	})
	res.Denied = append(res.Denied, q.unknownPaths...)
	slices.SortFunc(out.permits, comparePolicies)
	slices.SortFunc(out.forbids, comparePolicies)
	return out
}

// classesFor returns the class of each leaf, nil when a candidate is opaque.
func (s *Set) classesFor(q *Question, cands policies) []int {
	if s.plainFields || slices.ContainsFunc(cands, func(p *policy) bool { return p.field.opaque }) {
		return nil
	}
	return q.action.field.classes[q.request.Resource.Type]
}

// eachField calls fn for each leaf asked for, in order, with its verdict.
func (s *Set) eachField(q *Question, e *entities, fn func(leaf, verdict)) {
	f := q.action.field
	cands := f.index.candidates(q.request.Principal, q.request.Resource, e)
	q.masked.guard(cands, e.meter)
	classes := s.classesFor(q, cands)
	var verdicts map[int]verdict
	var narrowed policies
	var parts []probed // of cands
	if classes != nil {
		verdicts = make(map[int]verdict, 8)
		byPolicy := f.probed[q.request.Resource.Type]
		parts = make([]probed, len(cands))
		for i, p := range cands {
			parts[i] = byPolicy[p]
		}
	}
	members := membersOf(q.request.Context)
	request := func(l leaf) cedar.Request {
		req := q.request
		req.Action, req.Context = f.uid, withField(members, l.uid)
		return req
	}
	var satisfied []bool // of cands, apart from what they ask about the field; nil: not known
	if several(q.leaves, classes) {
		satisfied = evaluateApart(cands, request(q.leaves[0]), e)
	}
	each := stepsOfField + int64(len(cands))/4
	if satisfied == nil {
		each += contextSteps(q.request.Context)
	}
	if classes == nil {
		for _, p := range cands {
			each += int64(len(p.field.probes)) // of its first condition, at most
		}
	}
	for _, l := range q.leaves {
		class := 0
		if classes != nil {
			class = classes[l.index]
			if v, ok := verdicts[class]; ok {
				if !e.meter.spend(1) {
					return
				}
				fn(l, v)
				continue
			}
		}
		if !e.meter.spend(each) {
			return
		}
		var v verdict
		switch {
		case satisfied != nil:
			v = together(cands, parts, satisfied, class)
		case s.plainFields:
			v = s.evaluate(cands, request(l), e)
		default:
			narrowed = narrowed[:0]
			for i, p := range cands {
				if classes != nil && parts[i].lead.has(class) || classes == nil && (p.field.lead == nil || p.field.lead.ask(s.static[l.uid])) {
					narrowed = append(narrowed, p)
				}
			}
			v = s.evaluate(narrowed, request(l), e)
		}
		if classes != nil {
			verdicts[class] = v
		}
		fn(l, v)
	}
}

// several reports whether leaves are of more than one class.
func several(leaves []leaf, classes []int) bool {
	if classes == nil || len(leaves) == 0 {
		return false
	}
	first := classes[leaves[0].index]
	return slices.ContainsFunc(leaves, func(l leaf) bool { return classes[l.index] != first })
}

// evaluateApart evaluates candidates without what they ask about the field, and says which of them
// are satisfied. It returns nil if they cannot be separated. It also returns nil if one of them
// fails: whether it fails for a field can depend on a probe that comes before.
func evaluateApart(cands policies, req cedar.Request, e *entities) []bool {
	if slices.ContainsFunc(cands, func(p *policy) bool { return p.field.apart == nil }) {
		return nil
	}
	satisfied := make([]bool, len(cands))
	for _, forbid := range [...]bool{false, true} {
		_, diag := cedar.Authorize(apart{cands, forbid, e.meter}, e, req)
		if len(diag.Errors) > 0 {
			for _, p := range cands {
				if !p.forbid || forbid {
					e.meter.refund(p.cost) // each class costs it again
				}
			}
			return nil
		}
		i := 0
		for _, r := range diag.Reasons { // in the order of the candidates
			for cands[i].name != r.PolicyID {
				i++
			}
			satisfied[i] = true
		}
	}
	return satisfied
}

// apart is the permits or the forbids among policies, without what they ask about the field, as a
// cedar.PolicyIterator. It ends when the budget of the meter is spent.
type apart struct {
	policies
	forbid bool
	meter  *meter
}

// All implements cedar.PolicyIterator.
func (l apart) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for _, p := range l.policies {
			if p.forbid == l.forbid && (!l.meter.spend(p.cost) || !yield(p.name, p.field.apart)) {
				return
			}
		}
	}
}

// together is the verdict about the fields of a class, as [Set.evaluate] would make it: a candidate is
// satisfied if what it asks about the field is true, and the rest of it is satisfied.
func together(cands policies, parts []probed, satisfied []bool, class int) verdict {
	var permits, forbids []*policy
	for i, p := range cands {
		switch {
		case !satisfied[i] || !parts[i].when.has(class):
		case p.forbid:
			forbids = append(forbids, p)
		default:
			permits = append(permits, p)
		}
	}
	if len(forbids) > 0 {
		return verdict{reasons: forbids}
	}
	return verdict{allowed: len(permits) > 0, reasons: permits}
}

// contextSteps is the work of withField: the new record hashes all texts of the context.
func contextSteps(ctx cedar.Record) int64 {
	steps := int64(0)
	for _, v := range ctx.All() {
		steps += stepsOfElement
		switch v := v.(type) {
		case cedar.String:
			steps += int64(len(v)) / bytesInStep
		case cedar.EntityUID:
			steps += int64(len(v.ID)) / bytesInStep
		}
	}
	return steps
}

// membersOf returns a copy of the members of a record.
func membersOf(r cedar.Record) cedar.RecordMap {
	if m := r.Map(); m != nil {
		return m
	}
	return cedar.RecordMap{}
}

// withField returns the context of a field: these members, and the field.
func withField(members cedar.RecordMap, field cedar.EntityUID) cedar.Record {
	members["field"] = field
	return cedar.NewRecord(members)
}
