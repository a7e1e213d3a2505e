package engine

import (
	"reflect"
	"slices"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

const failedSchema = `entity User;
entity Field in [FieldGroup];
entity FieldGroup;
entity Doc { locked: Bool };
action view appliesTo { principal: User, resource: Doc, context: { mfa: Bool } };
action "view.field" appliesTo { principal: User, resource: Doc, context: { mfa: Bool, field: Field } };
`

// decideFailed asks to view a document and two of its fields.
func decideFailed(t *testing.T, policies string, docStored, mfa, requireAll bool) (*Result, *Explanation) {
	t.Helper()
	set, findings := Compile([]Source{{
		Name: "b", Schema: failedSchema, Policies: []PolicyText{{Text: policies}},
		Fields: []Field{{Type: "Doc", Path: "code"}, {Type: "Doc", Path: "note"}},
	}}, nil)
	if set == nil {
		t.Fatal(findings)
	}
	q, err := set.read(Ask{
		Principal: cedar.NewEntityUID("User", "u"), Action: cedar.NewEntityUID("Action", "view"), Resource: cedar.NewEntityUID("Doc", "d"),
		Context: map[string]any{"mfa": mfa}, FieldsAsked: true, All: true, RequireAll: requireAll,
	})
	if err != nil {
		t.Fatal(err)
	}
	stored := map[cedar.EntityUID]*Entity{}
	if docStored {
		e, err := set.ReadEntity(RawEntity{UID: q.request.Resource, Attrs: map[string]any{"locked": true}})
		if err != nil {
			t.Fatal(err)
		}
		stored[e.UID] = e
	}
	pool := NewPool()
	sl := set.newSlice(q, pool)
	fill(sl, pool, stored)
	res, err := set.decide(q, sl)
	if err != nil {
		t.Fatal(err)
	}
	x, err := set.explain(q, sl, res)
	if err != nil {
		t.Fatal(err)
	}
	return res, x
}

// A forbid that denies because it failed is named as a reason and as an error, and
// gives no advice: whoever followed it would be denied again.
func TestNoAdviceOfFailedForbid(t *testing.T) {
	ids := func(list []PolicyRef) (out []string) {
		for _, r := range list {
			out = append(out, r.ID)
		}
		return out
	}
	const permits = `@id("object") permit (principal, action == Action::"view", resource);
@id("fields") permit (principal, action == Action::"view.field", resource);
`
	for _, c := range []struct {
		what, policies string
		stored, mfa    bool
		policiesWant   []string
		errorsWant     []string
		advice         []Advice
	}{
		{
			"the object, satisfied", permits + `@id("f") @advice("mfa") forbid (principal, action == Action::"view", resource) when { resource.locked && !context.mfa };`,
			true, false,
			[]string{"f"}, nil,
			[]Advice{{Policy: PolicyRef{"b", "f"}, Text: "mfa"}},
		},
		{
			"the object, failed", permits + `@id("f") @advice("mfa") forbid (principal, action == Action::"view", resource) when { resource.locked && !context.mfa };`,
			false, true,
			[]string{"f"}, []string{"f"}, nil,
		},
		{
			"the object, one failed and one satisfied", permits + `@id("f") @advice("mfa") forbid (principal, action == Action::"view", resource) when { resource.locked && !context.mfa };
@id("g") @advice("other") forbid (principal, action == Action::"view", resource) unless { context.mfa };`,
			false, false,
			[]string{"f", "g"}, []string{"f"},
			[]Advice{{Policy: PolicyRef{"b", "g"}, Text: "other"}},
		},
		{
			"a field, failed where another is satisfied", permits + `@id("f") @advice("mfa") forbid (principal, action == Action::"view.field", resource)
  when { context.field == Field::"Doc.code" || resource.locked };`,
			false, false,
			[]string{"f"}, []string{"f"},
			[]Advice{{Policy: PolicyRef{"b", "f"}, Text: "mfa", Paths: []string{"code"}}},
		},
		{
			"a field, failed", permits + `@id("f") @advice("mfa") forbid (principal, action == Action::"view.field", resource) when { resource.locked };`,
			false, false,
			[]string{"f"}, []string{"f"}, nil,
		},
	} {
		res, x := decideFailed(t, c.policies, c.stored, c.mfa, true)
		var failed []string
		for _, e := range res.Errors {
			failed = append(failed, e.Policy.ID)
		}
		if res.Allowed || !slices.Equal(ids(res.Policies), c.policiesWant) || !slices.Equal(failed, c.errorsWant) || !reflect.DeepEqual(res.Advice, c.advice) {
			t.Errorf("%s: policies %v, errors %v, advice %+v", c.what, res.Policies, res.Errors, res.Advice)
		}
		for _, id := range c.errorsWant {
			if !slices.ContainsFunc(x.Policies, func(p PolicyExplanation) bool { return p.Policy.ID == id && p.Outcome == Failed }) {
				t.Errorf("%s: the explanation does not say that %s failed", c.what, id)
			}
		}
	}
}

// A policy about an object and its fields is listed once: among the errors, the
// policies that determined, and the obligations.
func TestListedOnce(t *testing.T) {
	res, _ := decideFailed(t, `@id("p") @obligation("log") permit (principal, action, resource);
@id("q") permit (principal, action, resource) when { resource.locked };`, false, false, false)
	if len(res.Errors) != 1 || res.Errors[0].Policy.ID != "q" {
		t.Errorf("errors %+v", res.Errors)
	}
	if want := []PolicyRef{{"b", "p"}}; !slices.Equal(res.Policies, want) {
		t.Errorf("policies %v", res.Policies)
	}
	if want := []Obligation{{PolicyRef{"b", "p"}, "log"}}; !slices.Equal(res.Obligations, want) {
		t.Errorf("obligations %v", res.Obligations)
	}
	if want := []string{"code", "note"}; !res.Allowed || !slices.Equal(res.Permitted, want) {
		t.Errorf("allowed %v, permitted %v", res.Allowed, res.Permitted)
	}
}
