package cedarposttest

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server/servertest"
)

func raw(s *Service) cedarpostv1connect.AuthorizationServiceClient {
	return cedarpostv1connect.NewAuthorizationServiceClient(connect.NewClient(s.transport))
}

// A watch reports every revision. Each message goes on from the one before, and a new
// watch goes on from an earlier one.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		svc := NewFS(t, policies.Shop())
		alice, staff := cedarpost.UID("Shop::User", "alice"), cedarpost.UID("Shop::Role", "staff")
		watch := func(after string) cedarpostv1connect.AuthorizationServiceWatchClientStream {
			t.Helper()
			req := &cedarpostv1.WatchRequest{}
			if after != "" {
				req.After = &cedarpostv1.Revision{Token: after}
			}
			stream, err := raw(svc).Watch(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			return stream
		}
		receive := func(stream cedarpostv1connect.AuthorizationServiceWatchClientStream, after, number int64, changed, reset bool) *cedarpostv1.WatchResponse {
			t.Helper()
			m, err := stream.Receive()
			if err != nil {
				t.Fatal(err)
			}
			if m.After != after && !reset || m.Revision.Number != number || (len(m.Tags) > 0) != changed || m.Reset_ != reset {
				t.Errorf("%v; want after %d, number %d, changed %v, reset %v", m, after, number, changed, reset)
			}
			return m
		}
		stream := watch("")
		first := receive(stream, 1, 1, false, false)
		svc.AddParents(alice, staff)
		receive(stream, 1, 2, true, false)
		svc.RemoveParents(alice, staff)
		svc.AddParents(alice, staff)
		for at := int64(2); at < 4; { // the two changes can be in one message or in two
			m, err := stream.Receive()
			if err != nil || m.After != at || m.Revision.Number <= at || len(m.Tags) == 0 {
				t.Fatalf("after %d: %v, %v", at, m, err)
			}
			at = m.Revision.Number
		}
		began := time.Now()
		receive(stream, 4, 4, false, false)
		if d := time.Since(began); d != heartbeat {
			t.Errorf("a heartbeat after %v", d)
		}
		svc.Fail(connect.NewError(connect.CodeUnavailable, "gone"))
		if _, err := stream.Receive(); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("of a service that is away: %v", err)
		}
		svc.Fail(nil)

		stream = watch(first.Revision.Token)
		receive(stream, 1, 4, true, false)
		_ = stream.Close()
		for name, token := range map[string]string{
			"to come":             later(first.Revision.Token),
			"of another database": NewFS(t, policies.Shop()).revision(1).Token,
		} {
			stream = watch(token)
			if m := receive(stream, 0, 4, false, true); m.Revision.Token == token {
				t.Error(name)
			}
			_ = stream.Close()
		}
		if _, err := watch("AAAA").Receive(); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("of no token: %v", err)
		}
		stream = watch("")
		receive(stream, 4, 4, false, false)
		go svc.Close()
		if _, err := stream.Receive(); !errors.Is(err, errClosed) && connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("of a service that has ended: %v", err)
		}
	})
}

// A report counts once, even if it is sent several times.
func TestReports(t *testing.T) {
	svc := NewFS(t, policies.Shop())
	ctx, _ := structpb.NewStruct(map[string]any{"mfa": true})
	res, err := raw(svc).Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`Shop::User::"bob"`), Action: servertest.UID(`Shop::Action::"ViewOrder"`),
		Resource: servertest.UID(`Shop::Order::"42"`), Context: ctx,
	})
	if err != nil {
		t.Fatal(err)
	}
	report := func(id string, reuses ...*cedarpostv1.Reuse) connect.Code {
		_, err := raw(svc).ReportReuse(t.Context(), &cedarpostv1.ReportReuseRequest{ReportId: id, Reuses: reuses})
		if err == nil {
			return 0
		}
		return connect.CodeOf(err)
	}
	now := timestamppb.Now()
	reuse := func(hits int64) *cedarpostv1.Reuse {
		return &cedarpostv1.Reuse{DecisionId: res.DecisionId, Hits: hits, First: now, Last: now}
	}
	first := uuid.NewString()
	for _, c := range []struct {
		what   string
		id     string
		reuses []*cedarpostv1.Reuse
		code   connect.Code
		uses   int64
	}{
		{"first", first, []*cedarpostv1.Reuse{reuse(3)}, 0, 3},
		{"again", first, []*cedarpostv1.Reuse{reuse(3)}, 0, 3},
		{"second", uuid.NewString(), []*cedarpostv1.Reuse{reuse(2)}, 0, 5},
		{"twice in one", uuid.NewString(), []*cedarpostv1.Reuse{reuse(1), reuse(1)}, connect.CodeInvalidArgument, 5},
		{"none", uuid.NewString(), []*cedarpostv1.Reuse{reuse(0)}, connect.CodeInvalidArgument, 5},
		{"no id", "x", []*cedarpostv1.Reuse{reuse(1)}, connect.CodeInvalidArgument, 5},
	} {
		if code := report(c.id, c.reuses...); code != c.code || svc.Decisions()[0].Uses != c.uses {
			t.Errorf("%s: %v, %d uses", c.what, code, svc.Decisions()[0].Uses)
		}
	}
}
