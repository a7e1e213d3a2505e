package server_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

func docServer(t *testing.T, opts ...servertest.Option) *servertest.Server {
	t.Helper()
	s := servertest.New(t, opts...)
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	return s
}

func put(e *cedarpostv1.Entity) *cedarpostv1.EntityOperation {
	return &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: e}}
}

func TestWritesThatTheSchemaRefuses(t *testing.T) {
	s := docServer(t)
	good := servertest.DocUser(t, "ann")
	for _, c := range []struct{ name, entity, text string }{
		{"wrong type", `{"uid":{"type":"Doc::User","id":"x"},"attrs":{"level":"high"}}`, `Doc::User::"x".level: expected a Long`},
		{"missing", `{"uid":{"type":"Doc::User","id":"x"}}`, `required attribute "level"`},
		{"undeclared", `{"uid":{"type":"Doc::User","id":"x"},"attrs":{"level":1,"boss":true}}`, `"boss" is not declared`},
		{"parent", `{"uid":{"type":"Doc::User","id":"x"},"attrs":{"level":1},"parents":[{"type":"Doc::Paper","id":"p"}]}`, `parent of type "Doc::Paper"`},
		{"unknown type", `{"uid":{"type":"Doc::Robot","id":"x"}}`, "Doc::Robot"},
		{"action", `{"uid":{"type":"Doc::Action","id":"Read"}}`, "actions come from the schema"},
		{"request type", `{"uid":{"type":"Doc::Draft","id":"x"},"attrs":{}}`, "never stored"},
		{"reference type", `{"uid":{"type":"Doc::Paper","id":"x"},"attrs":{"readers":{"type":"Doc::User","id":"a"}}}`, "expected an entity of type Doc::Group"},
		{"inexact", `{"uid":{"type":"Doc::User","id":"x"},"attrs":{"level":1.5}}`, "whole number"},
		{"tags", `{"uid":{"type":"Doc::User","id":"x"},"attrs":{"level":1},"tags":{"a":1}}`, "declares no tags"},
		{"NUL", `{"uid":{"type":"Doc::User","id":"x"},"attrs":{"level":1,"nick":"a\u0000"}}`, "NUL"},
		{"long", `{"uid":{"type":"Doc::User","id":"x"},"attrs":{"level":1,"nick":"` + strings.Repeat("n", 5000) + `"}}`, "limit is 4096"},
	} {
		_, err := servertest.Write(t, s, put(good), put(servertest.Entity(t, c.entity)))
		servertest.WantCode(t, err, connect.CodeInvalidArgument, c.text)
		if err != nil && !strings.Contains(err.Error(), "operation 2") {
			t.Errorf("%s: %v does not say which operation", c.name, err)
		}
	}
	// All or nothing: the valid operation was not written either.
	_, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: good.Uid})
	servertest.WantCode(t, err, connect.CodeNotFound, "ann")
}

// A Long keeps all of its 64 bits when it is written and read.
func TestLongsAreExact(t *testing.T) {
	s := docServer(t)
	for _, text := range []string{"9223372036854775807", "-9223372036854775808", "9007199254740993", "9007199254740991", "-1"} {
		s.MustPut(servertest.Entity(t, `{"uid":{"type":"Doc::User","id":"n"},"attrs":{"level":`+text+`}}`))
		got, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"n"`)})
		if err != nil {
			t.Fatal(err)
		}
		v := got.Entity.Entity.Attrs.Fields["level"]
		if s := v.GetStringValue(); s != text && fmt.Sprintf("%.0f", v.GetNumberValue()) != text {
			t.Errorf("%s came back as %v", text, v)
		}
	}
}

func read(t testing.TB, s *servertest.Server, user string, c *cedarpostv1.Consistency) cedarpostv1.Decision {
	t.Helper()
	r, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`Doc::User::"` + user + `"`), Action: servertest.UID(`Doc::Action::"Read"`),
		Resource: servertest.UID(`Doc::Paper::"p"`), Consistency: c,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r.Decision
}

// A stale writer must not bring back a membership that was revoked meanwhile.
func TestStaleWriter(t *testing.T) {
	s := docServer(t)
	s.MustPut(
		servertest.Entity(t, `{"uid":{"type":"Doc::Group","id":"staff"}}`),
		servertest.Entity(t, `{"uid":{"type":"Doc::Group","id":"team"},"parents":[{"type":"Doc::Group","id":"staff"}]}`),
		servertest.Entity(t, `{"uid":{"type":"Doc::Paper","id":"p"},"attrs":{"readers":{"type":"Doc::Group","id":"staff"}}}`),
		servertest.DocUser(t, "ann", "team"))
	if read(t, s, "ann", nil) != cedarpostv1.Decision_ALLOW {
		t.Fatal("ann should read through team in staff")
	}
	seen, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"ann"`)})
	if err != nil {
		t.Fatal(err)
	}
	// Another admin revokes.
	revoked, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_RemoveParents{
		RemoveParents: &cedarpostv1.ChangeParents{Uid: seen.Entity.Entity.Uid, Parents: []*cedarpostv1.EntityUid{servertest.UID(`Doc::Group::"team"`)}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	fresh := &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: revoked.Revision}}
	if read(t, s, "ann", fresh) != cedarpostv1.Decision_DENY {
		t.Error("revoked and still allowed")
	}
	// The first one writes back what it read, with the old membership.
	stale := proto.CloneOf(seen.Entity.Entity)
	stale.Attrs.Fields["nick"] = structpb.NewStringValue("Annie")
	op := put(stale)
	op.Precondition = &cedarpostv1.Precondition{Condition: &cedarpostv1.Precondition_IfRevision{IfRevision: seen.Entity.ChangedAt}}
	_, err = servertest.Write(t, s, op)
	servertest.WantCode(t, err, connect.CodeAborted, "changed after that revision")
	// The right way is to change only the attribute.
	if _, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_SetAttributes{
		SetAttributes: &cedarpostv1.SetAttributes{Uid: stale.Uid, Attrs: &structpb.Struct{Fields: map[string]*structpb.Value{"nick": structpb.NewStringValue("Annie")}}},
	}}); err != nil {
		t.Fatal(err)
	}
	full := &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: true}}
	if read(t, s, "ann", full) != cedarpostv1.Decision_DENY {
		t.Error("the membership came back")
	}
	// A group that has members is not deleted without cascade.
	del := func(cascade bool) error {
		_, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Delete{
			Delete: &cedarpostv1.DeleteEntity{Uid: servertest.UID(`Doc::Group::"staff"`), Cascade: cascade},
		}})
		return err
	}
	servertest.WantCode(t, del(false), connect.CodeFailedPrecondition, "1 entities name it as parent")
	if err := del(true); err != nil {
		t.Fatal(err)
	}
}

// Two writers add memberships at the same time, and none is lost.
func TestConcurrentWriters(t *testing.T) {
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann"))
	var wg sync.WaitGroup
	const writers, each = 4, 15
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if _, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_AddParents{
					AddParents: &cedarpostv1.ChangeParents{Uid: servertest.UID(`Doc::User::"ann"`), Parents: []*cedarpostv1.EntityUid{
						servertest.UID(fmt.Sprintf(`Doc::Group::"g%d-%d"`, w, i)),
					}},
				}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"ann"`)})
	if err != nil || len(got.Entity.Entity.Parents) != writers*each {
		t.Errorf("%d memberships of %d: %v", len(got.GetEntity().GetEntity().GetParents()), writers*each, err)
	}
}

func TestListAndImport(t *testing.T) {
	s := docServer(t)
	stream, err := s.Entities.ImportEntities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for chunk := range 3 {
		msg := &cedarpostv1.ImportEntitiesRequest{}
		for i := range 40 {
			msg.Entities = append(msg.Entities, servertest.DocUser(t, fmt.Sprintf("u%03d", chunk*40+i)))
		}
		if err := stream.Send(msg); err != nil {
			t.Fatal(err)
		}
	}
	res, err := stream.CloseAndReceive()
	if err != nil || res.Entities != 120 || res.Changed != 120 {
		t.Fatalf("import: %v %v", res, err)
	}
	var got []string
	req := &cedarpostv1.ListEntitiesRequest{Type: "Doc::User", PageSize: 50}
	for {
		page, err := s.Entities.ListEntities(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page.Entities {
			got = append(got, e.Entity.Uid.Id)
		}
		// Later writes are not on the pages: all pages are of one revision.
		s.MustPut(servertest.DocUser(t, fmt.Sprintf("u%03d-late", len(got))))
		if req.PageToken = page.NextPageToken; req.PageToken == "" {
			break
		}
	}
	if len(got) != 120 {
		t.Errorf("listed %d of 120", len(got))
	}
	req.PageToken = "bm9uc2Vuc2U"
	_, err = s.Entities.ListEntities(t.Context(), req)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "page_token")
}

// A request may have inline entities only of request-only types, and only entities that it
// reaches.
func TestInlineEntities(t *testing.T) {
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann"))
	draft := func(author string, size int) *cedarpostv1.Entity {
		return servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Doc::Draft","id":"new"},"attrs":{"author":{"type":"Doc::User","id":%q},"size":%d}}`, author, size))
	}
	publish := func(e ...*cedarpostv1.Entity) (*cedarpostv1.AuthorizeResponse, error) {
		return s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Doc::User::"ann"`), Action: servertest.UID(`Doc::Action::"Publish"`),
			Resource: servertest.UID(`Doc::Draft::"new"`), Entities: e,
		})
	}
	for _, c := range []struct {
		e    *cedarpostv1.Entity
		want cedarpostv1.Decision
	}{{draft("ann", 5), cedarpostv1.Decision_ALLOW}, {draft("ann", 50), cedarpostv1.Decision_DENY}, {draft("eve", 5), cedarpostv1.Decision_DENY}} {
		if r, err := publish(c.e); err != nil || r.Decision != c.want {
			t.Errorf("%v: %v %v", c.e, r, err)
		}
	}
	other := draft("ann", 1)
	other.Uid.Id = "other"
	_, err := publish(draft("ann", 5), other)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "nothing in the request refers to it")
	_, err = publish(draft("ann", 5), draft("ann", 5))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "twice")
}
