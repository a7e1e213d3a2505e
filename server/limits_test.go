package server_test

import (
	"fmt"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// groups imports n groups, each with the parents that fn returns.
func groups(t *testing.T, s *servertest.Server, n int, fn func(i int) string) {
	t.Helper()
	stream, err := s.Entities.ImportEntities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	msg := &cedarpostv1.ImportEntitiesRequest{}
	for i := range n {
		msg.Entities = append(msg.Entities, servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Doc::Group","id":"g%d"},"parents":[%s]}`, i, fn(i))))
		if len(msg.Entities) == 1000 || i == n-1 {
			if err := stream.Send(msg); err != nil {
				t.Fatal(err)
			}
			msg = &cedarpostv1.ImportEntitiesRequest{}
		}
	}
	if _, err := stream.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
}

func group(i int) string { return fmt.Sprintf(`{"type":"Doc::Group","id":"g%d"}`, i) }

// A chain of groups as long as the limit is followed to its end. A longer one is an error, not a
// decision by a part of it.
func TestDeepGroups(t *testing.T) {
	t.Parallel() // it takes long
	// On a busy machine it may take long to read so many groups.
	s := docServer(t, func(c *server.Config) { c.DecisionTimeout = 2 * time.Minute })
	const deep = 10_500
	groups(t, s, deep, func(i int) string {
		if i+1 == deep {
			return ""
		}
		return group(i + 1)
	})
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Doc::Paper","id":"p"},"attrs":{"readers":`+group(deep-1)+`}}`))
	for from, want := range map[int]string{deep - 100: "allow", deep - 10_000: "allow", deep - 10_001: "error", 0: "error"} {
		s.MustPut(servertest.DocUser(t, "ann", fmt.Sprintf("g%d", from)))
		r, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Doc::User::"ann"`), Action: servertest.UID(`Doc::Action::"Read"`), Resource: servertest.UID(`Doc::Paper::"p"`),
		})
		switch {
		case want == "error":
			servertest.WantCode(t, err, connect.CodeFailedPrecondition, "more than 10000 ancestors")
		case err != nil || r.Decision != cedarpostv1.Decision_ALLOW:
			t.Errorf("%d levels: %v %v", deep-from, r, err)
		}
	}
	// A write that would close a cycle is refused.
	_, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_AddParents{
		AddParents: &cedarpostv1.ChangeParents{Uid: servertest.UID(fmt.Sprintf(`Doc::Group::"g%d"`, deep-1)), Parents: []*cedarpostv1.EntityUid{servertest.UID(fmt.Sprintf(`Doc::Group::"g%d"`, deep-50))}},
	}})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "its own ancestor")
}
