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
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// ownRules are refusals of this service that Cedar does not know.
var ownRules = regexp.MustCompile(`^dereferences (the literal|entities \d+ deep)`)

var ownSchemaRules = regexp.MustCompile(` is a name of Cedar's own and cannot be declared`)

func envUint(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// On drawn worlds, this engine and the reference implementation agree: on which
// schemas, policies, entities and requests are valid, and on each answer with its
// reasons and errors. CEDARPOST_DIFF_CASES draws more, CEDARPOST_SEED the same
// again, and CEDARPOST_DIFF_CASE one alone.
func TestDifferential(t *testing.T) {
	seed := envUint(t, "CEDARPOST_SEED", rand.Uint64())
	first, last := uint64(0), envUint(t, "CEDARPOST_DIFF_CASES", 80)
	if os.Getenv("CEDARPOST_DIFF_CASE") != "" {
		first = envUint(t, "CEDARPOST_DIFF_CASE", 0)
		last = first + 1
	}
	t.Logf("CEDARPOST_SEED=%d", seed)
	dir := installReference(t)
	count := &tally{counts: map[string]int{}}
	numbers := make(chan uint64)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		ref := startReference(t, dir)
		wg.Go(func() {
			dead := false
			for n := range numbers {
				if dead {
					continue
				}
				d := &diff{count: count, ref: ref, number: n, c: drawCase(seed, n)}
				if err := d.run(); err != nil {
					count.failf("case %d: %v\n%s", n, err, d.c.schema)
					dead = errors.Is(err, errReference)
				}
			}
		})
	}
	for n := first; n < last; n++ {
		numbers <- n
	}
	close(numbers)
	wg.Wait()
	for i, f := range count.failed {
		if i == 10 {
			t.Errorf("and %d more", len(count.failed)-i)
			break
		}
		t.Error(f)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n%d worlds, against the reference implementation\n", last-first)
	for _, part := range []string{"schema", "policy", "entity", "request", "answer", "gap"} {
		lines, sum := count.of(part + " ")
		fmt.Fprintf(&b, "  %7d  %s\n%s\n", sum, part, strings.Join(lines, "\n"))
	}
	t.Log(b.String())
	if last-first >= 150 {
		for _, must := range []string{"policy accepted", "policy refused", "request refused", "entity refused", "answer allow", "answer deny", "answer with errors"} {
			if _, n := count.of(must); n == 0 {
				t.Errorf("no %s was drawn", must)
			}
		}
	}
}

// text is JSON of a value. Maps and slices keep what is in them as it is.
func text(v any) json.RawMessage {
	out, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return out
}

// spell writes a drawn value: references and extension values in the explicit
// form, or in the short one that only a schema makes clear.
func spell(v any, short bool) any {
	switch v := v.(type) {
	case diffRef:
		ref := map[string]any{"type": v[0], "id": v[1]}
		if short {
			return ref
		}
		return map[string]any{"__entity": ref}
	case diffExt:
		if short {
			return v[1]
		}
		return map[string]any{"__extn": map[string]any{"fn": v[0], "arg": v[1]}}
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = spell(v[i], short)
		}
		return out
	case map[string]any:
		out := make(map[string]any, len(v))
		for k := range v {
			out[k] = spell(v[k], short)
		}
		return out
	}
	return v
}

func spellUID(u [2]string) map[string]string { return map[string]string{"type": u[0], "id": u[1]} }

func cedarUIDOf(u [2]string) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType(u[0]), cedar.String(u[1]))
}

func (e diffEntity) json(short bool) map[string]any {
	parents := []any{}
	for _, p := range e.parents {
		parents = append(parents, spellUID(p))
	}
	return map[string]any{"uid": spellUID([2]string{e.typ, e.id}), "attrs": spell(e.attrs, short), "tags": spell(e.tags, short), "parents": parents}
}

// diff runs one case on both sides.
type diff struct {
	count  *tally
	ref    *reference
	number uint64
	c      diffCase
	short  bool

	schema json.RawMessage
	set    *Set // of what may be published
	all    *Set // of all policies that parse, or nil
}

func policyID(i int) string { return fmt.Sprintf("p%d", i) }

// source makes a bundle of the policies with the given numbers.
func (d *diff) source(numbers []int) (Source, json.RawMessage) {
	src := Source{Name: corpusBundle, SchemaFile: "schema", Schema: d.c.schema, SkipForbidErrors: true}
	static := map[string]string{}
	for _, i := range numbers {
		src.Policies = append(src.Policies, PolicyText{File: policyID(i), Text: fmt.Sprintf("@id(%q) %s", policyID(i), d.c.policies[i])})
		static[policyID(i)] = d.c.policies[i]
	}
	return src, text(map[string]any{"staticPolicies": static})
}

func (d *diff) run() error {
	d.schema, d.short = text(d.c.schema), d.number%2 == 1
	var numbers []int
	for i := range d.c.policies {
		numbers = append(numbers, i)
	}
	src, _ := d.source(numbers)
	_, findings := Compile([]Source{src}, nil)
	// While one policy is too costly to check, none is validated, so such policies are left out.
	costly := func(i int) bool {
		return slices.ContainsFunc(findings, func(f Finding) bool { return f.File == policyID(i) && strings.Contains(f.Message, "steps to check") })
	}
	if slices.ContainsFunc(numbers, costly) {
		kept := d.c.policies[:0:0]
		for i, p := range d.c.policies {
			if costly(i) {
				d.count.add("policy refused: by a rule of our own alone")
			} else {
				kept = append(kept, p)
			}
		}
		d.c.policies = kept
		return d.run()
	}
	var schemaError string
	errorsOf := map[string][]string{}
	for _, f := range findings {
		switch {
		case f.File == "schema":
			schemaError = f.Message
		case !f.Warning:
			errorsOf[f.File] = append(errorsOf[f.File], f.Message)
		}
	}
	verdicts, err := d.verdicts(numbers)
	if err != nil {
		return err
	}
	if ownSchemaRules.MatchString(schemaError) {
		d.count.add("schema refused: by a rule of our own alone")
		return nil
	}
	if (verdicts == nil) != (schemaError != "") {
		return fmt.Errorf("schema: ours %q, reference accepts: %v", schemaError, verdicts != nil)
	}
	if schemaError != "" {
		d.count.add("schema refused by both")
		return nil
	}
	d.count.add("schema accepted by both")
	accepted, parseable := d.validate(numbers, errorsOf, verdicts)
	src, acceptedJSON := d.source(accepted)
	if d.set, findings = Compile([]Source{src}, nil); d.set == nil {
		return fmt.Errorf("what was accepted together with others is refused: %s", findings[0])
	}
	src, parseableJSON := d.source(parseable)
	if d.all, err = byHand(src); err != nil {
		return err
	}
	return d.answers(acceptedJSON, parseableJSON)
}

// refVerdict is what the reference says of one policy.
type refVerdict struct {
	parses bool
	errors []string
	warned bool
}

// verdicts asks for the reference's verdict on each policy, nil when it refuses
// the schema.
func (d *diff) verdicts(numbers []int) ([]refVerdict, error) {
	ask := func(numbers []int) (refAnswer, error) {
		_, policies := d.source(numbers)
		answers, err := d.ref.ask(call("validate", text(map[string]any{"schema": d.schema, "policies": policies})))
		if err != nil {
			return refAnswer{}, err
		}
		return answers[0], nil
	}
	fill := func(out []refVerdict, a refAnswer) {
		for i := range out {
			for _, e := range a.ValidationErrors {
				if e.PolicyID == policyID(i) {
					out[i].errors = append(out[i].errors, strings.TrimPrefix(e.Error.Message, fmt.Sprintf("for policy `%s`, ", e.PolicyID)))
				}
			}
			out[i].warned = out[i].warned || slices.ContainsFunc(a.ValidationWarnings, func(w refProblem) bool { return w.PolicyID == policyID(i) })
		}
	}
	out := make([]refVerdict, len(numbers))
	whole, err := ask(numbers)
	if err != nil {
		return nil, err
	}
	if whole.ok() {
		for i := range out {
			out[i].parses = true
		}
		fill(out, whole)
		return out, nil
	}
	// The schema, or some policy, does not parse.
	none, err := ask(nil)
	if err != nil || !none.ok() {
		return nil, err
	}
	for _, i := range numbers {
		one, err := ask([]int{i})
		if err != nil {
			return nil, err
		}
		out[i].parses = one.ok()
		if !one.ok() {
			out[i].errors = []string{one.String()}
		}
		fill(out, one)
	}
	return out, nil
}

// validate compares the verdicts on each policy, and returns which may be
// published and which at least parse.
func (d *diff) validate(numbers []int, errorsOf map[string][]string, verdicts []refVerdict) (accepted, parseable []int) {
	for _, i := range numbers {
		reference := verdicts[i].errors
		var ours, own []string
		for _, msg := range errorsOf[policyID(i)] {
			if ownRules.MatchString(msg) {
				own = append(own, msg)
			} else {
				ours = append(ours, msg)
			}
		}
		if (len(reference) == 0) != (len(ours) == 0) {
			name, known := d.knownGap(i, ours, reference)
			if !known {
				d.count.failf("case %d: policy %s: ours %q, reference %q\n%s\n%s", d.number, policyID(i), ours, reference, d.c.policies[i], d.c.schema)
			}
			d.count.add("gap policy " + name)
		}
		p := parseAlone(d.c.policies[i])
		switch {
		case (p != nil) != verdicts[i].parses:
			d.count.failf("case %d: policy %s parses: ours %v, reference %v\n%s", d.number, policyID(i), p != nil, verdicts[i].parses, d.c.policies[i])
			continue
		case p == nil:
			d.count.add("policy refused: does not parse")
			continue
		case len(ours) > 0:
			d.count.add("policy refused: not valid")
		case len(own) > 0:
			d.count.add("policy refused: by a rule of our own alone")
		case verdicts[i].warned:
			accepted = append(accepted, i)
			d.count.add("policy accepted, where the reference warns that it is impossible")
		default:
			accepted = append(accepted, i)
			d.count.add("policy accepted")
		}
		parseable = append(parseable, i)
	}
	return accepted, parseable
}

// parseAlone parses a text of one policy, nil when it is none.
func parseAlone(text string) *policy {
	statements, errs := split("@id(\"p\") "+text, false)
	if len(errs) > 0 || len(statements) != 1 {
		return nil
	}
	p, err := parsePolicy(corpusBundle, "", statements[0])
	if _, found := tooManySigns(text); err != nil || found {
		return nil
	}
	return p
}

// knownGap names the gap that a disagreement about a policy is.
func (d *diff) knownGap(i int, ours, reference []string) (string, bool) {
	src, _ := d.source([]int{i})
	set, err := byHand(src)
	if err != nil {
		return "", false
	}
	for _, g := range gaps {
		if g.covers(set, set.bundles[corpusBundle].policies[0], ours, reference) {
			return g.what + " (" + g.guard + ")", true
		}
	}
	return "", false
}

// answers compares entities, requests and answers.
func (d *diff) answers(acceptedJSON, parseableJSON json.RawMessage) error {
	store, full, short, explicit, err := d.entities()
	if err != nil {
		return err
	}
	calls := []refCall{
		call("preparseSchema", "schema", d.schema),
		call("preparsePolicySet", "accepted", acceptedJSON),
		call("preparsePolicySet", "all", parseableJSON),
	}
	const setUp = 3
	for _, r := range d.c.requests {
		shared := func(set string) map[string]any {
			return map[string]any{"principal": spellUID(r.principal), "action": spellUID(r.action), "resource": spellUID(r.resource), "preparsedPolicySetId": set}
		}
		whole := shared("accepted")
		whole["context"], whole["entities"] = spell(r.context, d.short), short
		whole["preparsedSchemaName"], whole["validateRequest"] = "schema", true
		// Without a schema the reference takes what comes, valid or not.
		plain := shared("all")
		plain["context"], plain["entities"] = spell(r.context, false), explicit
		calls = append(calls, call("statefulIsAuthorized", text(whole)), call("statefulIsAuthorized", text(plain)))
	}
	answers, err := d.ref.ask(calls...)
	if err != nil {
		return err
	}
	for _, a := range answers[:setUp] {
		if !a.ok() {
			return errors.New(a.String())
		}
	}
	for i, r := range d.c.requests {
		at := fmt.Sprintf("case %d request %d", d.number, i)
		n := setUp + 2*i
		d.throughAll(at, r, store, answers[n], calls[n])
		d.evaluateAll(at, r, full, answers[n+1], calls[n+1])
	}
	return nil
}

// throughAll compares what the whole way of a request makes of the policies that
// may be published and the entities that may be stored.
func (d *diff) throughAll(at string, r diffRequest, store map[cedar.EntityUID]Entity, want refAnswer, sent refCall) {
	ask := Ask{Principal: cedarUIDOf(r.principal), Action: cedarUIDOf(r.action), Resource: cedarUIDOf(r.resource), Context: spell(r.context, d.short).(map[string]any)}
	q, err := d.set.read(ask)
	if err == nil && q.inapplicable {
		err = errors.New("not applicable")
	}
	if (err == nil) != want.ok() {
		d.count.failf("%s: ours %v, reference %s\n%s\n%s", at, err, want, sent, d.c.schema)
		return
	}
	if err != nil {
		d.count.add("request refused")
		return
	}
	d.count.add("request accepted")
	res, err := decideFrom(d.set, q, store)
	if err != nil {
		d.count.failf("%s: %v", at, err)
		return
	}
	var reasons, failed []string
	for _, p := range res.Policies {
		reasons = append(reasons, p.ID)
	}
	for _, e := range res.Errors {
		failed = append(failed, e.Policy.ID)
	}
	d.compare(at+" through question, index, slice and decision", want, res.Allowed, reasons, failed, sent)
}

// evaluateAll compares what index and evaluation make of all policies and all
// entities, valid or not.
func (d *diff) evaluateAll(at string, r diffRequest, full cedar.EntityMap, want refAnswer, sent refCall) {
	a, declared := d.all.actions[cedarUIDOf(r.action)]
	if !declared {
		return
	}
	req := cedar.Request{Principal: cedarUIDOf(r.principal), Action: a.uid, Resource: cedarUIDOf(r.resource)}
	err := json.Unmarshal(text(spell(r.context, false)), &req.Context)
	if readOtherwise(r.context) {
		d.count.add("gap value, without schema: cedar-go reads it otherwise")
		return
	}
	if (err == nil) != want.ok() {
		// A value that is none, like a date of the 31st of February.
		d.count.failf("%s: ours %v, reference %s\n%s", at, err, want, sent)
		return
	}
	if err != nil {
		return
	}
	ents := entitiesOf(d.all, full)
	v := d.all.evaluate(a.index.candidates(req.Principal, req.Resource, ents), req, ents)
	var reasons, failed []string
	for _, p := range v.reasons {
		reasons = append(reasons, p.ref.ID)
	}
	for _, e := range v.errors {
		failed = append(failed, e.Policy.ID)
	}
	d.compare(at+" through index and evaluation", want, v.allowed, reasons, failed, sent)
}

func (d *diff) compare(at string, want refAnswer, allowed bool, reasons, failed []string, sent refCall) {
	sorted := func(s []string) string {
		s = slices.Clone(s)
		slices.Sort(s)
		return strings.Join(s, " ")
	}
	decision := "deny"
	if allowed {
		decision = "allow"
	}
	var wantFailed []string
	for _, e := range want.Response.Diagnostics.Errors {
		wantFailed = append(wantFailed, e.PolicyID)
	}
	got := fmt.Sprintf("%s, reasons [%s], errors [%s]", decision, sorted(reasons), sorted(failed))
	expect := fmt.Sprintf("%s, reasons [%s], errors [%s]", want.Response.Decision, sorted(want.Response.Diagnostics.Reason), sorted(wantFailed))
	if got != expect {
		d.count.failf("%s: %s\n      want %s (%v)\n%s\n%s\n%s", at, got, expect, want.Response.Diagnostics.Errors, sent, strings.Join(d.c.policies, "\n"), d.c.schema)
		return
	}
	with := decision
	if len(failed) > 0 {
		with = "with errors, " + decision
	}
	d.count.add("answer " + with)
}

// entities compares the verdicts on each entity. It returns those that both
// accept as a store would hold them, all as evaluation takes them, and the same
// two lists as JSON.
func (d *diff) entities() (store map[cedar.EntityUID]Entity, full cedar.EntityMap, valid, loose []any, err error) {
	type one struct {
		uid           cedar.EntityUID
		short, plain  any
		read          *Entity
		refusal       error
		parsed        cedar.Entity
		refusalParsed error // without a schema, as cedar-go reads it
	}
	var all []*one
	for _, e := range d.c.entities {
		o := &one{uid: cedarUIDOf([2]string{e.typ, e.id}), plain: e.json(false)}
		spelled := e.json(d.short)
		o.short = spelled
		raw := RawEntity{UID: o.uid, Attrs: spelled["attrs"].(map[string]any), Tags: spelled["tags"].(map[string]any)}
		for _, p := range e.parents {
			raw.Parents = append(raw.Parents, cedarUIDOf(p))
		}
		o.read, o.refusal = d.set.ReadEntity(raw)
		if o.refusalParsed = json.Unmarshal(text(o.plain), &o.parsed); readOtherwise(e.attrs) || readOtherwise(e.tags) {
			d.count.add("gap value, without schema: cedar-go reads it otherwise")
			o.refusalParsed = errors.New("not read as Cedar does")
		}
		all = append(all, o)
	}
	// The reference sees what we accept with every request, and must not refuse
	// it there. What we refuse is asked about here.
	for i, o := range all {
		if o.refusal == nil {
			d.count.add("entity accepted")
			continue
		}
		answers, err := d.ref.ask(call("checkParseEntities", text(map[string]any{"entities": []any{o.short}, "schema": d.schema})))
		switch {
		case err != nil:
			return nil, nil, nil, nil, err
		case !answers[0].ok():
			d.count.add("entity refused")
		case indirectParent(d.set, o.uid, d.c.entities[i]):
			d.count.add("gap entity refused: a type that is only a parent's parent in the schema")
		default:
			d.count.failf("case %d: entity %s: ours %v, reference accepts\n%s\n%s", d.number, o.uid, o.refusal, text(o.short), d.c.schema)
		}
	}
	store, full, valid, loose = map[cedar.EntityUID]Entity{}, cedar.EntityMap{}, []any{}, []any{}
	for _, o := range all {
		if o.refusal == nil {
			store[o.uid] = *o.read
			valid = append(valid, o.short)
		}
		if o.refusalParsed == nil {
			full[o.uid] = o.parsed
			loose = append(loose, o.plain)
		}
	}
	// Evaluation takes every entity with all its ancestors, and the reference
	// without a schema must be told of the actions.
	closed := cedar.EntityMap{}
	for uid, e := range full {
		e.Parents = cedar.NewEntityUIDSet(ancestorsIn(full, uid)...)
		closed[uid] = e
	}
	for uid, e := range d.all.static {
		parents := []any{}
		for p := range e.Parents.All() {
			parents = append(parents, spellUID([2]string{string(p.Type), string(p.ID)}))
		}
		loose = append(loose, map[string]any{"uid": spellUID([2]string{string(uid.Type), string(uid.ID)}), "attrs": map[string]any{}, "parents": parents})
	}
	return store, closed, valid, loose, nil
}

// indirectParent says whether an entity is refused because a parent is of a type
// that the schema names only as a parent of a parent. The reference allows that,
// and cedar-go and this service do not: a refusal that says what it wants.
func indirectParent(s *Set, uid cedar.EntityUID, e diffEntity) bool {
	err := s.checkParents(uid, nil)
	for _, p := range e.parents {
		err = errors.Join(err, s.checkParents(uid, []cedar.EntityUID{cedarUIDOf(p)}))
	}
	return err != nil
}
