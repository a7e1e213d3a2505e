package engine

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	sast "github.com/cedar-policy/cedar-go/x/exp/schema/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

// Source is one bundle as text.
type Source struct {
	Name string
	// SchemaFile names the schema in findings; Schema is its text in Cedar's
	// schema syntax.
	SchemaFile, Schema string
	Policies           []PolicyText
	// FieldsFile names the catalogue in findings.
	FieldsFile string
	Fields     []Field
	// Published bundles were accepted before, perhaps by a version without some of
	// today's rules for annotations. They are not held to these when another bundle
	// is checked beside them.
	Published bool
	// SkipForbidErrors restores Cedar's rule that a policy that fails is left
	// out, for forbids too.
	SkipForbidErrors bool
}

// PolicyText is a text of one or more policies. Line is where it begins in its
// file, from 1 (0 is read as 1).
type PolicyText struct {
	File string
	Line int
	Text string
}

// Field is one catalogued path of an entity type with the groups it is in; for
// the type FieldGroup, Path names a group.
type Field struct {
	Type, Path   string
	Groups       []string
	Line, Column int
}

// Finding is one problem of a bundle. Line and Column count from 1, 0 is
// unknown.
type Finding struct {
	Bundle       string
	File         string
	Line, Column int
	Policy       string
	Message      string
	Hint         string
	Warning      bool
}

// String returns "file:line:column: message".
func (f Finding) String() string {
	var b strings.Builder
	if f.File != "" {
		b.WriteString(f.File)
		if f.Line > 0 {
			fmt.Fprintf(&b, ":%d", f.Line)
			if f.Column > 0 {
				fmt.Fprintf(&b, ":%d", f.Column)
			}
		}
		b.WriteString(": ")
	}
	if f.Policy != "" {
		fmt.Fprintf(&b, "policy %s: ", f.Policy)
	}
	b.WriteString(f.Message)
	return b.String()
}

// PolicyInfo is one policy as the compiler cut it out of its file.
type PolicyInfo struct {
	ID, File string
	Line     int
	Text     string
}

// Set is all bundles compiled: what every decision of one policy state needs.
// It is immutable and safe for concurrent use.
type Set struct {
	bundles map[string]*compiledBundle
	owners  map[string]string // namespace → bundle
	schema  *resolved.Schema
	digest  [sha256.Size]byte // of all schemas and catalogues
	actions map[cedar.EntityUID]*action
	static  map[cedar.EntityUID]cedar.Entity // actions, fields, groups; closed
	// parsed holds each policy by its text, for the next Compile; clean, those
	// that were checked against this schema without a finding.
	parsed map[parseKey]*policy
	clean  map[parseKey]bool

	actionTypes, requestTypes, fieldTypes map[cedar.EntityType]bool
	catalogues                            map[cedar.EntityType]*catalogue

	// sensitive is what types that come with requests have that is marked
	// @sensitive; sensitiveNames are the names of all attributes so marked.
	sensitive      map[cedar.EntityType]entityMarks
	sensitiveNames map[cedar.String]bool

	// plainFields decides field by field with every candidate: what the classes
	// must equal. Only tests set it.
	plainFields bool
}

type compiledBundle struct {
	name             string
	namespaces       []string
	policies         []*policy
	skipForbidErrors bool
}

// parseKey is what a policy is parsed from. Where it stands does not matter: a
// line more at the top of a file compiles nothing again.
type parseKey struct {
	bundle, text string
}

// Compile compiles and checks all bundles together. What previous (which may be
// nil) compiled from equal text is taken over. When some finding is not a
// warning the Set is nil.
func Compile(sources []Source, previous *Set) (*Set, []Finding) {
	return compile(sources, previous, false)
}

// Load compiles bundles that Compile accepted before, without checking them
// again: a server must come up with what was published, whatever rules a later
// version adds, and checking takes much longer than compiling.
func Load(sources []Source, previous *Set) (*Set, []Finding) {
	return compile(sources, previous, true)
}

func compile(sources []Source, previous *Set, trusted bool) (*Set, []Finding) {
	c := &compiler{previous: previous, trusted: trusted, set: &Set{
		bundles:      map[string]*compiledBundle{},
		owners:       map[string]string{},
		actions:      map[cedar.EntityUID]*action{},
		static:       map[cedar.EntityUID]cedar.Entity{},
		parsed:       map[parseKey]*policy{},
		clean:        map[parseKey]bool{},
		actionTypes:  map[cedar.EntityType]bool{},
		requestTypes: map[cedar.EntityType]bool{},
		fieldTypes:   map[cedar.EntityType]bool{},
		catalogues:   map[cedar.EntityType]*catalogue{},

		sensitive:      map[cedar.EntityType]entityMarks{},
		sensitiveNames: map[cedar.String]bool{},
	}}
	sources = slices.Clone(sources)
	sort.Slice(sources, func(i, j int) bool { return sources[i].Name < sources[j].Name })
	if c.schemas(sources) {
		for _, src := range sources {
			c.policies(src)
		}
		if !c.failed {
			c.index()
		}
	}
	slices.SortStableFunc(c.findings, func(a, b Finding) int {
		if a.Warning != b.Warning {
			if b.Warning {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Bundle+"\x00"+a.File, b.Bundle+"\x00"+b.File)
	})
	if c.failed {
		return nil, c.findings
	}
	return c.set, c.findings
}

type compiler struct {
	set      *Set
	previous *Set
	trusted  bool
	findings []Finding
	failed   bool
}

func (c *compiler) report(f Finding) {
	c.findings = append(c.findings, f)
	c.failed = c.failed || !f.Warning
}

// rule reports what breaks a rule of ours and yet compiles. What was published
// once is not held to it.
func (c *compiler) rule(f Finding) {
	if !c.trusted {
		c.report(f)
	}
}

// schemas parses, joins and resolves the schemas and reads the catalogues. It
// says whether policies can be looked at.
func (c *compiler) schemas(sources []Source) bool {
	h := sha256.New()
	var all []*sast.Schema
	files := map[string]string{}
	for _, src := range sources {
		files[src.Name] = src.SchemaFile
		_ = json.NewEncoder(h).Encode([]any{src.Name, src.Schema, src.Fields})
		sc, terr := parseSchema(src.Schema)
		if terr != nil {
			c.report(Finding{Bundle: src.Name, File: src.SchemaFile, Line: terr.line, Column: terr.column, Message: terr.msg, Hint: terr.hint})
			continue
		}
		b := &compiledBundle{name: src.Name, namespaces: namespacesOf(sc), skipForbidErrors: src.SkipForbidErrors}
		c.set.bundles[src.Name] = b
		for _, ns := range b.namespaces {
			if ns == reservedNamespace || strings.HasPrefix(ns, reservedNamespace+"::") {
				c.report(Finding{Bundle: src.Name, File: src.SchemaFile, Message: fmt.Sprintf("namespace %s belongs to the service itself", ns)})
			}
			if other, taken := c.set.owners[ns]; taken {
				c.report(Finding{Bundle: src.Name, File: src.SchemaFile, Message: fmt.Sprintf("namespace %q is owned by bundle %s", ns, other), Hint: "a namespace has one owner"})
			}
			c.set.owners[ns] = src.Name
		}
		if !src.Published {
			annotationProblems(sc, func(msg, hint string) {
				c.rule(Finding{Bundle: src.Name, File: src.SchemaFile, Message: msg, Hint: hint})
			})
		}
		for _, name := range declaredBuiltins(sc) {
			c.rule(Finding{Bundle: src.Name, File: src.SchemaFile, Message: fmt.Sprintf("%s is a name of Cedar's own and cannot be declared outside of a namespace", name), Hint: "other bundles' schemas would read differently"})
		}
		all = append(all, sc)
	}
	h.Sum(c.set.digest[:0])
	if c.failed {
		return false
	}
	if n := schemaNodes(mergeSchemas(all)); n > maxSchemaNodes {
		c.report(Finding{Message: fmt.Sprintf("the schemas have more than %d types when their common types are written out", maxSchemaNodes), Hint: "common types that hold others twice double with each step"})
		return false
	}
	var err error
	if c.set.schema, err = resolved.Resolve(mergeSchemas(all)); err != nil {
		c.report(c.resolveFinding(err, sources, all))
		return false
	}
	c.set.readSchema(func(bundle, msg, hint string) {
		c.rule(Finding{Bundle: bundle, File: files[bundle], Message: msg, Hint: hint})
	})
	for _, src := range sources {
		c.set.readFields(src, func(line, column int, msg, hint string) {
			c.rule(Finding{Bundle: src.Name, File: src.FieldsFile, Line: line, Column: column, Message: msg, Hint: hint})
		})
	}
	return !c.failed
}

// resolveFinding finds the bundle that an error of the joined schemas is about:
// the first that does not resolve even when of the others only the names stand.
func (c *compiler) resolveFinding(err error, sources []Source, parsed []*sast.Schema) Finding {
	for i, src := range sources {
		joined := make([]*sast.Schema, len(parsed))
		for j := range parsed {
			joined[j] = parsed[j]
			if i != j {
				joined[j] = namesOnly(parsed[j])
			}
		}
		if _, err := resolved.Resolve(mergeSchemas(joined)); err != nil {
			return Finding{Bundle: src.Name, File: src.SchemaFile, Message: err.Error()}
		}
	}
	return Finding{Message: err.Error()}
}

// policies parses and checks the policies of one bundle.
func (c *compiler) policies(src Source) {
	b := c.set.bundles[src.Name]
	where := map[string]*policy{}
	for _, text := range src.Policies {
		first := max(text.Line, 1)
		statements, errs := split(text.Text)
		if len(statements)+len(errs) == 0 && !src.Published {
			c.rule(Finding{Bundle: src.Name, File: text.File, Message: "holds no policy", Hint: "remove the file, or what comments its policies out", Warning: true})
		}
		for _, e := range errs {
			c.report(Finding{Bundle: src.Name, File: text.File, Line: first + e.line - 1, Column: e.column, Message: e.msg, Hint: e.hint})
		}
		for _, st := range statements {
			st.line += first - 1
			p, terr := c.parse(src.Name, text.File, st)
			if terr != nil {
				c.report(Finding{Bundle: src.Name, File: text.File, Line: terr.line, Column: terr.column, Message: terr.msg, Hint: terr.hint})
				continue
			}
			if other, twice := where[p.ref.ID]; twice {
				c.report(finding(p, fmt.Sprintf("@id is used already, at %s:%d", other.file, other.line), "give each policy a name of its own"))
				continue
			}
			where[p.ref.ID] = p
			if !src.Published {
				c.annotations(p)
			}
			b.policies = append(b.policies, p)
		}
	}
	slices.SortFunc(b.policies, comparePolicies)
	c.checkAll(b)
}

// annotations reports the annotations of a policy that have no effect.
func (c *compiler) annotations(p *policy) {
	found := p.compiled.Annotations()
	for _, key := range sortedKeys(found) {
		if msg, hint := annotationProblem(key, found[key], atPolicy); msg != "" {
			c.rule(finding(p, msg, hint))
		}
	}
}

// checkAll checks the policies of a bundle that the previous Set did not check
// against the same schemas. Cedar's validator goes through every environment of
// its schema for every policy, so policies of one action scope are checked
// together, against a schema in which no other action applies to anything.
func (c *compiler) checkAll(b *compiledBundle) {
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
			n := len(c.findings)
			if c.check(v, b, p) {
				c.set.clean[parseKey{p.ref.Bundle, p.text}] = n == len(c.findings)
			}
		}
	}
}

func (c *compiler) parse(bundle, file string, st statement) (*policy, *textError) {
	key := parseKey{bundle, st.text}
	if c.previous != nil {
		if p, ok := c.previous.parsed[key]; ok {
			// The policy of another Set is never written to: place and level, which
			// is of policy and schema together, go into a copy.
			moved := p.file != file || p.line != st.line || p.column != st.column
			if moved || !c.previous.clean[key] || c.previous.digest != c.set.digest {
				fresh := *p
				fresh.file, fresh.line, fresh.column = file, st.line, st.column
				p = &fresh
			}
			c.set.parsed[key] = p
			return p, nil
		}
	}
	p, err := parsePolicy(bundle, file, st)
	if err == nil {
		c.set.parsed[key] = p
	}
	return p, err
}

func finding(p *policy, msg, hint string) Finding {
	return Finding{Bundle: p.ref.Bundle, File: p.file, Line: p.line, Column: p.column, Policy: p.ref.ID, Message: msg, Hint: hint}
}

// check validates one policy against the schema and lints what Cedar's
// validator does not.
func (c *compiler) check(v *validate.Validator, b *compiledBundle, p *policy) bool {
	before := c.failed
	c.failed = false
	defer func() { c.failed = c.failed || before }()
	tree := p.tree()
	if b.name == Guardrails && !p.forbid {
		c.report(finding(p, "the bundle guardrails may hold only forbid policies", "its policies join every decision"))
	}
	valid := validatable(tree)
	impossible := false // it applies to nothing, so that its conditions do not count
	if err := v.Policy(p.ref.ID, valid); err != nil {
		for msg := range strings.SplitSeq(err.Error(), "\n") {
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

// checkConditions refuses what Cedar's validator refuses in conditions and that of
// cedar-go does not, or what cedar-go evaluates otherwise.
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

// checkNames refuses types and actions that nothing declares where Cedar's validator
// passes over them: types after "is", and all that stands in the conditions of a
// policy that applies to nothing.
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

// levelOf computes how deep p dereferences and refuses what no slice can hold.
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
	return max(l.level, 1)
}

// schemaOf is the schema that a policy is validated against: all entity types,
// the actions that its bundle decides, and of those only the ones that its scope
// names apply to anything.
func (s *Set) schemaOf(p *policy) *resolved.Schema {
	matched := map[cedar.EntityUID]bool{}
	for _, a := range s.matchedActions(p) {
		matched[a.uid] = true
	}
	out := *s.schema
	out.Actions = make(map[cedar.EntityUID]resolved.Action, len(s.schema.Actions))
	for uid, a := range s.schema.Actions {
		if p.ref.Bundle != Guardrails && s.owners[namespaceOf(uid.Type)] != p.ref.Bundle {
			continue
		}
		if !matched[uid] {
			a.AppliesTo = nil
		}
		out.Actions[uid] = a
	}
	return &out
}

// matchedActions returns the actions p could decide: of its own bundle's
// namespaces, or of all for guardrails, by its action scope.
func (s *Set) matchedActions(p *policy) []*action {
	var out []*action
	own := func(a *action) bool { return p.ref.Bundle == Guardrails || a.bundle == p.ref.Bundle }
	switch {
	case p.action.all:
		for _, a := range s.actions {
			if own(a) {
				out = append(out, a)
			}
		}
	case !p.action.in:
		if a, ok := s.actions[p.action.uids[0]]; ok && own(a) {
			out = append(out, a)
		}
	default:
		for _, a := range s.actions {
			if own(a) && slices.ContainsFunc(p.action.uids, func(g cedar.EntityUID) bool {
				return g == a.uid || s.static[a.uid].Parents.Contains(g)
			}) {
				out = append(out, a)
			}
		}
	}
	return out
}

// index puts each policy under the actions it could decide.
func (c *compiler) index() {
	type scope struct {
		bundle string
		group  cedar.EntityUID // zero: every action
	}
	parts := map[scope]*part{}
	for _, b := range c.set.bundles {
		for _, p := range b.policies {
			if !p.action.all && (!p.action.in || len(p.action.uids) > 1) {
				for _, a := range c.set.matchedActions(p) {
					a.index.add(p)
				}
				continue
			}
			key := scope{bundle: b.name}
			if !p.action.all {
				key.group = p.action.uids[0]
			}
			pt := parts[key]
			if pt == nil {
				pt = newPart()
				parts[key] = pt
				for _, a := range c.set.matchedActions(p) {
					a.index.share(pt)
				}
			}
			pt.add(p)
		}
	}
	for _, a := range c.set.actions {
		a.index.done()
		if a.fieldOf != nil {
			c.set.classify(a)
		}
	}
}

// Namespaces returns the namespaces a bundle owns, sorted.
func (s *Set) Namespaces(bundle string) []string { return s.bundles[bundle].namespaces }

// Policies returns the policies of a bundle by id.
func (s *Set) Policies(bundle string) []PolicyInfo {
	var out []PolicyInfo
	for _, p := range s.bundles[bundle].policies {
		out = append(out, PolicyInfo{p.ref.ID, p.file, p.line, p.text})
	}
	return out
}

// EntityTypes returns the entity types that can be stored, of one bundle's
// namespaces, sorted.
func (s *Set) EntityTypes(bundle string) []string {
	var out []string
	for t := range s.schema.Entities {
		if s.owners[namespaceOf(t)] == bundle {
			out = append(out, string(t))
		}
	}
	for t := range s.schema.Enums {
		if s.owners[namespaceOf(t)] == bundle {
			out = append(out, string(t))
		}
	}
	sort.Strings(out)
	return out
}

// ChangedTypes lists the entity types that s and old read differently: declared
// by one of them alone, or otherwise. Values of enumerated types are part of
// every type that may refer to them, so where those changed, all types count.
func (s *Set) ChangedTypes(old *Set) []string {
	if s.digest == old.digest {
		return nil
	}
	changed := map[cedar.EntityType]bool{}
	all := !reflect.DeepEqual(s.schema.Enums, old.schema.Enums)
	for _, pair := range [][2]*Set{{s, old}, {old, s}} {
		for t, decl := range pair[0].schema.Entities {
			other, ok := pair[1].schema.Entities[t]
			changed[t] = changed[t] || all || !ok || pair[0].fieldTypes[t] != pair[1].fieldTypes[t] || pair[0].requestTypes[t] != pair[1].requestTypes[t] ||
				!reflect.DeepEqual(decl.Shape, other.Shape) || !reflect.DeepEqual(decl.Tags, other.Tags) || !sameTypes(decl.ParentTypes, other.ParentTypes)
		}
		for t := range pair[0].schema.Enums {
			changed[t] = changed[t] || all
		}
	}
	out := []string{}
	for t, c := range changed {
		if c {
			out = append(out, string(t))
		}
	}
	sort.Strings(out)
	return out
}
