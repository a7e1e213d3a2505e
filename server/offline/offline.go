// Package offline checks a bundle without a server and a database: it compiles the
// bundle, reads its entities and runs its tests, with the engine that decides.
package offline

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/entityfile"
	"github.com/cedarpost/cedarpost/server/wire"
)

// TestResult is the outcome of one check of a bundle's tests.yaml.
type TestResult struct {
	Name string
	Line int
	// Failures are the differences. There are none if the test passed.
	Failures []string
}

// Report is the outcome of checking a bundle.
type Report struct {
	Findings []engine.Finding
	Tests    []TestResult
}

// Valid reports whether there are no findings except warnings. It does not look at the
// tests.
func (r *Report) Valid() bool {
	return !slices.ContainsFunc(r.Findings, func(f engine.Finding) bool { return !f.Warning })
}

// Failed counts the tests that failed.
func (r *Report) Failed() int {
	n := 0
	for _, t := range r.Tests {
		if len(t.Failures) > 0 {
			n++
		}
	}
	return n
}

// Check compiles a bundle together with the sources of other bundles, checks its
// entities, and runs its tests on them. The Set is nil if the bundle is not valid.
func Check(b *bundle.Bundle, others []engine.Source, previous *engine.Set) (*Report, *engine.Set) {
	r, set, _ := CheckUntil(b, others, previous, nil)
	return r, set
}

// CheckUntil is [Check] for a bundle of somebody else: it calls ended before each policy and
// each test, and stops with the error that ended returns. ended may be nil.
func CheckUntil(b *bundle.Bundle, others []engine.Source, previous *engine.Set, ended func() error) (*Report, *engine.Set, error) {
	sources := append(slices.Clone(others), Source(b))
	r := &Report{}
	set, findings, err := engine.CompileUntil(sources, previous, ended)
	if err != nil {
		return nil, nil, err
	}
	r.Findings = findings
	if set == nil {
		return r, nil, nil
	}
	pool, refused := Seed(b, set)
	r.Findings = append(r.Findings, refused...)
	if !r.Valid() {
		return r, nil, nil
	}
	if b.Entities != nil {
		for _, m := range set.Mentions(b.Name) {
			if !pool.Has(m.UID) {
				r.Findings = append(r.Findings, m.Unlisted())
			}
		}
	}
	for _, t := range b.Tests {
		if ended != nil {
			if err := ended(); err != nil {
				return nil, nil, err
			}
		}
		r.Tests = append(r.Tests, TestResult{t.Name, t.Line, runTest(set, pool, b.Name, t)})
	}
	return r, set, nil
}

// Source makes the source that the engine compiles from a bundle.
func Source(b *bundle.Bundle) engine.Source {
	src := engine.Source{
		Name: b.Name, FieldsFile: bundle.FieldsName,
		SkipForbidErrors: b.OnForbidError == bundle.Skip,
		ManifestFile:     bundle.ManifestName, PrincipalTokens: PrincipalTokens(b.PrincipalTokens),
	}
	if one := b.Schemas[0]; len(b.Schemas) == 1 && !one.JSON() {
		src.SchemaFile, src.Schema = one.Path, string(one.Content)
	} else {
		for _, f := range b.Schemas {
			src.Schemas = append(src.Schemas, engine.SchemaText{File: f.Path, Text: string(f.Content), JSON: f.JSON()})
		}
	}
	src.Exports = Exports(b.Exports)
	for _, f := range b.Policies {
		src.Policies = append(src.Policies, engine.PolicyText{File: f.Path, Text: string(f.Content), JSON: f.JSON()})
	}
	for _, f := range b.Fields {
		src.Fields = append(src.Fields, engine.Field{Type: f.Type, Path: f.Path, Groups: f.Groups, Line: f.Line, Column: f.Column})
	}
	return src
}

// PrincipalTokens converts the principal_tokens of a bundle to the types of the engine.
func PrincipalTokens(list []bundle.PrincipalToken) (out []engine.PrincipalToken) {
	for _, t := range list {
		e := engine.PrincipalToken{Issuer: t.Issuer, Type: t.Type, IDClaim: t.IDClaim, IDPrefix: t.IDPrefix, Audiences: t.Audiences, Line: t.Line, Column: t.Column}
		for _, a := range t.Context {
			e.Context = append(e.Context, engine.ClaimAttribute(a))
		}
		out = append(out, e)
	}
	return out
}

// Exports converts the exports of a bundle to the types of the engine.
func Exports(list []bundle.Export) (out []engine.Export) {
	for _, e := range list {
		out = append(out, engine.Export(e))
	}
	return out
}

// Seed reads the entities.json of a bundle into a pool, where questions find the
// entities. It returns a finding for each entity that is refused.
func Seed(b *bundle.Bundle, set *engine.Set) (*engine.Pool, []engine.Finding) {
	pool := engine.NewPool()
	if b.Entities == nil {
		return pool, nil
	}
	refuse := func(err error) engine.Finding {
		return engine.Finding{Bundle: b.Name, File: bundle.EntitiesName, Message: err.Error()}
	}
	list, err := entityfile.Parse(b.Entities)
	if err != nil {
		return nil, []engine.Finding{refuse(err)}
	}
	var refused []engine.Finding
	var stored []engine.Entity
	seen := map[cedar.EntityUID]bool{}
	for _, e := range list {
		raw := wire.Entity(e)
		if seen[raw.UID] {
			refused = append(refused, refuse(fmt.Errorf("entity %s is in the file twice", raw.UID)))
			continue
		}
		seen[raw.UID] = true
		ent, err := set.ReadEntity(raw)
		if err != nil {
			refused = append(refused, refuse(err))
			continue
		}
		stored = append(stored, *ent)
	}
	pool.Add(nil, stored)
	return pool, refused
}

// runTest asks one question and compares the answer with the expected one.
func runTest(set *engine.Set, pool *engine.Pool, bundleName string, t bundle.Test) []string {
	ask := engine.Ask{
		Principal: refUID(t.Principal), Action: refUID(t.Action), Resource: refUID(t.Resource),
		Context: numbers(t.Context).(map[string]any), FieldsAsked: t.AllFields || len(t.Fields) > 0,
		Paths: t.Fields, All: t.AllFields, RequireAll: t.RequireAll,
	}
	for _, e := range t.Entities {
		m, ok := e.(map[string]any)
		if !ok {
			return []string{"entities: not a list of entities in Cedar's JSON format"}
		}
		pe, err := entityfile.FromMap(m)
		if err != nil {
			return []string{"entities: " + err.Error()}
		}
		ask.Inline = append(ask.Inline, wire.Entity(pe))
	}
	evaluation, err := set.Prepare(ask, pool, func(missing []cedar.EntityUID) error {
		pool.Add(missing, nil) // the pool has all entities of the bundle
		return nil
	})
	if err != nil {
		return []string{err.Error()}
	}
	res, err := evaluation.Decide()
	if err != nil {
		return []string{err.Error()}
	}
	return compareResult(bundleName, t.Expect, res)
}

func compareResult(bundleName string, want bundle.Expect, res *engine.Result) []string {
	var out []string
	differ := func(what, want, got string) {
		if want != got {
			want, got = short(want), short(got)
			out = append(out, fmt.Sprintf("%s: expected %s, got %s", what, want, got))
		}
	}
	decision, deniedAt := "allow", ""
	if !res.Allowed {
		decision = "deny"
		deniedAt = [...]string{"", "FUNCTION", "OBJECT", "FIELD"}[res.DeniedAt]
	}
	differ("decision", want.Decision, decision)
	if want.DeniedAt != "" {
		differ("denied_at", want.DeniedAt, deniedAt)
	}
	list := func(what string, want, got []string) {
		if want == nil {
			return
		}
		want, got = slices.Clone(want), slices.Clone(got)
		slices.Sort(want)
		slices.Sort(got)
		differ(what, "["+strings.Join(want, ", ")+"]", "["+strings.Join(got, ", ")+"]")
	}
	list("permitted", want.Permitted, res.Permitted)
	list("denied", want.Denied, res.Denied)
	var determining, obligations, advice []string
	for _, p := range res.Policies {
		name := p.ID
		if p.Bundle != bundleName {
			name = p.String()
		}
		determining = append(determining, name)
	}
	for _, o := range res.Obligations {
		obligations = append(obligations, o.Text)
	}
	for _, a := range res.Advice {
		advice = append(advice, a.Text)
	}
	list("determining", want.Determining, determining)
	list("obligations", want.Obligations, obligations)
	list("advice", want.Advice, advice)
	return out
}

// maxCompared bounds the texts in the difference between two answers, in bytes. A test can ask
// for thousands of fields, and a bundle has thousands of tests.
const maxCompared = 2000

func short(text string) string {
	if len(text) <= maxCompared {
		return text
	}
	return strings.ToValidUTF8(text[:maxCompared], "") + "…"
}

func refUID(r bundle.Ref) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType(r.Type), cedar.String(r.ID))
}

// numbers turns each int64 of YAML into a value that the engine reads.
func numbers(v any) any {
	switch v := v.(type) {
	case int64:
		return json.Number(fmt.Sprint(v))
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = numbers(v[i])
		}
		return out
	case map[string]any:
		out := make(map[string]any, len(v))
		for k := range v {
			out[k] = numbers(v[k])
		}
		return out
	}
	return v
}
