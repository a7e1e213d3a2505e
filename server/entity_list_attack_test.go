package server_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"testing"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// entitiesOf returns a client of EntityService with a key.
func entitiesOf(s *servertest.Server, secret string) cedarpostv1connect.EntityServiceClient {
	return cedarpostv1connect.NewEntityServiceClient(s.Client(s.Admin, secret))
}

// forgedToken makes the page token of a listing whose last page ended at an entity of a type.
func forgedToken(t *testing.T, req *cedarpostv1.ListEntitiesRequest, at *cedarpostv1.Revision, typ, id string) string {
	t.Helper()
	filters, err := proto.MarshalOptions{Deterministic: true}.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(filters)
	text, err := json.Marshal(map[string]any{"Filters": hash[:16], "End": map[string]any{"Token": at.GetToken(), "UID": map[string]string{"Type": typ, "ID": id}}})
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(text)
}

// A data-writer of one type forges page tokens, which say that the page before ended within another
// type: one of its bundle, one of another bundle, and grants.
func TestAttackForgedPageToken(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	at := s.MustPut(servertest.DocUser(t, "ann"), docGroup(t, "team", "all"), docGroup(t, "all", "world"))
	secret := newCaller(t, s, "thief", &cedarpostv1.Grant{Role: access.DataWriter, Bundle: "doc", EntityTypes: []string{"Doc::User"}})
	entities := entitiesOf(s, secret)
	for _, filter := range []*cedarpostv1.ListEntitiesRequest{
		{Type: "Doc::User"},
		{Type: "Doc::User", Ancestor: servertest.UID(`Doc::Group::"team"`)},
	} {
		for _, typ := range []string{"Doc::Group", "Doc::Paper", "Cedarpost::Grant", ""} {
			req := proto.CloneOf(filter)
			req.PageToken = forgedToken(t, filter, at, typ, "")
			if typ == "" {
				req.PageToken = forgedToken(t, filter, at, typ, "x")
			}
			page, err := entities.ListEntities(t.Context(), req)
			servertest.WantCode(t, err, connect.CodeInvalidArgument, "page_token: not one of this query")
			if n := len(page.GetEntities()); n > 0 {
				t.Errorf("%d entities of type %s", n, page.Entities[0].Entity.Uid.Type)
			}
		}
	}
	// A token of its own type works.
	page, err := entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: "Doc::User", PageToken: forgedToken(t, &cedarpostv1.ListEntitiesRequest{Type: "Doc::User"}, at, "Doc::User", "a")})
	if err != nil || len(page.Entities) != 1 {
		t.Errorf("%v, %v", page, err)
	}
	t.Log("attack: a page token that says that the page before ended within another type: 8 of 8 refused")
}

// A bundle without a namespace.
const (
	flatSchema   = `entity Person; entity Thing; action See appliesTo { principal: [Person], resource: [Thing] };`
	flatPolicies = `@id("all") permit (principal, action == Action::"See", resource);`
)

// A bundle without a namespace owns no more than its own types: a call about entities of all types
// needs a right to all bundles.
func TestAttackEmptyNamespace(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustApply("flat", "schema.cedarschema", flatSchema, "policies.cedar", flatPolicies)
	s.MustPut(servertest.DocUser(t, "ann"), servertest.Entity(t, `{"uid":{"type":"Person","id":"bob"}}`))
	secret := newCaller(t, s, "flat-data", grant(access.DataWriter, "flat"), grant(access.Enforcer, "flat"))
	entities := entitiesOf(s, secret)
	for what, err := range map[string]error{
		"list":    second(entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{})),
		"changes": second(entities.QueryEntityChanges(t.Context(), &cedarpostv1.QueryEntityChangesRequest{})),
	} {
		if err == nil {
			t.Errorf("%s: permitted", what)
		}
		servertest.WantCode(t, err, connect.CodePermissionDenied, "entities of all types")
	}
	page, err := entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: "Person"})
	if err != nil || len(page.Entities) != 1 {
		t.Errorf("its own type: %v, %v", page, err)
	}
	t.Log("attack: the owner of the bundle without a namespace asks for entities of all types: 2 of 2 calls refused")
}

// A data-writer makes an entity of its own bundle a member of a group of another one, and asks below which
// groups it is: how the other bundle nests its groups.
func TestAttackListBelowForeignGroups(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustApply("doc", "bundle.yaml", "exports: [Group]", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	s.MustPut(docGroup(t, "team", "secret"))
	s.MustApply("spy", "schema.cedarschema", `namespace Spy { entity Probe in [Doc::Group]; action See appliesTo { principal: [Probe], resource: [Probe] }; }`,
		"policies.cedar", `@id("all") permit (principal, action == Spy::Action::"See", resource);`)
	secret := newCaller(t, s, "spy", grant(access.DataWriter, "spy"))
	probe := servertest.Entity(t, `{"uid":{"type":"Spy::Probe","id":"p"},"parents":[{"type":"Doc::Group","id":"team"}]}`)
	if _, err := entitiesOf(s, secret).WriteEntities(t.Context(), &cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{put(probe)}}); err != nil {
		t.Fatal(err)
	}
	req := &cedarpostv1.ListEntitiesRequest{Type: "Spy::Probe", Ancestor: servertest.UID(`Doc::Group::"secret"`)}
	page, err := entitiesOf(s, secret).ListEntities(t.Context(), req)
	servertest.WantCode(t, err, connect.CodePermissionDenied, "entities of type Doc::Group")
	if len(page.GetEntities()) > 0 {
		t.Errorf("%v", page)
	}
	if page, err := s.Entities.ListEntities(t.Context(), req); err != nil || len(page.Entities) != 1 {
		t.Errorf("a reader of both: %v, %v", page, err)
	}
	t.Log("attack: listing below a group of another bundle: 1 of 1 refused")
}
