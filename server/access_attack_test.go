package server_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
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
