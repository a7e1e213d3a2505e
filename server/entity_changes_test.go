package server_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

func TestEntityChanges(t *testing.T) {
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann"), servertest.DocUser(t, "bob"), docGroup(t, "team", "all"))
	s.MustPut(servertest.DocUser(t, "ann", "team"))
	if _, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Delete{
		Delete: &cedarpostv1.DeleteEntity{Uid: servertest.UID(`Doc::User::"bob"`)}}}); err != nil {
		t.Fatal(err)
	}
	query := func(req *cedarpostv1.QueryEntityChangesRequest) (texts []string) {
		t.Helper()
		for {
			page, err := s.Entities.QueryEntityChanges(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range page.Changes {
				texts = append(texts, strings.ToLower(c.Kind.String())+" "+c.Uid.Id)
				if c.Caller != "bootstrap" || c.Time == nil {
					t.Errorf("%v", c)
				}
				// At its revision, the entity is as the change made it, or deleted.
				_, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: c.Uid, At: c.Revision})
				if gone := c.Kind == cedarpostv1.EntityChange_DELETED; (connect.CodeOf(err) == connect.CodeNotFound) != gone {
					t.Errorf("%v: %v", c, err)
				}
			}
			// Later writes are not on the pages, which go back in time.
			s.MustPut(servertest.DocUser(t, fmt.Sprint("late", len(texts))))
			if req.PageToken = page.NextPageToken; req.PageToken == "" {
				return texts
			}
		}
	}
	all := []string{"deleted bob", "changed ann", "created team", "created ann", "created bob"}
	if got := query(&cedarpostv1.QueryEntityChangesRequest{PageSize: 2}); !slices.Equal(got, all) {
		t.Errorf("all: %v", got)
	}
	if got := query(&cedarpostv1.QueryEntityChangesRequest{PageSize: 1, Uid: servertest.UID(`Doc::User::"ann"`)}); !slices.Equal(got, []string{"changed ann", "created ann"}) {
		t.Errorf("of ann: %v", got)
	}
	if got := query(&cedarpostv1.QueryEntityChangesRequest{Type: "Doc::Group", Caller: "bootstrap"}); !slices.Equal(got, []string{"created team"}) {
		t.Errorf("of groups: %v", got)
	}
	page, err := s.Entities.QueryEntityChanges(t.Context(), &cedarpostv1.QueryEntityChangesRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Entities.QueryEntityChanges(t.Context(), &cedarpostv1.QueryEntityChangesRequest{PageToken: page.NextPageToken, Type: "Doc::User"})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "page_token")
}
