package server_test

import (
	"context"
	"fmt"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

func withRate(g *cedarpostv1.Grant, perSecond int32) *cedarpostv1.Grant {
	g.ChecksPerSecond = perSecond
	return g
}

// A grant gives a caller another rate than the setting of the server, from the next call on. A batch
// counts its checks.
func TestRateOfAGrant(t *testing.T) {
	t.Parallel()
	s := servertest.New(t, func(c *server.Config) { c.RateLimit = 0.001 }) // a burst of 100, and next to nothing after it
	s.MustLoadShop()
	op := accessOf(s, s.Token)
	secret := newCaller(t, s, "service", grant(access.Enforcer, "shop"))
	service := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, secret))
	batch := &cedarpostv1.AuthorizeBatchRequest{}
	for range 100 {
		batch.Checks = append(batch.Checks, servertest.AskShop("bob", "ViewOrder", "42", true))
	}
	if _, err := service.AuthorizeBatch(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	_, err := service.Authorize(t.Context(), batch.Checks[0])
	servertest.WantCode(t, err, connect.CodeResourceExhausted, "0.001 checks a second, and 100 at once (--rate-limit)")

	given := withRate(grant(access.Enforcer, "shop"), 1_000_000)
	given.Caller = "service"
	if _, err := op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: given}); err != nil {
		t.Fatal(err)
	}
	servertest.Eventually(t, "the new rate", func() bool {
		_, err := service.Authorize(t.Context(), batch.Checks[0])
		return err == nil
	})
	me, err := accessOf(s, secret).WhoAmI(t.Context(), &cedarpostv1.WhoAmIRequest{})
	if err != nil || len(me.Grants) != 1 || me.Grants[0].ChecksPerSecond != 1_000_000 {
		t.Errorf("%v, %v", me, err)
	}
	list, err := op.ListGrants(t.Context(), &cedarpostv1.ListGrantsRequest{Caller: "service"})
	if err != nil || len(list.Grants) != 1 || list.Grants[0].ChecksPerSecond != 1_000_000 {
		t.Errorf("%v, %v", list, err)
	}
	if again, err := op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: given}); err != nil || again.Changed {
		t.Errorf("the same grant again: %v, %v", again, err)
	}
	for bad, want := range map[*cedarpostv1.Grant]string{
		withRate(grant(access.Auditor, "shop"), 5):           "only the role enforcer",
		withRate(grant(access.Enforcer, "shop"), -1):         "checks_per_second",
		withRate(grant(access.Enforcer, "shop"), 10_000_001): "checks_per_second",
	} {
		bad.Caller = "other"
		_, err := op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: bad})
		servertest.WantCode(t, err, connect.CodeInvalidArgument, want)
	}
	if _, err := decisionlog.VerifyLog(t.Context(), s.DB, decisionlog.Verification{History: true}); err != nil {
		t.Error(err)
	}
}

// An operator of one bundle lifts no limit of the server: it neither sets a rate, nor keeps one
// longer, nor takes one away. It stores no more grants for a caller than there may be.
func TestAttackOperatorLiftsLimits(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	all := accessOf(s, s.Token)
	op := accessOf(s, newCaller(t, s, "op", grant(access.Operator, "shop")))
	newCaller(t, s, "slow", withRate(grant(access.Enforcer, "shop"), 5))
	refused := 0
	refuse := func(what string, err error) {
		t.Helper()
		if connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("%s: %v", what, err)
			return
		}
		servertest.WantCode(t, err, connect.CodePermissionDenied, "for a grant with a rate (--rate, checks_per_second), which only an operator of all bundles manages")
		refused++
	}
	put := func(by cedarpostv1connect.AccessServiceClient, caller string, rate int32) error {
		g := withRate(grant(access.Enforcer, "shop"), rate)
		g.Caller = caller
		return second(by.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: g}))
	}
	refuse("a new grant with a rate", put(op, "friend", 1_000_000))
	refuse("a new key with a rate", second(op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "friend", Grants: []*cedarpostv1.Grant{withRate(grant(access.Enforcer, "shop"), 1_000_000)}})))
	refuse("a higher rate", put(op, "slow", 1_000_000))
	refuse("no rate in place of one", put(op, "slow", 0))
	err := second(op.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "slow", Role: access.Enforcer, Bundle: "shop"}))
	refuse("its grant deleted", err)
	servertest.WantCode(t, err, connect.CodePermissionDenied, "no right to DeleteGrant")
	if err := put(op, "friend", 0); err != nil {
		t.Errorf("a grant without a rate: %v", err)
	}
	if err := put(all, "slow", 7); err != nil {
		t.Errorf("an operator of all bundles: %v", err)
	}

	if _, err := s.DB.ChangeAccess(t.Context(), "test", func(context.Context, store.Access) (c store.AccessChange, err error) {
		for i := range server.MaxCallerGrants {
			c.Put = append(c.Put, store.Grant{Caller: "token:corp/full", Role: access.Enforcer, Bundle: fmt.Sprint("b", i)})
		}
		return c, nil
	}); err != nil {
		t.Fatal(err)
	}
	err = put(op, "token:corp/full", 0)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "which is the limit for one caller")
	t.Logf("attack: an operator of one bundle tries to set, raise, drop and delete a rate: %d of 5 refused; grant %d of a caller is refused", refused, server.MaxCallerGrants+1)
}
