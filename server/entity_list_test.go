package server_test

import (
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// list reads all pages and returns the ids, separated by spaces.
func list(t testing.TB, s *servertest.Server, req *cedarpostv1.ListEntitiesRequest) (string, error) {
	t.Helper()
	req = proto.CloneOf(req)
	var ids []string
	for {
		page, err := s.Entities.ListEntities(t.Context(), req)
		if err != nil {
			return "", err
		}
		for _, e := range page.Entities {
			ids = append(ids, e.Entity.Uid.Id)
		}
		if req.PageToken = page.NextPageToken; req.PageToken == "" {
			return strings.Join(ids, " "), nil
		}
	}
}

// equals is a filter for the value of an attribute.
func equals(name string, value any) *cedarpostv1.AttributeEquals {
	v, err := structpb.NewValue(value)
	if err != nil {
		panic(err)
	}
	return &cedarpostv1.AttributeEquals{Name: name, Value: v}
}

func docGroup(t testing.TB, id, parent string) *cedarpostv1.Entity {
	return servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Doc::Group","id":%q},"parents":[{"type":"Doc::Group","id":%q}]}`, id, parent))
}

func TestListFilters(t *testing.T) {
	s := docServer(t)
	s.MustPut(docGroup(t, "team", "dept"), docGroup(t, "dept", "all"), servertest.DocUser(t, "ann", "team"), servertest.DocUser(t, "bob", "dept"),
		servertest.DocUser(t, "eve", "other"), servertest.Entity(t, `{"uid":{"type":"Doc::User","id":"zoe"},"attrs":{"level":2,"nick":"z"},"parents":[{"type":"Doc::Group","id":"team"}]}`))
	then := s.MustPut(servertest.Entity(t, `{"uid":{"type":"Doc::Paper","id":"p"},"attrs":{"readers":{"type":"Doc::Group","id":"team"}}}`))
	s.MustPut(servertest.DocUser(t, "ann", "other"))

	below := func(id string) *cedarpostv1.EntityUid { return &cedarpostv1.EntityUid{Type: "Doc::Group", Id: id} }
	type attrs = []*cedarpostv1.AttributeEquals
	for _, c := range []struct {
		name string
		req  *cedarpostv1.ListEntitiesRequest
		want string
	}{
		{"all", &cedarpostv1.ListEntitiesRequest{}, "dept team p ann bob eve zoe"},
		{"below team", &cedarpostv1.ListEntitiesRequest{Ancestor: below("team")}, "zoe"},
		{"below team, before ann left", &cedarpostv1.ListEntitiesRequest{Ancestor: below("team"), At: then}, "ann zoe"},
		{"below all", &cedarpostv1.ListEntitiesRequest{Ancestor: below("all")}, "dept team bob zoe"},
		{"users below all", &cedarpostv1.ListEntitiesRequest{Ancestor: below("all"), Type: "Doc::User"}, "bob zoe"},
		{"below a group that is not stored", &cedarpostv1.ListEntitiesRequest{Ancestor: below("other")}, "ann eve"},
		{"below a user", &cedarpostv1.ListEntitiesRequest{Ancestor: servertest.UID(`Doc::User::"ann"`)}, ""},
		{"of level 1", &cedarpostv1.ListEntitiesRequest{Type: "Doc::User", Attributes: attrs{equals("level", 1)}}, "ann bob eve"},
		{"of level 2 and nick z", &cedarpostv1.ListEntitiesRequest{Type: "Doc::User", Attributes: attrs{equals("level", 2), equals("nick", "z")}}, "zoe"},
		{"of level 1 below all", &cedarpostv1.ListEntitiesRequest{Type: "Doc::User", Ancestor: below("all"), Attributes: attrs{equals("level", 1)}}, "bob"},
		{"by a reference", &cedarpostv1.ListEntitiesRequest{Type: "Doc::Paper", Attributes: attrs{equals("readers", map[string]any{"type": "Doc::Group", "id": "team"})}}, "p"},
	} {
		for _, size := range []int32{0, 1} {
			c.req.PageSize = size
			if got, err := list(t, s, c.req); err != nil || got != c.want {
				t.Errorf("%s, pages of %d: %q, want %q, %v", c.name, size, got, c.want, err)
			}
		}
	}

	for _, c := range []struct {
		req  *cedarpostv1.ListEntitiesRequest
		text string
	}{
		{&cedarpostv1.ListEntitiesRequest{Attributes: attrs{equals("level", 1)}}, "attributes: needs type"},
		{&cedarpostv1.ListEntitiesRequest{Type: "Doc::User", Attributes: attrs{equals("boss", 1)}}, `Doc::User has no attribute "boss"`},
		{&cedarpostv1.ListEntitiesRequest{Type: "Doc::Robot", Attributes: attrs{equals("boss", 1)}}, `type "Doc::Robot" is not declared`},
		{&cedarpostv1.ListEntitiesRequest{Type: "Doc::User", Attributes: attrs{equals("level", "high")}}, "attributes: level: expected a Long"},
		{&cedarpostv1.ListEntitiesRequest{Type: "Doc::User", Attributes: attrs{equals("level", 1), equals("level", 2)}}, `"level" is given twice`},
		{&cedarpostv1.ListEntitiesRequest{Ancestor: servertest.UID(`Doc::Robot::"x"`)}, `Doc::Robot`},
	} {
		_, err := list(t, s, c.req)
		servertest.WantCode(t, err, connect.CodeInvalidArgument, c.text)
	}
}

// A page token works only with the filters that it was given out for.
func TestPageTokensOfListings(t *testing.T) {
	s := docServer(t)
	var team []*cedarpostv1.Entity
	for i := range 5 {
		team = append(team, servertest.DocUser(t, fmt.Sprint(i), "team"))
	}
	then := s.MustPut(team...)
	req := &cedarpostv1.ListEntitiesRequest{
		Type: "Doc::User", PageSize: 2, At: then, Ancestor: servertest.UID(`Doc::Group::"team"`),
		Attributes: []*cedarpostv1.AttributeEquals{equals("level", 1)},
	}
	page, err := s.Entities.ListEntities(t.Context(), req)
	if err != nil || page.Revision.Number != then.Number {
		t.Fatalf("%v, %v", page, err)
	}
	for name, change := range map[string]func(*cedarpostv1.ListEntitiesRequest){
		"type":       func(r *cedarpostv1.ListEntitiesRequest) { r.Type = "Doc::Group" },
		"ancestor":   func(r *cedarpostv1.ListEntitiesRequest) { r.Ancestor.Id = "other" },
		"attributes": func(r *cedarpostv1.ListEntitiesRequest) { r.Attributes[0] = equals("level", 2) },
		"at":         func(r *cedarpostv1.ListEntitiesRequest) { r.At = nil },
	} {
		other := proto.CloneOf(req)
		other.PageToken = page.NextPageToken
		change(other)
		_, err := s.Entities.ListEntities(t.Context(), other)
		if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "page_token") {
			t.Errorf("another %s: %v", name, err)
		}
	}
	// An entity that is deleted meanwhile is still on the next page, which may have another
	// size.
	for _, e := range team {
		e.Parents = nil
	}
	s.MustPut(team...)
	req.PageToken, req.PageSize = page.NextPageToken, 10
	if got, err := list(t, s, req); err != nil || got != "2 3 4" {
		t.Errorf("%q, %v", got, err)
	}
}

// Sets are equal in whatever order they are written: in filters, and when a write changes
// nothing.
func TestSetsAreSets(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("tag", "schema.cedarschema", `namespace Tag {
		entity Item { labels: Set<String>, box: { sets: Set<Set<Long>> }, from?: ipaddr };
	}`)
	item := func(labels, sets, from string) *cedarpostv1.Entity {
		return servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Tag::Item","id":"i"},"attrs":{"labels":%s,"box":{"sets":%s},"from":%q}}`, labels, sets, from))
	}
	at := s.MustPut(item(`["a","b","c","d","e"]`, `[[1,2,3],[4,5,6],[]]`, "10.0.0.1"))
	for range 10 {
		again := s.MustPut(item(`["e","c","a","d","b","a"]`, `[[],[6,5,4],[3,1,2]]`, "10.0.0.1/32"))
		if again.Number != at.Number {
			t.Fatal("an equal entity made a revision")
		}
	}
	for _, c := range []struct {
		a    *cedarpostv1.AttributeEquals
		want string
	}{
		{equals("labels", []any{"d", "c", "b", "a", "e"}), "i"},
		{equals("labels", []any{"d", "c", "b", "a"}), ""},
		{equals("box", map[string]any{"sets": []any{[]any{6, 5, 4}, []any{2, 1, 3}, []any{}}}), "i"},
		{equals("box", map[string]any{"sets": []any{[]any{6, 5, 4}, []any{2, 1, 3}}}), ""},
		{equals("from", "10.0.0.1"), "i"},
		{equals("from", map[string]any{"__extn": map[string]any{"fn": "ip", "arg": "10.0.0.1"}}), "i"},
		{equals("from", "10.0.0.2"), ""},
	} {
		got, err := list(t, s, &cedarpostv1.ListEntitiesRequest{Type: "Tag::Item", Attributes: []*cedarpostv1.AttributeEquals{c.a}})
		if err != nil || got != c.want {
			t.Errorf("%v: %q, want %q, %v", c.a, got, c.want, err)
		}
	}
}

// The filters for an old revision are read by the schema of that revision, which can have other
// types and other types of attributes.
func TestListingByAnOldSchema(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("org", "schema.cedarschema", `namespace Org {
		entity Dept; entity Team in [Dept]; entity User in [Team] { grade: Long };
	}`)
	then := s.MustPut(
		servertest.Entity(t, `{"uid":{"type":"Org::Team","id":"t"},"parents":[{"type":"Org::Dept","id":"d"}]}`),
		servertest.Entity(t, `{"uid":{"type":"Org::User","id":"ann"},"attrs":{"grade":7},"parents":[{"type":"Org::Team","id":"t"}]}`))
	for _, uid := range []string{`Org::User::"ann"`, `Org::Team::"t"`} {
		if _, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Delete{
			Delete: &cedarpostv1.DeleteEntity{Uid: servertest.UID(uid), Cascade: true}}}); err != nil {
			t.Fatal(err)
		}
	}
	s.MustApply("org", "schema.cedarschema", `namespace Org {
		entity Dept; entity User in [Dept] { grade: String };
	}`)
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Org::User","id":"bob"},"attrs":{"grade":"7"},"parents":[{"type":"Org::Dept","id":"d"}]}`))
	req := &cedarpostv1.ListEntitiesRequest{Type: "Org::User", Ancestor: servertest.UID(`Org::Dept::"d"`),
		Attributes: []*cedarpostv1.AttributeEquals{equals("grade", "7")}}
	if got, err := list(t, s, req); err != nil || got != "bob" {
		t.Errorf("now: %q, %v", got, err)
	}
	req.At, req.Attributes[0] = then, equals("grade", 7)
	if got, err := list(t, s, req); err != nil || got != "ann" {
		t.Errorf("then: %q, %v", got, err)
	}
}
