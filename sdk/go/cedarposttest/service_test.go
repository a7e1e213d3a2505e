package cedarposttest_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/policies"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
)

const shop = "../../../policies/shop"

func user(id string) cedarpost.EntityUID  { return cedarpost.UID("Shop::User", id) }
func role(id string) cedarpost.EntityUID  { return cedarpost.UID("Shop::Role", id) }
func order(id string) cedarpost.EntityUID { return cedarpost.UID("Shop::Order", id) }

func view(who, id string) cedarpost.Check {
	return cedarpost.Check{
		Principal: user(who), Action: cedarpost.UID("Shop::Action", "ViewOrder"), Resource: order(id),
		Context: map[string]any{"mfa": false},
	}
}

// production makes a client as in production.
func production(c *cedarpost.Config) { c.CacheBytes = 0 }

func allowed(t *testing.T, client *cedarpost.Client, check cedarpost.Check) bool {
	t.Helper()
	r, err := client.Authorize(t.Context(), check)
	if err != nil {
		t.Fatal(err)
	}
	return r.Allowed()
}

func TestDecisions(t *testing.T) {
	svc := cedarposttest.New(t, shop)
	client := svc.Client()
	check := view("alice", "42")
	check.Fields, check.RequestID = []string{"id", "total"}, "request 7"
	if !allowed(t, client, check) || allowed(t, client, view("bob", "99")) {
		t.Error("not as the bundle says")
	}
	bad := view("bob", "42")
	bad.Context = nil
	if _, err := client.Authorize(t.Context(), bad); !errors.Is(err, cedarpost.ErrInvalid) {
		t.Errorf("without context: %v", err)
	}
	all := svc.Decisions()
	if len(all) != 2 {
		t.Fatalf("%v", all)
	}
	d := all[0]
	if d.ID == "" || d.Context["mfa"] != false || d.RequestID != "request 7" || !d.Allowed || d.DeniedAt != cedarpost.NotDenied ||
		fmt.Sprint(d.Fields, d.Permitted, d.Denied) != "[id total] [id] [total]" {
		t.Errorf("%+v", d)
	}
	if got := all[1].String(); got != `Shop::User::"bob" Shop::Action::"ViewOrder" Shop::Order::"99": deny at OBJECT` {
		t.Error(got)
	}
	if svc.ForgetDecisions(); len(svc.Decisions()) != 0 {
		t.Error("decisions were not forgotten")
	}
}

func TestWrites(t *testing.T) {
	svc := cedarposttest.New(t, shop)
	client := svc.Client()
	steps := []struct {
		what  string
		do    func() string
		check cedarpost.Check
		want  bool
	}{
		{"nobody", func() string { return svc.Delete(user("nobody")) }, view("zoe", "42"), false},
		{"put", func() string {
			return svc.Put(
				cedarpost.Entity{UID: user("zoe"), Attrs: map[string]any{"region": "eu", "suspended": false}},
				cedarpost.Entity{UID: order("1000"), Attrs: map[string]any{"owner": user("zoe"), "region": "eu", "status": "open", "total": int32(5)}})
		}, view("zoe", "1000"), true},
		{"member", func() string { return svc.AddParents(user("zoe"), role("support")) }, view("zoe", "42"), true},
		{"no member", func() string { return svc.RemoveParents(user("zoe"), role("support")) }, view("zoe", "42"), false},
		{"again", func() string { return svc.AddParents(user("zoe"), role("support"), role("finance")) }, view("zoe", "42"), true},
		{"no role", func() string { return svc.Delete(role("support"), role("finance")) }, view("zoe", "42"), false},
		{"suspended", func() string {
			return svc.Put(cedarpost.Entity{UID: user("zoe"), Attrs: map[string]any{"region": "eu", "suspended": true}})
		}, view("zoe", "1000"), false},
	}
	before := ""
	for _, s := range steps {
		revision := s.do()
		if revision == before {
			t.Errorf("%s: no new revision", s.what)
		}
		before = revision
		s.check.AtLeastAsFresh = revision
		if got := allowed(t, client, s.check); got != s.want {
			t.Errorf("after %s: %v", s.what, got)
		}
	}
}

// stopped is a test that keeps the reason of its failure.
type stopped struct {
	testing.TB
	message string
}

func (s *stopped) Fatalf(format string, args ...any) {
	s.message = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// fatal returns the failure of fn in a test of its own.
func fatal(t *testing.T, fn func(testing.TB)) string {
	s := &stopped{TB: t}
	var wg sync.WaitGroup
	wg.Go(func() { fn(s) })
	wg.Wait()
	return s.message
}

func TestMistakes(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("bundle.yaml", "name: broken\n")
	write("schema.cedarschema", "namespace B { entity U; action Go appliesTo { principal: [U], resource: [U] }; }")
	write("p.cedar", `@id("typo") permit (principal, action == B::Action::"Gone", resource);`)
	put := func(uid cedarpost.EntityUID, attrs map[string]any) func(testing.TB) {
		return func(t testing.TB) {
			cedarposttest.New(t, shop).Put(cedarpost.Entity{UID: uid, Attrs: attrs})
		}
	}
	for want, do := range map[string]func(testing.TB){
		"no bundle given":             func(t testing.TB) { cedarposttest.New(t) },
		"nowhere: read bundle: open ": func(t testing.TB) { cedarposttest.New(t, "nowhere") },
		`bundle broken is not valid:
	p.cedar:1:`: func(t testing.TB) { cedarposttest.New(t, dir) },
		`Shop::User::"x".region: expected a String`:        put(user("x"), map[string]any{"region": 1, "suspended": false}),
		`Shop::User::"x": attrs.region: a chan int cannot`: put(user("x"), map[string]any{"region": make(chan int)}),
		`Shop::User::"nobody": it is not stored; put it first`: func(t testing.TB) {
			cedarposttest.New(t, shop).AddParents(user("nobody"), role("staff"))
		},
		`Shop::Role::"staff": these parents would make it its own ancestor`: func(t testing.TB) {
			cedarposttest.New(t, shop).AddParents(role("staff"), role("support"))
		},
		`ReportInterval is more than 10s`: func(t testing.TB) {
			cedarposttest.New(t, shop).Client(func(c *cedarpost.Config) { c.ReportInterval = time.Hour })
		},
	} {
		if got := fatal(t, do); !strings.HasPrefix(got, "cedarposttest: ") || !strings.Contains(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	svc, err := cedarposttest.Open(shop)
	if err != nil {
		t.Fatal(err)
	}
	defer svc.Close()
	defer func() {
		if r := fmt.Sprint(recover()); !strings.Contains(r, "is not declared") {
			t.Errorf("without a test: %v", r)
		}
	}()
	svc.Put(cedarpost.Entity{UID: cedarpost.UID("Shop::Typo", "x")})
}

// Several bundles: policies of one name entity types of the other, and guardrails
// forbid in both.
func TestBundles(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	org := fstest.MapFS{
		"bundle.yaml":        file("name: org\nexports: [Team, User]"),
		"schema.cedarschema": file("namespace Org { entity Team; entity User in [Team]; }"),
		"entities.json":      file(`[{"uid":{"type":"Org::User","id":"u"},"attrs":{},"parents":[{"type":"Org::Team","id":"t"}]}]`),
	}
	app := fstest.MapFS{
		"bundle.yaml":        file("name: app"),
		"schema.cedarschema": file("namespace App { entity Doc; action Read appliesTo { principal: [Org::User], resource: [Doc] }; }"),
		"p.cedar":            file(`@id("team") permit (principal in Org::Team::"t", action, resource);`),
	}
	svc := cedarposttest.NewFS(t, app, org)
	check := cedarpost.Check{Principal: cedarpost.UID("Org::User", "u"), Action: cedarpost.UID("App::Action", "Read"), Resource: cedarpost.UID("App::Doc", "d")}
	if !allowed(t, svc.Client(), check) {
		t.Error("a team of another bundle does not count")
	}
	guardrails := fstest.MapFS{
		"bundle.yaml":        file("name: guardrails"),
		"schema.cedarschema": file(""),
		"p.cedar":            file(`@id("none") forbid (principal, action, resource);`),
	}
	if allowed(t, cedarposttest.NewFS(t, guardrails, app, org).Client(), check) {
		t.Error("guardrails do not count")
	}
}

func TestAway(t *testing.T) {
	svc := cedarposttest.New(t, shop)
	client := svc.Client()
	for range 3 {
		svc.Away(true)
		for range 10 { // more often than it takes to open a breaker
			if r, err := client.Authorize(t.Context(), view("bob", "42")); !errors.Is(err, cedarpost.ErrUnavailable) || r.Allowed() {
				t.Fatalf("away: %v", err)
			}
		}
		svc.Away(false)
		if !allowed(t, client, view("bob", "42")) {
			t.Error("denied")
		}
	}
	svc.Fail(connect.NewError(connect.CodeUnauthenticated, "no such key"))
	if _, err := client.Authorize(t.Context(), view("bob", "42")); !errors.Is(err, cedarpost.ErrUnauthenticated) {
		t.Errorf("%v", err)
	}
	svc.Fail(errors.New("pulled the plug"))
	if _, err := client.Authorize(t.Context(), view("bob", "42")); !errors.Is(err, cedarpost.ErrUnavailable) || !strings.Contains(err.Error(), "pulled the plug") {
		t.Errorf("%v", err)
	}
	svc.Fail(nil)
	open := view("bob", "99")
	open.FailOpen = "orders are not secret"
	svc.Away(true)
	if !allowed(t, client, open) {
		t.Error("did not fail open")
	}
	svc.Away(false)
	if err := client.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := svc.FailOpens()
	if len(got) != 1 || got[0] != (cedarposttest.FailOpen{
		Principal: user("bob"), Action: open.Action, Resource: order("99"), Reason: "orders are not secret", Code: "resource_exhausted", Count: 1,
	}) {
		t.Errorf("%+v", got)
	}
}

// A client as in production keeps answers, learns of changes, and reports its uses.
// Nothing of it is left when the test has ended.
func TestCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		svc := cedarposttest.NewFS(t, policies.Shop())
		client := svc.Client(production)
		time.Sleep(time.Second)
		synctest.Wait()
		for range 5 {
			if !allowed(t, client, view("alice", "42")) {
				t.Error("denied")
			}
		}
		if s := client.Stats(); s.Decided != 1 || s.Reused != 4 {
			t.Errorf("%+v", s)
		}
		time.Sleep(10 * time.Second) // the report
		if d := svc.Decisions(); len(d) != 1 || d[0].Uses != 4 {
			t.Errorf("%+v", d)
		}
		svc.RemoveParents(user("alice"), role("support"))
		synctest.Wait() // the watch
		if allowed(t, client, view("alice", "42")) {
			t.Error("a revoked right was used")
		}
		// After a watch broke, the next one goes on from the same revision.
		svc.Away(true)
		svc.AddParents(user("alice"), role("support"))
		time.Sleep(3 * time.Second)
		if r, err := client.Authorize(t.Context(), view("alice", "42")); err == nil && r.Allowed() {
			t.Error("answered while away")
		}
		svc.Away(false)
		time.Sleep(5 * time.Second)
		if !allowed(t, client, view("alice", "42")) {
			t.Error("a right that was given back is not there")
		}
		if s := client.Stats(); s.Gaps != 0 || s.Lost != 0 || !s.Leased {
			t.Errorf("%+v", s)
		}
	})
}

// Answers that the schema excludes, or that depend on the time, are not kept.
func TestNotKept(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	fsys := fstest.MapFS{
		"bundle.yaml": file("name: b"),
		"schema.cedarschema": file(`namespace B { entity U; @source("request") entity Order { of: U };
			@audit("always") action Pay appliesTo { principal: [U], resource: [U] };
			action Enter appliesTo { principal: [U], resource: [U], context: { now: datetime } };
			action Buy appliesTo { principal: [U], resource: [Order] };
			action Look appliesTo { principal: [U], resource: [U] }; }`),
		"p.cedar": file(`@id("all") permit (principal, action, resource);`),
	}
	synctest.Test(t, func(t *testing.T) {
		svc := cedarposttest.NewFS(t, fsys)
		client := svc.Client(production)
		time.Sleep(time.Second)
		synctest.Wait()
		u := cedarpost.UID("B::U", "u")
		for action, kept := range map[string]bool{"Pay": false, "Enter": false, "Buy": true, "Look": true} {
			check := cedarpost.Check{Principal: u, Action: cedarpost.UID("B::Action", action), Resource: u}
			if action == "Buy" {
				check.Resource = cedarpost.UID("B::Order", "new")
				check.Entities = []cedarpost.Entity{{UID: check.Resource, Attrs: map[string]any{"of": u}}}
			}
			allowed(t, client, check)
			if r, err := client.Authorize(t.Context(), check); err != nil || !r.Allowed() || r.Reused() != kept {
				t.Errorf("%s: kept %v, error %v", action, r.Reused(), err)
			}
		}
	})
}

// Many goroutines ask and write at once, for the race detector.
func TestAtOnce(t *testing.T) {
	svc := cedarposttest.New(t, shop)
	clients := []*cedarpost.Client{svc.Client(), svc.Client(production), svc.Client(func(c *cedarpost.Config) { c.Coalesce = true })}
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			client := clients[i%len(clients)]
			for n := range 30 {
				switch {
				case i == 0:
					svc.AddParents(user("bob"), role("staff"))
				case i == 1:
					svc.RemoveParents(user("bob"), role("staff"))
				case i == 2 && n%10 == 0:
					svc.Decisions()
				}
				for _, a := range client.AuthorizeBatch(t.Context(), []cedarpost.Check{view("bob", "42"), view("bob", "99")}) {
					if a.Err != nil {
						t.Error(a.Err)
					}
				}
			}
		})
	}
	wg.Wait()
}
