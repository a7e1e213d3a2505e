package server_test

import (
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// Grants are given and taken while their caller calls. A call that lies between two changes has the
// right of that time: none is permitted by a grant that is gone.
func TestAttackGrantsChangeUnderLoad(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustLoadShop()
	op := accessOf(s, s.Token)
	asks := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, newCaller(t, s, "asker", grant(access.Enforcer, "shop"))))
	// changes is odd while a grant is being changed. After each change it has grown by two.
	var changes, permitted, refused, between atomic.Int64
	granted := func(changes int64) bool { return changes%4 == 0 }
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				before := changes.Load()
				_, err := asks.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", true))
				switch code := connect.CodeOf(err); {
				case err != nil && code != connect.CodePermissionDenied:
					t.Errorf("%v", err)
				case changes.Load() != before || before%2 == 1:
					between.Add(1)
				case granted(before) && err != nil:
					t.Errorf("refused with a grant: %v", err)
				case !granted(before) && err == nil:
					t.Error("permitted without a grant")
				case err == nil:
					permitted.Add(1)
				default:
					refused.Add(1)
				}
			}
		})
	}
	// The counts of both kinds grow between the changes.
	grows := func(count *atomic.Int64) {
		servertest.Eventually(t, "more calls", func(least int64) func() bool {
			return func() bool { return count.Load() >= least }
		}(count.Load()+5))
	}
	for range 10 {
		grows(&permitted)
		changes.Add(1)
		_, err := op.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "asker", Role: access.Enforcer, Bundle: "shop"})
		changes.Add(1)
		if err != nil {
			t.Fatal(err)
		}
		grows(&refused)
		changes.Add(1)
		_, err = op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: "asker", Role: access.Enforcer, Bundle: "shop"}})
		changes.Add(1)
		if err != nil {
			t.Fatal(err)
		}
	}
	close(done)
	wg.Wait()
	t.Logf("20 changes of a grant: %d calls permitted by it, %d refused without it, %d during a change; none otherwise", permitted.Load(), refused.Load(), between.Load())
}

// The key of a caller whose grant was taken is refused by every server, and so is its open watch.
func TestAttackKeyOfADeletedGrant(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustLoadShop()
	other := servertest.On(t, s.URL)
	secret := newCaller(t, s, "asker", grant(access.Enforcer, "shop"))
	asks := func(s *servertest.Server) error {
		_, err := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, secret)).Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", true))
		return err
	}
	servertest.Eventually(t, "the other server", func() bool { return asks(other) == nil })
	watch, err := cedarpostv1connect.NewAuthorizationServiceClient(other.Client(other.API, secret)).Watch(t.Context(), &cedarpostv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Receive(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if _, err := accessOf(s, s.Token).DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "asker", Role: access.Enforcer, Bundle: "shop"}); err != nil {
		t.Fatal(err)
	}
	servertest.WantCode(t, asks(s), connect.CodePermissionDenied, "no right")
	servertest.Eventually(t, "a refusal by the other server", func() bool { return connect.CodeOf(asks(other)) == connect.CodePermissionDenied })
	elsewhere := time.Since(began)
	for err == nil {
		_, err = watch.Receive()
	}
	servertest.WantCode(t, err, connect.CodePermissionDenied, "Watch")
	t.Logf("refused by its own server at once, by another one after %v; the watch ended", elsewhere.Round(time.Millisecond))
}

// An idempotency key is of one caller. Another caller that sends it with the same request gets its
// own answer, or a refusal, and never that of the first one.
func TestAttackIdempotencyKeyOfAnotherCaller(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	req := &cedarpostv1.PutGrantRequest{IdempotencyKey: "k", Grant: &cedarpostv1.Grant{Caller: "x", Role: access.Auditor, Bundle: "doc"}}
	first, err := accessOf(s, s.Token).PutGrant(t.Context(), req)
	if err != nil || !first.Changed {
		t.Fatalf("%v, %v", first, err)
	}
	operator := newCaller(t, s, "operator", grant(access.Operator, "*"))
	second, err := accessOf(s, operator).PutGrant(t.Context(), req)
	if err != nil || second.Changed { // it is stored already
		t.Errorf("%v, %v", second, err)
	}
	_, err = accessOf(s, newCaller(t, s, "asker", grant(access.Enforcer, "doc"))).PutGrant(t.Context(), req)
	servertest.WantCode(t, err, connect.CodePermissionDenied, "PutGrant")
	// A caller that lost its right does not get the old answer any more.
	if _, err := accessOf(s, s.Token).DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "operator", Role: access.Operator, Bundle: "*"}); err != nil {
		t.Fatal(err)
	}
	_, err = accessOf(s, operator).PutGrant(t.Context(), req)
	servertest.WantCode(t, err, connect.CodePermissionDenied, "PutGrant")
	t.Log("the key of another caller: 1 answer of its own, 2 refusals, 0 answers of the first caller")
}

// Two operators of one bundle each, who distrust each other. Neither gets at the callers of the other
// one, nor at callers whose grants are still to come, nor learns which bundles there are.
func TestAttackOperatorTakesCallers(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	root := accessOf(s, s.Token)
	thief := accessOf(s, newCaller(t, s, "thief", grant(access.Operator, "doc")))
	bill := accessOf(s, newCaller(t, s, "bill", grant(access.Operator, "bill")))
	newCaller(t, s, "bare")
	made, err := bill.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "bill-svc", Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "bill")}})
	if err != nil {
		t.Fatal(err)
	}
	trap, err := thief.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "bill-pipeline", Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "doc")}})
	if err != nil {
		t.Fatal(err)
	}
	put := func(by cedarpostv1connect.AccessServiceClient, caller, role, bundle string) error {
		return second(by.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: caller, Role: role, Bundle: bundle}}))
	}
	attempts := map[string]error{
		"waits with its key for a grant for bill": put(bill, "bill-pipeline", access.PolicyPublisher, "bill"),
		"takes a caller without grants":           put(thief, "bare", access.Enforcer, "doc"),
		"locks the other operator out of its own": put(thief, "bill-svc", access.Auditor, "doc"),
		"locks the other operator's own key":      put(thief, "bill", access.Enforcer, "doc"),
		"makes a key of a foreign caller":         second(thief.RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: "bill-svc"})),
		"ends a foreign key":                      second(thief.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "bill-svc"})),
		"asks for a caller that is not there":     second(thief.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "nobody"})),
	}
	refused := 0
	for what, err := range attempts {
		if connect.CodeOf(err) != connect.CodePermissionDenied || !strings.Contains(err.Error(), "for a caller that is not its own (") {
			t.Errorf("%s: %v", what, err)
			continue
		}
		refused++
	}
	if me, err := accessOf(s, trap.Secret).WhoAmI(t.Context(), &cedarpostv1.WhoAmIRequest{}); err != nil || len(me.Grants) != 1 {
		t.Errorf("%v, %v", me, err)
	}
	// An operator of all bundles widens a caller. Each operator still ends the grants for its bundle.
	if err := put(root, "bill-svc", access.Auditor, "doc"); err != nil {
		t.Fatal(err)
	}
	servertest.WantCode(t, second(thief.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Id: made.Key.Id})), connect.CodePermissionDenied, "for a caller that is not its own (")
	if _, err := thief.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "bill-svc", Role: access.Auditor, Bundle: "doc"}); err != nil {
		t.Error(err)
	}
	if _, err := bill.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Id: made.Key.Id}); err != nil {
		t.Errorf("the operator of bill ends a key of its caller: %v", err)
	}
	t.Logf("attack: an operator of one bundle reaches for callers of another one: %d of %d attempts refused, all alike", refused, len(attempts))
}

// admin-local forbids every operator to manage keys and grants for one bundle. Neither an operator of
// all bundles gets around it, nor one of two bundles.
func TestAttackAroundAdminLocal(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	made, err := accessOf(s, s.Token).CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "docsvc", Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "doc")}})
	if err != nil {
		t.Fatal(err)
	}
	operators := map[string]cedarpostv1connect.AccessServiceClient{
		"one":  accessOf(s, newCaller(t, s, "one", grant(access.Operator, "doc"))),
		"both": accessOf(s, newCaller(t, s, "both", grant(access.Operator, "doc"), grant(access.Operator, "bill"))),
		"all":  accessOf(s, newCaller(t, s, "all", grant(access.Operator, "*"))),
	}
	s.MustApply("admin-local", "schema.cedarschema", "", "p.cedar", `
		@id("keys") forbid (principal, action in [Cedarpost::Action::"CreateKey", Cedarpost::Action::"RotateKey", Cedarpost::Action::"RevokeKey", Cedarpost::Action::"DeleteGrant"], resource == Cedarpost::Bundle::"doc");`)
	refused := 0
	for name, op := range operators {
		for what, err := range map[string]error{
			"CreateKey":   second(op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "new-" + name, Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "doc")}})),
			"RotateKey":   second(op.RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: "docsvc"})),
			"RevokeKey":   second(op.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Id: made.Key.Id})),
			"DeleteGrant": second(op.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "docsvc", Role: access.Enforcer, Bundle: "doc"})),
		} {
			servertest.WantCode(t, err, connect.CodePermissionDenied, what)
			if err != nil {
				refused++
			}
		}
	}
	if _, err := operators["both"].CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "billsvc", Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "bill")}}); err != nil {
		t.Errorf("a key for the other bundle: %v", err)
	}
	t.Logf("attack: 3 operators do what admin-local forbids for one bundle: %d of 12 calls refused", refused)
}

// An operator whose grant ends makes keys and grants that do not.
func TestAttackOperatorOutlivesItsEnd(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	end := time.Now().Add(time.Hour).Truncate(time.Second)
	until := func(role, bundle string, at time.Time) *cedarpostv1.Grant {
		g := grant(role, bundle)
		g.ExpiresAt = timestamppb.New(at)
		return g
	}
	for _, bundle := range []string{"doc", "*"} {
		name := map[string]string{"doc": "temp-doc", "*": "temp-all"}[bundle]
		op := accessOf(s, newCaller(t, s, name, until(access.Operator, bundle, end)))
		put := func(caller string, g *cedarpostv1.Grant) error {
			g.Caller = caller
			return second(op.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: g}))
		}
		refused := 0
		attempts := map[string]error{
			"its own grant without an end":  put(name, grant(access.Operator, bundle)),
			"its own grant with a late end": put(name, until(access.Operator, bundle, end.Add(time.Second))),
			"a grant of another caller":     put("x-"+name, grant(access.Enforcer, "doc")),
			"its own key without an end":    second(op.RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: name})),
			"a key of another caller":       second(op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "y-" + name, Grants: []*cedarpostv1.Grant{until(access.Enforcer, "doc", end)}})),
			"a grant with a key":            second(op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "z-" + name, ExpiresAt: timestamppb.New(end), Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "doc")}})),
		}
		for what, err := range attempts {
			if connect.CodeOf(err) != connect.CodePermissionDenied || err == nil || !strings.Contains(err.Error(), "ends at "+end.UTC().Format(time.RFC3339)) {
				t.Errorf("%s: %s: %v", name, what, err)
				continue
			}
			refused++
		}
		if _, err := op.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: "ok-" + name, ExpiresAt: timestamppb.New(end), Grants: []*cedarpostv1.Grant{until(access.Enforcer, "doc", end)}}); err != nil {
			t.Errorf("a key and a grant that end in time: %v", err)
		}
		t.Logf("attack: the operator %s, whose grant ends, outlives its end: %d of %d attempts refused", name, refused, len(attempts))
	}
}

// An operator of one bundle makes a caller with the name that a recovery will use, and waits. It gets no
// caller of such a name, and a recovery takes no caller that is there already.
func TestAttackPrepareTheNextRecovery(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	thief := accessOf(s, newCaller(t, s, "thief", grant(access.Operator, "doc")))
	names := []string{"recovered", "Recovered", "bootstrap", "Bootstrap", "RECOVER"}
	refused := 0
	for _, name := range names {
		_, key := thief.CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: name, Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "doc")}})
		g := grant(access.Enforcer, "doc")
		g.Caller = name
		_, put := thief.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: g})
		if connect.CodeOf(key) != connect.CodePermissionDenied || connect.CodeOf(put) != connect.CodePermissionDenied || key == nil || put == nil {
			t.Errorf("%s: %v, %v", name, key, put)
			continue
		}
		refused++
	}
	key, _ := access.NewKey("k", nil)
	end := time.Now().Add(-time.Hour)
	for what, now := range map[string]store.Access{
		"a live key":             {Keys: []store.Key{{Name: "recovered", ID: key.ID}}},
		"a key that has ended":   {Keys: []store.Key{{Name: "recovered", ID: key.ID, ExpiresAt: &end}}},
		"a grant and no key":     {Grants: []store.Grant{{Caller: "recovered", Role: access.Enforcer, Bundle: "doc"}}},
		"a grant that has ended": {Grants: []store.Grant{{Caller: "recovered", Role: access.Enforcer, Bundle: "doc", ExpiresAt: &end}}},
	} {
		if c, _, err := access.Recovery(now, "recovered"); err == nil || len(c.Put)+len(c.Add) > 0 {
			t.Errorf("%s: %v", what, err)
		}
	}
	if c, secret, err := access.Recovery(store.Access{Keys: []store.Key{{Name: "other"}}}, "recovered"); err != nil || len(c.Put) != 1 || len(c.Add) != 1 || secret == "" {
		t.Errorf("a new caller: %+v, %v", c, err)
	}
	t.Logf("attack: an operator of one bundle prepares the caller of the next recovery: %d of %d names refused; 4 of 4 callers that are there already are not recovered", refused, len(names))
}
