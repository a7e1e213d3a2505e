package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func lines(s string) []string { return strings.Split(strings.TrimSpace(s), "\n") }

// ask returns the arguments of authorize about an order. The principal is bob, unless more has
// another one.
func ask(action, order string, more ...string) []string {
	return append([]string{
		"authorize", "--principal=Shop::User::bob", "--action=Shop::Action::" + action,
		"--resource=Shop::Order::" + order, `--context={"mfa":false}`,
	}, more...)
}

func TestDev(t *testing.T) {
	t.Parallel() // it takes long
	dir := dataDir(t)
	// The URL of an old dev.env in the environment does not prevent dev from starting a Postgres.
	outer := newShell("CEDARPOST_DATABASE_URL=postgres://x@127.0.0.1:1/x?" + devMark)
	dev := outer.start(t, append([]string{"dev", "--approvals", "--data", dir}, anyPort...)...)
	envFile := filepath.Join(dir, "dev.env")
	for _, name := range []string{"dev.env", "bootstrap.key"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v, want mode 0600", name, info, err)
		}
	}
	if dev.url("env") != envFile {
		t.Errorf("ready %s, want env=%s", dev.ready, envFile)
	}
	env := readEnv(t, envFile)
	if len(env) != 5 || value(env, "CEDARPOST_API_URL") != dev.url("decision") || value(env, "CEDARPOST_OPS_URL") != dev.url("ops") {
		t.Errorf("dev.env sets %d variables, not those of: %s", len(env), dev.ready)
	}
	key := value(env, "CEDARPOST_TOKEN")
	sh := outer.with(env...)

	t.Run("authorize", testAuthorize(sh))
	t.Run("decisions", testDecisions(sh))
	t.Run("entities", testEntities(sh))
	t.Run("writes of entities", testEntityWrites(sh))
	t.Run("import", testImport(sh))
	t.Run("history of entities", testEntityHistory(sh))
	t.Run("bundles", testBundles(sh))
	t.Run("versions", testVersions(sh))
	t.Run("impact", testImpact(sh))
	t.Run("change", testChange(sh))
	t.Run("apply that needs approvals", testApplyOpensChange(sh))
	t.Run("forms", testForms(sh))
	t.Run("delete a bundle", testDeleteBundle(sh))
	t.Run("mistakes", testMistakes(sh))
	t.Run("policies", testPolicies(sh))
	t.Run("lint", testLint(sh))
	t.Run("log", testLog(sh))
	t.Run("uses", testUses(sh))
	t.Run("keys and grants", testKeys(sh, dir))
	t.Run("wrong key", testWrongKey(sh, dir))
	t.Run("second dev on the folder", func(t *testing.T) {
		before, err := os.ReadFile(envFile)
		if err != nil {
			t.Fatal(err)
		}
		sh.exits(t, 1, says("another cedarpost dev is running on "+dir), append([]string{"dev", "--data", dir}, anyPort...)...)
		if after, err := os.ReadFile(envFile); err != nil || !bytes.Equal(before, after) {
			t.Errorf("dev.env changed: %v", err)
		}
		sh.exits(t, 0, says("ready"), "health")
	})
	t.Run("documented commands", testDocumentedCommands(sh))
	t.Run("clean stop", func(t *testing.T) {
		if code := dev.stop(t, syscall.SIGTERM); code != 0 {
			t.Errorf("exit code %d\n%s", code, dev.errs)
		}
		if _, err := os.Stat(envFile); !os.IsNotExist(err) {
			t.Errorf("dev.env after a clean stop: %v", err)
		}
		sh.exits(t, 1, nil, "health")
	})
	if strings.Contains(sh.log.String(), key) {
		t.Error("some output shows the key")
	}
}

func testAuthorize(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		r := sh.exits(t, 0, says(
			"ALLOW\n", "permitted    customer.email, customer.name, id, items, shipping.address, status, total\n",
			"denied       internal.margin, internal.notes\n", "policies     shop/owner-views, shop/owner-fields\n", "decision     "),
			ask("ViewOrder", "42", "--fields=all", "--request-id=req-1")...)
		if strings.Contains(r.out, "\x1b") {
			t.Errorf("color where there is no terminal: %q", r.out)
		}
		sh.exits(t, 5, says("DENY at OBJECT\n", "permitted    (none)", "(none permits it)"), ask("ViewOrder", `"99"`, "--fields=id")...)
		sh.exits(t, 5, says("DENY at FUNCTION\n"), ask("DeleteOrder", "42")...)
		sh.exits(t, 5, says("DENY at FIELD\n", "denied       internal.notes"), ask("ViewOrder", "42", "--fields=id,internal.notes", "--require-all")...)
		sh.exits(t, 0, says("advice       step_up_mfa (shop/pii-needs-mfa) for customer.email"),
			ask("ViewOrder", "42", "--fields=id,customer.email", "--principal=Shop::User::alice", "--fully-consistent")...)
		sh.exits(t, 0, says("obligation   notify_customer (shop/finance-refunds)"),
			ask("RefundOrder", "42", "--principal=Shop::User::erin", "--context=@"+write(t, t.TempDir(), "c.json", `{"mfa": true}`))...)
		sh.exits(t, 1, says("cedarpost: invalid_argument: "), ask("Fly", "42")...)
		sh.exits(t, 1, says("cedarpost: invalid_argument: ", "speed"), ask("ViewOrder", "42", `--context={"mfa":true,"speed":1}`)...)

		// dev has no issuers, so it takes no tokens.
		file := write(t, t.TempDir(), "token", "a.b.c\n")
		byToken := []string{"authorize", "--principal-token-file", file, "--action=Shop::Action::ViewOrder", "--resource=Shop::Order::42"}
		sh.exits(t, 1, says("cedarpost: invalid_argument: principal_token: the access token is not accepted"), byToken...)
		if err := os.Chmod(file, 0o604); err != nil {
			t.Fatal(err)
		}
		sh.exits(t, 1, says("all users of this machine may use it"), byToken...)

		r = sh.exits(t, 5, nil, ask("ViewOrder", "99", "-o", "json")...)
		var got struct{ Decision, DeniedAt, DecisionID string }
		if err := json.Unmarshal([]byte(r.out), &got); err != nil || got.Decision != "DENY" || got.DeniedAt != "OBJECT" || len(got.DecisionID) != 36 {
			t.Errorf("%s %v", r.out, err)
		}
	}
}

func testDecisions(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		r := sh.exits(t, 0, says("TIME", "DENIED AT", "POLICIES"), "decisions")
		if rows := lines(r.out); len(rows) != 8 { // a head, and the answers of testAuthorize
			t.Errorf("%d lines\n%s", len(rows), r.out)
		}
		for args, want := range map[string]string{
			"--request-id req-1":                                   `ALLOW     Shop::User::"bob"  Shop::Action::"ViewOrder"  Shop::Order::"42"             7 of 9, not internal.margin, internal.notes  shop/owner-views, shop/owner-fields  `,
			"--denied-at function":                                 `Shop::Action::"DeleteOrder"`,
			"--principal Shop::User::alice":                        "shop/support-fields",
			"--policy shop/finance-refunds --since 1h":             "RefundOrder",
			"--action Shop::Action::RefundOrder --since 24h":       "RefundOrder",
			"list --denied-at field --since 1h --caller bootstrap": "FIELD",
			"--limit 1": `Shop::Order::"99"`,
			"--until 2100-01-01T00:00:00Z --denied-at field --limit 0": "FIELD",
		} {
			r := sh.exits(t, 0, says(want), append([]string{"decisions"}, strings.Fields(args)...)...)
			if rows := lines(r.out); len(rows) != 2 {
				t.Errorf("decisions %s: %d lines\n%s", args, len(rows), r.out)
			}
		}
		sh.exits(t, 2, says("--action has to read all decisions", "give --since"), "decisions", "--since", "2d", "--action", "Shop::Action::ViewOrder")
		sh.exits(t, 0, says("no decisions"), "decisions", "--since", "2100-01-01T00:00:00Z")

		r = sh.exits(t, 0, nil, "decisions", "--resource=Shop::Order::99", "-o", "json")
		rows := lines(r.out)
		var got struct{ DecisionID, Decision string }
		if err := json.Unmarshal([]byte(rows[0]), &got); err != nil || len(rows) != 2 || got.Decision != "DENY" {
			t.Fatalf("%v %s", err, r.out)
		}
		sh.exits(t, 0, says("DENY at OBJECT", `resource     Shop::Order::"99"`, `context      {"mfa":false}`, "caller       bootstrap", got.DecisionID),
			"decisions", "get", got.DecisionID)
		sh.exits(t, 0, says(`"evaluationTime":`), "decisions", "get", got.DecisionID, "-o", "json")
		sh.exits(t, 1, says("not_found"), "decisions", "get", "01900000-0000-7000-8000-000000000000")
		sh.exits(t, 1, says("invalid_argument"), "decisions", "get", "x")
	}
}

func testEntities(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		sh.exits(t, 5, says("Denied:", "permit shop/owner-views: not satisfied", `resource.owner = Shop::User::"carol"`), ask("ViewOrder", "99", "--explain")...)
		var users []string
		for i := range 1200 {
			users = append(users, fmt.Sprintf(`{"uid": {"type": "Shop::User", "id": "u%d"}, "attrs": {"region": "eu", "suspended": false}, "parents": []}`, i))
		}
		file := write(t, t.TempDir(), "users.json", "["+strings.Join(users, ",\n")+"]")
		r := sh.exits(t, 0, says("1,200 entities imported, 1,200 new or changed in ", "/s)\n", "token "), "entities", "import", file)
		token := strings.TrimSpace(r.out[strings.Index(r.out, "token")+5:])
		sh.exits(t, 5, says("DENY at OBJECT"), ask("ViewOrder", "42", "--principal=Shop::User::u1199", "--at-least-as-fresh="+token)...)
		sh.exits(t, 0, says("1,200 entities imported, 0 new or changed"), "entities", "import", file)
		sh.exits(t, 0, says(`Shop::User::"u7"`, `attributes   {"region":"eu","suspended":false}`), "entities", "get", "Shop::User::u7", "--at", token)
		sh.exits(t, 1, says("not_found"), "entities", "get", "Shop::User::nobody")
		r = sh.exits(t, 0, nil, "entities", "list", "--type=Shop::User", "-o", "json")
		if n := len(lines(r.out)); n != 1250 {
			t.Errorf("%d users listed, want all 1250, of two pages", n)
		}
		if r = sh.exits(t, 0, says("ENTITY"), "entities", "list", "--limit=3"); len(lines(r.out)) != 4 {
			t.Errorf("--limit 3:\n%s", r.out)
		}
		sh.exits(t, 1, says("invalid_argument", "Shop::Ghost"), "entities", "import",
			write(t, t.TempDir(), "bad.json", `[{"uid": {"type": "Shop::Ghost", "id": "x"}}]`))
		sh.exits(t, 1, says("not an array of entities"), "entities", "import", write(t, t.TempDir(), "bad.json", `{}`))
		sh.exits(t, 1, says("-: not an array of entities"), "entities", "import", "-") // stdin is empty here
	}
}

func testBundles(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		sh.exits(t, 0, says("BUNDLE", "shop", "Shop"), "bundles")
		sh.exits(t, 0, says(`"name":"shop"`), "bundles", "list", "-o", "json")
		copied := filepath.Join(t.TempDir(), "copy")
		sh.exits(t, 0, says("shop: version 1"), "bundles", "get", "shop", copied)
		sh.exits(t, 0, says("nothing changed"), "apply", copied)
		sh.exits(t, 1, says("is not empty"), "bundles", "get", "shop", copied)
		sh.exits(t, 1, says("not_found"), "bundles", "get", "none", filepath.Join(t.TempDir(), "x"))

		more := shopCopy(t, map[string]string{"more.cedar": "@id(\"nobody-deletes\")\nforbid (principal, action == Shop::Action::\"DeleteOrder\", resource) when { principal.region == \"mars\" };\n"})
		sh.exits(t, 0, says("dry run", "policies     24"), "apply", more, "--dry-run")
		sh.exits(t, 0, says("shop: published", "version      2", "policies     24"), "apply", more)
		sh.exits(t, 0, says(`"published":false`), "apply", more, "-o", "json")

		invalid := shopCopy(t, map[string]string{"more.cedar": "@id(\"typo\")\npermit (principal, action == Shop::Action::\"VeiwOrder\", resource);\n"})
		sh.exits(t, 3, says("more.cedar:2:30: error: policy typo: ", "cedarpost: refused, nothing changed"), "apply", invalid)
		sh.exits(t, 3, says(`"findings":[{"severity":"ERROR","file":"more.cedar"`), "apply", invalid, "-o", "json")
		sh.exits(t, 4, says("bob sees the order of carol", "refused, nothing changed: 1 of 48 tests failed"),
			"apply", shopCopy(t, map[string]string{"tests.yaml": failingTest}))
		var nothing strings.Builder // policies that apply to nothing: a warning for each
		for i := range 1100 {
			fmt.Fprintf(&nothing, "@id(\"n%d\") permit (principal, action == Shop::Action::\"ViewOrder\", resource is Shop::User);\n", i)
		}
		r := sh.exits(t, 4, says("left out: 2 more warnings", "refused, nothing changed: 1 of 48 tests failed"),
			"apply", shopCopy(t, map[string]string{"tests.yaml": failingTest, "nothing.cedar": nothing.String()}))
		if first, rest, _ := strings.Cut(r.err, "\n"); !strings.Contains(first, "bob sees the order of carol") {
			t.Errorf("the first line is %s", first)
		} else if strings.Index(rest, "policy n2:") > strings.Index(rest, "policy n10:") {
			t.Error("warnings are not in the order of their lines")
		}
		sh.exits(t, 3, says("bundle.yaml:5:1: error: ", "nothing was sent"), "apply", shopCopy(t, map[string]string{"bundle.yaml": "color: blue\n"}))
		sh.exits(t, 3, says("bundle.yaml:5:12: error: approvals must be a whole number", "nothing was sent"), "apply", shopCopy(t, map[string]string{"bundle.yaml": "approvals: two\n"}))
		sh.exits(t, 1, says("bundle.yaml names the bundle shop, and --name says other"), "apply", more, "--name", "other")
		sh.exits(t, 0, says("shop"), "bundles")
	}
}

func testWrongKey(sh *shell, dir string) func(*testing.T) {
	return func(t *testing.T) {
		wrong := sh.with("CEDARPOST_TOKEN=not-a-key")
		wrong.exits(t, 1, says("unauthenticated", "the server at http://127.0.0.1:", "does not accept the key or token from CEDARPOST_TOKEN"), "decisions")
		wrong.exits(t, 0, says("shop"), "bundles", "--token-file", filepath.Join(dir, "bootstrap.key"))
		sh.with("CEDARPOST_TOKEN=").exits(t, 1, says("unauthenticated", "set CEDARPOST_TOKEN, or give --token-file"), "decisions")
		sh.exits(t, 1, says("cedarpost"), "bundles", "--admin-url", value(sh.env, "CEDARPOST_API_URL"))
		// The server refuses while the client is still sending megabytes.
		big := shopCopy(t, map[string]string{"entities.json": strings.Repeat(" ", 30<<20)})
		wrong.exits(t, 1, says("unauthenticated"), "apply", big)
	}
}

func TestDevOnABusyPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := filepath.Join(dataDir(t), "new")
	newShell().exits(t, 1, says(l.Addr().String()+" is in use", "--admin-listen"),
		"dev", "--data", dir, "--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--admin-listen="+l.Addr().String())
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder was made: %v", err)
	}
}

func TestDevSurvivesKill(t *testing.T) {
	dir := dataDir(t)
	args := append([]string{"dev", "--data", dir}, anyPort...)
	dev := newShell().start(t, args...)
	first := readEnv(t, filepath.Join(dir, "dev.env"))
	sh := newShell(first...)
	sh.exits(t, 0, nil, "entities", "import", write(t, t.TempDir(), "e.json",
		`[{"uid": {"type": "Shop::User", "id": "new"}, "attrs": {"region": "eu", "suspended": false}, "parents": []}]`))
	sh.exits(t, 0, nil, ask("ViewOrder", "42")...)
	dev.stop(t, syscall.SIGKILL)

	// --empty loads nothing, so all data is from before the kill.
	dev = newShell().start(t, append(args, "--empty")...)
	second := readEnv(t, filepath.Join(dir, "dev.env"))
	if value(first, "CEDARPOST_TOKEN") != value(second, "CEDARPOST_TOKEN") {
		t.Error("another key after the restart")
	}
	sh = newShell(second...)
	sh.exits(t, 0, says("eu"), "entities", "get", "Shop::User::new")
	sh.exits(t, 0, says("owner-views"), "decisions")
	sh.exits(t, 0, says("ALLOW"), ask("ViewOrder", "42")...)
	// Alone with a dev, nobody else could approve.
	if !strings.Contains(dev.errs.String(), "--no-approvals is the default of dev") {
		t.Errorf("dev does not say that it asks for no approvals: %s", dev.errs)
	}
	strict := notes(t, "owners")
	write(t, strict, "bundle.yaml", "name: notes\napprovals: 2\n")
	sh.exits(t, 0, says("version      1"), "apply", strict)
	write(t, strict, "bundle.yaml", "name: notes\napprovals: 3\n")
	sh.exits(t, 0, says("version      2"), "apply", strict)
	if code := dev.stop(t, syscall.SIGINT); code != 0 {
		t.Errorf("exit code %d\n%s", code, dev.errs)
	}
}

// The demo of the README still works.
func TestDemo(t *testing.T) {
	demo := exec.Command("sh", "../../scripts/demo.sh", binary)
	demo.Env = newShell("TMPDIR="+t.TempDir(), "CEDARPOST_OUTPUT=json").env
	out, err := demo.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "# Done.") || strings.Contains(string(out), "cedarpost_") {
		t.Errorf("%v\n%s", err, out)
	}
}
