package server_test

import (
	"fmt"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// The error of a read of history that was swept says at which revision history begins.
func TestReadsOfWhatIsSwept(t *testing.T) {
	s := docServer(t)
	old := s.MustPut(servertest.DocUser(t, "ann"))
	s.MustPut(servertest.DocUser(t, "ann", "team"))
	newest := s.MustPut(servertest.DocUser(t, "bob"))
	servertest.MustExec(t, servertest.Session(t, s.URL), "update revisions set at = now() - interval '100 days'")
	if _, err := s.DB.Sweep(t.Context(), store.MinHistoryRetention); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("history begins at revision %d;", newest.Number)
	_, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"ann"`), At: old})
	servertest.WantCode(t, err, connect.CodeOutOfRange, text)
	_, err = list(t, s, &cedarpostv1.ListEntitiesRequest{At: old})
	servertest.WantCode(t, err, connect.CodeOutOfRange, text)
	if got, err := list(t, s, &cedarpostv1.ListEntitiesRequest{At: newest}); err != nil || got != "ann bob" {
		t.Errorf("%q, %v", got, err)
	}
	stale := put(servertest.DocUser(t, "carol"))
	stale.Precondition = &cedarpostv1.Precondition{Condition: &cedarpostv1.Precondition_IfRevision{IfRevision: old}}
	_, err = servertest.Write(t, s, stale)
	servertest.WantCode(t, err, connect.CodeAborted, "changed after that revision")
	changes, err := s.Entities.QueryEntityChanges(t.Context(), &cedarpostv1.QueryEntityChangesRequest{})
	if err != nil || len(changes.Changes) != 0 {
		t.Errorf("%v, %v", changes, err)
	}
}
