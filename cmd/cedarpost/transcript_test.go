package main

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store/storetest"
)

var updateTranscript = flag.Bool("update-transcript", false, "write docs/lifecycle-transcript.md")

// transcript is docs/lifecycle-transcript.md: commands, and what they print.
type transcript struct {
	t    *testing.T
	text strings.Builder
}

// say adds a sentence.
func (s *transcript) say(text string) { fmt.Fprintf(&s.text, "\n%s\n", text) }

// run runs a command of a person, and adds it with what it prints. Its words must be there.
func (s *transcript) run(who string, sh *shell, code int, words []string, args ...string) string {
	s.t.Helper()
	r := sh.exits(s.t, code, words, args...)
	line := "cedarpost"
	for _, a := range args {
		if strings.ContainsAny(a, " \"'") {
			a = "'" + a + "'"
		}
		line += " " + a
	}
	fmt.Fprintf(&s.text, "\n```console\n%s$ %s\n%s", who, line, r.out+r.err)
	if code != 0 {
		fmt.Fprintf(&s.text, "%s$ echo $?\n%d\n", who, code)
	}
	s.text.WriteString("```\n")
	return r.out
}

// steady replaces what differs from run to run.
func steady(text, dir string) string {
	text = strings.ReplaceAll(text, dir+"/", "")
	for _, r := range []struct{ pattern, with string }{
		{`[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}`, "019f6e2b-5c1e-7a54-9d6a-0c3f0e6b8a11"},
		{`\b[0-9a-f]{64}\b`, "5f0c…"},
		{`shop-r[0-9a-f]{16}`, "shop-r5c0e9d1f2a3b4c6d"},
		{`\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?Z?`, "2026-03-01 10:00:00"},
		{`(token +)[A-Za-z0-9_-]{60,}`, "${1}AvLb…"},
		{`127\.0\.0\.1:\d+`, "127.0.0.1:8081"},
	} {
		text = regexp.MustCompile(r.pattern).ReplaceAllString(text, r.with)
	}
	var out []string
	for line := range strings.Lines(text) {
		out = append(out, strings.TrimRight(line, " \n"))
	}
	return strings.Join(out, "\n") + "\n"
}

// The life of a change that goes wrong: proposed, seen in its impact, declined, fixed, approved, published,
// in force on a second server, taken back, and kept back. Each step is in the log.
func TestLifecycleTranscript(t *testing.T) {
	t.Parallel()
	decisions := 500
	if *updateTranscript {
		decisions = 10_000
	}
	pg := storetest.NewServer(t)
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	base := newShell(databaseURLEnv+"="+pg.URL(), "CEDARPOST_DEVELOPMENT_DATABASE=true", "CEDARPOST_BOOTSTRAP_KEY_FILE="+key, "TZ=UTC")
	base.exits(t, 0, nil, "migrate")
	one := base.start(t, append([]string{"serve", "--name=one"}, anyPort...)...)
	two := base.start(t, append([]string{"serve", "--name=two"}, anyPort...)...)
	at := func(d *daemon, keyFile string) *shell {
		return base.with("CEDARPOST_TOKEN_FILE="+keyFile, "CEDARPOST_ADMIN_URL="+d.url("admin"), "CEDARPOST_API_URL="+d.url("decision"))
	}
	admin := at(one, key)
	person := func(name string, roles ...string) *shell {
		file := filepath.Join(dir, name+".key")
		admin.exits(t, 0, nil, "keys", "create", name, "--role", roles[0], "--bundle", "shop", "--out", file)
		for _, role := range roles[1:] {
			admin.exits(t, 0, nil, "grants", "put", name, role, "--bundle", "shop")
		}
		return at(one, file)
	}
	ann, ben, cleo := person("ann", "policy-author", "auditor"), person("ben", "policy-approver"), person("cleo", "policy-publisher")
	person("shop-backend", "enforcer")

	shop := filepath.Join(dir, "shop")
	if err := os.CopyFS(shop, policies.Shop()); err != nil {
		t.Fatal(err)
	}
	admin.exits(t, 0, nil, "apply", shop)
	admin.exits(t, 0, nil, "entities", "import", filepath.Join(shop, "entities.json"))
	write(t, shop, "bundle.yaml", file(t, shop, "bundle.yaml")+"approvals: 1\nimpact: required\n")
	ann.exits(t, 0, nil, "change", "create", shop, "--title", "four eyes")
	reportOf := func(text string) string { return regexp.MustCompile(`shop-r[0-9a-f]{16}`).FindString(text) }
	ben.exits(t, 0, nil, "change", "approve", "shop-1", "--report", reportOf(ann.exits(t, 0, nil, "impact", "--change", "shop-1").out))
	cleo.exits(t, 0, nil, "change", "publish", "shop-1")
	askMany(t, one.url("decision"), strings.TrimSpace(file(t, dir, "shop-backend.key")), decisions)

	s := &transcript{t: t}
	s.text.WriteString("# A change that goes wrong, and is taken back\n\n`make transcript` runs these commands and writes this page. The bundle is the example `shop`, its `bundle.yaml` has\n`approvals: 1` and `impact: required`, and 10,000 decisions are recorded. Ann writes policies and reads the log, Ben approves, and Cleo publishes. Ids, digests\nand times are examples. [lifecycle.md](lifecycle.md) explains each step.\n")
	const (
		condition = "unless { context.mfa || resource.owner == principal };"
		expected  = "    permitted: [id, status, items]\n    advice: [step_up_mfa]\n"
	)
	view, tests := file(t, shop, "view.cedar"), file(t, shop, "tests.yaml")
	if strings.Count(view, condition) != 1 || strings.Index(tests, expected) < strings.Index(tests, "alice sees the basics") {
		t.Fatal("the example has changed")
	}
	edit := func(unless, expect string) {
		write(t, shop, "view.cedar", strings.Replace(view, condition, unless, 1))
		write(t, shop, "tests.yaml", strings.Replace(tests, expected, expect, 1))
	}
	edit("unless { context.mfa || resource.owner == principal || principal in Shop::Role::\"support\" };",
		"    permitted: [id, status, items, customer.name, customer.email, shipping.address]\n")

	s.say("Support asks for addresses without a second factor. Ann changes the policy, proposes it, and looks at its impact.")
	s.run("ann", ann, 0, says("shop-2: open"), "change", "create", shop, "--title", "support sees addresses without a second factor", "--reason", "ticket 4711")
	s.run("ann", ann, 0, says("shop-2: valid\n", "changed      pii-needs-mfa"), "change", "check", "shop-2")
	report := s.run("ann", ann, 0, says("shop/pii-needs-mfa", "customer.email", "allow to deny        0"), "impact", "--change", "shop-2", "--since", "24h")
	if regexp.MustCompile(`fields gained  +0\n`).MatchString(report) {
		t.Errorf("support gains nothing:\n%s", report)
	}
	s.say("Ben sees that support would get names and email addresses, too, and declines.")
	s.run("ben", ben, 0, says("impact       shop-r", "+unless"), "change", "show", "shop-2")
	s.run("ben", ben, 0, says("declined     ben"), "change", "decline", "shop-2", "--reason", "it opens all personal data, not only addresses")
	s.run("cleo", cleo, 1, says("was declined by ben"), "change", "publish", "shop-2")

	s.say("Ann narrows it. The edit makes the decline void.")
	edit("unless { context.mfa || resource.owner == principal || principal in Shop::Role::\"support\" && context.field == Shop::Field::\"Order.shipping.address\" };",
		"    permitted: [id, status, items, shipping.address]\n    advice: [step_up_mfa]\n")
	s.run("ann", ann, 0, says("shop-2: open"), "change", "edit", "shop-2", shop)
	report = s.run("ann", ann, 0, says("shipping.address", "allow to deny        0"), "impact", "--change", "shop-2", "--since", "24h")
	s.run("ben", ben, 0, says("approved     ben"), "change", "approve", "shop-2", "--report", reportOf(report))
	s.run("cleo", cleo, 0, says("published"), "change", "publish", "shop-2")

	s.say("It is in force on every server.")
	s.run("shop-backend@two", at(two, filepath.Join(dir, "shop-backend.key")), 0, says("permitted    id, shipping.address\n", "denied       customer.email"), "authorize", "--principal=Shop::User::alice", "--action=Shop::Action::ViewOrder", "--resource=Shop::Order::42",
		`--context={"mfa":false}`, "--fields=id,shipping.address,customer.email", "--fully-consistent")

	s.say("The data protection officer objects. Cleo takes the change back. The rollback freezes the bundle, so the pipeline cannot put it in again.")
	s.run("cleo", cleo, 0, says("published version 4 with the files of version 2, and frozen"), "rollback", "shop", "2", "--reason", "addresses are personal data")
	s.run("pipeline", cleo, 1, says("frozen", "addresses are personal data"), "apply", shop)
	s.run("cleo", cleo, 0, says("4 live", "shop-2"), "versions", "shop")

	s.say("Each step is in the log.")
	s.run("auditor", admin, 0, says("CreateChange", "DeclineChange", "UpdateChange", "ApproveChange", "PublishChange"), "events", "--subject", `Cedarpost::Change::"shop-2"`)
	s.run("auditor", admin, 0, says("RollbackVersion, version 4"), "events", "--kind", "change", "--subject", "shop")
	for range 100 { // the server records refused publishes some seconds later, those of one caller together
		if strings.Contains(admin.run(t, "events", "--kind", "publish_refused", "--subject", "shop").out, "refused") {
			break
		}
		time.Sleep(300 * time.Millisecond)
	}
	s.run("auditor", admin, 0, says("publish of shop refused"), "events", "--kind", "publish_refused", "--subject", "shop")

	page, name := steady(s.text.String(), dir), filepath.Join("..", "..", "docs", "lifecycle-transcript.md")
	if *updateTranscript {
		if err := os.WriteFile(name, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	// The order of samples, and counts of a random load, can differ. The commands cannot.
	commands := func(text string) (list []string) {
		text = regexp.MustCompile(`shop-r[0-9a-f]{16}`).ReplaceAllString(text, "ID")
		for line := range strings.Lines(text) {
			if strings.Contains(line, "$ ") {
				list = append(list, line)
			}
		}
		return list
	}
	if got, want := commands(page), commands(file(t, filepath.Dir(name), filepath.Base(name))); strings.Join(got, "") != strings.Join(want, "") {
		t.Errorf("docs/lifecycle-transcript.md has other commands than this test; `make transcript` writes it.\n%s\nwant\n%s", strings.Join(got, ""), strings.Join(want, ""))
	}
}

// askMany has questions of the example decided, in batches.
func askMany(t *testing.T, url, key string, n int) {
	t.Helper()
	p := &peer{url: url}
	p.connect(key, http.DefaultTransport)
	rnd := rand.New(rand.NewPCG(1, 2))
	for range n / 100 {
		batch := &cedarpostv1.AuthorizeBatchRequest{}
		for range 100 {
			mfa, _ := structpb.NewStruct(map[string]any{"mfa": rnd.IntN(2) == 0})
			batch.Checks = append(batch.Checks, &cedarpostv1.AuthorizeRequest{
				Principal: &cedarpostv1.EntityUid{Type: "Shop::User", Id: []string{"alice", "grace", "dave", "erin", "bob"}[rnd.IntN(5)]},
				Action:    &cedarpostv1.EntityUid{Type: "Shop::Action", Id: "ViewOrder"}, Resource: &cedarpostv1.EntityUid{Type: "Shop::Order", Id: fmt.Sprint(1 + rnd.IntN(50))},
				Context: mfa, Fields: &cedarpostv1.FieldSelection{Paths: []string{"id", "total", "customer.name", "customer.email", "shipping.address"}},
			})
		}
		if _, err := p.authorization().AuthorizeBatch(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
}
