package server_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

const staffSchema = `namespace Staff {
  entity Team in [Team];
  entity Person in [Team];
  entity Door in [Floor];
  entity Floor;
  action Use;
  action Open in [Use] appliesTo { principal: [Person], resource: [Door] };
  action Paint in [Staff::Action::"Use"] appliesTo { principal: [Person], resource: [Door] };
  action Fire appliesTo { principal: [Person], resource: [Person] };
}`

const staffPolicies = `
@id("all") forbid (principal, action, resource) when { false };
@id("ann") permit (principal == Staff::Person::"ann", action == Staff::Action::"Open", resource);
@id("cleaners") @obligation("log") permit (principal in Staff::Team::"cleaners", action in Staff::Action::"Use", resource in Staff::Floor::"1");
@id("doors") permit (principal, action in [Staff::Action::"Open", Staff::Action::"Fire"], resource == Staff::Door::"d");
@id("people") @obligation("ask") permit (principal is Staff::Person in Staff::Team::"bosses", action == Staff::Action::"Fire", resource is Staff::Person);
`

// Policies are found by what they can concern: by their scopes, by the groups that are stored for those who
// may read entities, and by those that the schema allows for others.
func TestListPolicies(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("staff", "schema.cedarschema", staffSchema, "doors/p.cedar", staffPolicies)
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Staff::Team","id":"night"},"parents":[{"type":"Staff::Team","id":"cleaners"}]}`),
		servertest.Entity(t, `{"uid":{"type":"Staff::Person","id":"bob"},"parents":[{"type":"Staff::Team","id":"night"}]}`),
		servertest.Entity(t, `{"uid":{"type":"Staff::Door","id":"d"},"parents":[{"type":"Staff::Floor","id":"1"}]}`))
	author := policiesOf(t, s, "author", grant(access.PolicyAuthor, "staff"))
	list := func(by cedarpostv1connect.PolicyServiceClient, req *cedarpostv1.ListPoliciesRequest) string {
		t.Helper()
		var ids []string
		for {
			res, err := by.ListPolicies(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range res.Policies {
				id := p.Id
				if p.Bundle != "staff" {
					id = p.Bundle + "/" + id
				}
				ids = append(ids, id)
			}
			if req.PageToken = res.NextPageToken; req.PageToken == "" {
				return strings.Join(ids, " ")
			}
		}
	}
	uid := func(text string) *cedarpostv1.EntityUid { return servertest.UID("Staff::" + text) }
	log := "log"
	for _, c := range []struct {
		name         string
		req          *cedarpostv1.ListPoliciesRequest
		want, author string // author is what an author sees who may not read entities; "": the same
	}{
		{"all", &cedarpostv1.ListPoliciesRequest{PageSize: 2}, "doc/authors doc/readers all ann cleaners doors people", "all ann cleaners doors people"},
		{"one bundle", &cedarpostv1.ListPoliciesRequest{Bundle: "doc"}, "doc/authors doc/readers", "-"},
		{"forbids", &cedarpostv1.ListPoliciesRequest{Effect: "forbid"}, "all", ""},
		{"an action, and its group", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Action: uid(`Action::"Paint"`)}, "all cleaners", ""},
		{"an action in a list", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Action: uid(`Action::"Fire"`)}, "all doors people", ""},
		{"a group of actions", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Action: uid(`Action::"Use"`)}, "all cleaners", ""},
		{"a person", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Principal: uid(`Person::"ann"`)}, "all ann doors", "all ann cleaners doors people"},
		{"a person in a group of a group", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Principal: uid(`Person::"bob"`)}, "all cleaners doors", "all cleaners doors people"},
		{"a group", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Principal: uid(`Team::"cleaners"`)}, "all cleaners doors", ""},
		{"a type that is in no group", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Principal: uid(`Floor::"1"`)}, "", ""},
		{"a resource", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Resource: uid(`Door::"d"`)}, "all ann cleaners doors", ""},
		{"a resource that is not stored", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Resource: uid(`Door::"e"`)}, "all ann", "all ann cleaners"},
		{"a resource by its type", &cedarpostv1.ListPoliciesRequest{Bundle: "staff", Resource: uid(`Person::"bob"`)}, "all ann people", ""},
		{"an annotation", &cedarpostv1.ListPoliciesRequest{Annotation: "obligation"}, "cleaners people", ""},
		{"a value of an annotation", &cedarpostv1.ListPoliciesRequest{Annotation: "obligation", AnnotationValue: &log}, "cleaners", ""},
		{"several filters", &cedarpostv1.ListPoliciesRequest{Effect: "permit", Principal: uid(`Person::"bob"`), Action: uid(`Action::"Open"`), Resource: uid(`Door::"d"`)}, "cleaners doors", ""},
	} {
		if got := list(s.Policies, c.req); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		want := c.author
		if want == "" {
			want = c.want
		}
		c.req.PageToken = ""
		if got := list(author, c.req); got != strings.TrimPrefix(want, "-") {
			t.Errorf("%s, for an author: %q, want %q", c.name, got, want)
		}
	}

	res, err := author.GetPolicy(t.Context(), &cedarpostv1.GetPolicyRequest{Bundle: "staff", Id: "cleaners"})
	if p := res.GetPolicy(); err != nil || p.Effect != "permit" || p.Principal != `principal in Staff::Team::"cleaners"` || p.Action != `action in Staff::Action::"Use"` || p.Resource != `resource in Staff::Floor::"1"` ||
		p.Conditional || p.Annotations["obligation"] != "log" || p.File != "doors/p.cedar" || p.Line != 4 || !strings.Contains(p.Text, `@id("cleaners")`) || p.Revision < 1 {
		t.Errorf("%v, %v", res, err)
	}
	for id, scopes := range map[string][]string{
		"all":    {"principal", "action", "resource"},
		"doors":  {"principal", `action in [Staff::Action::"Open", Staff::Action::"Fire"]`, `resource == Staff::Door::"d"`},
		"people": {`principal is Staff::Person in Staff::Team::"bosses"`, `action == Staff::Action::"Fire"`, "resource is Staff::Person"},
	} {
		res, err := author.GetPolicy(t.Context(), &cedarpostv1.GetPolicyRequest{Bundle: "staff", Id: id})
		if p := res.GetPolicy(); err != nil || !slices.Equal(scopes, []string{p.Principal, p.Action, p.Resource}) || p.Conditional != (id == "all") {
			t.Errorf("%v, %v", res, err)
		}
	}
	_, err = author.GetPolicy(t.Context(), &cedarpostv1.GetPolicyRequest{Bundle: "staff", Id: "none"})
	servertest.WantCode(t, err, connect.CodeNotFound, `"none"`)
	_, err = author.GetPolicy(t.Context(), &cedarpostv1.GetPolicyRequest{Bundle: "doc", Id: "readers"})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "the bundle doc")
	_, err = author.ListPolicies(t.Context(), &cedarpostv1.ListPoliciesRequest{AnnotationValue: &log})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "annotation_value")
	_, err = author.ListPolicies(t.Context(), &cedarpostv1.ListPoliciesRequest{Effect: "allow"})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "effect")
}

// An author who may not read entities asks by filters who is in which group: the answers are the same
// whatever is stored.
func TestAttackListPoliciesAsksForMembers(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("staff", "schema.cedarschema", staffSchema, "p.cedar", staffPolicies)
	author := policiesOf(t, s, "author", grant(access.PolicyAuthor, "staff"))
	answers := func() (text string) {
		for _, name := range []string{"ann", "bob", "eve"} {
			res, err := author.ListPolicies(t.Context(), &cedarpostv1.ListPoliciesRequest{Principal: servertest.UID(`Staff::Person::"` + name + `"`)})
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range res.Policies {
				text += fmt.Sprintf("%s %s\n", name, p.Id)
			}
		}
		return text
	}
	before := answers()
	for _, name := range []string{"bob", "eve"} {
		s.MustPut(servertest.Entity(t, `{"uid":{"type":"Staff::Person","id":"`+name+`"},"parents":[{"type":"Staff::Team","id":"bosses"}]}`))
	}
	told := 0
	if answers() != before {
		told++
		t.Error("an author learns by filters who is in a group")
	}
	t.Logf("attack: an author asks which policies concern 3 people before and after 2 of them join a group: %d answers differ", told)
}
