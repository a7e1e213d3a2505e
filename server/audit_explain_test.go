package server_test

import (
	"strings"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A past decision is explained as it was, with the values and the policies of its revision. Values of
// entities that the caller may not read are withheld.
func TestExplainPastDecision(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustApply("doc", "bundle.yaml", "exports: [User]", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	s.MustPut(servertest.DocUser(t, "ann"))
	spy := func(level string) {
		s.MustApply("spy", "schema.cedarschema", `namespace Spy { entity Door; action Open appliesTo { principal: [Doc::User], resource: [Door] }; }`,
			"policies.cedar", `@id("level") permit (principal, action == Spy::Action::"Open", resource) when { principal.level == `+level+` };`)
	}
	spy("4711")
	res, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`Doc::User::"ann"`), Action: servertest.UID(`Spy::Action::"Open"`), Resource: servertest.UID(`Spy::Door::"d"`)})
	if err != nil || res.Decision != cedarpostv1.Decision_DENY {
		t.Fatal(res, err)
	}
	spy("1") // it would be allowed now
	explained := func(s *servertest.Server) *cedarpostv1.ReplayDecisionResponse {
		t.Helper()
		out, err := s.Audit.ReplayDecision(t.Context(), &cedarpostv1.ReplayDecisionRequest{DecisionId: res.DecisionId, Explain: true})
		if err != nil || out.Outcome != replayedEqual {
			t.Fatal(out, err)
		}
		return out
	}
	const value, withheld = `value:"1"`, "withheld: about an entity that this caller may not read"
	if text := explained(s).Explanation.String(); !strings.Contains(text, "4711") || !strings.Contains(text, value) || strings.Contains(text, withheld) {
		t.Errorf("%s", text)
	}
	if out := replay(t, s, res.DecisionId); out.Explanation != nil {
		t.Errorf("not asked for: %v", out.Explanation)
	}
	other := *s
	other.UseKey(newCaller(t, s, "reader", grant(access.Auditor, "spy")))
	if text := explained(&other).Explanation.String(); strings.Contains(text, value) || !strings.Contains(text, withheld) {
		t.Errorf("a reader of one bundle: %s", text)
	}

	// A guardrail joined the decision. What it says is for those who may read its bundle.
	s.MustApply("guardrails", "schema.cedarschema", "", "policies.cedar", `@id("nobody") forbid (principal is Doc::User, action, resource) when { principal.level == 1 };`)
	if res, err = s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`Doc::User::"ann"`), Action: servertest.UID(`Spy::Action::"Open"`), Resource: servertest.UID(`Spy::Door::"d"`)}); err != nil {
		t.Fatal(err)
	}
	if x := explained(s).Explanation; x.Omitted != 0 || !strings.Contains(x.String(), "nobody") {
		t.Errorf("a reader of all: %v", x)
	}
	if x := explained(&other).Explanation; x.Omitted != 1 || strings.Contains(x.String(), "nobody") ||
		!strings.Contains(x.Summary, "a policy of another bundle, which this caller may not read") {
		t.Errorf("a reader of one bundle: %v", x)
	}
}
