package main

import (
	"context"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// TestRestoreDrill restores a database to an earlier state under its own name: tokens of lost
// revisions are refused, the operator states the truncation, servers sign again with the same key,
// and the witness continues.
func TestRestoreDrill(t *testing.T) {
	t.Parallel() // it takes long
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

	// The statement does not excuse checkpoints that are signed after it. After a second loss, it
	// does not help to show the statement again.
	statement := ""
	notes, err := checkpointsIn(state)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range notes {
		if auditlog.IsTruncation(n) {
			statement += string(n)
		}
	}
	if strings.Count(statement, "number 1") != 1 || strings.Count(statement, "number ") != 1 {
		t.Errorf("the witness keeps %s", statement)
	}
	for range 2 {
		grows()
		if r := sh.exits(t, 0, says("size"), witness...); strings.Contains(r.out, "TRUNCATED") {
			t.Errorf("it is stated again: %s", r.out)
		}
	}
	if !strings.Contains(newest(), "\ntruncations 1\n") {
		t.Errorf("signed after the statement: %s", newest())
	}
	storetest.Replace(t, database, storetest.Restore(t, dump, database))
	patiently("the restored database", func() bool { return sh.run(t, ask("ViewOrder", "42")...).code == 0 })
	showAgain(t, database, statement)
	patiently("the witness notices the second loss", func() bool { return strings.Contains(sh.run(t, witness...).err, "THE LOG CONTRADICTS") })
	sh.exits(t, 1, says("the log is NOT in order"), "audit", "verify", pub, "--against="+state)
	dev.stop(t, syscall.SIGTERM)

	// An operator can give the database a new id.
	dev = newShell().start(t, append([]string{"dev", "--data", dir}, anyPort...)...)
	sh = newShell().with(readEnv(t, filepath.Join(dir, "dev.env"))...)
	if r := sh.exits(t, 0, says("up to date"), "migrate"); strings.Contains(r.out, "new id") {
		t.Errorf("migrate says %s", r.out)
	}
	sh.exits(t, 0, says("has a new id, because it was restored"), "migrate", "--restored")
	dev.stop(t, syscall.SIGTERM)
}

// showAgain appends a statement of truncation to a log, as every writer of the log can.
func showAgain(t *testing.T, database, statement string) {
	t.Helper()
	db, err := store.Open(context.Background(), store.Config{DatabaseURL: secret.New(database)})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	id := uuid.Must(uuid.NewV7())
	record, err := proto.Marshal(&cedarpostv1.EventRecord{
		EventId: id.String(), Time: timestamppb.New(time.Unix(id.Time().UnixTime()).UTC().Truncate(time.Millisecond)),
		Kind: cedarpostv1.EventRecord_LOG_TRUNCATED, Subject: "again",
		Detail: &cedarpostv1.EventRecord_LogTruncated{LogTruncated: &cedarpostv1.LogTruncated{Statement: statement}},
	})
	if err != nil {
		t.Fatal(err)
	}
	w := db.NewLogWriter("again", auditlog.Strict, 0)
	defer w.Close()
	if _, err := w.Append(t.Context(), nil, []store.Event{{ID: id, Kind: "log_truncated", Subject: "again", Record: record}}); err != nil {
		t.Fatal(err)
	}
}
