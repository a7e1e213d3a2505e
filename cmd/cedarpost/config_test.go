package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// An error that occurs only when the server opens a file or listens also names the line of the
// YAML file, also for a relative path.
func TestWrongValueNamesItsLine(t *testing.T) {
	t.Parallel() // it takes long
	dir := t.TempDir()
	certify(t, dir, "a")
	open := write(t, dir, "open", strings.Repeat("0", 64)+"\n")
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = busy.Close() }()
	database := storetest.NewServer(t).URL()
	for text, want := range map[string]string{
		"listen: 9999":                        "listen",
		"admin-listen: 127.0.0.1:x":           "admin-listen",
		"ops-listen: " + busy.Addr().String(): "ops-listen",
		"mask-key-file: none":                 "mask-key-file",
		"mask-key-file: open":                 "mask-key-file",
		"tls-cert: none\ntls-key: tls.key":    "tls-cert",
		"tls-key: open\ntls-cert: tls.crt":    "tls-key",
		"client-ca: none\ntls-cert: tls.crt\ntls-key: tls.key\nclient-dns-names: true":      "client-ca",
		"client-ca: tls.crt\ntls-cert: tls.crt\ntls-key: tls.key\nclient-dns-names: true":   "client-ca",
		"client-trust-domain: A/b\ntls-cert: tls.crt\ntls-key: tls.key\nclient-ca: tls.crt": "client-trust-domain",
		"bootstrap-key-file: open":                       "bootstrap-key-file",
		"audit-key-file: none\naudit-checkpoint-file: c": "audit-key-file",
		"audit-key-file: open\naudit-checkpoint-file: c": "audit-key-file",
	} {
		file := write(t, dir, "c.yaml", "name: a\n"+text+"\n")
		args := []string{"serve", "--migrate", "--development-database", "--config=c.yaml"}
		for _, plane := range []string{"listen", "admin-listen", "ops-listen"} {
			if !strings.HasPrefix(text, plane) {
				args = append(args, "--"+plane+"=127.0.0.1:0")
			}
		}
		cmd := exec.CommandContext(t.Context(), binary, args...)
		cmd.Dir, cmd.Env = dir, newShell().env
		cmd.Env = append(cmd.Env, "CEDARPOST_DATABASE_URL="+database)
		out, err := cmd.CombinedOutput()
		if says := string(out); err == nil || strings.Count(says, "this sets") != 1 || !strings.Contains(says, fmt.Sprintf("%s:2: this sets %s", file, want)) {
			t.Errorf("%q: %v, does not name its line\n%s", text, err, says)
		}
	}
}

// An error of a connection is one line without repetitions.
func TestConnectionErrorIsOneLine(t *testing.T) {
	r := newShell().exits(t, 1, says("connection refused"), "serve", "--database-url=postgres://x@127.0.0.1:1/x")
	if strings.Count(r.err, "\n") != 1 || strings.Count(r.err, "connection refused") != 1 || strings.Contains(r.err, `\u{`) {
		t.Errorf("got\n%s", r.err)
	}
}

// These values and flags are refused before anything else happens.
func TestRefusedFlags(t *testing.T) {
	newShell().exits(t, codeUsage, says("--cache-mib must not be negative"), "serve", "--cache-mib", "-1")
	newShell().exits(t, codeUsage, says("--max-reuse must not be negative"), "serve", "--max-reuse", "-1h")
	newShell().exits(t, codeUsage, says(`"99999999d" is too large`), "serve", "--max-reuse", "99999999d")
	newShell().exits(t, codeUsage, says("--audit-key-file and --audit-agent-key need --audit-checkpoint-file"), "serve", "--database-url=postgres://x@127.0.0.1:1/x", "--audit-key-file=x")
	kept := write(t, t.TempDir(), "kept", "cedarpost-truncation-v1\norigin x\n\n— x AAAAAAAA\n\n")
	newShell().exits(t, codeUsage, says("no verifier key was given", filepath.Base(kept)), "audit", "verify", "--database-url=postgres://x@127.0.0.1:1/x", "--against="+kept)
}

// A database on another machine needs sslmode=verify-full in every command that opens it. Nothing is
// sent before the check.
func TestDatabaseNeedsTLS(t *testing.T) {
	const plain, secure = "postgres://u:hidden@192.0.2.1/d", "postgres://u:hidden@127.0.0.1:1/d"
	for _, command := range []string{"serve", "migrate", "audit verify"} {
		args := strings.Fields(command)
		r := newShell(databaseURLEnv+"="+plain).exits(t, 1, says("--database-url: the connection to the database is not safe",
			"192.0.2.1:5432 may be made without encryption", "set sslmode=verify-full", "--allow-plaintext-database"), args...)
		if strings.Contains(r.err, "hidden") {
			t.Error(r.err)
		}
		newShell(databaseURLEnv+"="+secure).exits(t, 1, says("connection refused"), args...)
	}
	file := write(t, t.TempDir(), "url", plain+"?sslmode=require\n")
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	newShell().exits(t, 1, says("--database-url-file: ", "does not verify"), "serve", "--database-url-file="+file)
	newShell(databaseURLEnv+"="+secure).exits(t, 1, says("--read-database-urls: ", "192.0.2.1:5432"), "serve", "--read-database-urls="+plain)
	newShell(databaseURLEnv+"="+plain+"?connect_timeout=1").exits(t, 1, says("open database"), "serve", "--allow-plaintext-database")
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

// If the environment gives a server and a key, the key of a settings file must not be sent to that
// server.
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

// An error about a setting names its line, if the value comes from the file. It names no
// line of a setting that is not the cause, or that a flag or a variable overrides.
func TestWrongSettingNamesItsLine(t *testing.T) {
	const database = "database-url: postgres://127.0.0.1:1/x\n"
	for text, want := range map[string]string{
		"log-level: debug\nmax-staleness: soon\n":                 "c.yaml:2: this sets max-staleness",
		"\n\nmax-staleness: 0s\n":                                 "c.yaml:3: this sets max-staleness",
		"rate-limit: lots\n":                                      "c.yaml:1: this sets rate-limit",
		"rate-limit: -1\n":                                        "c.yaml:1: this sets rate-limit",
		"cache-mib: 1.5\n":                                        "c.yaml:1: this sets cache-mib",
		"name: a\nrecord-mode: fast\n":                            "c.yaml:2: this sets record-mode",
		"allow-plaintext: perhaps\n":                              "c.yaml:1: this sets allow-plaintext",
		"history-retention: 1d\n":                                 "c.yaml:1: this sets history-retention",
		"name: \"a\\nb\"\n":                                       "c.yaml:1: this sets name",
		"tls-cert: /x.pem\n":                                      "c.yaml:1: this sets tls-cert",
		"name: a\nmax-staleness: 1ns\n":                           "c.yaml:2: this sets max-staleness",
		"audit-key-file: x\n" + database:                          "c.yaml:1: this sets audit-key-file",
		"max-reuse: 99999999d\n":                                  "c.yaml:1: this sets max-reuse",
		"name: a\ndatabase-url-file: /no/such/file\n":             "c.yaml:2: this sets database-url-file",
		"name: a\nread-database-urls-file: /no/file\n" + database: "c.yaml:2: this sets read-database-urls-file",
	} {
		file := write(t, t.TempDir(), "c.yaml", text)
		r := newShell("CEDARPOST_CONFIG="+file).run(t, "serve")
		if r.code == 0 || strings.Count(r.err, "this sets") != 1 || !strings.Contains(r.err, want) {
			t.Errorf("%q: exit code %d, does not say %q\n%s", text, r.code, want, r.err)
		}
	}
	wrong := write(t, t.TempDir(), "c.yaml", "max-staleness: soon\n")
	for _, r := range []result{
		newShell("CEDARPOST_CONFIG="+wrong, "CEDARPOST_MAX_STALENESS=never").run(t, "serve"),
		newShell("CEDARPOST_CONFIG="+wrong).run(t, "serve", "--max-staleness=never"),
	} {
		if r.code != codeUsage || !strings.Contains(r.err, "never") || strings.Contains(r.err, wrong) {
			t.Errorf("the file is blamed for what it does not set\n%s", r.err)
		}
	}
}
