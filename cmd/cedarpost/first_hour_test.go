package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

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
	sh.start(t, append([]string{"serve", "--migrate", "--development-database", "--bootstrap-key-file", filepath.Join(dir, "bootstrap.key")}, anyPort...)...)
	d := sh.start(t, append([]string{"serve", "--development-database"}, anyPort...)...)
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
}
