package server_test

import (
	"strings"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

func TestExplain(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	explain := func(r *cedarpostv1.AuthorizeRequest) (*cedarpostv1.Explanation, map[string]*cedarpostv1.PolicyExplanation) {
		t.Helper()
		r.Explain = true
		res, err := s.Authorization.Authorize(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		by := map[string]*cedarpostv1.PolicyExplanation{}
		for _, p := range res.Explanation.Policies {
			if len(p.Paths) == 0 {
				by[p.Policy.Id] = p
			}
		}
		return res.Explanation, by
	}
	x, by := explain(servertest.AskShop("carol", "ViewOrder", "42", true))
	p := by["owner-views"]
	if p == nil || p.Outcome != cedarpostv1.PolicyExplanation_CONDITION_FALSE || !strings.Contains(p.Condition, "resource.owner == principal") ||
		len(p.Values) != 2 || p.Values[0].Value != `Shop::User::"bob"` || p.File == "" || p.Line == 0 {
		t.Errorf("carol and owner-views: %v", p)
	}
	if p := by["support-views"]; p == nil || p.Outcome != cedarpostv1.PolicyExplanation_SCOPE_MISMATCH || !strings.Contains(p.Reason, `is not in Shop::Role::"support"`) {
		t.Errorf("carol and support-views: %v", p)
	}
	if !strings.HasPrefix(x.Summary, "Denied") {
		t.Errorf("summary %q", x.Summary)
	}
	_, by = explain(servertest.AskShop("mallory", "ViewOrder", "42", true))
	if p := by["suspended"]; p == nil || p.Outcome != cedarpostv1.PolicyExplanation_SATISFIED || !p.Forbid {
		t.Errorf("mallory and suspended: %v", p)
	}
	// Fields: one forbid denies personal data to alice without MFA.
	x, _ = explain(servertest.WithAllFields(servertest.AskShop("alice", "ViewOrder", "42", false)))
	found := false
	for _, p := range x.Policies {
		if p.Policy.Id == "pii-needs-mfa" && p.Outcome == cedarpostv1.PolicyExplanation_SATISFIED {
			found = strings.Join(p.Paths, " ") == "customer.email customer.name shipping.address"
		}
	}
	if !found {
		t.Errorf("pii-needs-mfa does not explain the personal fields: %v", x)
	}
}

// An explanation does not contain values that the schema marks @sensitive, not even as part of a
// record.
func TestExplainWithholds(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("h", "schema.cedarschema", `namespace H { entity U { @sensitive ssn: String, home: { @sensitive street: String, city: String } };
		action A appliesTo { principal: [U], resource: [U], context: { @sensitive pin: String } }; }`,
		"p.cedar", `@id("a") permit (principal, action, resource) when { principal.ssn == "x" };
@id("b") permit (principal, action, resource) when { principal.home == resource.home && resource.home.city == "y" };
@id("c") permit (principal, action, resource) when { context.pin == principal.ssn };`)
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"H::U","id":"u"},"attrs":{"ssn":"secret-1","home":{"street":"secret-2","city":"z"}}}`))
	res, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`H::U::"u"`), Action: servertest.UID(`H::Action::"A"`), Resource: servertest.UID(`H::U::"u"`),
		Context: servertest.Entity(t, `{"uid":{"type":"x","id":"x"},"attrs":{"pin":"secret-3"}}`).Attrs, Explain: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	if text := res.Explanation.String(); strings.Contains(text, "secret-") || !strings.Contains(text, "withheld") {
		t.Errorf("got %s", text)
	}
}
