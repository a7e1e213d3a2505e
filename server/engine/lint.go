package engine

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// This file turns the messages of Cedar's validator into findings with a place and a
// hint. It also warns of policies that the validator accepts and that are probably a
// mistake.

var (
	quotedName      = regexp.MustCompile("`([^`]*)`")
	attributeName   = regexp.MustCompile("attribute `([^`]*)`")
	optionalName    = regexp.MustCompile("safety of access to optional attribute `([^`]*)`")
	unknownAction   = regexp.MustCompile("^unrecognized action `(.*)`$")
	unknownType     = regexp.MustCompile("^unrecognized entity type `(.*)`$")
	contextOf       = regexp.MustCompile("in context for (.*) not found$")
	noActionApplies = "unable to find an applicable action"
)

// explainFinding adds to a validator's message a hint and its place in the policy, if
// the text of the message shows it.
func (s *Set) explainFinding(p *policy, msg string) Finding {
	f := finding(p, msg, "")
	if m := optionalName.FindStringSubmatch(msg); m != nil {
		f.place(p, "."+lastName(m[1]))
		f.Hint = fmt.Sprintf("ask first whether it is there: … has %s && …", m[1])
		return f
	}
	if m := attributeName.FindStringSubmatch(msg); m != nil {
		f.place(p, "."+lastName(m[1]), `"`+lastName(m[1])+`"`)
		f.Hint = didYouMean(lastName(m[1]), s.attributeNames(msg))
		return f
	}
	if m := unknownAction.FindStringSubmatch(msg); m != nil {
		f.place(p, m[1])
		var names []string
		for uid := range s.actions {
			names = append(names, uid.String())
		}
		f.Hint = didYouMean(m[1], names)
		return f
	}
	if m := unknownType.FindStringSubmatch(msg); m != nil {
		f.place(p, m[1])
		var names []string
		for t := range s.schema.Entities {
			names = append(names, string(t))
		}
		for t := range s.schema.Enums {
			names = append(names, string(t))
		}
		f.Hint = didYouMean(m[1], names)
		return f
	}
	if strings.Contains(msg, noActionApplies) {
		// Cedar only warns about a policy that can never apply.
		f.Warning = true
		f.Hint = "no action that this bundle decides takes this principal and resource together"
	}
	return f
}

// place moves a finding to the first of the texts that occurs in the policy.
func (f *Finding) place(p *policy, texts ...string) {
	for _, text := range texts {
		if i := strings.Index(p.text, text); i >= 0 {
			f.placeAt(p, i)
			return
		}
	}
}

// placeAt moves a finding to a place in the text of the policy. The text of a policy in JSON is not what its
// file has, so a finding about it stays at the policy.
func (f *Finding) placeAt(p *policy, at int) {
	if p.inJSON() {
		return
	}
	before := p.text[:at]
	if n := strings.Count(before, "\n"); n > 0 {
		f.Line = p.line + n
		f.Column = len([]rune(before[strings.LastIndexByte(before, '\n')+1:])) + 1
	} else {
		f.Column = p.column + len([]rune(before))
	}
}

func lastName(path string) string { return path[strings.LastIndexByte(path, '.')+1:] }

// attributeNames lists the attributes of the entity types that a message names, or of the
// context of the action that it names.
func (s *Set) attributeNames(msg string) []string {
	var out []string
	for _, m := range quotedName.FindAllStringSubmatch(msg, -1) {
		for name := range s.schema.Entities[cedar.EntityType(m[1])].Shape {
			out = append(out, string(name))
		}
	}
	var action cedar.EntityUID
	if m := contextOf.FindStringSubmatch(msg); len(m) > 1 && action.UnmarshalCedar([]byte(m[1])) == nil {
		if a := s.actions[action]; a != nil && a.appliesTo != nil {
			for name := range a.appliesTo.Context {
				out = append(out, string(name))
			}
		}
	}
	return out
}

// didYouMean suggests the nearest of names, or lists them when they are few.
func didYouMean(name string, names []string) string {
	slices.Sort(names)
	names = slices.Compact(names)
	best, distance := "", max(2, len(name)/4)+1
	for _, n := range names {
		if d := editDistance(name, n, distance); d < distance {
			best, distance = n, d
		}
	}
	switch {
	case best != "":
		return "did you mean " + best + "?"
	case len(names) > 0 && len(names) <= 12:
		return "there is " + strings.Join(names, ", ")
	}
	return ""
}

// editDistance is the Levenshtein distance of two texts, or limit if it is larger.
func editDistance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j+1]+1, row[j]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}

// lint warns of valid policies that are probably a mistake. impossible says that the
// policy applies to nothing, which Cedar's validator reported already.
func (c *compiler) lint(p *policy, tree *xast.Policy, impossible bool) {
	warn := func(msg, hint string) {
		f := finding(p, msg, hint)
		f.Warning = true
		c.report(f)
	}
	matched := c.set.matchedActions(p)
	principals, resources := map[cedar.EntityType]bool{}, map[cedar.EntityType]bool{}
	applies, fieldAction := false, ""
	for _, a := range matched {
		if a.appliesTo == nil {
			continue
		}
		applies = true
		if a.fieldOf != nil {
			fieldAction = max(fieldAction, a.uid.String())
		}
		for _, t := range a.appliesTo.Principals {
			principals[t] = principals[t] || p.principal.couldBe(t)
		}
		for _, t := range a.appliesTo.Resources {
			resources[t] = resources[t] || p.resource.couldBe(t)
		}
	}
	n := never{principals, resources}
	switch {
	case impossible: // reported already
	case !applies:
		warn("can never apply: none of its actions applies to anything", "")
	case n.conditions(tree):
		warn("can never apply: its conditions are false for every request", "")
	}
	if p.forbid {
		return
	}
	open := p.action.all && !p.principal.hasType && !p.principal.hasUID && !p.resource.hasType && !p.resource.hasUID
	if open && len(tree.Conditions) == 0 {
		warn("permits everybody everything that this bundle decides", "give it a scope or a condition")
	} else if fieldAction != "" && !p.field.looks() {
		warn(fmt.Sprintf("permits %s without looking at context.field, so it grants every field, later ones too", fieldAction),
			"add a condition on context.field, or name the actions it is for")
	}
}

// never finds conditions that are false for every question. It knows the types that
// principal and resource can have, and assumes that everything else is possible.
type never struct {
	principals, resources map[cedar.EntityType]bool
}

func (n never) conditions(tree *xast.Policy) bool {
	return slices.ContainsFunc(tree.Conditions, func(c xast.ConditionType) bool {
		return slices.ContainsFunc(conjuncts(c.Body, c.Condition == xast.ConditionUnless), n.isFalse)
	})
}

func (n never) isFalse(e xast.IsNode) bool {
	switch t := e.(type) {
	case xast.NodeValue:
		return t.Value == cedar.Boolean(false)
	case xast.NodeTypeAnd:
		return n.isFalse(t.Left) || n.isFalse(t.Right)
	case xast.NodeTypeOr:
		return n.isFalse(t.Left) && n.isFalse(t.Right)
	case xast.NodeTypeNot:
		return n.isTrue(t.Arg)
	case xast.NodeTypeIs:
		types, ok := n.typesOf(t.Left)
		return ok && !types[t.EntityType]
	case xast.NodeTypeEquals:
		types, ok := n.typesOf(t.Left)
		uid, literal := entityLiteral(t.Right)
		return ok && literal && !types[uid.Type]
	}
	return false
}

func (n never) isTrue(e xast.IsNode) bool {
	switch t := e.(type) {
	case xast.NodeValue:
		return t.Value == cedar.Boolean(true)
	case xast.NodeTypeAnd:
		return n.isTrue(t.Left) && n.isTrue(t.Right)
	case xast.NodeTypeOr:
		return n.isTrue(t.Left) || n.isTrue(t.Right)
	case xast.NodeTypeNot:
		return n.isFalse(t.Arg)
	case xast.NodeTypeIs:
		types, ok := n.typesOf(t.Left)
		return ok && len(types) == 1 && types[t.EntityType]
	}
	return false
}

func (n never) typesOf(e xast.IsNode) (map[cedar.EntityType]bool, bool) {
	v, ok := e.(xast.NodeTypeVariable)
	switch {
	case ok && v.Name == "principal":
		return n.principals, true
	case ok && v.Name == "resource":
		return n.resources, true
	}
	return nil, false
}

// fieldNames lists the fields, or groups, of a type.
func (s *Set) fieldNames(t cedar.EntityType) []string {
	var out []string
	for uid := range s.static {
		if uid.Type == t {
			out = append(out, uid.String())
		}
	}
	return out
}

// Mention is a stored entity that a policy names.
type Mention struct {
	UID     cedar.EntityUID
	finding Finding
}

// Missing is the warning that the entity is not stored.
func (m Mention) Missing() Finding {
	return m.warning("is not stored", "check its spelling, or write the entity; until then the policy applies to nobody")
}

// Unlisted is the warning that the entity is not among those for the tests of its bundle.
func (m Mention) Unlisted() Finding {
	return m.warning("is not in entities.json", "check its spelling, or add the entity, so that tests can use it")
}

func (m Mention) warning(what, hint string) Finding {
	f := m.finding
	f.Warning = true
	f.Message, f.Hint = fmt.Sprintf("%s %s", m.UID, what), hint
	return f
}

// Literals lists the entities that the policies of a bundle name, each once.
func (s *Set) Literals(bundle string) []cedar.EntityUID {
	var list []cedar.EntityUID
	for _, p := range s.bundles[bundle].policies {
		literals(p.tree(), func(uid cedar.EntityUID) {
			if !slices.Contains(list, uid) {
				list = append(list, uid)
			}
		})
	}
	return list
}

// Mentions lists the entities that the policies of a bundle name and that may or may not
// be stored. Actions, fields, groups of fields and values of enumerated types are not
// among them, since the schema declares those, nor are the callers, roles and bundles in
// policies of admin-local, which are never stored. Each entity is listed once, with the
// first policy that names it.
func (s *Set) Mentions(bundle string) []Mention {
	var out []Mention
	seen := map[cedar.EntityUID]bool{}
	for _, p := range s.bundles[bundle].policies {
		literals(p.tree(), func(uid cedar.EntityUID) {
			_, static := s.static[uid]
			_, enum := s.schema.Enums[uid.Type]
			if seen[uid] || static || enum || s.requestOnly(uid.Type) || bundle == AdminLocal && s.Owner(uid.Type) == Admin {
				return
			}
			seen[uid] = true
			f := finding(p, "", "")
			f.place(p, uid.String())
			out = append(out, Mention{uid, f})
		})
	}
	return out
}
