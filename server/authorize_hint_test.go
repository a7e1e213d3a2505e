package server_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/server/snapshot"
)

const hintSchema = `namespace H {
  entity Group in [Group];
  entity User in [Group] { boss?: User };
  entity Thing { owner: User };
  @source("request") entity Draft { author: User };
  entity FieldGroup in [FieldGroup];
  entity Field in [Field, FieldGroup];
  action See appliesTo { principal: [User], resource: [Thing], context: { as?: User } };
  action "See.field" appliesTo { principal: [User], resource: [Thing], context: { as?: User, field: Field } };
  @audit("always") action Sign appliesTo { principal: [User], resource: [Thing] };
  action Open appliesTo { principal: [User], resource: [Thing], context: { now: datetime } };
  action Show appliesTo { principal: [User], resource: [Thing] };
  @audit("always") action "Show.field" appliesTo { principal: [User], resource: [Thing], context: { field: Field } };
  action Send appliesTo { principal: [User], resource: [Draft] };
}`

const hintPolicies = `
@id("all") permit (principal, action, resource);
@id("boss") forbid (principal, action == H::Action::"See", resource)
  when { resource.owner has boss && resource.owner.boss in H::Group::"bad" };`

// A cache hint has the tag of everything that the answer depends on, and watchers get the same
// tags.
func TestCacheHints(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("h", "schema.cedarschema", hintSchema, "policies.cedar", hintPolicies, "fields.yaml", "H::Thing:\n  name: []\n")
	s.MustPut(
		servertest.Entity(t, `{"uid":{"type":"H::User","id":"ann"},"parents":[{"type":"H::Group","id":"g1"}]}`),
		servertest.Entity(t, `{"uid":{"type":"H::Group","id":"g1"},"parents":[{"type":"H::Group","id":"g2"}]}`),
		servertest.Entity(t, `{"uid":{"type":"H::Thing","id":"t"},"attrs":{"owner":{"type":"H::User","id":"olaf"}}}`),
		servertest.Entity(t, `{"uid":{"type":"H::User","id":"olaf"},"attrs":{"boss":{"type":"H::User","id":"ghost"}}}`))
	db := database(t, s)
	tags := func(entities ...string) (out []uint64) {
		for _, text := range entities {
			uid := servertest.UID(text)
			out = append(out, snapshot.EntityTag(db, uid.Type, uid.Id))
		}
		out = append(out, snapshot.BundleTag(db, "h"), snapshot.BundleTag(db, "guardrails"))
		slices.Sort(out)
		return out
	}
	ask := func(action, principal, resource string, change func(*cedarpostv1.AuthorizeRequest)) *cedarpostv1.AuthorizeRequest {
		req := &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(principal), Action: servertest.UID(`H::Action::"` + action + `"`), Resource: servertest.UID(resource), WantCacheHint: true,
		}
		if change != nil {
			change(req)
		}
		return req
	}
	fields := func(r *cedarpostv1.AuthorizeRequest) { r.Fields = &cedarpostv1.FieldSelection{All: true} }
	const ann, thing = `H::User::"ann"`, `H::Thing::"t"`
	seen := []string{ann, `H::Group::"g1"`, `H::Group::"g2"`, thing, `H::User::"olaf"`, `H::User::"ghost"`}
	draft := servertest.Entity(t, `{"uid":{"type":"H::Draft","id":"d"},"attrs":{"author":{"type":"H::User","id":"ann"}}}`)
	for _, c := range []struct {
		name string
		req  *cedarpostv1.AuthorizeRequest
		want []uint64 // nil: no hint
	}{
		{"ancestors, references and what is not stored", ask("See", ann, thing, nil), tags(seen...)},
		{"fields too", ask("See", ann, thing, fields), tags(seen...)},
		{"entities of the context", ask("See", ann, thing, func(r *cedarpostv1.AuthorizeRequest) {
			r.Context = structOf(t, `{"as":{"type":"H::User","id":"eve"}}`)
		}), tags(append(slices.Clone(seen), `H::User::"eve"`)...)},
		{"a resource that is not stored", ask("See", ann, `H::Thing::"none"`, nil), tags(ann, `H::Group::"g1"`, `H::Group::"g2"`, `H::Thing::"none"`)},
		{"what came with the request does not change", ask("Send", ann, `H::Draft::"d"`, func(r *cedarpostv1.AuthorizeRequest) {
			r.Entities = []*cedarpostv1.Entity{draft}
		}), tags(ann, `H::Group::"g1"`, `H::Group::"g2"`)},
		{"what no entity can allow", ask("See", thing, thing, nil), tags()},
		{"not asked for", ask("See", ann, thing, func(r *cedarpostv1.AuthorizeRequest) { r.WantCacheHint = false }), nil},
		{"explained", ask("See", ann, thing, func(r *cedarpostv1.AuthorizeRequest) { r.Explain = true }), nil},
		{"always audited", ask("Sign", ann, thing, nil), nil},
		{"of the server's time", ask("Open", ann, thing, nil), nil},
		{"fields always audited", ask("Show", ann, thing, fields), nil},
		{"not their fields", ask("Show", ann, thing, nil), tags(seen...)[:0]},
	} {
		res := authorize(t, s, c.req)
		hint := res.CacheHint
		if c.name == "not their fields" {
			if hint == nil {
				t.Errorf("%s: no hint", c.name)
			}
			continue
		}
		if (hint == nil) != (c.want == nil) || !slices.Equal(hint.GetTags(), c.want) || hint != nil && hint.MaxAge.AsDuration() != 5*time.Minute {
			t.Errorf("%s: %v, want %v", c.name, hint, c.want)
		}
		rec, _ := recordOf(t, s, res)
		if rec.MayBeKept.AsDuration() != hint.GetMaxAge().AsDuration() || (rec.MayBeKept == nil) != (hint == nil) {
			t.Errorf("%s: recorded %v", c.name, rec.MayBeKept)
		}
		if c.req.Explain {
			continue
		}
		batch, err := s.Authorization.AuthorizeBatch(t.Context(), &cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{c.req, c.req}})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range batch.Results {
			if got := r.GetResponse().CacheHint; (got == nil) != (c.want == nil) || !slices.Equal(got.GetTags(), c.want) {
				t.Errorf("%s, in a batch: %v", c.name, got)
			}
		}
	}

	// Watchers get the tag when it is written.
	w, _ := watch(t, s, nil)
	hint := authorize(t, s, ask("See", ann, thing, nil)).CacheHint
	for _, text := range seen {
		uid := servertest.UID(text)
		e := &cedarpostv1.Entity{Uid: uid}
		if uid.Type == "H::Thing" {
			e.Attrs = structOf(t, `{"owner":{"type":"H::User","id":"ann"}}`)
		}
		if uid.Id == "g2" || uid.Id == "ghost" {
			e.Parents = []*cedarpostv1.EntityUid{{Type: "H::Group", Id: "g9"}}
		}
		told, reset := w.until(s.MustPut(e).Number)
		if tag := snapshot.EntityTag(db, uid.Type, uid.Id); reset || len(told) != 1 || !told[tag] || !slices.Contains(hint.Tags, tag) {
			t.Errorf("%s: told of %v", text, told)
		}
	}

	never := servertest.On(t, s.URL, func(c *server.Config) { c.MaxReuse = -1 })
	if res := authorize(t, never, ask("See", ann, thing, nil)); res.CacheHint != nil {
		t.Errorf("a server that allows none says %v", res.CacheHint)
	}
}

// A cache hint can have 256 tags, and no more.
func TestTooManyTags(t *testing.T) {
	s := docServer(t)
	s.MustPut(paper(t, "p", "g0"))
	for n, want := range map[int]bool{252: true, 253: false} {
		var groups []string
		for i := range n {
			groups = append(groups, fmt.Sprint("g", i))
		}
		id := fmt.Sprint("u", n)
		s.MustPut(servertest.DocUser(t, id, groups...))
		req := &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Doc::User::"` + id + `"`), Action: servertest.UID(`Doc::Action::"Read"`), Resource: servertest.UID(`Doc::Paper::"p"`), WantCacheHint: true,
		}
		if hint := authorize(t, s, req).CacheHint; (hint != nil) != want || want && len(hint.Tags) != 256 {
			t.Errorf("%d groups: %d tags", n, len(hint.GetTags()))
		}
	}
}
