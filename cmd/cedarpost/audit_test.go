package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// TestAudit does the work of an auditor: keys, proofs, a witness, verifications, and an owner of the
// database who alters the log.
func TestAudit(t *testing.T) {
	t.Parallel() // it takes long
	dir := dataDir(t)
	dev := newShell().start(t, append([]string{"dev", "--data", dir}, anyPort...)...)
	env := readEnv(t, filepath.Join(dir, "dev.env"))
	sh := newShell().with(env...)
	pub := "--verifier-key-file=" + filepath.Join(dir, "audit.pub")
	database := value(env, "CEDARPOST_DATABASE_URL")
	decide := func() (id string) {
		t.Helper()
		r := sh.exits(t, 0, nil, ask("ViewOrder", "42", "-o", "json")...)
		var answer struct{ DecisionID string }
		if err := json.Unmarshal([]byte(r.out), &answer); err != nil {
			t.Fatal(err)
		}
		return answer.DecisionID
	}
	id := decide()
	proven := func(id string) {
		t.Helper()
		for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) { // until a checkpoint covers it
			if r := sh.run(t, "audit", "prove", id, pub); r.code == 0 {
				if !strings.Contains(r.out, "the record is in the log") || !strings.Contains(r.out, "signature    verified") {
					t.Errorf("prove says %s", r.out)
				}
				return
			}
		}
		t.Fatalf("%s is never proven", id)
	}
	proven(id)

	key := filepath.Join(t.TempDir(), "other.key")
	r := sh.exits(t, 0, says("audit.example.org/x+"), "audit", "keygen", "--name=audit.example.org/x", key)
	stranger := "--verifier-key=" + strings.TrimSpace(r.out)
	if info, err := os.Stat(key); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v, want mode 0600", info, err)
	}
	sh.exits(t, 1, says("never overwritten"), "audit", "keygen", "--name=audit.example.org/x", key)
	sh.exits(t, 1, says("cannot name a log"), "audit", "keygen", "--name=two words", filepath.Join(t.TempDir(), "key"))
	sh.exits(t, 1, says("not signed by a trusted key"), "audit", "prove", id, stranger)
	sh.exits(t, 1, says("no record"), "audit", "prove", "01890a5d-ac96-774b-bcce-b302099a8057", pub)

	state := filepath.Join(t.TempDir(), "witness")
	witness := []string{"audit", "witness", "--once", "--state=" + state}
	sh.exits(t, 2, says("no key to verify with"), witness...)
	sh.exits(t, 0, says("localhost/cedarpost-dev size"), append(witness, pub)...)
	proven(decide())
	sh.exits(t, 0, says("localhost/cedarpost-dev size"), append(witness, pub)...)
	// With the key of another log, nothing can be said about this one.
	if r := sh.exits(t, 1, says("cannot be verified", "a verifier key is missing"), append(witness, stranger)...); strings.Contains(r.err, "CONTRADICTS") {
		t.Errorf("the witness reports a contradiction: %s", r.err)
	}
	if _, err := os.Stat(state + ".bad"); err == nil {
		t.Error("the witness keeps what it cannot verify as a contradiction")
	}

	verify := []string{"audit", "verify", pub, "--against=" + state, "--against=" + filepath.Join(dir, "checkpoints")}
	sh.exits(t, 0, says("the log is in order", "signatures verified"), verify...)
	sh.exits(t, 0, says("the log is in order"), append(verify, "--since=1h")...)
	r = sh.exits(t, 0, nil, append(verify, "-o", "json")...)
	var result struct {
		OK         bool
		Decisions  int
		Signatures bool `json:"signatures_verified"`
		Compared   bool `json:"compared_with_kept"`
	}
	if err := json.Unmarshal([]byte(r.out), &result); err != nil || !result.OK || result.Decisions != 2 || !result.Signatures || !result.Compared {
		t.Errorf("%s %v", r.out, err)
	}
	r = sh.exits(t, 0, nil, "audit", "verify", "-o", "json")
	if err := json.Unmarshal([]byte(r.out), &result); err != nil || !result.OK || result.Signatures || result.Compared {
		t.Errorf("without keys and files: %s %v", r.out, err)
	}
	sh.exits(t, 0, says("no checkpoint that was kept elsewhere was compared", "signatures NOT verified", "no signature was verified: whoever"), "audit", "verify")
	sh.exits(t, 0, says("no signature was verified: whoever", `"signatures_verified":false`), "audit", "verify", "-o", "json")
	sh.exits(t, 1, says("its verifier key is missing", "localhost/cedarpost-dev+"), "audit", "verify", stranger)
	sh.exits(t, 2, says("cannot be combined with --since"), append(verify, "--history", "--since=1h")...)
	sh.exits(t, 0, says("the log is in order", "from the empty database", "1 version of a bundle, 1 API key"), append(verify, "--history")...)
	r = sh.exits(t, 0, nil, append(verify, "--history", "-o", "json")...)
	var stored struct {
		OK      bool
		History struct{ Base, Newest, Revisions, Keys int }
	}
	if err := json.Unmarshal([]byte(r.out), &stored); err != nil || !stored.OK || stored.History.Keys != 1 || stored.History.Revisions != stored.History.Newest {
		t.Errorf("%s %v", r.out, err)
	}
	sh.exits(t, 1, says("holds no checkpoint"), "audit", "verify", "--against="+filepath.Join(dir, "audit.pub"))

	// The owner of the database gives a user another role.
	rewritten, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer rewritten.Close(context.Background())
	const parents = "update entities set parents = array_%s(parents, 'Shop::Role finance') where type = 'Shop::User' and id = 'bob' and until is null"
	if _, err := rewritten.Exec(t.Context(), fmt.Sprintf(parents, "append")); err != nil {
		t.Fatal(err)
	}
	sh.exits(t, 0, says("the log is in order"), verify...)
	sh.exits(t, 1, says("the log is NOT in order", "differ from the log", "revision "), append(verify, "--history")...)
	if _, err := rewritten.Exec(t.Context(), fmt.Sprintf(parents, "remove")); err != nil {
		t.Fatal(err)
	}
	sh.exits(t, 0, says("the log is in order"), append(verify, "--history")...)

	// The owner of the database changes a column of the decisions.
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "set session_replication_role = replica; update decisions set caller = 'nobody'"); err != nil {
		t.Fatal(err)
	}
	sh.exits(t, 1, says("the log is NOT in order", "column caller"), verify...)

	// The owner then replaces the log by a shorter one, with its checkpoints.
	dev.stop(t, syscall.SIGTERM)
	dev = newShell().start(t, append([]string{"dev", "--data", dir}, anyPort...)...)
	sh = newShell().with(readEnv(t, filepath.Join(dir, "dev.env"))...)
	_, err = conn.Exec(t.Context(), "select 1")
	if err == nil {
		t.Error("the database outlived dev")
	}
	conn, err = pgx.Connect(t.Context(), value(readEnv(t, filepath.Join(dir, "dev.env")), "CEDARPOST_DATABASE_URL"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for signed := false; !signed; time.Sleep(50 * time.Millisecond) {
		err := conn.QueryRow(t.Context(), "select (select max(size) from checkpoints) = (select count(*) from audit_batches)").Scan(&signed)
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Exec(t.Context(), `set session_replication_role = replica;
		delete from checkpoints where size > 1; delete from audit_batches where seq > 1`); err != nil {
		t.Fatal(err)
	}
	sh.exits(t, 1, says("THE LOG CONTRADICTS", "it has no checkpoint, and had one of"), append(witness, pub)...)
	sh.exits(t, 1, says("the log was cut off"), verify...)
	dev.stop(t, syscall.SIGTERM)
}
