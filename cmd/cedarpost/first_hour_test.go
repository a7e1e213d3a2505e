package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// The commands of docs/access.md work as they stand there, in their order. The log of this test is
// the transcript.
func TestFirstHour(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../docs/access.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	database := storetest.NewServer(t).URL()
	if err := os.WriteFile(filepath.Join(dir, "migrate.url"), []byte(database+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(binary, filepath.Join(dir, "cedarpost")); err != nil {
		t.Fatal(err)
	}
	sh := newShell("CEDARPOST_DATABASE_URL=" + database)
	serve := append([]string{"serve", "--development-database"}, anyPort...)
	sh.exits(t, 1, says("nobody can sign in", "start serve with --bootstrap-key-file"), append(serve, "--migrate", "--mask-key-file", filepath.Join(dir, "none"))...)
	d := sh.start(t, append(serve, "--bootstrap-key-file", filepath.Join(dir, "bootstrap.key"))...)
	key, err := os.ReadFile(filepath.Join(dir, "bootstrap.key"))
	if err != nil {
		t.Fatal(err)
	}
	shell := "set -e\n" // one shell, so that its variables stay
	commands := 0
	for _, block := range regexp.MustCompile("(?s)```console\n(.*?)```").FindAllStringSubmatch(string(doc), -1) {
		for line := range strings.Lines(block[1]) {
			command, ok := strings.CutPrefix(line, "$ ")
			if !ok {
				t.Errorf("docs/access.md: %q is not a command", line)
			}
			commands++
			// The id of a key is one that was made.
			command = regexp.MustCompile(`--id [a-z0-9]+`).ReplaceAllString(command, `--id "$(cedarpost keys list shop-backend -o json | sed -n '1s/.*"id": *"\([^"]*\)".*/\1/p')"`)
			shell += "cat <<'END'\n" + line + "END\n" + command
		}
	}
	run := exec.CommandContext(t.Context(), "sh", "-c", shell)
	run.Dir = dir
	run.Env = newShell("CEDARPOST_ADMIN_URL="+d.url("admin"), "PATH="+dir+":"+os.Getenv("PATH")).env
	out, err := run.CombinedOutput()
	if err != nil || commands < 10 {
		t.Errorf("%d commands: %v\n%s", commands, err, out)
	}
	t.Logf("%s", out)
	if regexp.MustCompile(`cdp_[a-z0-9]+_`).Match(out) {
		t.Error("a key is shown")
	}

	// A server that still has the file of the revoked key starts, unless nobody could sign in.
	if _, err := os.Stat(filepath.Join(dir, "bootstrap.key")); !os.IsNotExist(err) {
		t.Errorf("the file of the revoked key: %v", err)
	}
	old := slices.Concat(serve, []string{"--bootstrap-key-file", write(t, dir, "old.key", string(key))})
	again := sh.start(t, old...)
	eventually(t, "the server warns", func() bool {
		return strings.Contains(again.errs.String(), "was revoked: remove the file, and leave the setting out")
	})
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), "set session_replication_role = replica; update api_keys set expires_at = now() - interval '1 hour'"); err != nil {
		t.Fatal(err)
	}
	sh.exits(t, 1, says("the key in this file was revoked", "cedarpost keys recover makes one"), old...)
}
