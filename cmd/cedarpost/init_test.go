package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A folder that init writes is a bundle without findings, dev serves it, and publishes what is saved.
func TestInitAndWatch(t *testing.T) {
	t.Parallel() // it waits for saves to be noticed
	outer := newShell()
	dir := filepath.Join(t.TempDir(), "wiki")
	outer.exits(t, 0, says("cedarpost "), "--version")
	outer.exits(t, 0, says("wrote the bundle wiki"), "init", dir, "--namespace", "Wiki::Pages")
	outer.exits(t, 0, says("wiki: valid, 7 tests passed"), "check", dir)
	outer.exits(t, 0, says("no warnings, 0 for information"), "lint", dir)
	outer.exits(t, 1, says("is not empty, so nothing was written"), "init", dir)
	outer.exits(t, 2, says("is not the name of a bundle"), "init", filepath.Join(t.TempDir(), "Wiki Pages"))
	outer.exits(t, 2, says("has rules of its own"), "init", filepath.Join(t.TempDir(), "guardrails"))
	for _, name := range []string{"in", "A::if", "Cedarpost::X", "__cedar::X", "A::"} {
		outer.exits(t, 2, says("is not a namespace"), "init", filepath.Join(t.TempDir(), "a"), "--namespace", name)
	}
	outer.exits(t, 2, says("is not a namespace"), "init", filepath.Join(t.TempDir(), "a"), "--namespace", "x y")
	outer.exits(t, 2, says("--watch needs the folders"), append([]string{"dev", "--watch", "--data", dataDir(t)}, anyPort...)...)

	outer.with("CEDARPOST_DATABASE_URL=postgres://localhost:1/production").exits(t, 2, says("--development-database"), append([]string{"dev", dir, "--data", dataDir(t)}, anyPort...)...)

	data := dataDir(t)
	args := append([]string{"dev", dir, "--watch", "--data", data}, anyPort...)
	dev := outer.start(t, args...)
	sh := outer.with(readEnv(t, filepath.Join(data, "dev.env"))...)
	read := []string{"authorize", "--principal=Wiki::Pages::User::ben", "--action=Wiki::Pages::Action::Read", "--resource=Wiki::Pages::Document::plan", `--context={"mfa":false}`}
	sh.exits(t, 0, says("ALLOW"), read...)

	said := func(what string) {
		t.Helper()
		for deadline := time.Now().Add(2 * time.Minute); !strings.Contains(dev.errs.String(), what); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("dev does not say %q:\n%s", what, dev.errs)
			}
		}
	}
	save := func(name, from, to string) {
		t.Helper()
		file := filepath.Join(dir, name)
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(text), from) {
			t.Fatal(err, string(text))
		}
		if err := os.WriteFile(file, []byte(strings.Replace(string(text), from, to, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	said("wiki: published as version 1, and the entities of entities.json are stored")
	save("documents.cedar", "permit (", "permitt (")
	said("refused, nothing changed")
	sh.exits(t, 0, says("ALLOW"), read...)
	save("documents.cedar", "permitt (", "permit (")
	said("wiki: is published as it is")
	save("documents.cedar", "resource.status ==", "resource.status !=")
	said("of 7 tests failed")
	sh.exits(t, 0, says("ALLOW"), read...)
	save("documents.cedar", "resource.status != \"published\"", "(resource.status == \"published\" || context.mfa)")
	save("tests.yaml", "  - name: ben does not see a draft\n", "  - name: ben sees a draft with a second factor\n")
	save("tests.yaml", "    expect: deny\n    denied_at: OBJECT\n", "    expect: allow\n")
	said("wiki: published as version 2")
	save("entities.json", `"id":"idea"`, `"id":"thought"`)
	save("tests.yaml", `Wiki::Pages::Document::"idea"`, `Wiki::Pages::Document::"thought"`)
	said("wiki: published as version 3, and the entities of entities.json are stored")
	read[3] = "--resource=Wiki::Pages::Document::thought"
	sh.exits(t, 5, says("DENY"), read...)
	read[4] = `--context={"mfa":true}`
	sh.exits(t, 0, says("ALLOW"), read...)
	if code := dev.stop(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
