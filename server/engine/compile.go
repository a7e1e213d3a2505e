package engine

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/cedar-policy/cedar-go"
	sast "github.com/cedar-policy/cedar-go/x/exp/schema/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Compile compiles and checks all bundles together. It reuses what previous, which may
// be nil, compiled from the same text. The Set is nil if any finding is not a warning.
func Compile(sources []Source, previous *Set) (*Set, []Finding) {
	set, findings, _ := CompileUntil(sources, previous, nil)
	return set, findings
}

// CompileUntil is [Compile] for untrusted text: it calls ended before each policy, and stops with
// the error that ended returns. ended may be nil.
func CompileUntil(sources []Source, previous *Set, ended func() error) (*Set, []Finding, error) {
	return compile(sources, previous, false, ended)
}

// Load compiles bundles that Compile accepted before, without checking them
// again: a server must come up with what was published, whatever rules a later
// version adds, and checking takes much longer than compiling.
func Load(sources []Source, previous *Set) (*Set, []Finding) {
	set, findings, _ := compile(sources, previous, true, nil)
	return set, findings
}

func compile(sources []Source, previous *Set, trusted bool, ended func() error) (*Set, []Finding, error) {
	c := &compiler{previous: previous, trusted: trusted, ended: ended, published: map[string]bool{}, manifests: map[string]string{}, set: &Set{
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
		if !c.trusted && !c.stopped() {
			c.checkExports(sources)
		}
		if !c.failed && !c.stopped() {
			c.index()
		}
	}
	if c.stop != nil {
		return nil, nil, c.stop
	}
	slices.SortStableFunc(c.findings, func(a, b Finding) int {
		if a.Warning != b.Warning {
			if b.Warning {
				return -1
			}
			return 1
		}
		return cmp.Or(strings.Compare(a.Bundle, b.Bundle), strings.Compare(a.File, b.File), a.Line-b.Line, a.Column-b.Column)
	})
	if c.failed {
		return nil, c.findings, nil
	}
	return c.set, c.findings, nil
}

type compiler struct {
	set      *Set
	previous *Set
	trusted  bool
	findings []Finding
	failed   bool
	// errors and warnings count the findings that were reported.
	errors, warnings int

	published map[string]bool   // bundles that were accepted before
	manifests map[string]string // the names of the files bundle.yaml
	ended     func() error      // nil: never
	stop      error             // the error of ended
}

// maxFindings bounds the errors of a compilation, and the warnings. One policy can have thousands.
const maxFindings = 1000

func (c *compiler) report(f Finding) {
	c.failed = c.failed || !f.Warning
	n, kind := &c.errors, "errors"
	if f.Warning {
		n, kind = &c.warnings, "warnings"
	}
	switch *n++; {
	case *n <= maxFindings:
		c.findings = append(c.findings, f)
	case *n == maxFindings+1:
		c.findings = append(c.findings, Finding{Message: fmt.Sprintf("there are more than %d %s; the others are left out", maxFindings, kind), Warning: f.Warning})
	}
}

// stopped reports whether the work is to be given up: the caller does not want it any more, or
// there is no place for another error.
func (c *compiler) stopped() bool {
	if c.stop == nil && c.ended != nil {
		c.stop = c.ended()
	}
	return c.stop != nil || c.errors > maxFindings
}

// rule reports text that compiles and breaks a rule of this service. Text that was
// published before the rule existed is accepted.
func (c *compiler) rule(f Finding) {
	if !c.trusted {
		c.report(f)
	}
}

// schemas parses, joins and resolves the schemas and reads the catalogues. It reports
// whether they are good enough to compile policies against.
func (c *compiler) schemas(sources []Source) bool {
	h := sha256.New()
	var all []*sast.Schema
	bySource := map[string]*Source{}
	for i := range sources {
		src := &sources[i]
		bySource[src.Name] = src
		c.published[src.Name] = src.Published
		if !c.joinSchema(src) {
			continue
		}
		c.manifests[src.Name] = src.ManifestFile
		_ = json.NewEncoder(h).Encode([]any{src.Name, src.Schema, src.Fields})
		sc, terr := parseSchema(src.Schema)
		if terr != nil {
			c.report(Finding{Bundle: src.Name, File: src.SchemaFile, Line: terr.line, Column: terr.column, Message: terr.msg, Hint: terr.hint})
			continue
		}
		b := &compiledBundle{name: src.Name, namespaces: namespacesOf(sc), skipForbidErrors: src.SkipForbidErrors,
			schema: Source{SchemaFile: src.SchemaFile, declared: src.declared}}
		if len(src.Schemas) == 0 {
			b.schema.Schema = src.Schema
		}
		c.set.bundles[src.Name] = b
		for _, ns := range b.namespaces {
			if src.Name != Admin && (ns == reservedNamespace || strings.HasPrefix(ns, reservedNamespace+"::")) {
				c.report(Finding{Bundle: src.Name, File: src.schemaFile("namespace " + ns), Message: fmt.Sprintf("namespace %s belongs to the service itself", ns)})
			}
			if other, taken := c.set.owners[ns]; taken {
				c.ownedTwice(ns, src, bySource[other])
			}
			c.set.owners[ns] = src.Name
		}
		if !src.Published {
			annotationProblems(sc, func(msg, hint string) {
				c.rule(Finding{Bundle: src.Name, File: src.schemaFile(msg), Message: msg, Hint: hint})
			})
		}
		for _, name := range declaredBuiltins(sc) {
			c.rule(Finding{Bundle: src.Name, File: src.SchemaFile, Message: fmt.Sprintf("%s is a name of Cedar's own and cannot be declared outside of a namespace", name), Hint: "other bundles' schemas would read differently"})
		}
		all = append(all, sc)
	}
	h.Sum(c.set.digest[:0])
	for i := range sources {
		src := &sources[i]
		if b := c.set.bundles[src.Name]; b != nil && !src.Published {
			c.nested(b, src)
		}
	}
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
	for _, src := range sources {
		if !c.trusted && !src.Published && src.Name != Guardrails && src.Name != AdminLocal && c.set.actionSteps(src.Name) > maxActionSteps {
			c.report(Finding{Bundle: src.Name, File: src.SchemaFile, Message: fmt.Sprintf("nests groups of actions too deep: together, its actions are in more than %d groups", maxActionSteps/2), Hint: "put actions into a few groups directly"})
			return false
		}
	}
	c.set.readSchema(func(bundle, msg, hint string) {
		f := Finding{Bundle: bundle, Message: msg, Hint: hint}
		if src := bySource[bundle]; src != nil {
			f.File = src.schemaFile(msg)
		}
		c.rule(f)
	})
	for _, src := range sources {
		c.set.readFields(src, func(line, column int, msg, hint string) {
			c.rule(Finding{Bundle: src.Name, File: src.FieldsFile, Line: line, Column: column, Message: msg, Hint: hint})
		})
		c.set.readPrincipalTokens(src, func(line, column int, msg, hint string) {
			c.rule(Finding{Bundle: src.Name, File: src.ManifestFile, Line: line, Column: column, Message: msg, Hint: hint})
		})
		c.set.readExports(src, func(e Export, msg, hint string) {
			if !src.Published {
				c.rule(Finding{Bundle: src.Name, File: src.ManifestFile, Line: e.Line, Column: e.Column, Message: msg, Hint: hint})
			}
		})
	}
	return !c.failed
}

// ownedTwice refuses a namespace that two bundles declare. The finding is about the one that is not published.
func (c *compiler) ownedTwice(ns string, taker, owner *Source) {
	if taker.Published && !owner.Published {
		taker, owner = owner, taker
	}
	c.report(Finding{
		Bundle: taker.Name, File: taker.schemaFile("namespace " + ns), Message: fmt.Sprintf("namespace %q is owned by bundle %s", ns, owner.Name), Hint: "a namespace has one owner",
		Other: owner.Name, Without: fmt.Sprintf("namespace %q is owned by another bundle", ns),
	})
}

// nested refuses a namespace inside of another bundle's namespace, and one around it: people take
// Shop::Sub for a part of Shop. Bundles that have such namespaces already may keep them.
func (c *compiler) nested(b *compiledBundle, src *Source) {
	for _, ns := range b.namespaces {
		for _, other := range sortedKeys(c.set.owners) {
			owner := c.set.owners[other]
			if ns == "" || other == "" || owner == b.name || !strings.HasPrefix(ns, other+"::") && !strings.HasPrefix(other, ns+"::") {
				continue
			}
			kept := c.previous != nil && c.previous.owners[ns] == b.name && c.previous.owners[other] == owner
			f := Finding{Bundle: b.name, File: src.schemaFile("namespace " + ns), Message: fmt.Sprintf("namespace %s is inside of namespace %s, which is owned by bundle %s", ns, other, owner),
				Hint: "a namespace and those inside of it have one owner", Warning: kept,
				Other: owner, Without: fmt.Sprintf("namespace %s is inside of a namespace that is owned by another bundle", ns)}
			if len(other) > len(ns) {
				f.Message = fmt.Sprintf("namespace %s is around namespace %s, which is owned by bundle %s", ns, other, owner)
				f.Without = fmt.Sprintf("namespace %s is around a namespace that is owned by another bundle", ns)
			}
			if !c.trusted {
				c.report(f)
			}
		}
	}
}

// resolveFinding finds the bundle that caused an error in the joined schemas: the first bundle
// that does not resolve when the others are reduced to their names. A common type is resolved
// where it is used, so the error can need two bundles. Then it is the bundle without which the
// others resolve, one that is not published yet if there are several.
func (c *compiler) resolveFinding(err error, sources []Source, parsed []*sast.Schema) Finding {
	// resolve reduces all bundles but one to their names, or that one alone.
	resolve := func(i int, alone bool) error {
		joined := slices.Clone(parsed)
		for j := range joined {
			if (j == i) == alone {
				joined[j] = namesOnly(parsed[j])
			}
		}
		_, err := resolved.Resolve(mergeSchemas(joined))
		return err
	}
	for i, src := range sources {
		if err := resolve(i, false); err != nil {
			f := Finding{Bundle: src.Name, File: src.SchemaFile, Message: err.Error()}
			if m := undefinedName.FindStringSubmatch(f.Message); m != nil {
				f.File, f.Line, f.Column = src.firstUse(m[1])
			}
			return f
		}
	}
	for _, published := range []bool{false, true} {
		for i, src := range sources {
			if src.Published == published && resolve(i, true) == nil {
				return Finding{Bundle: src.Name, File: src.SchemaFile, Message: err.Error()}
			}
		}
	}
	return Finding{Message: err.Error()}
}

// policies parses and checks the policies of one bundle.
func (c *compiler) policies(src Source) {
	b := c.set.bundles[src.Name]
	where := map[string]*policy{}
	var taken room
	for _, text := range src.Policies {
		first := max(text.Line, 1)
		var statements []statement
		var errs []textError
		if text.JSON {
			statements, errs = splitJSON(text.Text, c.stopped)
		} else {
			statements, errs = split(text.Text, c.trusted || src.Published)
		}
		if len(statements)+len(errs) == 0 && !src.Published {
			c.rule(Finding{Bundle: src.Name, File: text.File, Message: "holds no policy", Hint: "remove the file, or what comments its policies out", Warning: true})
		}
		for _, e := range errs {
			c.report(Finding{Bundle: src.Name, File: text.File, Line: first + e.line - 1, Column: e.column, Message: e.msg, Hint: e.hint})
		}
		for _, st := range statements {
			if c.stopped() {
				return
			}
			st.line += first - 1
			p, terr := c.parse(src.Name, text.File, st)
			if terr != nil {
				c.report(Finding{Bundle: src.Name, File: text.File, Line: terr.line, Column: terr.column, Message: terr.msg, Hint: terr.hint})
				continue
			}
			if taken.take(p); !c.trusted && !src.Published && taken.full() != "" {
				c.report(Finding{Bundle: src.Name, File: text.File, Message: "the bundle " + taken.full(), Hint: "split the bundle"})
				return
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
	if !c.trusted && !src.Published {
		c.looks(src, b)
	}
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

func (c *compiler) parse(bundle, file string, st statement) (*policy, *textError) {
	key := parseKey{bundle, st.text}
	if c.previous != nil {
		if p, ok := c.previous.parsed[key]; ok {
			// Other Sets share the policy, so it must not change. Its place and its
			// level, which depends on the schema, are set in a copy.
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

// index adds each policy to the index of the actions that it can decide.
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
		c.checkDecisionCost(a)
		if a.fieldOf != nil {
			c.set.classify(a)
		}
	}
}
