package server_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// TestShopStory plays the story of the README, in each protocol.
func TestShopStory(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	const (
		basic    = "id status items"
		personal = "customer.name customer.email shipping.address"
		all      = basic + " total internal.margin internal.notes " + personal
	)
	for _, p := range []struct {
		name string
		opts []connecthttp.Option
	}{
		{"connect binary", nil},
		{"connect json", []connecthttp.Option{connecthttp.WithProtoJSON()}},
		{"grpc", []connecthttp.Option{connecthttp.WithGRPC()}},
		{"grpc-web", []connecthttp.Option{connecthttp.WithGRPCWeb()}},
	} {
		t.Run(p.name, func(t *testing.T) {
			c := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, s.Token, p.opts...))
			sees := func(user string, mfa bool, want string) {
				t.Helper()
				r, err := c.Authorize(t.Context(), servertest.WithAllFields(servertest.AskShop(user, "ViewOrder", "42", mfa)))
				if err != nil {
					t.Fatal(err)
				}
				got, wanted := slices.Sorted(slices.Values(r.Fields.Permitted)), slices.Sorted(slices.Values(strings.Fields(want)))
				if r.Decision != cedarpostv1.Decision_ALLOW || !slices.Equal(got, wanted) {
					t.Errorf("%s (mfa %v): %s, sees %v, want %v", user, mfa, r.Decision, got, wanted)
				}
				if r.DeniedAt != nil {
					t.Errorf("%s: denied_at on an allow", user)
				}
			}
			denied := func(user, action, order string, at cedarpostv1.DeniedAt) {
				t.Helper()
				r, err := c.Authorize(t.Context(), servertest.AskShop(user, action, order, true))
				if err != nil {
					t.Fatal(err)
				}
				if r.Decision != cedarpostv1.Decision_DENY || r.GetDeniedAt() != at {
					t.Errorf("%s %s %s: %s at %s, want DENY at %s", user, action, order, r.Decision, r.GetDeniedAt(), at)
				}
			}
			sees("bob", false, basic+" total "+personal)
			sees("alice", false, basic)
			sees("alice", true, basic+" "+personal)
			sees("erin", true, basic+" total internal.margin")
			sees("dave", false, basic+" total internal.margin internal.notes")
			sees("dave", true, all)
			denied("bob", "ViewOrder", "99", cedarpostv1.DeniedAt_OBJECT)
			denied("carol", "ViewOrder", "42", cedarpostv1.DeniedAt_OBJECT)
			denied("mallory", "ViewOrder", "42", cedarpostv1.DeniedAt_FUNCTION)
			denied("alice", "DeleteOrder", "42", cedarpostv1.DeniedAt_FUNCTION)
		})
	}
}

// Each answer has a record with the same content. It is found by its id and by queries.
func TestRecords(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	req := servertest.WithAllFields(servertest.AskShop("alice", "ViewOrder", "42", true))
	req.RequestId = "req-1"
	res, err := s.Authorization.Authorize(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: res.DecisionId})
	if err != nil {
		t.Fatal(err)
	}
	rec := got.Decision
	if rec.Decision != res.Decision || rec.Caller != "bootstrap" || rec.RequestId != "req-1" || rec.Revision != res.Revision.Number ||
		!slices.Equal(rec.Fields.Permitted, res.Fields.Permitted) || rec.Context.Fields["mfa"].GetBoolValue() != true ||
		len(rec.DeterminingPolicies) != len(res.DeterminingPolicies) {
		t.Errorf("record differs from the answer:\n%v\n%v", rec, res)
	}
	for range 4 {
		if _, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("carol", "ViewOrder", "42", true)); err != nil {
			t.Fatal(err)
		}
	}
	// The newest come first. Page tokens are bound to the query.
	q := &cedarpostv1.QueryDecisionsRequest{Principal: servertest.UID(`Shop::User::"carol"`), DeniedAt: cedarpostv1.DeniedAt_OBJECT, PageSize: 3}
	page, err := s.Audit.QueryDecisions(t.Context(), q)
	if err != nil || len(page.Decisions) != 3 || page.NextPageToken == "" {
		t.Fatalf("first page: %v %v", page, err)
	}
	q.PageToken = page.NextPageToken
	page, err = s.Audit.QueryDecisions(t.Context(), q)
	if err != nil || len(page.Decisions) != 1 || page.NextPageToken != "" {
		t.Fatalf("second page: %v %v", page, err)
	}
	q.Principal = servertest.UID(`Shop::User::"bob"`)
	if _, err = s.Audit.QueryDecisions(t.Context(), q); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a page token of another query: %v", err)
	}
	page, err = s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{RequestId: "req-1"})
	if err != nil || len(page.Decisions) != 1 || page.Decisions[0].DecisionId != res.DecisionId {
		t.Errorf("by request id: %v %v", page, err)
	}
}

func TestBatch(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	bad := servertest.AskShop("bob", "NoSuchAction", "42", true)
	res, err := s.Authorization.AuthorizeBatch(t.Context(), &cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{
		servertest.AskShop("bob", "ViewOrder", "42", false), bad, servertest.AskShop("carol", "ViewOrder", "42", false),
	}})
	if err != nil {
		t.Fatal(err)
	}
	if res.Results[0].GetResponse().GetDecision() != cedarpostv1.Decision_ALLOW ||
		res.Results[1].GetError().GetCode() != "invalid_argument" ||
		res.Results[2].GetResponse().GetDecision() != cedarpostv1.Decision_DENY {
		t.Errorf("got %v", res)
	}
	n := count(t, s)
	if n != 2 {
		t.Errorf("%d records for 2 decisions", n)
	}
	if _, err := s.Authorization.AuthorizeBatch(t.Context(), &cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{
		{Principal: bad.Principal, Action: bad.Action, Resource: bad.Resource, Consistency: &cedarpostv1.Consistency{}},
	}}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("consistency on a check: %v", err)
	}
}

func count(t testing.TB, s *servertest.Server) int {
	t.Helper()
	n := 0
	token := ""
	for {
		page, err := s.Audit.QueryDecisions(context.Background(), &cedarpostv1.QueryDecisionsRequest{PageSize: 1000, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		n += len(page.Decisions)
		if token = page.NextPageToken; token == "" {
			return n
		}
	}
}
