package server_test

import (
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// An approval that waits for another write, until the right of its caller has ended, is refused.
func TestAttackApproveAfterItsRight(t *testing.T) {
	t.Parallel() // it waits for the end of a grant
	h := newHouse(t, noRule)
	c := h.create(extra(3))
	end := time.Now().Add(2 * time.Second)
	brief := grant(access.PolicyApprover, "doc")
	brief.ExpiresAt = timestamppb.New(end)
	late := policiesOf(t, h.Server, "late", brief)

	lock := servertest.Session(t, h.URL)
	servertest.MustExec(t, lock, "begin; select from revision for update")
	approved := make(chan error, 1)
	go func() {
		_, err := late.ApproveChange(t.Context(), &cedarpostv1.ApproveChangeRequest{Id: c.Id, Digest: c.Digest})
		approved <- err
	}()
	time.Sleep(time.Until(end)) // what ends by time ends at this time, on any machine
	servertest.MustExec(t, lock, "commit")
	if err := <-approved; connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("approved without the right: %v", err)
	}
	if n := len(h.get(c.Id).Change.Approvals); n != 0 {
		t.Errorf("%d approvals", n)
	}
	if !t.Failed() {
		t.Log("attack: an approval that waits until the right of its caller has ended: 1 of 1 refused")
	}
}
