package server_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/corpustest"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/entityfile"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// Over the wire, with data in Postgres, the answers are those of the reference implementation.
// Each run draws other policy sets; with CEDARPOST_SEED it draws the same again.
func TestConformanceOverTheWire(t *testing.T) {
	t.Parallel() // it takes long
	r := rand.New(rand.NewPCG(conformanceSeed(t), 0))
	names := []string{casesWithData[r.IntN(len(casesWithData))]}
	for _, i := range r.Perm(len(casesWithErrors))[:2] {
		names = append(names, casesWithErrors[i])
	}
	conformOverTheWire(t, corpustest.ByName(t, names...), 1, 2)
}

// TestSoakConformanceOverTheWire is the long form.
func TestSoakConformanceOverTheWire(t *testing.T) {
	servertest.Soak(t)
	conformOverTheWire(t, corpustest.Load(t), len(casesWithData), len(casesWithErrors))
}

func conformanceSeed(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("CEDARPOST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("CEDARPOST_SEED: %v", err)
		}
	}
	t.Logf("CEDARPOST_SEED=%d", seed)
	return seed
}

// conformOverTheWire serves those policy sets of the corpus in which stored entities make a
// difference, and those in which only policies fail. It fails unless there are so many of each.
func conformOverTheWire(t *testing.T, cases []corpustest.Case, withData, withErrors int) {
	t.Helper()
	wanted := [2]int{withData, withErrors}
	var served, unpublishable, unstorable, requests, refused int
	for _, c := range cases {
		policies, err := c.Named()
		if err != nil {
			t.Fatal(err)
		}
		list, err := entityfile.Parse([]byte(c.Entities))
		if err != nil {
			t.Fatalf("%s: %v", c.Name, err)
		}
		// The schema declares the actions.
		list = slices.DeleteFunc(list, func(e *cedarpostv1.Entity) bool {
			return e.Uid.Type == "Action" || strings.HasSuffix(e.Uid.Type, "::Action")
		})
		hasData := slices.ContainsFunc(list, func(e *cedarpostv1.Entity) bool {
			return len(e.Attrs.GetFields())+len(e.Tags.GetFields())+len(e.Parents) > 0
		})
		hasErrors := slices.ContainsFunc(c.Requests, func(r corpustest.Request) bool { return len(r.Errors) > 0 })
		if !hasData && !hasErrors {
			continue
		}
		set, _ := engine.Compile([]engine.Source{{Name: "corpus", SkipForbidErrors: true, Schema: c.Schema, Policies: []engine.PolicyText{{Text: policies}}}}, nil)
		if set == nil {
			unpublishable++
			continue
		}
		// Cedar allows NUL in text. Postgres cannot store it.
		if slices.ContainsFunc(list, func(e *cedarpostv1.Entity) bool { return strings.Contains(e.String(), `\x00`) }) {
			unstorable++
			continue
		}
		kind := 1
		if slices.ContainsFunc(c.Requests, func(r corpustest.Request) bool { return !answersWithout(t, set, r) }) {
			kind = 0
		}
		if kind == 1 && !hasErrors {
			continue
		}
		wanted[kind]--
		served++
		t.Run(c.Name, func(t *testing.T) {
			s := servertest.New(t)
			s.MustApply("corpus", "schema.cedarschema", c.Schema, "policies.cedar", policies, "bundle.yaml", "on_forbid_error: skip\n")
			if len(list) > 0 {
				s.MustPut(list...)
			}
			for i, r := range c.Requests {
				requests++
				if !serveRequest(t, s, i, r) {
					refused++
				}
			}
		})
	}
	if wanted != [2]int{} || requests == refused {
		t.Errorf("%d policy sets served, %d and %d too few of the two kinds, %d requests of which %d refused", served, wanted[0], wanted[1], requests, refused)
	}
	t.Logf("%d policy sets served (%d passed over as not publishable, %d as not storable), %d requests, %d refused for a NUL, the others agree",
		served, unpublishable, unstorable, requests, refused)
}

// serveRequest asks the server and compares its answer with that of the reference. It returns
// false if the server refuses such requests by design.
func serveRequest(t *testing.T, s *servertest.Server, i int, r corpustest.Request) bool {
	t.Helper()
	uid := func(u cedar.EntityUID) *cedarpostv1.EntityUid {
		return &cedarpostv1.EntityUid{Type: string(u.Type), Id: string(u.ID)}
	}
	// The reader of entity files keeps numbers exact.
	carrier, err := entityfile.Parse(fmt.Appendf(nil, `[{"uid":{"type":"T","id":""},"attrs":%s}]`, r.Context))
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: uid(r.Principal), Action: uid(r.Action), Resource: uid(r.Resource), Context: carrier[0].Attrs,
		Consistency: &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: true}},
	})
	if err != nil {
		raw, _ := json.Marshal([]any{r.Principal, r.Action, r.Resource, r.Context})
		if connect.CodeOf(err) == connect.CodeInvalidArgument && strings.Contains(string(raw), `\u0000`) {
			return false
		}
		t.Errorf("request %d: %v", i, err)
		return true
	}
	var reasons, failed []string
	for _, p := range got.DeterminingPolicies {
		reasons = append(reasons, p.Id)
	}
	for _, e := range got.Errors {
		failed = append(failed, e.Policy.Id)
	}
	if got, want := answer(strings.ToLower(got.Decision.String()), reasons, failed), answer(r.Decision, r.Reasons, r.Errors); got != want {
		t.Errorf("request %d: got %s, want %s", i, got, want)
	}
	return true
}

// answer returns the text of an answer. Equal answers have equal text.
func answer(decision string, reasons, failed []string) string {
	reasons, failed = slices.Clone(reasons), slices.Clone(failed)
	slices.Sort(reasons)
	slices.Sort(failed)
	return fmt.Sprint(decision, reasons, failed)
}

// answersWithout reports whether the engine gives the right answer without any entity.
func answersWithout(t *testing.T, set *engine.Set, r corpustest.Request) bool {
	t.Helper()
	ask := engine.Ask{Principal: r.Principal, Action: r.Action, Resource: r.Resource}
	d := json.NewDecoder(bytes.NewReader(r.Context))
	d.UseNumber()
	if err := d.Decode(&ask.Context); err != nil {
		t.Fatal(err)
	}
	pool := engine.NewPool()
	e, err := set.Prepare(ask, pool, func(missing []cedar.EntityUID) error {
		pool.Add(missing, nil)
		return nil
	})
	if err != nil {
		return true
	}
	res, err := e.Decide()
	if err != nil {
		t.Fatal(err)
	}
	decision := "deny"
	if res.Allowed {
		decision = "allow"
	}
	var reasons, failed []string
	for _, p := range res.Policies {
		reasons = append(reasons, p.ID)
	}
	for _, e := range res.Errors {
		failed = append(failed, e.Policy.ID)
	}
	return answer(decision, reasons, failed) == answer(r.Decision, r.Reasons, r.Errors)
}
