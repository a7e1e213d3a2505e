package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cedar-policy/cedar-go"
	sast "github.com/cedar-policy/cedar-go/x/exp/schema/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
	xtypes "github.com/cedar-policy/cedar-go/x/exp/types"

	"github.com/cedarpost/cedarpost/server/corpustest"
)

// class names a kind of refusal that is by design, by what its message says. A
// message that is of no class fails the test: what we refuse, we refuse knowingly.
type class struct {
	message *regexp.Regexp
	name    string
	// own: a rule of this service alone. What is not, the reference refuses too.
	own bool
}

func classes(rows ...any) []class {
	var out []class
	for i := 0; i < len(rows); i += 3 {
		out = append(out, class{regexp.MustCompile(rows[i].(string)), rows[i+1].(string), rows[i+2].(bool)})
	}
	return out
}

// What Compile refuses. What it says itself comes first; the rest is the
// validator's.
var setClasses = classes(
	`^dereferences the literal `, "a policy dereferences a literal", true,
	`^dereferences entities \d+ deep`, "a policy dereferences deeper than 3", true,
	`: ".*" is not a value of the enumerated type `, "a policy names an unlisted id of an enumerated type", false,
	``, "a policy does not validate", false,
)

// What Read refuses. The reference accepts all requests and entities of the
// corpus, so these are rules of our own.
var requestClasses = classes(
	`^context.*: not valid text`, "NUL in the context", true,
)

// What ReadEntity refuses.
var entityClasses = classes(
	`: actions come from the schema`, "an action", true,
	`not valid text \(UTF-8 without NUL\)$`, "NUL", true,
)

func classify(list []class, message string) (class, bool) {
	for _, c := range list {
		if c.message.MatchString(message) {
			return c, true
		}
	}
	return class{}, false
}

// tally counts. It is safe for concurrent use.
type tally struct {
	mu     sync.Mutex
	counts map[string]int
	failed []string
}

func (c *tally) add(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[what]++
}

func (c *tally) failf(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failed = append(c.failed, fmt.Sprintf(format, args...))
}

// of returns the lines whose name begins with prefix, by count.
func (c *tally) of(prefix string) (lines []string, sum int) {
	var names []string
	for name, n := range c.counts {
		if strings.HasPrefix(name, prefix) {
			names = append(names, name)
			sum += n
		}
	}
	slices.SortFunc(names, func(a, b string) int { return c.counts[b] - c.counts[a] })
	for _, name := range names {
		lines = append(lines, fmt.Sprintf("      %7d  %s", c.counts[name], strings.TrimPrefix(name, prefix)))
	}
	return lines, sum
}

// corpusBundle is the bundle that each policy set of the corpus becomes.
const corpusBundle = "corpus"

// corpusSource makes a bundle of a policy set. Only the names are added that
// this service wants.
func corpusSource(c corpustest.Case) (Source, error) {
	statements, errs := split(c.Policies, false)
	if len(errs) > 0 {
		return Source{}, errors.New(errs[0].msg)
	}
	src := Source{Name: corpusBundle, Schema: c.Schema, SkipForbidErrors: true}
	for i, st := range statements {
		src.Policies = append(src.Policies, PolicyText{Text: fmt.Sprintf("@id(\"policy%d\")\n%s", i, st.text)})
	}
	return src, nil
}

// The answers of this engine are those of the reference for the corpus. A policy set
// that may be published goes the whole way of a request: Compile, Read, a slice that
// is loaded step by step, Decide. What is refused on that way is counted, and then
// decided anyway from where it stopped, so that each request is evaluated.
//
// This is a sample of the corpus, another one in each run: one policy set of ten.
func TestConformance(t *testing.T) {
	const oneIn = 10
	sample := corpustest.Sample(t, oneIn, rand.IntN(oneIn))
	if requests := conformAll(t, sample); len(sample) != 775 || requests != 6200 {
		t.Errorf("%d policy sets and %d requests in the sample", len(sample), requests)
	}
}

// TestSoakConformance is the long form, with the whole corpus.
func TestSoakConformance(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("long: make soak, make conformance")
	}
	cases := corpustest.Load(t)
	if requests := conformAll(t, cases); len(cases) != 7750 || requests != 62000 {
		t.Errorf("%d policy sets and %d requests in the corpus", len(cases), requests)
	}
}

func conformAll(t *testing.T, cases []corpustest.Case) (requests int) {
	t.Helper()
	count := &tally{counts: map[string]int{}}
	work := make(chan corpustest.Case)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for c := range work {
				conform(count, c)
			}
		})
	}
	for _, c := range cases {
		requests += len(c.Requests)
		work <- c
	}
	close(work)
	wg.Wait()
	if _, n := count.of("run "); n != requests {
		t.Errorf("%d requests run of %d", n, requests)
	}
	for i, f := range count.failed {
		if i == 20 {
			t.Errorf("and %d more", len(count.failed)-i)
			break
		}
		t.Error(f)
	}
	t.Log(conformanceSummary(count, len(cases), requests))
	return requests
}

func conformanceSummary(count *tally, sets, requests int) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	list := func(title, prefix string) {
		lines, sum := count.of(prefix)
		line("  %7d  %s", sum, title)
		for _, l := range lines {
			line("%s", l)
		}
	}
	line("\nThe reference corpus")
	line("  %7d  policy sets", sets)
	line("  %7d  accepted for publishing", count.counts["set accepted"])
	line("  %7d  of those have a policy that applies to nothing", count.counts["set accepted with a policy that applies to nothing"])
	list("refused by design", "set refused: ")
	line("  %7d  requests", requests)
	list("run", "run ")
	line("  %7d  agreed in decision, reasons and errors", count.counts["agreed"])
	line("  %7d  disagreed", requests-count.counts["agreed"])
	list("refused by design, of sets that are accepted", "request refused: ")
	line("  %7d  entities of accepted sets read as the reference reads them", count.counts["entity read"])
	list("refused by design", "entity refused: ")
	return b.String()
}

// conform runs one policy set.
func conform(count *tally, c corpustest.Case) {
	src, err := corpusSource(c)
	if err != nil {
		count.failf("%s: %v", c.Name, err)
		return
	}
	set, findings := Compile([]Source{src}, nil)
	if set != nil {
		count.add("set accepted")
		// The reference refused such a policy when the corpus was made. It warns of it
		// by now: TestDifferentialSyntax has some.
		impossible := slices.ContainsFunc(findings, func(f Finding) bool { return strings.Contains(f.Message, noActionApplies) })
		if !c.Strict && impossible {
			count.add("set accepted with a policy that applies to nothing")
		} else if !c.Strict {
			count.failf("%s: published, but the reference refuses it", c.Name)
		}
		conformPublished(count, c, set)
		return
	}
	why, ok := classify(setClasses, findings[0].Message)
	if !ok || (c.Strict && !why.own) {
		count.failf("%s: refused for %s, reference accepts: %v", c.Name, findings[0], c.Strict)
	}
	count.add("set refused: " + why.name)
	if set, err = byHand(src); err != nil {
		count.failf("%s: %v", c.Name, err)
		return
	}
	if valid := set.validates(); valid != c.Strict {
		count.failf("%s: valid: %v, reference: %v", c.Name, valid, c.Strict)
	}
	conformUnpublished(count, c, set)
}

// corpusEntities decodes the entities of a case, as Cedar reads them with a schema.
func corpusEntities(c corpustest.Case, schema *resolved.Schema) (cedar.EntityMap, error) {
	var m xtypes.EntityMap
	err := m.UnmarshalJSONWithSchema([]byte(c.Entities), schema)
	return cedar.EntityMap(m), err
}

// decodeNumbers decodes JSON and keeps each number exact.
func decodeNumbers(data []byte, into any) error {
	d := json.NewDecoder(strings.NewReader(string(data)))
	d.UseNumber()
	return d.Decode(into)
}

// conformPublished takes the whole way.
func conformPublished(count *tally, c corpustest.Case, set *Set) {
	full, err := corpusEntities(c, set.schema)
	if err != nil {
		count.failf("%s: %v", c.Name, err)
		return
	}
	store := readCorpusEntities(count, c, set, full)
	for i, r := range c.Requests {
		at := fmt.Sprintf("%s request %d", c.Name, i)
		var context cedar.Record
		ask := Ask{Principal: r.Principal, Action: r.Action, Resource: r.Resource}
		if err := errors.Join(decodeNumbers(r.Context, &ask.Context), json.Unmarshal(r.Context, &context)); err != nil {
			count.failf("%s: %v", at, err)
			continue
		}
		q, err := set.read(ask)
		if err == nil && q.inapplicable {
			err = errors.New("not applicable")
		}
		if err != nil {
			why, ok := classify(requestClasses, err.Error())
			if !ok {
				count.failf("%s: %v", at, err)
				continue
			}
			count.add("request refused: " + why.name)
			count.add("run through index, slice and decision")
			q = &Question{request: cedar.Request{Principal: r.Principal, Action: r.Action, Resource: r.Resource, Context: context}, action: set.actions[r.Action]}
		} else {
			if !q.request.Context.Equal(context) {
				count.failf("%s: context read as %v, want %v", at, q.request.Context, context)
			}
			count.add("run through question, index, slice and decision")
		}
		res, err := decideFrom(set, q, store)
		if err != nil {
			count.failf("%s: %v", at, err)
			continue
		}
		var reasons, failed []string
		for _, p := range res.Policies {
			reasons = append(reasons, p.ID)
		}
		for _, e := range res.Errors {
			failed = append(failed, e.Policy.ID)
		}
		compare(count, at, r, res.Allowed, reasons, failed)
	}
}

// compare compares an answer with the reference's.
func compare(count *tally, at string, r corpustest.Request, allowed bool, reasons, failed []string) {
	sorted := func(s []string) string {
		s = slices.Clone(s)
		slices.Sort(s)
		return strings.Join(s, " ")
	}
	decision := "deny"
	if allowed {
		decision = "allow"
	}
	got := fmt.Sprintf("%s, reasons [%s], errors [%s]", decision, sorted(reasons), sorted(failed))
	want := fmt.Sprintf("%s, reasons [%s], errors [%s]", r.Decision, sorted(r.Reasons), sorted(r.Errors))
	if got != want {
		count.failf("%s: %s\n      want %s", at, got, want)
		return
	}
	count.add("agreed")
}

// readCorpusEntities reads the entities as a write would. Those that a write
// refuses are taken as the reference reads them.
func readCorpusEntities(count *tally, c corpustest.Case, set *Set, full cedar.EntityMap) map[cedar.EntityUID]Entity {
	var list []struct {
		UID         cedar.EntityUID
		Attrs, Tags map[string]any
		Parents     []cedar.EntityUID
	}
	if err := decodeNumbers([]byte(c.Entities), &list); err != nil {
		count.failf("%s: %v", c.Name, err)
	}
	store := map[cedar.EntityUID]Entity{}
	for _, l := range list {
		want := full[l.UID]
		e, err := set.ReadEntity(RawEntity{UID: l.UID, Attrs: l.Attrs, Tags: l.Tags, Parents: l.Parents})
		if err != nil {
			why, ok := classify(entityClasses, err.Error())
			if !ok {
				count.failf("%s: %v", c.Name, err)
			}
			count.add("entity refused: " + why.name)
			store[l.UID] = Entity{UID: l.UID, Attrs: want.Attributes, Tags: want.Tags, Parents: slices.Collect(want.Parents.All())}
			continue
		}
		got := cedar.Entity{UID: e.UID, Attributes: e.Attrs, Tags: e.Tags, Parents: cedar.NewEntityUIDSet(e.Parents...)}
		if !got.Equal(want) {
			count.failf("%s: entity %s read as %v, want %v", c.Name, l.UID, got, want)
		}
		count.add("entity read")
		store[l.UID] = *e
	}
	return store
}

// decideFrom decides with a slice that is given what it asks for and no more.
func decideFrom(set *Set, q *Question, store map[cedar.EntityUID]Entity) (*Result, error) {
	pool := NewPool()
	sl := set.newSlice(q, pool)
	for m := sl.toLoad(); len(m) > 0; m = sl.toLoad() {
		pool.Add(m, withAncestors(store, m))
	}
	return set.decide(q, sl)
}

// ancestorsIn returns all ancestors of an entity.
func ancestorsIn(full cedar.EntityMap, uid cedar.EntityUID) []cedar.EntityUID {
	parents := map[cedar.EntityUID]map[cedar.EntityUID]bool{}
	for u, e := range full {
		parents[u] = map[cedar.EntityUID]bool{}
		for p := range e.Parents.All() {
			parents[u][p] = true
		}
	}
	out, _ := closeOver(uid, parents)
	return out
}

// byHand puts together the set of policies that Compile may refuse: parsed, and
// under the actions of the schema.
func byHand(src Source) (*Set, error) {
	sc, terr := parseSchema(src.Schema)
	if terr != nil {
		return nil, errors.New(terr.msg)
	}
	rs, err := resolved.Resolve(mergeSchemas([]*sast.Schema{sc}))
	if err != nil {
		return nil, err
	}
	b := &compiledBundle{name: src.Name, skipForbidErrors: src.SkipForbidErrors}
	set := &Set{
		bundles: map[string]*compiledBundle{src.Name: b}, owners: map[string]string{}, schema: rs,
		actions: map[cedar.EntityUID]*action{}, static: map[cedar.EntityUID]cedar.Entity{},
		actionTypes: map[cedar.EntityType]bool{}, requestTypes: map[cedar.EntityType]bool{}, fieldTypes: map[cedar.EntityType]bool{},
	}
	for _, ns := range namespacesOf(sc) {
		set.owners[ns] = src.Name
	}
	set.readSchema(func(_, msg, _ string) { err = errors.Join(err, errors.New(msg)) })
	if err != nil {
		return nil, err
	}
	for _, text := range src.Policies {
		p, terr := parsePolicy(src.Name, "", statement{text.Text, 1, 1})
		if terr != nil {
			return nil, fmt.Errorf("%s: %s", terr.msg, text.Text)
		}
		b.policies = append(b.policies, p)
		for _, a := range set.matchedActions(p) {
			a.index.add(p)
		}
	}
	return set, nil
}

// validates says whether the policies validate, lint of literals aside.
func (s *Set) validates() bool {
	v := validate.New(s.schema)
	return !slices.ContainsFunc(s.bundles[corpusBundle].policies, func(p *policy) bool { return v.Policy(p.ref.ID, p.tree()) != nil })
}

// conformUnpublished runs index and evaluation over all entities.
func conformUnpublished(count *tally, c corpustest.Case, set *Set) {
	full, err := corpusEntities(c, set.schema)
	if err != nil {
		count.failf("%s: %v", c.Name, err)
		return
	}
	closed := map[cedar.EntityUID]cedar.Entity{}
	for uid, e := range full {
		e.Parents = cedar.NewEntityUIDSet(ancestorsIn(full, uid)...)
		closed[uid] = e
	}
	for i, r := range c.Requests {
		at := fmt.Sprintf("%s request %d", c.Name, i)
		count.add("run through index and evaluation")
		req := cedar.Request{Principal: r.Principal, Action: r.Action, Resource: r.Resource}
		if err := json.Unmarshal(r.Context, &req.Context); err != nil {
			count.failf("%s: %v", at, err)
			continue
		}
		a, ok := set.actions[r.Action]
		if !ok {
			count.failf("%s: no action %s", at, r.Action)
			continue
		}
		ents := entitiesOf(set, closed)
		v := set.evaluate(a.index.candidates(r.Principal, r.Resource, ents), req, ents)
		var reasons, failed []string
		for _, p := range v.reasons {
			reasons = append(reasons, p.ref.ID)
		}
		for _, e := range v.errors {
			failed = append(failed, e.Policy.ID)
		}
		compare(count, at, r, v.allowed, reasons, failed)
	}
}
