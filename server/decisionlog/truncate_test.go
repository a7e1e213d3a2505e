package decisionlog_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// notesIn reads the notes of a checkpoint file.
func notesIn(t *testing.T, file string) (notes [][]byte) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	err = auditlog.EachCheckpoint(bytes.NewReader(text), func(signed []byte) error {
		notes = append(notes, signed)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return notes
}

func readKey(t *testing.T, file string) auditlog.Key {
	t.Helper()
	key, err := auditlog.ReadKey(file)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newKey(t *testing.T, name string) auditlog.Key {
	t.Helper()
	file, _ := servertest.LogKey(t, name)
	return readKey(t, file)
}

func verifierOf(t *testing.T, key auditlog.Key) note.Verifier {
	t.Helper()
	v, err := note.NewVerifier(key.Verifier)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// After a signed statement of what was lost, servers sign a restored log with the same key. The
// verification returns the statement, and does not accept one that another key signed.
func TestTruncation(t *testing.T) {
	t.Parallel() // it takes long
	s, key, verifier, checkpoints, before := signedShop(t)
	backup := copyDatabase(t, s.URL)
	s = servertest.On(t, s.URL, signWith(checkpoints, key))
	servertest.DecideSome(t, s, 5)
	servertest.Covered(t, s, verifier)
	servertest.DecideSome(t, s, 5)
	after, _ := servertest.Covered(t, s, verifier)
	signing := decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: checkpoints}
	truncate := func(db *store.DB, signing decisionlog.Signing, confirm bool) (decisionlog.Truncated, error) {
		return decisionlog.TruncateLog(context.Background(), db, decisionlog.Truncation{
			Signing: signing, Operator: "ann", Reason: "the primary burned", Server: "test", Confirm: confirm,
		})
	}
	s.Stop()
	original := openServer(t, s.URL)
	if _, err := truncate(original, signing, true); err == nil || !strings.Contains(err.Error(), "nothing is lost") {
		t.Errorf("where nothing is lost: %v", err)
	}
	old := notesIn(t, checkpoints) // a copy of the file from before the loss

	restored := servertest.On(t, backup, signWith(checkpoints, key))
	servertest.DecideSome(t, restored, 20) // the log is longer than the signed one
	servertest.Eventually(t, "a refusal to sign", func() bool {
		return strings.Contains(servertest.Metrics(t, restored), "cedarpost_checkpoint_refused 1")
	})
	auditor := servertest.OpenAuditor(t, backup)
	verify := func(keys []note.Verifier, files ...[][]byte) (decisionlog.Verified, error) {
		t.Helper()
		return decisionlog.VerifyLog(t.Context(), auditor, decisionlog.Verification{Keys: keys, Against: files})
	}
	trusted := []note.Verifier{verifier}
	if _, err := verify(trusted, old); err == nil {
		t.Error("the loss goes unnoticed")
	}
	for _, confirm := range []bool{false, true} {
		if n := len(notesIn(t, checkpoints)); n != len(old) {
			t.Fatalf("%d notes in the file, and %d before anything was confirmed", n, len(old))
		}
		done, err := truncate(restored.DB, signing, confirm)
		if err != nil || done.From != after || done.To.Size > before.Size || done.To.Size == 0 || done.Batches <= after.Size {
			t.Fatalf("%+v, %v", done, err)
		}
		if confirm {
			continue
		}
		// A statement without a signature of the right key excuses nothing.
		realKey, strange, otherKey := readKey(t, key), newKey(t, "test.example/log"), newKey(t, "test.example/other")
		sign := func(k auditlog.Key) []byte {
			signed, err := done.Sign(k)
			if err != nil {
				t.Fatal(err)
			}
			return signed
		}
		statement := sign(realKey)
		text, _, _ := bytes.Cut(statement, []byte("\n\n"))
		for name, c := range map[string]struct {
			keys []note.Verifier
			note []byte
			want string
		}{
			"without a verifier key":    {nil, statement, "verifier key is missing"},
			"with another verifier key": {[]note.Verifier{verifierOf(t, strange)}, statement, "verifier key is missing"},
			"forged":                    {trusted, sign(strange), "is signed with " + auditlog.KeyID(verifierOf(t, strange))},
			"by the key of another log": {[]note.Verifier{verifier, verifierOf(t, otherKey)}, sign(otherKey), "is signed with " + auditlog.KeyID(verifierOf(t, otherKey))},
			"altered":                   {trusted, bytes.Replace(statement, []byte("ann"), []byte("bob"), 1), "does not count"},
			"unsigned":                  {trusted, append(slices.Clone(text), "\n\n— test.example/log AAAAAAAA\n"...), "another root"},
			"missing":                   {trusted, old[0], "another root"},
		} {
			if _, err := verify(c.keys, append(slices.Clone(old), c.note)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	now, _ := servertest.Covered(t, restored, verifier)
	if now.Origin != after.Origin {
		t.Errorf("signed under %s", now.Origin)
	}
	kept := notesIn(t, checkpoints)
	done, err := verify(trusted, kept)
	if err != nil || len(done.Truncations) != 1 || done.Truncated == 0 {
		t.Fatalf("%+v, %v", done, err)
	}
	if f := done.Truncations[0]; !f.Kept || !f.InLog || f.Operator != "ann" || f.Reason != "the primary burned" || f.From != after {
		t.Errorf("%+v", f)
	}
	if done, err := verify(trusted, old, kept); err != nil || len(done.Truncations) != 1 {
		t.Errorf("beside a file from before it: %+v, %v", done, err)
	}
	if done, err := verify(trusted); err != nil || len(done.Truncations) != 1 || done.Truncations[0].Kept {
		t.Errorf("from the log alone: %+v, %v", done, err)
	}
	if _, err := truncate(restored.DB, decisionlog.SignOften(signing), true); err == nil || !strings.Contains(err.Error(), "another server signs the log now") {
		t.Errorf("while a server signs: %v", err)
	}

	// The order of the notes and repeated notes do not matter. For a file without the statement,
	// the one in the log counts.
	i := slices.IndexFunc(kept, auditlog.IsTruncation)
	for name, file := range map[string][][]byte{
		"first":                  append([][]byte{kept[i]}, old...),
		"last":                   append(slices.Delete(slices.Clone(kept), i, i+1), kept[i]),
		"twice":                  append(slices.Clone(kept), kept[i]),
		"missing in the file":    old,
		"with older checkpoints": append(slices.Clone(kept), old...),
	} {
		if done, err := verify(trusted, file); err != nil || done.Truncated == 0 {
			t.Errorf("%s: %+v, %v", name, done, err)
		}
	}

	// The verification finds an altered row in spite of the statement.
	restored.Stop()
	if _, err := truncate(openServer(t, backup), signing, true); err == nil || !strings.Contains(err.Error(), "nothing is lost") {
		t.Errorf("stated again: %v", err)
	}
	servertest.Tamper(t, backup, "update decisions set caller = 'nobody' where batch = (select batch from decisions order by at limit 1)")
	if _, err := verify(trusted, kept); err == nil || !strings.Contains(err.Error(), "column caller") {
		t.Errorf("got %v", err)
	}
}

// An altered log is not truncated: it has the checkpoint that it contradicts.
func TestTruncationRefusesAnAlteredLog(t *testing.T) {
	t.Parallel() // it takes long
	key, verifier := servertest.LogKey(t, "test.example/log")
	checkpoints := filepath.Join(t.TempDir(), "checkpoints")
	s := servertest.New(t, signWith(checkpoints, key))
	s.MustLoadShop()
	servertest.DecideSome(t, s, 5)
	servertest.Covered(t, s, verifier)
	servertest.DecideSome(t, s, 5)
	last, _ := servertest.Covered(t, s, verifier)
	s.Stop()
	servertest.Tamper(t, s.URL, "update audit_batches set header = header || 'x' where seq = (select max(seq) from audit_batches)")
	db := openServer(t, s.URL)
	truncation := decisionlog.Truncation{
		Signing: decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: checkpoints}, Operator: "ann", Reason: "none", Confirm: true,
	}
	if done, err := decisionlog.TruncateLog(t.Context(), db, truncation); err == nil || !strings.Contains(err.Error(), "was altered, not truncated") {
		t.Errorf("%+v, %v", done, err)
	}
	servertest.Tamper(t, s.URL, "update audit_batches set header = header || 'x' where seq = 0")
	if _, err := decisionlog.TruncateLog(t.Context(), db, truncation); err == nil || !strings.Contains(err.Error(), "has another log") {
		t.Errorf("%v", err)
	}
	if kept, err := auditlog.LastCheckpoint(checkpoints, last.Origin, func(auditlog.Checkpoint) bool { return true }); err != nil || kept != last {
		t.Errorf("%+v, %v", kept, err)
	}
}

// openServer opens a database as a server does.
func openServer(t *testing.T, url string) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}
