package engine

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cedar-policy/cedar-go"
)

// What costs much for its size, at the caps: each of these takes milliseconds,
// and where one would take exponential time this test would not end.
func TestCostlyShapes(t *testing.T) {
	const schema = `namespace C { entity U { s: String, sets: Set<Set<Long>>, n: Long }; action A appliesTo { principal: [U], resource: [U], context: { s: String, sets: Set<Set<Long>> } }; }`
	long := strings.Repeat("a", MaxStringBytes)
	var sets []any
	for i := range 100 { // each pair counts twice of MaxPairs
		var inner []any
		for j := range 10 {
			inner = append(inner, float64(i*j))
		}
		sets = append(sets, inner)
	}
	nest := func(open, body, shut string, n int) string {
		return strings.Repeat(open, n) + body + strings.Repeat(shut, n)
	}
	for name, condition := range map[string]string{
		"pattern":     `context.s like "` + strings.Repeat("*a", MaxStringBytes/2-10) + `b"`,
		"sets":        `context.sets.containsAll(principal.sets) && principal.sets.containsAny(context.sets) && principal.sets == context.sets`,
		"else if":     strings.Repeat("if principal.n == 1 then false else ", 1500) + "true",
		"ands":        "true" + strings.Repeat(" && principal.n < 5", 3000),
		"ors":         "false" + strings.Repeat(" || principal.n > 5", 3000),
		"parentheses": nest("(", "principal.n < 5", ")", MaxNesting-5),
		"nested ifs":  nest("if (principal.n < 5) then (", "true", ") else false", MaxNesting/2-5),
		"nested or":   nest("(principal.n == 1 || ", "true", " || context.s == \"x\")", MaxNesting-5),
		"sum":         "principal.n" + strings.Repeat(" + 1", 8000) + " > 0",
		"not":         nest("!(", "principal.n < 5", ")", MaxNesting/2-5),
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			set, findings := Compile([]Source{{Name: "c", Schema: schema, Policies: []PolicyText{{Text: fmt.Sprintf(`@id("p") permit (principal, action, resource) when { %s };`, condition)}}}}, nil)
			compiled := time.Since(began)
			if set == nil {
				t.Logf("refused in %s: %.100s", compiled, findings[0])
				return
			}
			attrs := map[string]any{"s": long, "sets": sets, "n": 1.0}
			u := cedar.NewEntityUID("C::U", "u")
			e, err := set.ReadEntity(RawEntity{UID: u, Attrs: attrs})
			if err != nil {
				t.Fatal(err)
			}
			began = time.Now()
			q, err := set.read(Ask{Principal: u, Action: cedar.NewEntityUID("C::Action", "A"), Resource: u, Context: map[string]any{"s": long, "sets": sets}})
			if err != nil {
				t.Fatal(err)
			}
			pool := NewPool()
			pool.Add([]cedar.EntityUID{u}, []Entity{*e})
			if _, err := set.decide(q, set.newSlice(q, pool)); err != nil {
				t.Fatal(err)
			}
			decided := time.Since(began)
			t.Logf("compiled in %s, decided in %s", compiled, decided)
		})
	}
}

const costSchema = `namespace C {
	entity G;
	entity U in [G] { s: String, friends: Set<U>, names: Set<String>, sets: Set<Set<Long>>, n: Long };
	action A appliesTo { principal: [U], resource: [U], context: { s: String } };
}`

// compileCosts compiles policies with these conditions and returns their set, which is nil if one is
// refused, and the first finding.
func compileCosts(t testing.TB, conditions ...string) (*Set, string) {
	t.Helper()
	src := Source{Name: "c", Schema: costSchema}
	for i, c := range conditions {
		src.Policies = append(src.Policies, PolicyText{File: "p.cedar", Text: fmt.Sprintf("@id(\"p%d\") permit (principal, action, resource) when { %s };", i, c)})
	}
	set, findings := Compile([]Source{src}, nil)
	if set == nil {
		return nil, findings[0].Message
	}
	return set, ""
}

// loadCosts loads n policies with a condition, also if all together are too costly.
func loadCosts(t testing.TB, condition string, n int) *Set {
	t.Helper()
	src := Source{Name: "c", Schema: costSchema}
	for i := range n {
		src.Policies = append(src.Policies, PolicyText{Text: fmt.Sprintf("@id(\"p%d\") permit (principal, action, resource) when { %s };", i, condition)})
	}
	set, findings := Load([]Source{src}, nil)
	if set == nil {
		t.Fatal(findings)
	}
	return set
}

// evaluateCosts asks a question with the largest values, and returns the error.
func evaluateCosts(t testing.TB, set *Set, pause Pause) error {
	t.Helper()
	u := cedar.NewEntityUID("C::U", "u")
	var names []any
	for i := range MaxArrayElements {
		names = append(names, fmt.Sprint("name", i))
	}
	long := strings.Repeat("a", MaxStringBytes)
	e, err := set.ReadEntity(RawEntity{UID: u, Attrs: map[string]any{"s": long, "friends": []any{}, "names": names, "sets": collidingSets(141), "n": 1.0}})
	if err != nil {
		t.Fatal(err)
	}
	pool := NewPool()
	pool.SetPause(pause)
	pool.Add([]cedar.EntityUID{u}, []Entity{*e})
	ask := Ask{Principal: u, Action: cedar.NewEntityUID("C::Action", "A"), Resource: u, Context: map[string]any{"s": long}}
	evaluation, err := set.Prepare(ask, pool, func([]cedar.EntityUID) error { return nil })
	if err != nil {
		return err
	}
	res, err := evaluation.Decide()
	if (res == nil) == (err == nil) {
		t.Fatalf("%v, %v", res, err)
	}
	return err
}

// collidingSets returns sets of two numbers with the same sum, which is their hash.
func collidingSets(n int) []any {
	var out []any
	for i := range n {
		out = append(out, []any{float64(i), float64(1_000_000 - i)})
	}
	return out
}

// Operations cost what their operands can take. What costs too much for one evaluation is
// refused, and the finding names the part.
func TestPolicyCost(t *testing.T) {
	many := func(n int, part string) string { return "false" + strings.Repeat(" || "+part, n) }
	for name, c := range map[string]struct {
		condition string
		most      int64  // steps
		refused   string // "": accepted
	}{
		"comparison":         {`principal.n == 5`, 50, ""},
		"many comparisons":   {many(2000, `principal.n == 5`), 60_000, ""},
		"many conjuncts":     {"true" + strings.Repeat("&&true", 9000), 50_000, ""},
		"membership":         {many(1000, `principal in C::G::"g"`), 30_000, ""},
		"beginning of text":  {many(1000, `context.s like "abc*"`), 40_000, ""},
		"end of text":        {`context.s like "*.example.com"`, 5_000, ""},
		"set of texts":       {`principal.names.containsAll(resource.names)`, 3_000, ""},
		"sets of sets":       {`principal.sets.containsAny(resource.sets)`, 11_000, ""},
		"star after escape":  {`context.s like "\\*` + strings.Repeat("a", 4000) + `b"`, 0, "can take 126"},
		"star by escape":     {`context.s like "\*` + strings.Repeat("a", 3000) + `"`, 400, ""},
		"long beginning":     {`context.s like "` + strings.Repeat("a", 4000) + `*"`, 400, ""},
		"member of a set":    {`principal.names.contains(context.s)`, 2_500, ""},
		"set of texts made":  {"[" + strings.Repeat("context.s, ", 400) + `context.s].contains("x")`, 0, "can take"},
		"has with many":      {"context has s" + strings.Repeat(".s", 200), 0, "more than 100 attributes in a row"},
		"chain of indexes":   {"context" + strings.Repeat(`["s"]`, 200) + " == 1", 0, "the limit is"},
		"long text":          {`"` + strings.Repeat("a", 5000) + `" like "*b"`, 0, "a text of more than 4096 bytes"},
		"escapes":            {`context.s == "` + strings.Repeat(`\u{41}`, 4000) + `"`, 100, ""},
		"long pattern":       {`context.s like "*` + strings.Repeat("a", 4000) + `b"`, 0, `can take 1261`},
		"patterns":           {many(15, `context.s like "*`+strings.Repeat("a", 400)+`b"`), 0, `its costliest part is context.s like "*aaa`},
		"parts of pattern":   {`context.s like "` + strings.Repeat("*a", 2000) + `b"`, 5_000, ""},
		"many sets of sets":  {many(20, `principal.sets == resource.sets`), 0, "can take 2"},
		"constant sets":      {"[" + strings.Repeat("[1,4],[2,3],", 200) + "[0,5]].contains([9,9])", 0, "have 80200 pairs of elements"},
		"behind parentheses": {"[" + strings.Repeat("([1,4]),({a: 1}.a == 2),", 200) + "([0,5])].contains([9,9])", 0, "pairs of elements"},
		"sets of variables":  {"[" + strings.Repeat("principal.names, ", 100) + "resource.names].contains(principal.names)", 0, "can take 2"},
	} {
		t.Run(name, func(t *testing.T) {
			set, msg := compileCosts(t, c.condition)
			if c.refused != "" {
				if set != nil || !strings.Contains(msg, c.refused) {
					t.Errorf("accepted: %v, %q, want %q", set != nil, msg, c.refused)
				}
				return
			}
			if set == nil {
				t.Fatal(msg)
			}
			if cost := set.bundles["c"].policies[0].cost; cost > c.most {
				t.Errorf("costs %d steps, want at most %d", cost, c.most)
			}
		})
	}
}

// What was published before there was a limit is loaded, and decides within the budget.
func TestPublishedPoliciesLoad(t *testing.T) {
	text := `@id("p") permit (principal, action, resource) when { context.s like "*` + strings.Repeat("a", 4000) + `b" || [` +
		strings.Repeat("[1,4],[2,3],", 200) + `[0,5]].contains([9,9]) };`
	source := []Source{{Name: "c", Schema: costSchema, Policies: []PolicyText{{Text: text}}}}
	if set, _ := Compile(source, nil); set != nil {
		t.Error("published again")
	}
	set, findings := Load(source, nil)
	if set == nil {
		t.Fatal(findings)
	}
	if err := evaluateCosts(t, set, nil); err != nil {
		t.Error(err)
	}
}

// Policies that would leave no budget for any decision are refused together.
func TestCostOfAllPolicies(t *testing.T) {
	costly := `context.s like "*` + strings.Repeat("a", 280) + `b"`
	if set, msg := compileCosts(t, slices.Repeat([]string{costly}, 200)...); set == nil {
		t.Error(msg)
	}
	_, msg := compileCosts(t, slices.Repeat([]string{costly}, 300)...)
	if !strings.Contains(msg, `can take 27 million steps for each decision about C::Action::"A"`) {
		t.Errorf("300 policies: %s", msg)
	}
	guard := Source{Name: Guardrails}
	for i := range 300 {
		guard.Policies = append(guard.Policies, PolicyText{Text: fmt.Sprintf("@id(\"g%d\") forbid (principal, action, resource) when { principal is C::U && %s };", i, strings.ReplaceAll(costly, "context.s", "principal.s"))})
	}
	set, findings := Compile([]Source{{Name: "c", Schema: costSchema}, guard}, nil)
	if set != nil || findings[0].Bundle != Guardrails || !strings.Contains(findings[0].Message, "of guardrails") {
		t.Errorf("300 policies of guardrails: %v", findings)
	}
}

// A decision ends when its budget is spent, and never with an answer of some of the policies.
func TestDecisionBudget(t *testing.T) {
	costly := `context.s like "*` + strings.Repeat("a", 280) + `b"` // less than MaxPolicyCost
	for n, want := range map[int]bool{150: true, 300: false} {
		set := loadCosts(t, costly, n)
		steps := int64(0)
		err := evaluateCosts(t, set, func(bundle string, n int64) error {
			if steps += n; n > MaxPolicyCost+pauseEvery || bundle != "c" && n > 0 {
				t.Errorf("%d steps without a pause, for %q", n, bundle)
			}
			return nil
		})
		if want && err != nil || !want && !errors.Is(err, ErrTooCostly) {
			t.Errorf("%d policies: %v", n, err)
		}
		if !want && (strings.Contains(err.Error(), Guardrails) || !strings.Contains(err.Error(), "20 million steps; give policies")) {
			t.Error(err)
		}
		if most := int64(MaxDecisionCost); steps > most {
			t.Errorf("%d policies: %d steps, the budget is %d", n, steps, most)
		}
	}
}

// The error of a pause ends the decision before the next policy.
func TestDecisionEnds(t *testing.T) {
	set := loadCosts(t, `context.s like "*`+strings.Repeat("a", 280)+`b"`, 150)
	gone := errors.New("gone")
	calls := 0
	err := evaluateCosts(t, set, func(_ string, steps int64) error {
		if steps == 0 {
			return nil
		}
		calls++
		return gone
	})
	if !errors.Is(err, gone) || calls != 1 {
		t.Errorf("%v after %d pauses", err, calls)
	}
}

// A walk over many ancestors counts, and ends with the budget.
func TestWalksCount(t *testing.T) {
	set, msg := compileCosts(t, slices.Repeat([]string{"false" + strings.Repeat(` || principal in C::G::"none"`, 900)}, 10)...)
	if set == nil {
		t.Fatal(msg)
	}
	u := Entity{UID: cedar.NewEntityUID("C::U", "u")}
	asked := []cedar.EntityUID{u.UID}
	for i := range MaxArrayElements {
		g := cedar.NewEntityUID("C::G", cedar.String(fmt.Sprint("g", i)))
		u.Parents, asked = append(u.Parents, g), append(asked, g)
	}
	pool := NewPool()
	pool.Add(asked, []Entity{u})
	e, err := set.Prepare(Ask{Principal: u.UID, Action: cedar.NewEntityUID("C::Action", "A"), Resource: u.UID, Context: map[string]any{"s": ""}}, pool, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Decide(); !errors.Is(err, ErrTooCostly) {
		t.Errorf("9,000 walks over 1,000 groups: %v", err)
	}
}

// Sets of sets and of records in questions and writes are bounded by the pairs that may have to
// be compared.
func TestPairs(t *testing.T) {
	set, msg := compileCosts(t, "true")
	if set == nil {
		t.Fatal(msg)
	}
	read := func(n int) error {
		_, err := set.ReadEntity(RawEntity{UID: cedar.NewEntityUID("C::U", "u"), Attrs: map[string]any{
			"s": "", "friends": []any{}, "names": []any{}, "sets": collidingSets(n), "n": 1.0}})
		return err
	}
	if err := read(141); err != nil {
		t.Error(err)
	}
	if err := read(142); err == nil || !strings.Contains(err.Error(), "sets: 142 elements that are sets or records") {
		t.Errorf("142 sets: %v", err)
	}
	stored := RawEntity{UID: cedar.NewEntityUID("C::U", "u"), Attrs: map[string]any{
		"s": "", "friends": []any{}, "names": []any{}, "sets": collidingSets(200), "n": 1.0}}
	if _, err := set.ReadStored(stored); err != nil {
		t.Errorf("stored before: %v", err)
	}
}
