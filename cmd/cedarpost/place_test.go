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

// An error that comes only when the server opens a file or listens names the line of
// the YAML file too, whichever way the value is written there.
func TestWrongValueNamesItsLine(t *testing.T) {
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
		"listen: 9999":                                   "listen",
		"admin-listen: 127.0.0.1:x":                      "admin-listen",
		"ops-listen: " + busy.Addr().String():            "ops-listen",
		"mask-key-file: none":                            "mask-key-file",
		"mask-key-file: open":                            "mask-key-file",
		"tls-cert: none\ntls-key: tls.key":               "tls-cert",
		"tls-key: open\ntls-cert: tls.crt":               "tls-key",
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

// What the server says comes line by line, and control characters in it do not.
func TestHealthPrintsLines(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ready\nwarning: signing: a\nwarning: clock: \x1b[31mb\n"))
	}))
	defer s.Close()
	r := newShell().exits(t, 0, nil, "health", "--ops-url="+s.URL)
	if want := "ready\nwarning: signing: a\nwarning: clock: \\u{1b}[31mb\n"; r.out != want {
		t.Errorf("got %q, want %q", r.out, want)
	}
}

// An error of a connection is one line that says each thing once.
func TestConnectionErrorIsOneLine(t *testing.T) {
	r := newShell().exits(t, 1, says("connection refused"), "serve", "--database-url=postgres://x@127.0.0.1:1/x")
	if strings.Count(r.err, "\n") != 1 || strings.Count(r.err, "connection refused") != 1 || strings.Contains(r.err, `\u{`) {
		t.Errorf("got\n%s", r.err)
	}
}

// Values and flags that are refused at once, in words.
func TestRefusedFlags(t *testing.T) {
	newShell().exits(t, codeUsage, says("--cache-mib must not be negative"), "serve", "--cache-mib", "-1")
	newShell().exits(t, codeUsage, says("--max-reuse must not be negative"), "serve", "--max-reuse", "-1h")
	newShell().exits(t, codeUsage, says(`"99999999d" is too large`), "serve", "--max-reuse", "99999999d")
	newShell().exits(t, codeUsage, says("--audit-key-file needs --audit-checkpoint-file"), "serve", "--database-url=postgres://x@127.0.0.1:1/x", "--audit-key-file=x")
	kept := write(t, t.TempDir(), "kept", "cedarpost-truncation-v1\norigin x\n\n— x AAAAAAAA\n\n")
	newShell().exits(t, codeUsage, says("no verifier key was given", filepath.Base(kept)), "audit", "verify", "--database-url=postgres://x@127.0.0.1:1/x", "--against="+kept)
}
