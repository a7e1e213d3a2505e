package server_test

import (
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// docInJSON is the bundle doc in other forms: its schema in two files, one in JSON, and its policies in JSON.
func docInJSON(t *testing.T) []string {
	t.Helper()
	rest, draft := servertest.DocSchema, "  @source(\"request\") entity Draft { author: User, size: Long };\n"
	if !strings.Contains(rest, draft) {
		t.Fatal("the schema has no drafts")
	}
	var sc schema.Schema
	if err := sc.UnmarshalCedar([]byte("namespace Doc {\n" + draft + "}\n")); err != nil {
		t.Fatal(err)
	}
	inJSON, err := sc.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	list, err := cedar.NewPolicyListFromBytes("", []byte(servertest.DocPolicies))
	if err != nil {
		t.Fatal(err)
	}
	set := cedar.NewPolicySet()
	for i, p := range list {
		set.Add(cedar.PolicyID([]string{"policy0", "policy1"}[i]), p)
	}
	policies, err := set.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return []string{"schema/rest.cedarschema", strings.Replace(rest, draft, "", 1), "schema/draft.cedarschema.json", string(inJSON), "doc.cedar.json", string(policies)}
}

// A bundle in other forms decides as before, fits the stored entities, and is found and compared as text.
func TestBundleInJSON(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann"))
	live, err := s.Policies.ListPolicies(t.Context(), &cedarpostv1.ListPoliciesRequest{Bundle: "doc"})
	if err != nil {
		t.Fatal(err)
	}
	publish := func(size string) cedarpostv1.Decision {
		t.Helper()
		res, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Doc::User::"ann"`), Action: servertest.UID(`Doc::Action::"Publish"`), Resource: servertest.UID(`Doc::Draft::"d"`),
			Entities: []*cedarpostv1.Entity{servertest.Entity(t, `{"uid":{"type":"Doc::Draft","id":"d"},"attrs":{"author":{"__entity":{"type":"Doc::User","id":"ann"}},"size":`+size+`}}`)},
		})
		if err != nil {
			t.Fatal(err)
		}
		return res.Decision
	}
	if publish("9") != cedarpostv1.Decision_ALLOW || publish("10") != cedarpostv1.Decision_DENY {
		t.Error("the bundle as text decides otherwise")
	}
	files := docInJSON(t)
	edits := []*cedarpostv1.FileEdit{removeFile("schema.cedarschema"), removeFile("policies.cedar")}
	for i := 0; i < len(files); i += 2 {
		edits = append(edits, putFile(files[i], files[i+1]))
	}
	change, err := s.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "other forms", Edits: edits})
	if err != nil {
		t.Fatal(err)
	}
	check, err := s.Policies.CheckChange(t.Context(), &cedarpostv1.CheckChangeRequest{Id: change.Change.Id})
	if err != nil || !check.Ok || len(check.Policies) != 2 {
		t.Fatalf("%v, %v", check, err)
	}
	for _, p := range check.Policies {
		if p.Kind != cedarpostv1.PolicyDiff_CHANGED || len(p.Parts) > 0 {
			t.Errorf("a difference in meaning: %v", p)
		}
	}
	res := s.MustApply("doc", append(files, "LICENSE", "all rights", "docs/x.yaml", "a: b")...)
	if len(res.Warnings) != 2 || res.Warnings[0].File != "LICENSE" || res.Warnings[1].File != "docs/x.yaml" || !strings.Contains(res.Warnings[1].Message, "left out") {
		t.Errorf("%v", res.Warnings)
	}
	if publish("9") != cedarpostv1.Decision_ALLOW || publish("10") != cedarpostv1.Decision_DENY {
		t.Error("the bundle in JSON decides otherwise")
	}
	if again := s.MustApply("doc", files...); again.Published || again.Bundle.Digest != res.Bundle.Digest {
		t.Errorf("%v", again)
	}
	now, err := s.Policies.ListPolicies(t.Context(), &cedarpostv1.ListPoliciesRequest{Bundle: "doc"})
	if err != nil || len(now.Policies) != len(live.Policies) {
		t.Fatalf("%v, %v", now, err)
	}
	for i, p := range now.Policies {
		if p.Id != live.Policies[i].Id || p.File != "doc.cedar.json" || p.Line != 1 {
			t.Errorf("%v", p)
		}
	}
	for i := range files {
		files[i] = strings.Replace(files[i], "level: Long", "level: String", 1)
	}
	_, err = s.Apply("doc", servertest.Files(files...))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "schema/rest.cedarschema: ")
	_, err = s.Apply("doc", servertest.Files(append(files, "old.cedar.bak", "forbid (principal, action, resource);")...))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "old.cedar.bak: would not be read")
}
