package server_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// accessOf returns a client of AccessService with a key.
func accessOf(s *servertest.Server, secret string) cedarpostv1connect.AccessServiceClient {
	return cedarpostv1connect.NewAccessServiceClient(s.Client(s.Admin, secret))
}

func grant(role, bundle string) *cedarpostv1.Grant {
	return &cedarpostv1.Grant{Role: role, Bundle: bundle}
}

// newCaller makes a caller with grants and returns its key.
func newCaller(t *testing.T, s *servertest.Server, name string, grants ...*cedarpostv1.Grant) string {
	t.Helper()
	res, err := accessOf(s, s.Token).CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: name, Grants: grants})
	if err != nil {
		t.Fatal(err)
	}
	return res.Secret
}

// A key lives from its creation to its revocation, on every server, and its secret is nowhere.
func TestKeysLive(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	other := servertest.On(t, s.URL)
	op := accessOf(s, s.Token)
	made, err := op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "shop", Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "*")}})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(made.Secret, "cdp_"+made.Key.Id+"_") || made.Key.Caller != "shop" || made.Key.ExpiresAt != nil {
		t.Errorf("%v", made.Key)
	}
	me, err := accessOf(s, made.Secret).WhoAmI(t.Context(), &cedarpostv1.WhoAmIRequest{})
	if err != nil || me.Caller != "shop" || me.KeyId != made.Key.Id || me.Kind != "api_key" || len(me.Grants) != 1 || len(me.Permitted) != 1 ||
		!slices.Equal(me.Permitted[0].Actions, []string{"Authorize", "AuthorizeBatch", "GetRevision", "ReportReuse", "Watch", "WhoAmI"}) {
		t.Errorf("%v, %v", me, err)
	}
	servertest.Eventually(t, "the other server", func() bool {
		_, err := accessOf(other, made.Secret).WhoAmI(t.Context(), &cedarpostv1.WhoAmIRequest{})
		return err == nil
	})

	next, err := op.RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: "shop", ExpiresAt: timestamppb.New(time.Now().Add(time.Hour))})
	if err != nil || len(next.Others) != 1 || next.Others[0].Id != made.Key.Id || next.Key.ExpiresAt == nil {
		t.Fatalf("%v, %v", next, err)
	}
	_, err = op.RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: "shop"})
	servertest.WantCode(t, err, connect.CodeAlreadyExists, made.Key.Id)
	_, err = op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "shop"})
	servertest.WantCode(t, err, connect.CodeAlreadyExists, "has a live key already")
	_, err = op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "recover", Grants: []*cedarpostv1.Grant{grant(access.Operator, "*")}})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "take another name")
	_, err = op.RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: "nobody"})
	servertest.WantCode(t, err, connect.CodeNotFound, "keys create")

	whole, err := op.ListKeys(t.Context(), &cedarpostv1.ListKeysRequest{Caller: "shop"})
	if err != nil || !slices.ContainsFunc(whole.Keys, func(k *cedarpostv1.Key) bool {
		return k.Id == next.Key.Id && proto.Equal(k.CreatedAt, next.Key.CreatedAt)
	}) {
		t.Errorf("%v, %v, want the time of %v", whole, err, next.Key)
	}
	list, err := op.ListKeys(t.Context(), &cedarpostv1.ListKeysRequest{PageSize: 1})
	if err != nil || len(list.Keys) != 1 || list.NextPageToken == "" {
		t.Fatalf("%v, %v", list, err)
	}
	n := len(list.Keys)
	for token := list.NextPageToken; token != ""; token = list.NextPageToken {
		if list, err = op.ListKeys(t.Context(), &cedarpostv1.ListKeysRequest{PageSize: 1, PageToken: token}); err != nil {
			t.Fatal(err)
		}
		n += len(list.Keys)
	}
	if n != 4 { // two bootstrap keys
		t.Errorf("%d keys", n)
	}
	if strings.Contains(list.String(), strings.Split(made.Secret, "_")[2]) {
		t.Error("a listing has a secret")
	}

	// A watch of a caller without a live key ends, on every server.
	w, err := cedarpostv1connect.NewAuthorizationServiceClient(other.Client(other.API, made.Secret)).Watch(t.Context(), &cedarpostv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Receive(); err != nil {
		t.Fatal(err)
	}
	gone, err := op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "shop"})
	if err != nil || len(gone.Revoked) != 2 {
		t.Fatalf("%v, %v", gone, err)
	}
	for err == nil {
		_, err = w.Receive()
	}
	servertest.WantCode(t, err, connect.CodeUnauthenticated, "revoked")
	for _, at := range []*servertest.Server{s, other} {
		for _, secret := range []string{made.Secret, next.Secret} {
			servertest.Eventually(t, "the end of a key", func() bool {
				_, err := accessOf(at, secret).WhoAmI(t.Context(), &cedarpostv1.WhoAmIRequest{})
				return connect.CodeOf(err) == connect.CodeUnauthenticated
			})
		}
	}
	_, err = op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Id: made.Key.Id})
	servertest.WantCode(t, err, connect.CodeNotFound, "the id \""+made.Key.Id)
	_, err = op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: made.Key.Id})
	servertest.WantCode(t, err, connect.CodeNotFound, "keys revoke --id")

	if _, err := decisionlog.VerifyLog(t.Context(), s.DB, decisionlog.Verification{History: true}); err != nil {
		t.Error(err)
	}
	for kind, want := range map[string]int{"log_read": 1, "change": 5} {
		if got := events(t, s, kind); len(got) < want {
			t.Errorf("%d events of kind %s", len(got), kind)
		}
	}
}

// An operator of one bundle manages callers of that bundle only: neither a grant nor a key gives it
// more than it has.
func TestOperatorOfOneBundle(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	op := accessOf(s, newCaller(t, s, "op", grant(access.Operator, "doc")))
	newCaller(t, s, "foreign", grant(access.Enforcer, "other"))
	newCaller(t, s, "bare")
	if _, err := accessOf(s, s.Token).PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: "token:corp/ann", Role: access.Auditor, Bundle: "other"}}); err != nil {
		t.Fatal(err)
	}
	newCaller(t, s, "both", grant(access.Enforcer, "doc"), grant(access.Enforcer, "other"))
	own, err := op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "own", Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "doc")}})
	if err != nil {
		t.Fatal(err)
	}
	put := func(g *cedarpostv1.Grant) error {
		_, err := op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: g})
		return err
	}
	withCaller := func(name string, g *cedarpostv1.Grant) *cedarpostv1.Grant { g.Caller = name; return g }
	for what, err := range map[string]error{
		"a grant for its bundle":            put(withCaller("op", grant(access.PolicyPublisher, "doc"))),
		"a grant to a new caller":           put(withCaller("new", grant(access.Auditor, "doc"))),
		"one to a caller with a token":      put(withCaller("token:corp/ann", grant(access.Auditor, "doc"))),
		"a key of its caller":               second(op.RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: "own"})),
		"a listing of its keys":             second(op.ListKeys(t.Context(), &cedarpostv1.ListKeysRequest{})),
		"the end of a grant for its bundle": second(op.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "both", Role: access.Enforcer, Bundle: "doc"})),
		"the end of one key":                second(op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Id: own.Key.Id})),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"the end of a key that is not there":  second(op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Id: "x"})),
		"a key of a caller without grants":    second(op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "future"})),
		"the end of the key of such a caller": second(op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "bare"})),
		"a grant to a foreign caller":         put(withCaller("foreign", grant(access.Auditor, "doc"))),
		"a grant to one of both":              put(withCaller("both", grant(access.Auditor, "doc"))),
		"a grant to one without grants":       put(withCaller("bare", grant(access.Enforcer, "doc"))),
		"a key of one without grants":         second(op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "bare", Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "doc")}})),
		"the end of the key of one of both":   second(op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "both"})),
		"a grant for another bundle":          put(withCaller("op", grant(access.Enforcer, "other"))),
		"a grant for all":                     put(withCaller("op", grant(access.Enforcer, "*"))),
		"a grant for guardrails":              put(withCaller("op", grant(access.PolicyPublisher, "guardrails"))),
		"a grant for admin-local":             put(withCaller("op", grant(access.PolicyPublisher, "admin-local"))),
		"a key of a foreign caller":           second(op.RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: "foreign"})),
		"a key of one of both":                second(op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "bootstrap"})),
		"a key with a foreign grant":          second(op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "new", Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "doc"), grant(access.Enforcer, "*")}})),
		"the end of a foreign key":            second(op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "foreign"})),
		"the end of the operator's key":       second(op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "bootstrap"})),
		"the end of a foreign grant":          second(op.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "both", Role: access.Enforcer, Bundle: "other"})),
	} {
		servertest.WantCode(t, err, connect.CodePermissionDenied, "")
		if err == nil {
			t.Errorf("%s is permitted", what)
		}
	}
	list, err := op.ListGrants(t.Context(), &cedarpostv1.ListGrantsRequest{})
	if err != nil || slices.ContainsFunc(list.Grants, func(g *cedarpostv1.Grant) bool { return g.Bundle != "doc" }) || len(list.Grants) != 5 {
		t.Errorf("%v, %v", list, err)
	}
	keys, err := op.ListKeys(t.Context(), &cedarpostv1.ListKeysRequest{})
	if err != nil || slices.ContainsFunc(keys.Keys, func(k *cedarpostv1.Key) bool { return k.Caller != "op" && k.Caller != "own" }) {
		t.Errorf("%v, %v", keys, err)
	}
	servertest.Eventually(t, "the refusals in the log", func() bool { return len(events(t, s, "refused_right")) > 0 })
}

// second returns the error of a call.
func second[T any](_ T, err error) error { return err }

// Nobody can take the last operator away, neither at once nor by two calls at the same time.
func TestLastOperator(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	op := accessOf(s, s.Token)
	last := func(err error) {
		t.Helper()
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, "the last API key with the role operator")
	}
	end := timestamppb.New(time.Now().Add(time.Hour))
	operator := &cedarpostv1.Grant{Caller: access.BootstrapName, Role: access.Operator, Bundle: "*", ExpiresAt: end}
	last(second(op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: access.BootstrapName})))
	last(second(op.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: access.BootstrapName, Role: access.Operator, Bundle: "*"})))
	servertest.WantCode(t, second(op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: operator})), connect.CodeFailedPrecondition, "the last API key without an end")

	// An operator with a key that ends by itself does not replace it.
	if _, err := op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "guest", ExpiresAt: end, Grants: []*cedarpostv1.Grant{grant(access.Operator, "*")}}); err != nil {
		t.Fatal(err)
	}
	_, err := op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: access.BootstrapName})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "the last API key without an end")
	if _, err := op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "guest"}); err != nil {
		t.Fatal(err)
	}

	// Two operators take each other's grant at the same time: one stays.
	two := accessOf(s, newCaller(t, s, "two", grant(access.Operator, "*")))
	var both sync.WaitGroup
	errs := make([]error, 2)
	both.Go(func() {
		_, errs[0] = op.DeleteGrant(context.Background(), &cedarpostv1.DeleteGrantRequest{Caller: "two", Role: access.Operator, Bundle: "*"})
	})
	both.Go(func() {
		_, errs[1] = two.DeleteGrant(context.Background(), &cedarpostv1.DeleteGrantRequest{Caller: access.BootstrapName, Role: access.Operator, Bundle: "*"})
	})
	both.Wait()
	if (errs[0] == nil) == (errs[1] == nil) {
		t.Errorf("%v, %v", errs[0], errs[1])
	}
}

// Forbids of admin-local take rights away, but never all from an operator, and never the right to
// change admin-local.
func TestAdminLocal(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	shop := newCaller(t, s, "shop", grant(access.DataWriter, "*"), grant(access.PolicyPublisher, "*"))
	write := func(secret string) error {
		_, err := cedarpostv1connect.NewEntityServiceClient(s.Client(s.Admin, secret)).WriteEntities(t.Context(), &cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{put(servertest.DocUser(t, "dan"))}})
		return err
	}
	if err := write(shop); err != nil {
		t.Fatal(err)
	}
	_, err := s.Apply("admin-local", servertest.Files("schema.cedarschema", "", "p.cedar", `@id("all") permit (principal, action, resource);`))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "")
	_, err = s.Apply("admin", servertest.Files("schema.cedarschema", "", "p.cedar", `@id("all") forbid (principal, action, resource);`))
	servertest.WantCode(t, err, connect.CodePermissionDenied, "admin")
	res, err := s.Apply("admin-local", servertest.Files("schema.cedarschema", "", "p.cedar", `
		@id("shop") forbid (principal == Cedarpost::Caller::"shop", action == Cedarpost::Action::"WriteEntities", resource);
		@id("operators") forbid (principal in Cedarpost::Role::"operator", action, resource) unless { action == Cedarpost::Action::"QueryEvents" };`))
	if err != nil || len(res.GetWarnings()) > 0 {
		t.Fatalf("%v, %v", res, err)
	}
	servertest.WantCode(t, write(shop), connect.CodePermissionDenied, "WriteEntities for any bundle: forbidden by policy admin-local/shop")
	op := accessOf(s, s.Token)
	_, err = op.ListKeys(t.Context(), &cedarpostv1.ListKeysRequest{})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "ListKeys for any bundle: forbidden by policy admin-local/operators")
	if me, err := op.WhoAmI(t.Context(), &cedarpostv1.WhoAmIRequest{}); err != nil || me.Caller != "bootstrap" {
		t.Errorf("%v, %v", me, err)
	}
	_, err = accessOf(s, shop).ListKeys(t.Context(), &cedarpostv1.ListKeysRequest{})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "an operator can grant others")
	if _, err := op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: "shop", Role: access.Enforcer, Bundle: "doc"}}); err != nil {
		t.Errorf("an operator puts a grant: %v", err)
	}
	_, err = op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: "shop", Role: access.PolicyPublisher, Bundle: "admin"}})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "for the bundle admin, which is built in")
	servertest.Eventually(t, "an event that names the policy", func() bool {
		return slices.ContainsFunc(events(t, s, "refused_right"), func(e *cedarpostv1.EventRecord) bool {
			return strings.HasSuffix(e.GetRefusedRight().GetReason(), ": forbidden by policy admin-local/shop")
		})
	})
	// A publisher of all bundles does not change those that join the decisions of others.
	s.UseKey(shop)
	for _, name := range []string{"admin-local", "guardrails"} {
		_, err := s.Apply(name, servertest.Files("schema.cedarschema", "", "p.cedar", `@id("none") forbid (principal, action, resource) when { false };`))
		servertest.WantCode(t, err, connect.CodePermissionDenied, name)
	}
}

// What a grant does not cover is neither listed nor found.
func TestAnswersAreCut(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	for _, name := range []string{"doc", "other"} {
		ns := strings.ToUpper(name[:1]) + name[1:]
		s.MustApply(name, "schema.cedarschema", strings.ReplaceAll(servertest.DocSchema, "namespace Doc", "namespace "+ns), "policies.cedar", strings.ReplaceAll(servertest.DocPolicies, "Doc::", ns+"::"))
	}
	s.MustApply("guardrails", "schema.cedarschema", "", "p.cedar", `@id("hidden") @advice("ask the hotline") forbid (principal == Doc::User::"eve", action, resource);`)
	s.MustPut(servertest.DocUser(t, "eve"))
	secret := newCaller(t, s, "narrow", grant(access.Enforcer, "doc"), grant(access.Auditor, "doc"), grant(access.DataWriter, "doc"))
	ask := func(ns string) *cedarpostv1.AuthorizeRequest {
		return &cedarpostv1.AuthorizeRequest{Principal: servertest.UID(ns + `::User::"eve"`), Action: servertest.UID(ns + `::Action::"Read"`), Resource: servertest.UID(ns + `::Paper::"p"`), Explain: true}
	}
	whole := map[string]*cedarpostv1.AuthorizeResponse{}
	for _, ns := range []string{"Doc", "Other"} {
		res, err := s.Authorization.Authorize(t.Context(), ask(ns))
		if err != nil {
			t.Fatal(err)
		}
		whole[ns] = res
	}
	if !strings.Contains(whole["Doc"].String(), "hidden") {
		t.Fatalf("the guardrail did not join: %v", whole["Doc"])
	}
	// Nor are the calls that a grant for one bundle never permits.
	me, err := accessOf(s, secret).WhoAmI(t.Context(), &cedarpostv1.WhoAmIRequest{})
	if may := fmt.Sprint(me.GetPermitted()); err != nil || !strings.Contains(may, "QueryDecisions") || strings.Contains(may, "QueryEvents") || strings.Contains(may, "ExportDecisions") || strings.Contains(may, "Proof") {
		t.Errorf("%v, %v", may, err)
	}
	s.UseKey(secret)
	res, err := s.Authorization.Authorize(t.Context(), ask("Doc"))
	if err != nil || strings.Contains(res.String(), "hidden") || strings.Contains(res.String(), "guardrails") {
		t.Errorf("%v, %v", res, err)
	}
	if len(res.GetAdvice()) != 1 || res.Advice[0].Text != "ask the hotline" {
		t.Errorf("%v", res.GetAdvice())
	}
	_, err = s.Authorization.Authorize(t.Context(), ask("Other"))
	servertest.WantCode(t, err, connect.CodePermissionDenied, `Other::Action::"Read"`)
	unknown := ask("Nowhere")
	_, err = s.Authorization.Authorize(t.Context(), unknown)
	servertest.WantCode(t, err, connect.CodePermissionDenied, `Nowhere::Action::"Read"`)

	rows, err := s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{From: timestamppb.New(time.Now().Add(-time.Hour))})
	if err != nil || len(rows.Decisions) != 2 || slices.ContainsFunc(rows.Decisions, func(d *cedarpostv1.DecisionRecord) bool { return d.Action.Type != "Doc::Action" }) {
		t.Errorf("%v, %v", rows, err)
	}
	count, err := s.Audit.CountDecisions(t.Context(), &cedarpostv1.CountDecisionsRequest{Filter: &cedarpostv1.QueryDecisionsRequest{From: timestamppb.New(time.Now().Add(-time.Hour))}, Group: cedarpostv1.CountDecisionsRequest_ACTION})
	if err != nil || len(count.Counts) != 1 {
		t.Errorf("%v, %v", count, err)
	}
	for ns, found := range map[string]bool{"Doc": true, "Other": false} {
		_, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: whole[ns].DecisionId})
		_, replayed := s.Audit.ReplayDecision(t.Context(), &cedarpostv1.ReplayDecisionRequest{DecisionId: whole[ns].DecisionId})
		if (err == nil) != found || (replayed == nil) != found || !found && (connect.CodeOf(err) != connect.CodeNotFound || connect.CodeOf(replayed) != connect.CodeNotFound) {
			t.Errorf("%s: %v, %v", ns, err, replayed)
		}
	}
	bundles, err := s.Policies.ListBundles(t.Context(), &cedarpostv1.ListBundlesRequest{})
	if err != nil || len(bundles.Bundles) != 1 || bundles.Bundles[0].Name != "doc" {
		t.Errorf("%v, %v", bundles, err)
	}
	_, err = s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "entities of all types")
	_, err = s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Cedarpost::Grant::"operator * bootstrap"`)})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "")
}

// Bad requests about keys and grants get a clear error, and nothing is stored.
func TestBadGrantsAndKeys(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	op := accessOf(s, s.Token)
	before := revision(t, s)
	past := timestamppb.New(time.Now().Add(-time.Second))
	long := strings.Repeat("x", 513)
	for text, g := range map[string]*cedarpostv1.Grant{
		"no role":                   {Caller: "a", Role: "root", Bundle: "*"},
		"grant.bundle":              {Caller: "a", Role: "enforcer", Bundle: "Big"},
		"names a caller":            {Role: "enforcer", Bundle: "*"},
		"grant.caller":              {Caller: long, Role: "enforcer", Bundle: "*"},
		"only the role enforcer":    {Caller: "a", Role: "auditor", Bundle: "*", Actions: []string{`A::Action::"b"`}},
		"only the role data-writer": {Caller: "a", Role: "enforcer", Bundle: "*", EntityTypes: []string{"A"}},
		"in the past":               {Caller: "a", Role: "enforcer", Bundle: "*", ExpiresAt: past},
		"not a time":                {Caller: "a", Role: "enforcer", Bundle: "*", ExpiresAt: &timestamppb.Timestamp{Seconds: -1 << 60}},
		"at most 100 item":          {Caller: "a", Role: "enforcer", Bundle: "*", Actions: slices.Repeat([]string{"a"}, 101)},
		"one line of at most 512":   {Caller: "a\nb", Role: "enforcer", Bundle: "*"},
		"id in quotes is missing":   {Caller: "a", Role: "enforcer", Bundle: "*", Actions: []string{"Shop::Action::ViewOrder"}},
		"its type is not Action":    {Caller: "a", Role: "enforcer", Bundle: "*", Actions: []string{`Shop::User::"ann"`}},
		"is not an entity type":     {Caller: "a", Role: "data-writer", Bundle: "*", EntityTypes: []string{"Shop::Ord er"}},
	} {
		_, err := op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: g})
		if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(strings.ReplaceAll(err.Error(), "no more than", "at most"), text) {
			t.Errorf("%v: %v, want %s", g, err, text)
		}
	}
	for text, req := range map[string]*cedarpostv1.CreateKeyRequest{
		"caller":        {Caller: "token:a/b"},
		"begins with a": {Caller: "-a"},
		"stands twice":  {Caller: "a", Grants: []*cedarpostv1.Grant{grant("enforcer", "*"), grant("enforcer", "*")}},
		"one is of":     {Caller: "a", Grants: []*cedarpostv1.Grant{{Caller: "b", Role: "enforcer", Bundle: "*"}}},
		"in the past":   {Caller: "a", ExpiresAt: past},
	} {
		_, err := op.CreateKey(t.Context(), req)
		servertest.WantCode(t, err, connect.CodeInvalidArgument, text)
	}
	_, err := op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "either")
	_, err = op.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "a", Role: "enforcer", Bundle: "*"})
	servertest.WantCode(t, err, connect.CodeNotFound, "no grant")
	if now := revision(t, s); now != before {
		t.Errorf("revision %d, was %d", now, before)
	}
	// The same grant again is no change.
	g := &cedarpostv1.Grant{Caller: "a", Role: "enforcer", Bundle: "*", Actions: []string{`B::Action::"b"`, `A::Action::"a"`}}
	for i, changed := range []bool{true, false} {
		res, err := op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: proto.CloneOf(g)})
		if err != nil || res.Changed != changed {
			t.Errorf("%d: %v, %v", i, res, err)
		}
	}
}

// A grant may name what is not published yet, and the answer warns of it. An action counts however
// its text is written.
func TestGrantWarnings(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustLoadShop()
	op := accessOf(s, s.Token)
	shopAction := []string{`Shop::Action::"ViewOrder"`}
	newCaller(t, s, "a")
	newCaller(t, s, "doc-app", grant(access.Auditor, "doc"))
	for _, c := range []struct {
		grant *cedarpostv1.Grant
		want  string // in the only warning; "": none
	}{
		{&cedarpostv1.Grant{Caller: "a", Role: "enforcer", Bundle: "shop", Actions: shopAction}, ""},
		{&cedarpostv1.Grant{Caller: "a", Role: "data-writer", Bundle: "*", EntityTypes: []string{"Shop::Order"}}, ""},
		{&cedarpostv1.Grant{Caller: "token:staff/a b", Role: "auditor", Bundle: "*"}, ""},
		{&cedarpostv1.Grant{Caller: "nobody here", Role: "auditor", Bundle: "*"}, `no caller can have this name: a caller has a name of`},
		{&cedarpostv1.Grant{Caller: "recover", Role: "auditor", Bundle: "*"}, "no caller can have this name"},
		{&cedarpostv1.Grant{Caller: "a-misspelled", Role: "auditor", Bundle: "*"}, "the caller a-misspelled has no API key"},
		{&cedarpostv1.Grant{Caller: "tokn:staff/x", Role: "auditor", Bundle: "*"}, "begins with none of token:"},
		{&cedarpostv1.Grant{Caller: "token:staff", Role: "auditor", Bundle: "*"}, "is not token:<issuer>/<subject>"},
		{&cedarpostv1.Grant{Caller: "certificate:*.example.org", Role: "auditor", Bundle: "*"}, "without a wildcard"},
		{&cedarpostv1.Grant{Caller: "certificate:a.example.org", Role: "auditor", Bundle: "*"}, ""},
		{&cedarpostv1.Grant{Caller: "spiffe://Example.org/x", Role: "auditor", Bundle: "*"}, "is not a SPIFFE ID"},
		{&cedarpostv1.Grant{Caller: "spiffe://example.org/x", Role: "auditor", Bundle: "*"}, ""},
		{&cedarpostv1.Grant{Caller: "a", Role: "enforcer", Bundle: "shpo"}, "no bundle shpo is published"},
		{&cedarpostv1.Grant{Caller: "a", Role: "enforcer", Bundle: "shop", Actions: []string{`Shop::Action::"ViewOrdr"`}}, `the bundle shop has no action Shop::Action::"ViewOrdr"`},
		{&cedarpostv1.Grant{Caller: "a", Role: "data-writer", Bundle: "shop", EntityTypes: []string{"Shop::Ordr"}}, "the bundle shop has no entity type Shop::Ordr"},
		{&cedarpostv1.Grant{Caller: "a", Role: "enforcer", Bundle: "guardrails", Actions: shopAction}, "is of the bundle shop"},
		{&cedarpostv1.Grant{Caller: "a", Role: "data-writer", Bundle: "guardrails", EntityTypes: []string{"Shop::Order"}}, "is of the bundle shop"},
	} {
		res, err := op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: c.grant})
		if err != nil {
			t.Fatal(err)
		}
		said := slices.DeleteFunc(res.Warnings, func(w string) bool { return w == "no bundle guardrails is published" })
		if c.want == "" && len(said) > 0 || c.want != "" && (len(said) != 1 || !strings.Contains(said[0], c.want)) {
			t.Errorf("%v: %q, want %q", c.grant, said, c.want)
		}
	}
	// An operator of another bundle does not learn what the shop has.
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	doc := accessOf(s, newCaller(t, s, "doc-operator", grant(access.Operator, "doc")))
	for _, name := range []string{"ViewOrder", "Nothing"} {
		res, err := doc.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: "doc-app", Role: "enforcer", Bundle: "doc", Actions: []string{`Shop::Action::"` + name + `"`}}})
		if want := `the bundle doc has no action Shop::Action::"` + name + `", or it is a group of actions`; err != nil || len(res.Warnings) != 1 || res.Warnings[0] != want {
			t.Errorf("%v, %v, want %q", res.GetWarnings(), err, want)
		}
	}
	made, err := op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "service", Grants: []*cedarpostv1.Grant{
		{Role: "enforcer", Bundle: "shop", Actions: []string{`Shop::Action::"\u{56}iewOrder"`}}, {Role: "auditor", Bundle: "shpo"},
	}})
	if err != nil || len(made.Warnings) != 1 || !strings.Contains(made.Warnings[0], "no bundle shpo") {
		t.Fatalf("%v, %v", made, err)
	}
	service := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, made.Secret))
	if _, err := service.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", true)); err != nil {
		t.Error(err)
	}
	// A key without rights, and one that gets the rights that its caller had before.
	for _, c := range []struct {
		caller string
		grants []*cedarpostv1.Grant
		want   string
	}{
		{"bare", nil, "the caller bare has no grants"},
		{"service", []*cedarpostv1.Grant{{Role: "auditor", Bundle: "shop"}}, "had other grants before, and this key has their rights, too: auditor for shpo, enforcer for shop"},
	} {
		_, _ = op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: c.caller})
		made, err := op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: c.caller, Grants: c.grants})
		if err != nil || len(made.Warnings) != 1 || !strings.Contains(made.Warnings[0], c.want) {
			t.Errorf("%v, %v, want %q", made.GetWarnings(), err, c.want)
		}
	}
}

// Grants are entities, which auditors and operators of all bundles read as the log names them. The
// read is recorded. Nobody else reads or writes them.
func TestGrantsAsEntities(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	uid := servertest.UID(`Cedarpost::Grant::"enforcer doc service"`)
	everything := s.Token
	secrets := map[string]string{}
	for _, role := range access.Roles() {
		secrets[role] = newCaller(t, s, role, grant(role, "*"))
	}
	secrets["auditor of doc"] = newCaller(t, s, "auditor-doc", grant(access.Auditor, "doc"))
	secrets["operator of doc"] = newCaller(t, s, "operator-doc", grant(access.Operator, "doc"))
	for _, perSecond := range []int32{100, 200} {
		g := withRate(grant(access.Enforcer, "doc"), perSecond)
		g.Caller = "service"
		if _, err := accessOf(s, s.Token).PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: g}); err != nil {
			t.Fatal(err)
		}
	}
	read := 0
	for name, secret := range secrets {
		s.UseKey(secret)
		got, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: uid})
		list, err2 := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: uid.Type})
		changes, err3 := s.Entities.QueryEntityChanges(t.Context(), &cedarpostv1.QueryEntityChangesRequest{Uid: uid})
		ofType, err4 := s.Entities.QueryEntityChanges(t.Context(), &cedarpostv1.QueryEntityChangesRequest{Type: uid.Type})
		some, err5 := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: uid.Type, Attributes: []*cedarpostv1.AttributeEquals{
			{Name: "caller", Value: structpb.NewStringValue("service")}, {Name: "checks_per_second", Value: structpb.NewNumberValue(200)},
		}})
		if name != access.Auditor && name != access.Operator {
			for _, err := range []error{err, err2, err3, err4, err5} {
				if connect.CodeOf(err) != connect.CodePermissionDenied {
					t.Errorf("%s: %v", name, err)
				}
			}
			continue
		}
		read += 5
		_, none := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: uid.Type, Attributes: []*cedarpostv1.AttributeEquals{{Name: "color", Value: structpb.NewStringValue("red")}}})
		servertest.WantCode(t, none, connect.CodeInvalidArgument, "it has caller, role")
		if err := errors.Join(err, err2, err3, err4, err5); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if rate := got.GetEntity().GetEntity().GetAttrs().GetFields()["checks_per_second"].GetNumberValue(); rate != 200 {
			t.Errorf("%s: %v", name, got)
		}
		if len(some.GetEntities()) != 1 || len(list.GetEntities()) < len(secrets) || len(changes.GetChanges()) != 2 || len(ofType.GetChanges()) < len(secrets) {
			t.Errorf("%s: %d, %d, %d", name, len(list.GetEntities()), len(changes.GetChanges()), len(ofType.GetChanges()))
		}
	}
	reads := slices.DeleteFunc(events(t, s, "log_read"), func(e *cedarpostv1.EventRecord) bool { return !strings.Contains(e.Subject, "EntityService") })
	if len(reads) != read {
		t.Errorf("%d reads of grants are recorded, want %d", len(reads), read)
	}
	s.UseKey(everything)
	all, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{})
	if err != nil || len(all.Entities) != 0 {
		t.Errorf("entities of all types have grants: %v, %v", all, err)
	}
	_, err = servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Delete{Delete: &cedarpostv1.DeleteEntity{Uid: uid}}})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "")
}

// Events name whose keys and grants were changed, and are found by that name, also when the key is
// gone.
func TestEventsOfKeysNameTheCaller(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	newCaller(t, s, "service", grant(access.Enforcer, "doc"), grant(access.Auditor, "doc"))
	newCaller(t, s, "other", grant(access.Enforcer, "doc"))
	newCaller(t, s, "single", grant(access.Enforcer, "doc"))
	op := accessOf(s, s.Token)
	res, err := op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "service"})
	if err != nil {
		t.Fatal(err)
	}
	const token = `token:corp/a "b"`
	for _, name := range []string{"single", token, token, "x " + token} { // the second time it changes nothing
		if _, err := op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: name, Role: access.Auditor, Bundle: "doc"}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := op.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: token, Role: access.Auditor, Bundle: "doc"}); err != nil {
		t.Fatal(err)
	}
	for subject, want := range map[string][]string{
		"service":                                {"RevokeKey 0 service", "CreateKey 0 service", "CreateKey 2 "},
		res.Revoked[0].Id:                        {"RevokeKey 0 service", "CreateKey 0 service"},
		"single":                                 {"PutGrant 1 ", "CreateKey 0 single", "CreateKey 1 "},
		token:                                    {"DeleteGrant 1 ", "PutGrant 1 "},
		`Cedarpost::Grant::"auditor doc single"`: {"PutGrant 1 "},
	} {
		list, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{Subject: subject})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range list.Events {
			got = append(got, fmt.Sprintf("%s %d %s", e.GetChange().GetOperation(), e.GetChange().GetEntityCount(), e.GetChange().GetKeyCaller()))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", subject, got, want)
		}
	}
}

// Each refused action is in the log with its count.
func TestRefusalsAreApart(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	service := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, newCaller(t, s, "service", grant(access.Enforcer, "doc"))))
	for i, action := range []string{"DeleteOrder", "EditOrder", "ListOrders"} {
		for range i + 1 {
			_, err := service.Authorize(t.Context(), servertest.AskShop("bob", action, "42", false))
			servertest.WantCode(t, err, connect.CodePermissionDenied, action)
		}
	}
	s.Stop()
	counts := map[string]int64{}
	for _, e := range events(t, s, "refused_right") {
		counts[e.GetRefusedRight().GetReason()] += e.GetRefusedRight().GetCount()
	}
	want := map[string]int64{`Shop::Action::"DeleteOrder"`: 1, `Shop::Action::"EditOrder"`: 2, `Shop::Action::"ListOrders"`: 3}
	if !maps.Equal(counts, want) {
		t.Errorf("%v, want %v", counts, want)
	}
}

// A question without an action is an invalid one, for a caller that may ask at all.
func TestQuestionWithoutAnAction(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustLoadShop()
	question := servertest.AskShop("bob", "ViewOrder", "42", false)
	question.Action = nil
	for secret, want := range map[string]connect.Code{
		newCaller(t, s, "service", grant(access.Enforcer, "shop")): connect.CodeInvalidArgument,
		newCaller(t, s, "auditor", grant(access.Auditor, "shop")):  connect.CodePermissionDenied,
	} {
		client := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, secret))
		for _, action := range []*cedarpostv1.EntityUid{nil, {}, {Id: "ViewOrder"}} {
			question.Action = action
			_, err := client.Authorize(t.Context(), question)
			servertest.WantCode(t, err, want, "")
			if want == connect.CodeInvalidArgument && !strings.Contains(err.Error(), "action") {
				t.Error(err)
			}
			_, err = client.AuthorizeBatch(t.Context(), &cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{servertest.AskShop("bob", "ViewOrder", "42", false), question}})
			servertest.WantCode(t, err, want, "")
		}
	}
}

// A key ends at its time, and its grants with it, without a write.
func TestExpiry(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	end := time.Now().Add(3 * time.Second)
	op := accessOf(s, s.Token)
	key, err := op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "brief", ExpiresAt: timestamppb.New(end), Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "*")}})
	if err != nil {
		t.Fatal(err)
	}
	secret := newCaller(t, s, "granted", &cedarpostv1.Grant{Role: access.Enforcer, Bundle: "*", ExpiresAt: timestamppb.New(end)})
	rev := func(secret string) error {
		_, err := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, secret)).GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
		return err
	}
	w, err := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, secret)).Watch(t.Context(), &cedarpostv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]connect.Code{key.Secret: connect.CodeUnauthenticated, secret: connect.CodePermissionDenied} {
		began := time.Now()
		if err := rev(name); err != nil && began.Before(end) && time.Now().Before(end) {
			t.Errorf("before its end: %v", err)
		}
		servertest.Eventually(t, "the end", func() bool { return connect.CodeOf(rev(name)) == want })
		if time.Now().Before(end) {
			t.Error("it ended early")
		}
	}
	s.MustPut(servertest.DocUser(t, "ann")) // moves the watch
	for err == nil {
		_, err = w.Receive()
	}
	if connect.CodeOf(err) == connect.CodeCanceled {
		t.Error(err)
	}
	servertest.Eventually(t, "the reason in the log", func() bool {
		return slices.ContainsFunc(events(t, s, "authentication_failure"), func(e *cedarpostv1.EventRecord) bool {
			return e.GetAuthenticationFailure().GetReason() == "expired key"
		})
	})
}

// A database from before there were grants: each caller with a key gets all roles, once.
func TestKeysFromBeforeGrants(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	conn := servertest.Session(t, s.URL)
	s.Stop()
	servertest.MustExec(t, conn, "delete from entities where type = '"+store.GrantType+"'")
	again := servertest.On(t, s.URL)
	res, err := accessOf(again, s.Token).WhoAmI(t.Context(), &cedarpostv1.WhoAmIRequest{})
	if err != nil || len(res.Grants) != len(access.AllGrants("x", "y")) {
		t.Errorf("%v, %v", res, err)
	}
}

// Headers that are no key.
func TestKeyForms(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	for reason, header := range map[string]string{"truncated key": "Bearer " + s.Token[:len(s.Token)-2], "unknown key": "Bearer cedarpost_x"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.Admin+cedarpostv1connect.AccessServiceWhoAmIProcedure, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", header)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: %d", reason, res.StatusCode)
		}
		servertest.Eventually(t, reason, func() bool {
			return slices.ContainsFunc(events(t, s, "authentication_failure"), func(e *cedarpostv1.EventRecord) bool { return e.GetAuthenticationFailure().GetReason() == reason })
		})
	}
}

// An upload is refused from the message on that comes after its caller has lost the right.
func TestGrantEndsDuringAnUpload(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	for what, end := range map[string]func() error{
		"the grant": func() error {
			return second(accessOf(s, s.Token).DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "thegrant", Role: access.DataWriter, Bundle: "doc"}))
		},
		"the key": func() error {
			return second(accessOf(s, s.Token).RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "thekey"}))
		},
	} {
		secret := newCaller(t, s, strings.ReplaceAll(what, " ", ""), grant(access.DataWriter, "doc"))
		stream, err := cedarpostv1connect.NewEntityServiceClient(s.Client(s.Admin, secret)).ImportEntities(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		send := func(id string) error {
			return stream.Send(&cedarpostv1.ImportEntitiesRequest{Entities: []*cedarpostv1.Entity{servertest.DocUser(t, id)}})
		}
		if err := send("first"); err != nil {
			t.Fatal(err)
		}
		servertest.Eventually(t, "the first message", func() bool {
			res, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: "Doc::User"})
			return err == nil && slices.ContainsFunc(res.Entities, func(e *cedarpostv1.StoredEntity) bool { return e.Entity.Uid.Id == "first" })
		})
		if err := end(); err != nil {
			t.Fatal(err)
		}
		_ = send("second " + what) // if it is refused, the error is that of the answer
		_, err = stream.CloseAndReceive()
		if code := connect.CodeOf(err); code != connect.CodePermissionDenied && code != connect.CodeUnauthenticated {
			t.Errorf("%s: %v", what, err)
		}
	}
	res, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: "Doc::User"})
	if err != nil || len(res.Entities) != 1 {
		t.Errorf("%v, %v", res, err)
	}
}

// The first key was revoked, and its file is still there: a server says so, and dev replaces it.
func TestBootstrapKeyThatWasRevoked(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(s.Token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	two := accessOf(s, newCaller(t, s, "two", grant(access.Operator, "*")))
	if _, err := two.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Id: access.KeyID(s.Token)}); err != nil {
		t.Fatal(err)
	}
	if made, err := access.BootstrapKey(t.Context(), s.DB, file, false); made || !errors.Is(err, access.ErrKeyRevoked) {
		t.Errorf("%v, %v", made, err)
	}
	if made, err := access.BootstrapKey(t.Context(), s.DB, file, true); !made || err != nil {
		t.Errorf("%v, %v", made, err)
	}
	if text, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(text)) == s.Token {
		t.Errorf("the file has the old key, %v", err)
	}
}
