package engine

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cedar-policy/cedar-go"
)

// What the figures mean is in docs/benchmarks.md. Each benchmark checks its
// answers before it measures.

var benchSizes = []int{100, 1_000, 10_000, 100_000}

// benchSchema is a service with 20 actions, half of them reading and half of
// them writing.
func benchSchema() string {
	var b strings.Builder
	b.WriteString(`namespace B {
  entity Role;
  entity Tenant;
  entity User in [Role, Tenant] { clearance: Long, suspended: Bool };
  entity Doc in [Tenant] { owner: User, status: String };
  action Reads, Writes;
`)
	for i := range benchActions {
		fmt.Fprintf(&b, "  action a%d in [%s] appliesTo { principal: [User], resource: [Doc], context: { mfa: Bool } };\n", i, benchGroup(i))
	}
	b.WriteString("}")
	return b.String()
}

const (
	benchActions = 20
	benchRoles   = 50
	benchGlobals = 20
)

func benchGroup(i int) string { return []string{"Reads", "Writes"}[i%2] }

func benchUID(typ, id string) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType("B::"+typ), cedar.String(id))
}

// benchPolicies writes n policies: 20 global ones and a third each for roles,
// tenants and users. What concerns one request stays the same few, but for the
// role policies: 50 roles and 20 actions make 1,000 pairs, and where a set has
// more role policies than that, the further ones are each for one tenant.
func benchPolicies(n int) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for i := range benchGlobals / 2 {
		switch i {
		case 0:
			add(`@id("global-%d") forbid (principal, action, resource) when { principal.suspended };`, i)
		case 1:
			add(`@id("global-%d") forbid (principal, action in B::Action::"Writes", resource) when { resource.status == "closed" };`, i)
		default:
			add(`@id("global-%d") forbid (principal, action, resource is B::Doc) when { resource.status == "secret-%d" } unless { context.mfa };`, i, i)
		}
	}
	for i := range benchGlobals / 2 {
		add(`@id("global-owner-%d") permit (principal, action == B::Action::"a%d", resource) when { resource.owner == principal };`, i, i)
	}
	for i := 0; len(out) < n; i++ {
		k := i / 3
		switch i % 3 {
		case 0:
			resource := "resource is B::Doc"
			if round := k / (benchRoles * benchActions); round > 0 {
				resource = fmt.Sprintf(`resource in B::Tenant::"t%d"`, round)
			}
			add(`@id("role-%d") permit (principal in B::Role::"r%d", action == B::Action::"a%d", %s) when { resource.status != "draft" };`,
				k, k%benchRoles, k/benchRoles%benchActions, resource)
		case 1:
			condition := fmt.Sprintf(`principal in B::Tenant::"t%d" && context.mfa`, k/2)
			if k/2%2 == 1 {
				condition = `principal.clearance >= 2 && resource.status == "open"`
			}
			add(`@id("tenant-%d") permit (principal, action in B::Action::"%s", resource in B::Tenant::"t%d") when { %s };`,
				k, benchGroup(k), k/2, condition)
		default:
			add(`@id("grant-%d") permit (principal == B::User::"u%d", action, resource == B::Doc::"d%d");`, k, k/8, k)
		}
	}
	return out
}

// perFile joins policies into files of 1,000, perPolicy passes each on its own
// with file and line, as they come back from the store.
func perFile(policies []string) []PolicyText {
	var out []PolicyText
	for chunk := range slices.Chunk(policies, 1000) {
		out = append(out, PolicyText{File: fmt.Sprintf("p%d.cedar", len(out)), Text: strings.Join(chunk, "\n") + "\n"})
	}
	return out
}

func perPolicy(policies []string) []PolicyText {
	out := make([]PolicyText, len(policies))
	for i, p := range policies {
		out[i] = PolicyText{File: fmt.Sprintf("p%d.cedar", i/1000), Line: i%1000 + 1, Text: p}
	}
	return out
}

func benchSource(policies []PolicyText) []Source {
	return []Source{{Name: "b", SchemaFile: "schema.cedarschema", Schema: benchSchema(), Policies: policies}}
}

func mustCompile(tb testing.TB, sources []Source, previous *Set) *Set {
	tb.Helper()
	set, findings := Compile(sources, previous)
	if set == nil {
		tb.Fatal(findings[0])
	}
	return set
}

// benchStored are the few entities that the requests meet.
func benchStored() map[cedar.EntityUID]Entity {
	out := map[cedar.EntityUID]Entity{}
	put := func(uid cedar.EntityUID, attrs cedar.RecordMap, parents ...cedar.EntityUID) {
		out[uid] = Entity{UID: uid, Attrs: cedar.NewRecord(attrs), Parents: parents}
	}
	user := func(id string, clearance int, parents ...cedar.EntityUID) {
		put(benchUID("User", id), cedar.RecordMap{"clearance": cedar.Long(clearance), "suspended": cedar.False}, parents...)
	}
	user("u0", 3, benchUID("Role", "r0"), benchUID("Role", "r7"), benchUID("Tenant", "t0"))
	user("bob", 3, benchUID("Role", "r1"), benchUID("Tenant", "t1"))
	user("mallory", 0)
	put(benchUID("Doc", "d0"), cedar.RecordMap{"owner": benchUID("User", "u0"), "status": cedar.String("open")}, benchUID("Tenant", "t0"))
	put(benchUID("Doc", "draft"), cedar.RecordMap{"owner": benchUID("User", "u0"), "status": cedar.String("draft")}, benchUID("Tenant", "t0"))
	return out
}

// benchCase is one request with the answer it must get.
type benchCase struct {
	name     string
	ask      Ask
	allowed  bool
	deniedAt DeniedAt
}

func benchCases() []benchCase {
	ask := func(user, action, doc string) Ask {
		return Ask{Principal: benchUID("User", user), Action: benchUID("Action", action), Resource: benchUID("Doc", doc),
			Context: map[string]any{"mfa": false}}
	}
	return []benchCase{
		// By role, tenant, grant and ownership at once.
		{"allow", ask("u0", "a0", "d0"), true, NotDenied},
		// Bob may use a0, but not on this: found at the first permit that is open.
		{"deny-object", ask("bob", "a0", "draft"), false, AtObject},
		// Mallory may not use a10 at all: every permit must be looked at.
		{"deny-function", ask("mallory", "a10", "d0"), false, AtFunction},
	}
}

func poolOf(stored map[cedar.EntityUID]Entity) *Pool {
	pool := NewPool()
	for uid, e := range stored {
		pool.Add([]cedar.EntityUID{uid}, []Entity{e})
	}
	return pool
}

// decideOnce is a whole decision in process, with the entities at hand.
func decideOnce(set *Set, pool *Pool, a Ask) (*Result, error) {
	q, err := set.read(a)
	if err != nil {
		return nil, err
	}
	sl := set.newSlice(q, pool)
	if m := sl.toLoad(); len(m) > 0 {
		return nil, fmt.Errorf("%s is not in the pool", m[0])
	}
	return set.decide(q, sl)
}

func mustDecide(tb testing.TB, set *Set, pool *Pool, a Ask) *Result {
	tb.Helper()
	res, err := decideOnce(set, pool, a)
	if err != nil {
		tb.Fatal(err)
	}
	return res
}

// prepared is what cedar.Authorize needs for one question: every policy, and
// the slice that Decide would use.
func prepared(tb testing.TB, set *Set, pool *Pool, a Ask) (policies, *entities, *Question) {
	tb.Helper()
	q, err := set.read(a)
	if err != nil {
		tb.Fatal(err)
	}
	e, err := set.newSlice(q, pool).entities()
	if err != nil {
		tb.Fatal(err)
	}
	var all policies
	for _, b := range set.bundles {
		all = append(all, b.policies...)
	}
	return all, e, q
}

// alternate times fns in turns, so that whatever else the machine does slows all
// of them alike, and returns the median time of one call of each, in ns.
func alternate(b *testing.B, fns ...func()) []float64 {
	b.Helper()
	const round = 2 * time.Millisecond
	calls := make([]int, len(fns))
	for i, fn := range fns {
		fn()
		start := time.Now()
		fn()
		calls[i] = 1 + int(round/max(time.Since(start), 1))
	}
	samples := make([][]float64, len(fns))
	for b.Loop() {
		for i, fn := range fns {
			start := time.Now()
			for range calls[i] {
				fn()
			}
			samples[i] = append(samples[i], float64(time.Since(start).Nanoseconds())/float64(calls[i]))
		}
	}
	out := make([]float64, len(fns))
	for i, s := range samples {
		slices.Sort(s)
		out[i] = s[len(s)/2]
	}
	b.ReportMetric(0, "ns/op") // of a whole round: says nothing
	return out
}

// BenchmarkDecidePolicies asks the same three questions of sets that differ only
// in size. "cedar" is cedar.Authorize over all policies of the set, with the
// entities ready, for contrast.
func BenchmarkDecidePolicies(b *testing.B) {
	pool := poolOf(benchStored())
	sets := map[int]*Set{}
	setOf := func(b *testing.B, n int) *Set {
		b.Helper()
		if sets[n] == nil {
			sets[n] = mustCompile(b, benchSource(perFile(benchPolicies(n))), nil)
		}
		return sets[n]
	}
	for _, c := range benchCases() {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("%s/policies=%d/engine", c.name, n), func(b *testing.B) {
				set := setOf(b, n)
				candidates := c.check(b, set, pool, n)
				b.ReportAllocs()
				for b.Loop() {
					_, _ = decideOnce(set, pool, c.ask)
				}
				b.ReportMetric(float64(candidates), "candidates")
			})
			b.Run(fmt.Sprintf("%s/policies=%d/cedar", c.name, n), func(b *testing.B) {
				set := setOf(b, n)
				c.check(b, set, pool, n)
				all, e, q := prepared(b, set, pool, c.ask)
				b.ReportAllocs()
				for b.Loop() {
					cedar.Authorize(metered{policies: all}, e, q.request)
				}
			})
		}
		b.Run(c.name+"/ratio", func(b *testing.B) {
			var fns []func()
			for _, n := range benchSizes {
				set := setOf(b, n)
				c.check(b, set, pool, n)
				fns = append(fns, func() { _, _ = decideOnce(set, pool, c.ask) })
			}
			ns := alternate(b, fns...)
			b.ReportMetric(ns[1]/ns[0], "1,000:100")
			b.ReportMetric(ns[2]/ns[0], "10,000:100")
			b.ReportMetric(ns[3]/ns[0], "100,000:100")
		})
	}
}

// check compares the answer of a set of n policies with what it must be and with
// Cedar's over all policies, and returns the number of candidates.
func (c benchCase) check(b *testing.B, set *Set, pool *Pool, n int) int {
	b.Helper()
	res := mustDecide(b, set, pool, c.ask)
	all, e, q := prepared(b, set, pool, c.ask)
	decision, diag := cedar.Authorize(metered{policies: all}, e, q.request)
	if len(all) != n || res.Allowed != c.allowed || res.DeniedAt != c.deniedAt || bool(decision) != c.allowed || len(diag.Errors) > 0 || len(diag.Reasons) != len(res.Policies) {
		b.Fatalf("%s of %d policies: %+v, and Cedar says %v %v", c.name, len(all), res, decision, diag)
	}
	return len(q.action.index.candidates(q.request.Principal, q.request.Resource, e))
}

// held is the heap in use after a collection, in MB.
func held() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}

var benchLayouts = []struct {
	name string
	cut  func([]string) []PolicyText
}{{"files", perFile}, {"each", perPolicy}}

// BenchmarkCompile compiles from text. MB is what the Set holds, beyond the
// text.
func BenchmarkCompile(b *testing.B) {
	for _, layout := range benchLayouts {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("%s/policies=%d", layout.name, n), func(b *testing.B) {
				sources := benchSource(layout.cut(benchPolicies(n)))
				before := held()
				set := mustCompile(b, sources, nil)
				mb := held() - before
				if got := len(set.Policies("b")); got != n {
					b.Fatalf("%d policies of %d", got, n)
				}
				set = nil // the next one must not find it in the heap
				b.ReportAllocs()
				for b.Loop() {
					set, _ = Compile(sources, nil)
				}
				b.ReportMetric(mb, "MB")
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/policy")
				runtime.KeepAlive(set)
			})
		}
	}
}

// BenchmarkCompileOneChanged compiles 100,000 policies of which one differs from
// what is compiled already.
func BenchmarkCompileOneChanged(b *testing.B) {
	const n, changed = 100_000, 54_327
	for _, layout := range benchLayouts {
		b.Run(layout.name, func(b *testing.B) {
			policies := benchPolicies(n)
			sources := benchSource(layout.cut(policies))
			start := time.Now()
			previous := mustCompile(b, sources, nil)
			full := time.Since(start)
			policies[changed] = strings.Replace(policies[changed], "principal.clearance >= 2", "principal.clearance >= 3", 1)
			next := benchSource(layout.cut(policies))
			set := mustCompile(b, next, previous)
			taken := 0
			for key := range set.clean {
				if previous.clean[key] {
					taken++
				}
			}
			if taken != n-1 || len(set.clean) != n {
				b.Fatalf("%d of %d policies were taken over", taken, len(set.clean))
			}
			b.ReportAllocs()
			for b.Loop() {
				set, _ = Compile(next, previous)
			}
			b.ReportMetric(float64(b.Elapsed())/float64(b.N)/float64(full), "of-full")
			runtime.KeepAlive(set)
		})
	}
}

const (
	benchFields        = 200
	benchFieldPolicies = 1000
)

// fieldSource is a record of 200 fields with 1,000 policies about them: permits
// of one group to one role, forbids of personal data without a second factor,
// and permits of single fields. Groups are in groups that are in groups.
func fieldSource() Source {
	src := Source{Name: "f", SchemaFile: "schema.cedarschema", FieldsFile: "fields.yaml", Schema: `namespace F {
  entity Role;
  entity User in [Role];
  entity Record { owner: User };
  entity FieldGroup in [FieldGroup];
  entity Field in [Field, FieldGroup];
  action View appliesTo { principal: [User], resource: [Record], context: { mfa: Bool } };
  action "View.field" appliesTo { principal: [User], resource: [Record], context: { mfa: Bool, field: Field } };
}`}
	rng := rand.New(rand.NewPCG(3, 3))
	for i := range benchFields {
		groups := []string{fmt.Sprintf("low-%d", i%36)}
		if i%10 == 0 {
			groups = append(groups, fmt.Sprintf("pii-%d", i/10%4))
		}
		src.Fields = append(src.Fields, Field{Type: "F::Record", Path: fmt.Sprintf("part%d.f%d", i%8, i), Groups: groups})
	}
	for i := range 36 {
		src.Fields = append(src.Fields, Field{Type: "F::FieldGroup", Path: fmt.Sprintf("low-%d", i), Groups: []string{fmt.Sprintf("mid-%d", i%12)}})
	}
	for i := range 12 {
		src.Fields = append(src.Fields, Field{Type: "F::FieldGroup", Path: fmt.Sprintf("mid-%d", i), Groups: []string{fmt.Sprintf("high-%d", i%3)}})
	}
	var texts []string
	add := func(format string, args ...any) { texts = append(texts, fmt.Sprintf(format, args...)) }
	add(`@id("view") permit (principal in F::Role::"r0", action == F::Action::"View", resource);`)
	for i := range benchFieldPolicies {
		role := i % benchRoles
		switch i % 20 {
		case 0:
			add(`@id("field-%d") forbid (principal, action == F::Action::"View.field", resource is F::Record) when { context.field in F::FieldGroup::"pii-%d" } unless { context.mfa || resource.owner == principal };`,
				i, i/20%4)
		case 1, 2:
			f := rng.IntN(benchFields/8) * 8
			add(`@id("field-%d") permit (principal in F::Role::"r%d", action == F::Action::"View.field", resource is F::Record) when { context.field == F::Field::"Record.part%d.f%d" };`,
				i, role, f%8, f)
		default:
			level, groups := "low", 36
			switch rng.IntN(6) {
			case 0:
				level, groups = "mid", 12
			case 1:
				level, groups = "high", 3
			}
			add(`@id("field-%d") permit (principal in F::Role::"r%d", action == F::Action::"View.field", resource is F::Record) when { context.field in F::FieldGroup::"%s-%d" };`,
				i, role, level, rng.IntN(groups))
		}
	}
	src.Policies = perFile(texts)
	return src
}

// BenchmarkFields decides all 200 fields of one record: once for each class of
// fields that no policy tells apart, and field by field.
func BenchmarkFields(b *testing.B) {
	set := mustCompile(b, []Source{fieldSource()}, nil)
	plain := *set
	plain.plainFields = true
	user, record := cedar.NewEntityUID("F::User", "u"), cedar.NewEntityUID("F::Record", "r")
	pool := poolOf(map[cedar.EntityUID]Entity{
		user: {UID: user, Parents: []cedar.EntityUID{cedar.NewEntityUID("F::Role", "r0"), cedar.NewEntityUID("F::Role", "r13")}},
		record: {UID: record, Attrs: cedar.NewRecord(cedar.RecordMap{
			"owner": cedar.NewEntityUID("F::User", "other")})},
	})
	ask := Ask{Principal: user, Action: cedar.NewEntityUID("F::Action", "View"), Resource: record,
		Context: map[string]any{"mfa": false}, FieldsAsked: true, All: true}
	byClass, loop := mustDecide(b, set, pool, ask), mustDecide(b, &plain, pool, ask)
	if !reflect.DeepEqual(byClass, loop) {
		b.Fatalf("by class %+v\nplain    %+v", byClass, loop)
	}
	if p, d := len(byClass.Permitted), len(byClass.Denied); p < 20 || d < 20 || p+d != benchFields {
		b.Fatalf("%d permitted, %d denied", p, d)
	}
	classes := map[int]bool{}
	_, e, q := prepared(b, set, pool, ask)
	for _, c := range q.action.field.classes["F::Record"] {
		classes[c] = true
	}
	candidates := q.action.field.index.candidates(user, record, e)
	for _, c := range []struct {
		name string
		set  *Set
	}{{"class", set}, {"plain", &plain}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, _ = decideOnce(c.set, pool, ask)
			}
			b.ReportMetric(float64(len(candidates)), "candidates")
			b.ReportMetric(float64(len(classes)), "classes")
		})
	}
	b.Run("ratio", func(b *testing.B) {
		object := ask
		object.FieldsAsked, object.All = false, false
		ns := alternate(b,
			func() { _, _ = decideOnce(set, pool, ask) },
			func() { _, _ = decideOnce(&plain, pool, ask) },
			func() { _, _ = decideOnce(set, pool, object) })
		b.ReportMetric(ns[1]/ns[0], "plain:class")
		b.ReportMetric(ns[0]/ns[2], "class:object-only")
	})
}
