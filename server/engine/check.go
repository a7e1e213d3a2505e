package engine

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

// maxMessages bounds the problems of one policy that Cedar's validator names: to look for a hint
// takes long.
const maxMessages = 50

// checkAll checks the policies of a bundle, except those that the previous Set checked
// against the same schemas. For every policy, Cedar's validator goes through every
// combination of action, principal type and resource type in its schema. To keep that
// small, policies with the same action scope are checked against a schema in which no
// other action applies to anything.
func (c *compiler) checkAll(b *compiledBundle) {
	if !c.affordable(b) {
		return
	}
	same := c.previous != nil && c.previous.digest == c.set.digest
	scopes := map[string][]*policy{}
	for _, p := range b.policies {
		key := parseKey{p.ref.Bundle, p.text}
		switch {
		case same && c.previous.clean[key]:
			c.set.clean[key] = true
		case c.trusted:
			p.level = c.levelOf(p, p.tree())
			c.set.clean[key] = true
		default:
			s := p.action.key()
			scopes[s] = append(scopes[s], p)
		}
	}
	for _, s := range slices.Sorted(maps.Keys(scopes)) {
		v := validate.New(c.set.schemaOf(scopes[s][0]))
		for _, p := range scopes[s] {
			if c.stopped() {
				return
			}
			n := len(c.findings)
			if c.check(v, b, p) {
				c.set.clean[parseKey{p.ref.Bundle, p.text}] = n == len(c.findings)
			}
		}
	}
}

// check validates one policy against the schema and lints what Cedar's
// validator does not.
func (c *compiler) check(v *validate.Validator, b *compiledBundle, p *policy) bool {
	before := c.failed
	c.failed = false
	defer func() { c.failed = c.failed || before }()
	tree := p.tree()
	if (b.name == Guardrails || b.name == AdminLocal) && !p.forbid {
		c.report(finding(p, fmt.Sprintf("the bundle %s may hold only forbid policies", b.name), "its policies join the decisions of others"))
	}
	valid := validatable(tree)
	impossible := false // the policy applies to nothing, so its conditions do not matter
	if err := v.Policy(p.ref.ID, valid); err != nil {
		n := 0
		for msg := range strings.SplitSeq(err.Error(), "\n") {
			if n++; n > maxMessages {
				c.report(finding(p, "has more problems of this kind", ""))
				break
			}
			msg = strings.TrimPrefix(msg, fmt.Sprintf("for policy `%s`, ", p.ref.ID))
			c.report(c.set.explainFinding(p, msg))
			impossible = impossible || strings.Contains(msg, noActionApplies)
		}
	}
	if !impossible {
		c.checkConditions(v, p, valid)
	}
	if at, found := tooManySigns(p.text); found {
		f := finding(p, fmt.Sprintf("more than %d of ! or - in a row", maxSigns), "two of them are as good as none")
		f.placeAt(p, at)
		c.report(f)
	}
	c.checkNames(p, tree, impossible)
	literals(tree, func(uid cedar.EntityUID) {
		if err := c.set.checkEnum(uid, uid.String()); err != nil {
			f := finding(p, err.Error(), "")
			f.place(p, uid.String())
			c.report(f)
		}
		if c.set.fieldTypes[uid.Type] {
			if _, ok := c.set.static[uid]; !ok {
				f := finding(p, fmt.Sprintf("%s is not in the field catalogue", uid), didYouMean(uid.String(), c.set.fieldNames(uid.Type)))
				f.place(p, uid.String())
				c.report(f)
			}
		}
	})
	if c.failed {
		return false
	}
	p.level = c.levelOf(p, tree)
	c.lint(p, tree, impossible)
	return !c.failed
}

// checkConditions refuses conditions that Cedar's validator refuses and cedar-go's
// accepts, and conditions that cedar-go evaluates differently from Cedar.
func (c *compiler) checkConditions(v *validate.Validator, p *policy, valid *xast.Policy) {
	if alike := comparedAlike(valid); alike != nil && !c.failed && v.Policy(p.ref.ID, alike) != nil {
		c.report(finding(p, "compares values of different types with <, <=, > or >=", "both sides must be Long, or datetime, or duration"))
	}
	if escapedStar.MatchString(p.text) {
		c.report(finding(p, `writes * as an escape, which Cedar takes for a wildcard and cedar-go for the sign`, `write * for the wildcard, \* for the sign`))
	}
	for _, l := range refusedLiterals(p.tree()) {
		f := finding(p, fmt.Sprintf("%s is not a %s", quote(l.text), l.typ), l.hint())
		f.place(p, strconv.Quote(l.text))
		c.report(f)
	}
}

// checkNames refuses undeclared types and actions in the places where Cedar's validator
// does not look: types after "is", and the conditions of a policy that applies to
// nothing.
func (c *compiler) checkNames(p *policy, tree *xast.Policy, impossible bool) {
	report := func(msg string) {
		if !slices.ContainsFunc(c.findings, func(f Finding) bool { return f.Bundle == p.ref.Bundle && f.Policy == p.ref.ID && f.Message == msg }) {
			c.report(c.set.explainFinding(p, msg))
		}
	}
	typ := func(t cedar.EntityType) {
		if !c.set.knowsType(t) {
			report(fmt.Sprintf("unrecognized entity type `%s`", t))
		}
	}
	typesAfterIs(tree, typ)
	if !impossible {
		return
	}
	actions := c.set.schemaOf(p).Actions
	literals(tree, func(uid cedar.EntityUID) {
		if !isActionType(uid.Type) {
			typ(uid.Type)
		} else if _, ok := actions[uid]; !ok {
			report(fmt.Sprintf("unrecognized action `%s`", uid))
		}
	})
}

// levelOf computes how deep p dereferences entities. It refuses a policy that
// dereferences what a slice cannot contain.
func (c *compiler) levelOf(p *policy, tree *xast.Policy) int {
	l := &leveler{schema: c.set.schema}
	seenP, seenR := map[cedar.EntityType]bool{}, map[cedar.EntityType]bool{}
	for _, a := range c.set.matchedActions(p) {
		if a.appliesTo == nil {
			continue
		}
		for _, t := range a.appliesTo.Principals {
			if !seenP[t] {
				seenP[t] = true
				l.principals = append(l.principals, resolved.EntityType(t))
			}
		}
		for _, t := range a.appliesTo.Resources {
			if !seenR[t] {
				seenR[t] = true
				l.resources = append(l.resources, resolved.EntityType(t))
			}
		}
		l.contexts = append(l.contexts, a.appliesTo.Context)
	}
	for _, cond := range tree.Conditions {
		l.expr(cond.Body)
	}
	if l.literal != nil {
		c.rule(finding(p, fmt.Sprintf("dereferences the literal %s, which is not part of any request", l.literal), "start from principal, resource or context"))
	}
	if l.level > MaxLevel {
		c.rule(finding(p, fmt.Sprintf("dereferences entities %d deep, the limit is %d", l.level, MaxLevel), "store the attribute nearer, or ask with it in the context"))
	}
	c.checkCost(p, l)
	return max(l.level, 1)
}

// schemaOf returns the schema that a policy is validated against. It has all entity
// types and the actions that the policy's bundle decides. Only the actions in the
// policy's scope apply to any principal and resource.
func (s *Set) schemaOf(p *policy) *resolved.Schema {
	matched := map[cedar.EntityUID]bool{}
	for _, a := range s.matchedActions(p) {
		matched[a.uid] = true
	}
	out := *s.schema
	out.Actions = make(map[cedar.EntityUID]resolved.Action, len(s.schema.Actions))
	for uid, a := range s.schema.Actions {
		if !decides(p.ref.Bundle, s.Owner(uid.Type)) {
			continue
		}
		if !matched[uid] {
			a.AppliesTo = nil
		}
		out.Actions[uid] = a
	}
	return &out
}
