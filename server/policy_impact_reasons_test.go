package server_test

import (
	"fmt"
	"strings"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

const wardSchema = `namespace W {
  entity Role enum ["nurse", "doctor"];
  entity Person { role: Role };
  entity Patient;
  entity Field in [FieldGroup];
  entity FieldGroup in [FieldGroup];
  action Read appliesTo { principal: [Person], resource: [Patient], context: {} };
  action "Read.field" appliesTo { principal: [Person], resource: [Patient], context: { field: Field } };
}`

// A difference is counted for the policies that had a part in it: not for one that is about others, and not for one that
// is not about fields if fields differ.
func TestAnalyzeChangeCountsByReason(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	policies := func(doctor, nurse, read string) string {
		return `@id("` + read + `") permit (principal, action == W::Action::"Read", resource);
			@id("doctor") permit (principal, action == W::Action::"Read.field", resource) when { principal.role == W::Role::"doctor" && ` + doctor + ` };
			@id("nurse") permit (principal, action == W::Action::"Read.field", resource) when { principal.role == W::Role::"nurse" && ` + nurse + ` };`
	}
	const all, name = "true", `context.field == W::Field::"Patient.name"`
	s.MustApply("w", "schema.cedarschema", wardSchema, "fields.yaml", "W::Patient:\n  name: []\n  notes: []\n", "p.cedar", policies(all, name, "read"))
	for i, role := range []string{"nurse", "doctor", "doctor"} {
		s.MustPut(servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"W::Person","id":"u%d"},"attrs":{"role":{"__entity":{"type":"W::Role","id":%q}}},"parents":[]}`, i, role)))
		authorize(t, s, servertest.WithAllFields(&cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(fmt.Sprintf(`W::Person::"u%d"`, i)), Action: servertest.UID(`W::Action::"Read"`), Resource: servertest.UID(`W::Patient::"p"`)}))
	}
	for _, read := range []string{"read", "renamed"} {
		c, err := s.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "w", Title: "t", Edits: []*cedarpostv1.FileEdit{putFile("p.cedar", policies(name, all, read))}})
		if err != nil {
			t.Fatal(err)
		}
		report := mustAnalyze(t, s.Policies, ofChange(c.Change.Id))
		var got []string
		for _, g := range report.ByPolicy {
			got = append(got, fmt.Sprintf("%s +%d -%d", g.Name, g.FieldsGained, g.FieldsLost))
		}
		if report.FieldsGained != 1 || report.FieldsLost != 2 || strings.Join(got, ", ") != "w/doctor +0 -2, w/nurse +1 -0" {
			t.Errorf("%d gained, %d lost, by policy %q", report.FieldsGained, report.FieldsLost, got)
		}
	}
}

// An object that a caller sent and that looks like a masked value is a value: the record lists what is masked.
func TestAnalyzeChangeOfValuesThatLookMasked(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	schema := strings.Replace(wardSchema, "resource: [Patient], context: {} };", "resource: [Patient], context: { r: { __masked: String } } };", 1)
	schema, _, _ = strings.Cut(schema, "  action \"Read.field\"")
	schema += "}"
	s.MustApply("w", "schema.cedarschema", schema, "p.cedar", `@id("p") permit (principal, action == W::Action::"Read", resource) when { context.r.__masked == "ab" };`)
	authorize(t, s, &cedarpostv1.AuthorizeRequest{Principal: servertest.UID(`W::Person::"a"`), Action: servertest.UID(`W::Action::"Read"`),
		Resource: servertest.UID(`W::Patient::"p"`), Context: structOf(t, `{"r":{"__masked":"ab"}}`)})
	c, err := s.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "w", Title: "t", Edits: []*cedarpostv1.FileEdit{putFile("p.cedar", "// none")}})
	if err != nil {
		t.Fatal(err)
	}
	if r := mustAnalyze(t, s.Policies, ofChange(c.Change.Id)); r.Unknown != 0 || r.AllowToDeny != 1 {
		t.Errorf("%v", r)
	}
}
