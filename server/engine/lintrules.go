package engine

import (
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// The rules of [Set.Lint], and those that need a server, [RuleEmptyGroup] and [RuleUnusedPolicy]. What a
// rule says is proven: it holds for every question and all entities that fit the schema.
const (
	RuleNeverApplies      = "never-applies"
	RuleShadowed          = "shadowed"
	RuleDuplicate         = "duplicate"
	RuleConstantCondition = "constant-condition"
	RulePermitsEverybody  = "permits-everybody"
	RuleFieldHidden       = "field-hidden"
	RuleFieldOpen         = "field-open"
	RuleUnusedAction      = "unused-action"
	RuleUnusedType        = "unused-type"
	RuleEmptyGroup        = "empty-group"
	RuleUnusedPolicy      = "unused-policy"
	RuleUnknown           = "unknown-rule"
)

// LintRule is a rule of lint.
type LintRule struct {
	ID string
	// Info says that its findings are for information, and no warnings.
	Info bool
	// Server says that it looks at what a server has stored.
	Server bool
}

// LintRules lists the rules of lint.
func LintRules() []LintRule {
	return []LintRule{
		{ID: RuleNeverApplies}, {ID: RuleShadowed}, {ID: RuleDuplicate}, {ID: RuleConstantCondition}, {ID: RulePermitsEverybody, Info: true},
		{ID: RuleFieldHidden}, {ID: RuleFieldOpen, Info: true}, {ID: RuleUnusedAction}, {ID: RuleUnusedType, Info: true},
		{ID: RuleEmptyGroup, Server: true}, {ID: RuleUnusedPolicy, Server: true}, {ID: RuleUnknown},
	}
}

// IsLintRule reports whether there is a rule with an id.
func IsLintRule(id string) bool {
	return slices.ContainsFunc(LintRules(), func(r LintRule) bool { return r.ID == id })
}

// LintFinding is what a rule of lint found. Warning is false if the rule is for information.
type LintFinding struct {
	Rule string
	Finding
}

// lintIgnore is the annotation that switches rules off at a policy, and separators stand between them.
const (
	lintIgnore = "lint_ignore"
	separators = ", "
)

// Lint looks for what is valid and probably a mistake in a bundle of the set. sources are those that the
// set was compiled from. Findings about a policy are left out if its annotation @lint_ignore names their
// rule.
func (s *Set) Lint(bundle string, sources []Source) []LintFinding {
	l := &linter{set: s, sources: sources, b: s.bundles[bundle], dead: map[*policy]bool{}, decides: map[*policy]map[*action]bool{}}
	if i := slices.IndexFunc(sources, func(src Source) bool { return src.Name == bundle }); i >= 0 {
		l.src = sources[i]
	}
	l.openForbids()
	l.policies()
	l.fields()
	l.actions()
	l.types()
	slices.SortFunc(l.out, compareLint)
	return s.WithoutIgnored(bundle, l.out)
}

// WithoutIgnored leaves out the findings about policies whose annotation @lint_ignore names their rule.
func (s *Set) WithoutIgnored(bundle string, list []LintFinding) []LintFinding {
	ignored := map[string][]string{}
	for _, p := range s.bundles[bundle].policies {
		if rules := ignores(p); rules != nil {
			ignored[p.ref.ID] = rules
		}
	}
	return slices.DeleteFunc(list, func(f LintFinding) bool { return f.Policy != "" && slices.Contains(ignored[f.Policy], f.Rule) })
}

// ignores lists the rules that are switched off at a policy.
func ignores(p *policy) []string {
	return strings.FieldsFunc(string(p.compiled.Annotations()[lintIgnore]), func(r rune) bool { return strings.ContainsRune(separators, r) })
}

// linter looks at the policies and declarations of one bundle.
type linter struct {
	set     *Set
	sources []Source
	src     Source // of the bundle
	b       *compiledBundle
	out     []LintFinding
	// dead are the policies that determine nothing: they never apply, or are shadowed.
	dead map[*policy]bool
	// open has the forbids without a condition that join the bundle's decisions, by the entity in their
	// principal scope; zero: none. Each list is in order of bundle and id.
	open    map[cedar.EntityUID][]*policy
	decides map[*policy]map[*action]bool // of open
}

func (l *linter) report(rule string, f Finding) {
	f.Bundle = l.b.name
	f.Warning = !slices.Contains(LintRules(), LintRule{ID: rule, Info: true})
	l.out = append(l.out, LintFinding{rule, f})
}

// environments yields the combinations of action, principal type and resource type that the scope of a
// policy can match. The schema rules all others out, and then no policy is asked.
func (s *Set) environments(p *policy) iter.Seq2[*action, [2]cedar.EntityType] {
	return func(yield func(*action, [2]cedar.EntityType) bool) {
		for _, a := range s.matchedActions(p) {
			if a.appliesTo == nil {
				continue
			}
			for _, principal := range a.appliesTo.Principals {
				for _, resource := range a.appliesTo.Resources {
					if p.principal.couldBe(principal) && p.resource.couldBe(resource) && !yield(a, [2]cedar.EntityType{principal, resource}) {
						return
					}
				}
			}
		}
	}
}

// conditionsOf returns the parts of the conditions of a policy, in the order of evaluation, and what is
// known about the types in them. applies is false if the scope matches no question.
func (s *Set) conditionsOf(p *policy) (parts []xast.IsNode, f fold, applies bool) {
	f.principals, f.resources = map[cedar.EntityType]bool{}, map[cedar.EntityType]bool{}
	for _, types := range s.environments(p) {
		applies, f.principals[types[0]], f.resources[types[1]] = true, true, true
	}
	for _, c := range p.source.Conditions {
		parts = append(parts, conjuncts(c.Body, c.Condition == xast.ConditionUnless)...)
	}
	return parts, f, applies
}

// conditional reports whether a policy may be unsatisfied though its scope matches.
func (s *Set) conditional(p *policy) bool {
	parts, f, _ := s.conditionsOf(p)
	return slices.ContainsFunc(parts, func(e xast.IsNode) bool { v, known := f.value(e); return !known || !v })
}

// openForbids finds the forbids that are always satisfied where their scope matches.
func (l *linter) openForbids() {
	l.open = map[cedar.EntityUID][]*policy{}
	joined := l.b.policies
	if rails := l.set.bundles[Guardrails]; rails != nil && rails != l.b {
		joined = slices.Concat(joined, rails.policies)
	}
	for _, p := range joined {
		if !p.forbid || l.set.conditional(p) {
			continue
		}
		l.open[p.principal.uid] = append(l.open[p.principal.uid], p)
		l.decides[p] = map[*action]bool{}
		for _, a := range l.set.matchedActions(p) {
			l.decides[p][a] = true
		}
	}
	for _, list := range l.open {
		slices.SortFunc(list, comparePolicies)
	}
}

// covers reports whether a scope matches every entity of a type that another scope matches, whatever is
// stored.
func (s scope) covers(narrow scope, t cedar.EntityType) bool {
	return s.couldBe(t) && (!s.hasUID || narrow.hasUID && narrow.uid == s.uid && (s.in || !narrow.in))
}

// shadow returns forbids without a condition of which one matches whatever a permit matches. There are
// none if the permit can determine a decision.
func (l *linter) shadow(p *policy) (by []*policy) {
	candidates := l.open[cedar.EntityUID{}]
	if p.principal.hasUID {
		candidates = slices.Concat(candidates, l.open[p.principal.uid])
	}
	if len(candidates) == 0 {
		return nil
	}
	for a, types := range l.set.environments(p) {
		i := slices.IndexFunc(candidates, func(f *policy) bool {
			return l.decides[f][a] && f.principal.covers(p.principal, types[0]) && f.resource.covers(p.resource, types[1])
		})
		if i < 0 {
			return nil
		}
		if !slices.Contains(by, candidates[i]) {
			by = append(by, candidates[i])
		}
	}
	slices.SortFunc(by, comparePolicies)
	return by
}

// policies applies the rules about policies.
func (l *linter) policies() {
	same := map[string]*policy{}
	for _, p := range l.b.policies {
		for _, rule := range ignores(p) {
			if !IsLintRule(rule) {
				l.report(RuleUnknown, finding(p, fmt.Sprintf("@%s names %q, and there is no such rule", lintIgnore, rule), ""))
			}
		}
		l.conditions(p)
		if l.dead[p] {
			continue
		}
		if !p.forbid {
			if by := l.shadow(p); by != nil {
				l.dead[p] = true
				names := make([]string, 0, 3)
				for _, f := range by[:min(len(by), 3)] {
					names = append(names, f.ref.String())
				}
				what := "a forbid without a condition covers its scope: " + names[0]
				if len(by) > 1 {
					what = fmt.Sprintf("%d forbids without a condition cover its scope together, among them %s", len(by), strings.Join(names, ", "))
				}
				l.report(RuleShadowed, finding(p, "can never permit anything: "+what, "remove one of them, or give the forbid a condition"))
			}
		}
		key := meaning(p)
		if other := same[key]; other != nil {
			l.report(RuleDuplicate, finding(p, fmt.Sprintf("does the same as %s, at %s:%d", other.ref.ID, other.file, other.line), "remove one of them"))
		} else {
			same[key] = p
		}
		l.permitsEverybody(p)
		l.fieldOpen(p)
	}
}

// meaning is a text that is equal only for policies that are satisfied by the same questions and have the
// same effect, obligation and advice.
func meaning(p *policy) string {
	tree := *p.source
	tree.Annotations = nil
	if set, ok := tree.Action.(xast.ScopeTypeInSet); ok {
		sorted := slices.Clone(set.Entities)
		slices.SortFunc(sorted, func(a, b cedar.EntityUID) int { return strings.Compare(a.String(), b.String()) })
		tree.Action = xast.ScopeTypeInSet{Entities: slices.Compact(sorted)}
	}
	return fmt.Sprintf("%q %q %s", p.obligation, p.advice, cedar.NewPolicyFromAST((*ast.Policy)(&tree)).MarshalCedar())
}

// conditions looks for policies that are satisfied by no question, and for parts of conditions that are
// always true.
func (l *linter) conditions(p *policy) {
	parts, f, applies := l.set.conditionsOf(p)
	if !applies {
		l.dead[p] = true
		l.report(RuleNeverApplies, finding(p, "can never determine a decision: no action in its scope takes this principal and resource", "correct its scope, or remove it"))
		return
	}
	// A permit that fails is not satisfied. A forbid that fails denies, unless its bundle says otherwise.
	failureCounts := p.forbid && !l.b.skipForbidErrors
	fails := false
	var always []string
	for _, part := range parts {
		value, known := f.value(part)
		if known && value {
			always = append(always, shorten(cedarText(part)))
			continue
		}
		if known && !(failureCounts && fails) || !failureCounts && f.isFalse(part) {
			l.dead[p] = true
			l.report(RuleNeverApplies, finding(p, "can never determine a decision: its conditions are false for every question", "correct them, or remove the policy"))
			return
		}
		fails = fails || !total(part)
	}
	for _, text := range always {
		l.report(RuleConstantCondition, finding(p, fmt.Sprintf("a part of its conditions is always true: %s", text), "remove this part, or write what was meant"))
	}
}

// permitsEverybody reports a permit of more than fields without a condition and without principals.
func (l *linter) permitsEverybody(p *policy) {
	if p.forbid || p.principal.hasUID || l.set.conditional(p) {
		return
	}
	for a := range l.set.environments(p) {
		if a.fieldOf == nil {
			who := "everybody"
			if p.principal.hasType {
				who = fmt.Sprintf("every %s", p.principal.typ)
			}
			l.report(RulePermitsEverybody, finding(p, fmt.Sprintf("permits %s, without a condition", who), "if that is not meant, name a group of principals in its scope"))
			return
		}
	}
}

// GroupMentions lists the groups that the policies of a bundle name, as in "principal in Group", and that
// may or may not have members. It leaves out what [Set.Mentions] leaves out. Each is listed once, with the
// first policy that names it.
func (s *Set) GroupMentions(bundle string) []Mention {
	groups := map[cedar.EntityUID]bool{}
	add := func(uid cedar.EntityUID) { groups[uid] = true }
	for _, p := range s.bundles[bundle].policies {
		for _, scope := range []scope{p.principal, p.resource} {
			if scope.in {
				add(scope.uid)
			}
		}
		for _, c := range p.source.Conditions {
			xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
				var right xast.IsNode
				switch t := n.(type) {
				case xast.NodeTypeIn:
					right = t.Right
				case xast.NodeTypeIsIn:
					right = t.Entity
				default:
					return true
				}
				list := []xast.IsNode{right}
				if set, ok := right.(xast.NodeTypeSet); ok {
					list = set.Elements
				}
				for _, e := range list {
					if v, ok := e.(xast.NodeValue); ok {
						entitiesIn(v.Value, add)
					}
				}
				return true
			})
		}
	}
	return slices.DeleteFunc(s.Mentions(bundle), func(m Mention) bool { return !groups[m.UID] })
}

// TypesBelow lists the types whose entities can be in an entity of a type, at any depth, sorted.
func (s *Set) TypesBelow(typ cedar.EntityType) (list []string) {
	for _, t := range sortedKeys(s.schema.Entities) {
		if s.TypesAbove(t)[typ] {
			list = append(list, string(t))
		}
	}
	return list
}

// Unused is the finding that a policy has determined no decision since a time, and false if the bundle has
// no such policy with this text.
func (s *Set) Unused(bundle, id, text, since string) (LintFinding, bool) {
	for _, p := range s.bundles[bundle].policies {
		if p.ref.ID == id && p.text == text {
			f := finding(p, "has determined no decision since "+since, "find out whether it is needed, and remove it if not")
			f.Warning = true
			return LintFinding{RuleUnusedPolicy, f}, true
		}
	}
	return LintFinding{}, false
}

// Empty is the finding that nobody is in the group.
func (m Mention) Empty() LintFinding {
	return LintFinding{RuleEmptyGroup, m.warning("has no members", "check its spelling, or add members; until then this part of the policy matches nothing else")}
}
