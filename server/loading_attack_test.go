package server_test

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// Somebody who writes entities gives a few users 210 MB of parents. Loading them took longer than a
// decision may, so each question about them was unavailable, as in an outage. Now it is refused
// after at most 8 MiB, in a batch by itself, and others are served meanwhile.
func TestAttackHeavyAncestors(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	const users, roles = 4, 210
	earlier, err := s.Authorization.Authorize(t.Context(), servertest.AskShop(fmt.Sprint("deep", users), "ViewOrder", "42", true))
	if err != nil {
		t.Fatal(err)
	}
	servertest.MustStoreHeavy(t, s, users+1, roles)
	seen := honest(t, func() error {
		_, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("alice", "ViewOrder", "42", true))
		return err
	})
	deep := func(i int) *cedarpostv1.AuthorizeRequest {
		return servertest.AskShop([]string{"deep0", "deep1", "deep2", "deep3"}[i%users], "ViewOrder", "42", true)
	}
	var attackers sync.WaitGroup
	var slowest atomic.Int64
	const callers, each = 6, 2
	for i := range callers {
		attackers.Go(func() {
			for range each {
				began := time.Now()
				_, err := s.Authorization.Authorize(t.Context(), deep(i))
				servertest.WantCode(t, err, connect.CodeFailedPrecondition, "no decision was given")
				for took := int64(time.Since(began)); took > slowest.Load(); {
					slowest.Store(took)
				}
			}
		})
	}
	attackers.Wait()
	_, err = s.Authorization.Authorize(t.Context(), deep(0))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "weigh more than 8388608 bytes")

	res, err := s.Authorization.AuthorizeBatch(t.Context(), &cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{
		deep(0), servertest.AskShop("alice", "ViewOrder", "43", true), deep(1), servertest.AskShop("bob", "ViewOrder", "44", true),
	}})
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range res.GetResults() {
		if i%2 == 0 && r.GetError().GetCode() != connect.CodeFailedPrecondition.String() || i%2 == 1 && r.GetResponse() == nil {
			t.Errorf("check %d of the batch: %v", i, r)
		}
	}
	t.Logf("attack: %d questions on %d connections about users with %d MB of parents, %d bytes are allowed: all are failed_precondition, the slowest after %v; %s",
		callers*each, callers, roles, engine.MaxSliceWeight, time.Duration(slowest.Load()).Round(time.Millisecond), seen())

	// The earlier decision is of the same revision, as if it had been made before there was a bound.
	again := replay(t, s, earlier.DecisionId)
	if again.Outcome != notReplayable || !strings.Contains(again.Reason, "its entities weigh more than") {
		t.Errorf("a replay of a decision about 210 MB: %v, %s", again.Outcome, again.Reason)
	}

	// What is stored already can be read, whatever it weighs.
	e, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Shop::Role::"mid1"`)})
	if err != nil || len(e.GetEntity().GetEntity().GetParents()) != 1000 {
		t.Errorf("%d parents, %v", len(e.GetEntity().GetEntity().GetParents()), err)
	}
}
