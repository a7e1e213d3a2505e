package main

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// TestRestoreDrill is what an operator goes through whose database is restored to an
// earlier state, under its name: tokens are refused, the log is stated to be truncated and
// signed on with its key, and a witness goes on.
func TestRestoreDrill(t *testing.T) {
	dir := dataDir(t)
	dev := newShell().start(t, append([]string{"dev", "--data", dir}, anyPort...)...)
	env := readEnv(t, filepath.Join(dir, "dev.env"))
	sh := newShell().with(env...)
	database := value(env, "CEDARPOST_DATABASE_URL")
	pub := "--verifier-key-file=" + filepath.Join(dir, "audit.pub")
	state := filepath.Join(t.TempDir(), "witness")
	witness := []string{"audit", "witness", "--once", "--state=" + state, pub}
	patiently := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(100 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("never: %s", what)
			}
		}
	}
	newest := func() string {
		r := sh.run(t, "audit", "checkpoint")
		return r.out
	}
	grows := func() { // a decision, and a checkpoint after it
		t.Helper()
		before := newest()
		sh.exits(t, 0, nil, ask("ViewOrder", "42")...)
		patiently("a checkpoint", func() bool { return newest() != before })
	}
	grows()
	sh.exits(t, 0, says("size"), witness...)
	dump := storetest.Dump(t, database)
	grows()
	grows()
	sh.exits(t, 0, says("size"), witness...)
	signed := newest()

	truncate := []string{"audit", "truncate", "--audit-key-file=" + filepath.Join(dir, "audit.key"),
		"--audit-checkpoint-file=" + filepath.Join(dir, "checkpoints"), "--operator=ann"}
	sh.exits(t, 2, says("--reason"), truncate...)
	truncate = append(truncate, "--reason=the drill")
	storetest.Replace(t, database, storetest.Restore(t, dump, database))
	patiently("the restored database", func() bool { return sh.run(t, ask("ViewOrder", "42")...).code == 0 })
	patiently("the witness notices", func() bool { return strings.Contains(sh.run(t, witness...).err, "THE LOG CONTRADICTS") })
	sh.exits(t, 0, says("goes on at", "signed batches", "nothing was signed"), truncate...)
	sh.exits(t, 1, says("the log is NOT in order"), "audit", "verify", pub, "--against="+state)
	sh.exits(t, 0, says("the statement is signed"), append(truncate, "--confirm")...)
	patiently("a checkpoint after the statement", func() bool { out := newest(); return out != "" && out != signed && sh.run(t, witness...).code == 0 })
	sh.exits(t, 0, nil, witness...)
	r := sh.exits(t, 0, says("the log is in order", "as ann stated", "the drill"), "audit", "verify", pub,
		"--against="+state, "--against="+filepath.Join(dir, "checkpoints"))
	if strings.Count(r.out, "the drill") != 1 {
		t.Errorf("verify says %s", r.out)
	}
	sh.exits(t, 0, says(`"operator":"ann"`, `"truncated_checkpoints"`), "audit", "verify", pub, "--against="+filepath.Join(dir, "checkpoints"), "-o", "json")
	sh.exits(t, 0, says("database_renewed"), "events", "--kind", "database_renewed")
	dev.stop(t, syscall.SIGTERM)

	// The id of the database can be renewed by hand.
	dev = newShell().start(t, append([]string{"dev", "--data", dir}, anyPort...)...)
	sh = newShell().with(readEnv(t, filepath.Join(dir, "dev.env"))...)
	if r := sh.exits(t, 0, says("up to date"), "migrate"); strings.Contains(r.out, "new id") {
		t.Errorf("migrate says %s", r.out)
	}
	sh.exits(t, 0, says("has a new id, because it was restored"), "migrate", "--restored")
	dev.stop(t, syscall.SIGTERM)
}
