package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
)

func TestWrongUsageExits2(t *testing.T) {
	sh := newShell()
	for _, line := range []struct {
		args string
		says string
	}{
		{"", `try: cedarpost --help`},
		{"bogus", `unexpected argument bogus`},
		{"authorize", `missing flags: --action=UID, --principal=UID, --resource=UID`},
		{"authorize --principal bob --action A::b --resource C::d", `"bob" is not an entity`},
		{"authorize --principal A::b --action A::b --resource C::d --context [1]", `--context: not a JSON object`},
		{`authorize --principal A::b --action A::b --resource C::d --context {"mfa":false,"mfa":true}`, `--context: not a JSON object like {"mfa": true}: member "mfa" stands twice in an object, at /mfa`},
		{`entities list --type A --attr of={"type":"A","id":"b","id":"c"}`, `--attr of: not a JSON object like {"mfa": true}: member "id" stands twice in an object, at /value/id`},
		{"authorize --principal A::b --action A::b --resource C::d --require-all", `--require-all needs --fields`},
		{"authorize --principal A::b --action A::b --resource C::d --fully-consistent --at-least-as-fresh x", `can't be used together`},
		{"check", `expected "<dir> ..."`},
		{"decisions --since yesterday", `neither a time like`},
		{"decisions --decision maybe", `must be one of`},
		{"decisions --policy owner-views", `is not bundle/id`},
		{"decisions -o xml", `must be one of`},
		{"serve", `no database: set CEDARPOST_DATABASE_URL`},
		{"serve --database-url a --database-url-file b", `give one`},
		{"serve --tls-cert x", `--tls-key`},
		{"dev --max-staleness 0s", `--max-staleness must be at least 100ms`},
		{"bundles --admin-url localhost:8081", `is not a URL like`},
		{"bundles --admin-url http://bob:hunter2@localhost:8081", `(not shown, as it may have a password) has a user or a password`},
		{"bundles --admin-url http://localhost:99999", `has a port that is not between 1 and 65535`},
		{"help bogus", `unexpected argument bogus`},
		{"entities import a.csv", `a CSV file needs --map`},
		{"entities import a.json --map m.yaml", `--map is for CSV, and a.json is read as json`},
		{"entities import a.json --format xml", `must be one of`},
		{"entities import a.json --atomic --resume", `leave --import-id and --resume away`},
		{"entities import a.json --atomic --import-id x", `leave --import-id and --resume away`},
		{"entities import - --resume", `--resume needs --import-id`},
	} {
		t.Run(line.args, func(t *testing.T) {
			r := sh.exits(t, 2, says(line.says), strings.Fields(line.args)...)
			if r.out != "" || !strings.HasPrefix(r.err, "cedarpost: ") {
				t.Errorf("stdout %q, stderr %q", r.out, r.err)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	sh := newShell()
	sh.exits(t, 0, says("Exit codes", "CEDARPOST_CONFIG", "authorize"), "--help")
	for _, command := range []string{
		"serve", "dev", "migrate", "health", "check", "apply", "bundles", "bundles get", "authorize",
		"entities import", "entities get", "entities list", "decisions", "decisions list", "decisions get", "decisions replay", "version",
	} {
		sh.exits(t, 0, says("Usage: cedarpost "+command), append([]string{"help"}, strings.Fields(command)...)...)
	}
	r := sh.exits(t, 0, nil, "version", "-o", "json")
	var v map[string]string
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || v["engine"] == "" || v["go"] == "" {
		t.Errorf("version: %s %v", r.out, err)
	}
}

func TestNoServer(t *testing.T) {
	sh := newShell("CEDARPOST_ADMIN_URL=http://127.0.0.1:1", "CEDARPOST_OPS_URL=http://127.0.0.1:1")
	sh.exits(t, 1, says("cedarpost: unavailable: ", "is the server running at http://127.0.0.1:1? (CEDARPOST_ADMIN_URL"), "bundles")
	sh.exits(t, 1, says("unavailable"), "apply", "../../policies/shop")
	sh.exits(t, 1, says("is the server running?"), "health")
}

func TestCheck(t *testing.T) {
	sh := newShell()
	shop := "../../policies/shop"
	invalid := shopCopy(t, map[string]string{"new.cedar": "@id(\"typo\")\npermit (principal, action == Shop::Action::\"VeiwOrder\", resource);\n"})
	failing := shopCopy(t, map[string]string{"tests.yaml": failingTest})
	unreadable := shopCopy(t, map[string]string{"bundle.yaml": "color: blue\n"})

	sh.exits(t, 0, says("shop: valid, ", " tests passed"), "check", shop)
	sh.exits(t, 3, says("new.cedar:2:30: error: policy typo: ", "VeiwOrder", "shop: not valid"), "check", invalid)
	sh.exits(t, 4, says("tests.yaml:", "test failed: bob sees the order of carol", "decision: expected allow, got deny"), "check", failing)
	sh.exits(t, 3, says("bundle.yaml:5:1: error: ", "color"), "check", unreadable)
	sh.exits(t, 1, says("no such file"), "check", filepath.Join(t.TempDir(), "none"))
	sh.exits(t, 2, says("are both the bundle"), "check", shop, failing)

	for code, dir := range map[int]string{0: shop, 3: invalid, 4: failing} {
		r := sh.exits(t, code, nil, "check", "-o", "json", dir)
		var got struct {
			Bundle   string
			Valid    bool
			Findings []struct{ Severity, File, Message string }
			Tests    []struct {
				Name     string
				Passed   bool
				Failures []string
			}
		}
		if err := json.Unmarshal([]byte(r.out), &got); err != nil {
			t.Fatal(err)
		}
		if got.Bundle != "shop" || got.Valid != (code != 3) || (len(got.Findings) > 0) != (code == 3) || (len(got.Tests) == 0) != (code == 3) {
			t.Errorf("exit code %d: %+v", code, got)
		}
	}
}

func TestCheckTogether(t *testing.T) {
	sh := newShell()
	org := filepath.Join(t.TempDir(), "org")
	app := filepath.Join(t.TempDir(), "app")
	for dir, files := range map[string][2]string{
		org: {`namespace Org { entity User; }`, `// it has users only`},
		app: {
			`namespace App { entity Doc; action Read appliesTo { principal: [Org::User], resource: [Doc], context: {} }; }`,
			`@id("all") permit (principal, action == App::Action::"Read", resource);`,
		},
	} {
		dir := shopless(t, dir)
		write(t, dir, "schema.cedarschema", files[0])
		write(t, dir, "policies.cedar", files[1])
	}
	sh.exits(t, 3, says("Org::User"), "check", app)
	sh.exits(t, 0, says("app: valid", "org: valid", "policies.cedar: warning: holds no policy"), "check", app, org)
}

// probe answers /readyz with a word.
func probe(t *testing.T, word string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(word)) }))
	t.Cleanup(s.Close)
	return s.URL
}

func TestSettings(t *testing.T) {
	file, env, flag := probe(t, "from the file"), probe(t, "from the environment"), probe(t, "from the flag")
	good := write(t, t.TempDir(), "good.yaml", "# a comment\nops-url: "+file+"\nrate-limit: 5\nmigrate: true\n")
	sh := newShell("CEDARPOST_CONFIG=" + good)

	sh.exits(t, 0, says("from the file"), "health")
	newShell().exits(t, 0, says("from the file"), "health", "--config", good)
	sh.with("CEDARPOST_OPS_URL=").exits(t, 0, says("from the file"), "health")
	sh.with("CEDARPOST_OPS_URL="+env).exits(t, 0, says("from the environment"), "health")
	sh.with("CEDARPOST_OPS_URL="+env).exits(t, 0, says("from the flag"), "health", "--ops-url", flag)

	for text, complaint := range map[string]string{
		"ops-url: a\nopsurl: b\n": "bad.yaml:2: opsurl: no such setting; there are admin-listen, admin-url, ",
		"token: secret\n":         "token: no such setting",
		"principal: A::b\n":       "principal: no such setting",
		"config: other.yaml\n":    "config: no such setting",
		"ops-url: [a, b]\n":       "ops-url: not a single value",
		"ops-url: a\nops-url: b":  "bad.yaml:2: ops-url: already set in line 1",
		"- ops-url\n":             "bad.yaml:1: must hold settings",
		"just text\n":             "bad.yaml:1: must hold settings",
		"serve:\n  listen: 1\n":   "bad.yaml:1: serve: no such setting",
		"ops-url: a\nb: [c\n":     "bad.yaml:3:1: not YAML",
		"? [a, b]\n: c\n":         "bad.yaml:1: must hold settings",
		"ops-url: a\n---\nx: [\n": "bad.yaml:4:1: not YAML",
		"ops-url: a\n---\nx: 1\n": "more than one YAML document",
	} {
		bad := write(t, t.TempDir(), "bad.yaml", text)
		sh.exits(t, 2, says(complaint), "health", "--config", bad)
	}
	rate := write(t, t.TempDir(), "rate.yaml", "rate-limit: lots\n")
	sh.exits(t, 2, says("rate-limit"), "serve", "--config", rate)
	sh.exits(t, 2, says("no such file"), "health", "--config", "none.yaml")
}

// TestTokenOfEnvironmentBeatsFile: a key in a settings file must not go to the
// server that the environment names together with another key.
func TestTokenOfEnvironmentBeatsFile(t *testing.T) {
	sent := make(chan string, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sent <- r.Header.Get("Authorization")
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer s.Close()
	dir := t.TempDir()
	key := write(t, dir, "key", "key-of-the-file\n")
	sh := newShell("CEDARPOST_ADMIN_URL="+s.URL, "CEDARPOST_CONFIG="+write(t, dir, "c.yaml", "token-file: "+key+"\n"))

	for _, line := range []struct {
		sh   *shell
		args []string
		want string
	}{
		{sh, nil, "Bearer key-of-the-file"},
		{sh.with("CEDARPOST_TOKEN=key-of-the-environment"), nil, "Bearer key-of-the-environment"},
		{sh.with("CEDARPOST_TOKEN=key-of-the-environment"), []string{"--token-file", key}, "Bearer key-of-the-file"},
		{newShell("CEDARPOST_ADMIN_URL=" + s.URL), nil, ""},
	} {
		r := line.sh.exits(t, 1, says("unauthenticated", "key"), append([]string{"bundles"}, line.args...)...)
		if got := <-sent; got != line.want {
			t.Errorf("sent %q, want %q", got, line.want)
		}
		if strings.Contains(r.out+r.err, "key-of-the") {
			t.Errorf("the key is printed: %s%s", r.out, r.err)
		}
	}
}

func TestUID(t *testing.T) {
	for text, want := range map[string]string{
		`Shop::User::bob`:             `Shop::User::"bob"`,
		`Shop::User::"bob"`:           `Shop::User::"bob"`,
		`User::b o b`:                 `User::"b o b"`,
		`User::back\slash`:            `User::"back\\slash"`,
		`Shop::User::bob@example.com`: `Shop::User::"bob@example.com"`,
		`Shop::User::""`:              `Shop::User::""`,
		`bob`:                         "",
		`User::`:                      "",
		`::bob`:                       "",
		`Us er::bob`:                  "",
		`User::"bob`:                  "",
	} {
		var u uid
		err := u.UnmarshalText([]byte(text))
		if want == "" {
			if err == nil {
				t.Errorf("%s: %s, want an error", text, uidText(u.EntityUid))
			}
		} else if err != nil || uidText(u.EntityUid) != want {
			t.Errorf("%s: %s, %v, want %s", text, uidText(u.EntityUid), err, want)
		}
	}
}

func TestWhatATerminalWouldObeyIsShown(t *testing.T) {
	if got, want := clean("a\x1b[31mb\nc\u202e"), `a\u{1b}[31mb\u{a}c\u{202e}`; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := quoteShell("it's $HOME"), `'it'\''s $HOME'`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestCheckForCI(t *testing.T) {
	sh := newShell()
	sh.exits(t, 0, says(`<testsuite name="shop"`, `failures="0"`), "check", "-o", "junit", "../../policies/shop")
	broken := shopCopy(t, map[string]string{"broken.cedar": `@id("x") permit (principal, action, resource) when { resource.ownr == principal };`})
	sh.exits(t, 3, says("<failure message=", "broken.cedar:1:"), "check", "-o", "junit", broken)
	sh.exits(t, 3, says("did you mean owner?"), "check", broken)
}
