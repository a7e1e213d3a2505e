package server_test

import (
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// admin-local forbids a caller everything about one bundle. Calls about all bundles do not give it out.
func TestAttackAroundAForbidOfOneBundle(t *testing.T) {
	t.Parallel()
	s := twoBundles(t)
	root := s.Token
	s.MustPut(servertest.DocUser(t, "ann"), servertest.Entity(t, `{"uid":{"type":"Other::User","id":"bob"},"attrs":{"level":1}}`))
	of := map[string]string{"Doc": askIn(t, s, "Doc"), "Other": askIn(t, s, "Other")}
	for _, name := range []string{"doc", "other"} {
		if _, err := s.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: name, Title: "a change"}); err != nil {
			t.Fatal(err)
		}
	}
	secret := newCaller(t, s, "auditor", grant(access.Auditor, "*"), grant(access.DataWriter, "*"), grant(access.Operator, "*"))
	s.MustApply("admin-local", "schema.cedarschema", "", "p.cedar", `
		@id("not-other") forbid (principal == Cedarpost::Caller::"auditor", action, resource == Cedarpost::Bundle::"other");
		@id("none-yet") forbid (principal == Cedarpost::Caller::"auditor", action, resource == Cedarpost::Bundle::"next");`)
	s.UseKey(secret)
	defer s.UseKey(root)
	list := func(typ string) error {
		return second(s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: typ}))
	}
	export := func() error {
		stream, err := s.Audit.ExportDecisions(t.Context(), &cedarpostv1.ExportDecisionsRequest{})
		if err == nil {
			_, err = stream.Receive()
		}
		return err
	}
	refused := 0
	for what, err := range map[string]error{
		"entities of all types":   list(""),
		"changes of all entities": second(s.Entities.QueryEntityChanges(t.Context(), &cedarpostv1.QueryEntityChangesRequest{})),
		"grants as entities":      list("Cedarpost::Grant"),
		"export of the log":       export(),
		"events":                  second(s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{})),
		"a key for all bundles":   second(accessOf(s, secret).CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "x", Grants: []*cedarpostv1.Grant{grant(access.Auditor, "*")}})),
		"entities of the bundle":  list("Other::User"),
	} {
		if connect.CodeOf(err) != connect.CodePermissionDenied || err == nil || !strings.Contains(err.Error(), "admin-local/") {
			t.Errorf("%s: %v", what, err)
			continue
		}
		refused++
	}
	for ns, id := range of {
		_, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: id})
		_, replayed := s.Audit.ReplayDecision(t.Context(), &cedarpostv1.ReplayDecisionRequest{DecisionId: id})
		if ns == "Doc" && (err != nil || replayed != nil) || ns == "Other" && (connect.CodeOf(err) != connect.CodeNotFound || connect.CodeOf(replayed) != connect.CodeNotFound) {
			t.Errorf("%s: %v, %v", ns, err, replayed)
		}
	}
	rows, err := s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{From: timestamppb.New(time.Now().Add(-time.Hour))})
	if err != nil || len(rows.Decisions) != 1 || rows.Decisions[0].Action.Type != "Doc::Action" {
		t.Errorf("%v, %v", rows, err)
	}
	bundles, err := s.Policies.ListBundles(t.Context(), &cedarpostv1.ListBundlesRequest{})
	if err != nil || strings.Contains(bundles.String(), "other") || !strings.Contains(bundles.String(), `"doc"`) {
		t.Errorf("%v, %v", bundles, err)
	}
	changes, err := s.Policies.ListChanges(t.Context(), &cedarpostv1.ListChangesRequest{})
	if err != nil || len(changes.Changes) != 1 || changes.Changes[0].Bundle != "doc" {
		t.Errorf("%v, %v", changes, err)
	}
	if err := list("Doc::User"); err != nil {
		t.Errorf("the bundle that is not forbidden: %v", err)
	}
	t.Logf("attack: calls about all bundles against a forbid about one: %d of 7 refused, 5 answers without it", refused)
}
