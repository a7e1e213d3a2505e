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

// The number of a revision stands for its token, to read.
func TestReadsAtANumber(t *testing.T) {
	s := docServer(t)
	first := s.MustPut(servertest.DocUser(t, "ann"))
	newest := s.MustPut(servertest.DocUser(t, "bob"))
	number := func(n int64) *cedarpostv1.Revision { return &cedarpostv1.Revision{Token: fmt.Sprint(n)} }
	for n, want := range map[int64]string{first.Number: "ann", newest.Number: "ann bob"} {
		if got, err := list(t, s, &cedarpostv1.ListEntitiesRequest{At: number(n)}); err != nil || got != want {
			t.Errorf("at %d: %q, %v, want %q", n, got, err, want)
		}
	}
	bob := servertest.UID(`Doc::User::"bob"`)
	_, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: bob, At: number(first.Number)})
	servertest.WantCode(t, err, connect.CodeNotFound, "is not stored")
	got, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: bob, At: number(newest.Number)})
	if err != nil || got.Revision.Number != newest.Number || got.Revision.Token == number(newest.Number).Token {
		t.Errorf("%v, %v", got, err)
	}
	_, err = list(t, s, &cedarpostv1.ListEntitiesRequest{At: number(newest.Number + 9)})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, fmt.Sprintf("there is no revision %d yet; the newest one is %d", newest.Number+9, newest.Number))
	for _, text := range []string{"0", "-1", "1e3", "99999999999999999999", " 1"} {
		_, err = list(t, s, &cedarpostv1.ListEntitiesRequest{At: &cedarpostv1.Revision{Token: text}})
		servertest.WantCode(t, err, connect.CodeInvalidArgument, "token")
	}
	// A number says nothing of a history, so it does not stand for the freshness of a decision.
	_, err = s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: bob, Action: servertest.UID(`Doc::Action::"Read"`), Resource: servertest.UID(`Doc::Paper::"p"`),
		Consistency: &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: number(first.Number)}}})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "token")
}
