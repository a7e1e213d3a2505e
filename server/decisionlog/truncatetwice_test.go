package decisionlog_test

import (
	"bytes"
	"context"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// After a second truncation, older copies of the checkpoint file are in order beside the current
// file. A repeated statement excuses nothing.
func TestSecondTruncation(t *testing.T) {
	t.Parallel() // it takes long
	key, verifier := servertest.LogKey(t, "test.example/log")
	checkpoints := filepath.Join(t.TempDir(), "checkpoints")
	on := func(url string, decisions int) (s *servertest.Server) {
		t.Helper()
		s = servertest.On(t, url, signWith(checkpoints, key))
		for range 3 {
			servertest.DecideSome(t, s, decisions)
			servertest.Covered(t, s, verifier)
		}
		s.Stop()
		return s
	}
	truncate := func(url string) {
		t.Helper()
		_, err := decisionlog.TruncateLog(context.Background(), openServer(t, url), decisionlog.Truncation{
			Signing:  decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: checkpoints},
			Operator: "ann", Reason: "the primary burned", Server: "test", Confirm: true,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	s := servertest.New(t, signWith(checkpoints, key))
	s.MustLoadShop()
	servertest.DecideSome(t, s, 3)
	servertest.Covered(t, s, verifier)
	s.Stop()
	first := copyDatabase(t, s.URL)
	on(s.URL, 30)
	before := notesIn(t, checkpoints)
	truncate(first)
	on(first, 1)
	second, unsigned := copyDatabase(t, first), copyDatabase(t, first)
	on(first, 1)
	between := notesIn(t, checkpoints)
	auditor := servertest.OpenAuditor(t, second)
	verify := func(files ...[][]byte) (decisionlog.Verified, error) {
		t.Helper()
		return decisionlog.VerifyLog(t.Context(), auditor, decisionlog.Verification{Keys: []note.Verifier{verifier}, Against: files})
	}
	i := slices.IndexFunc(between, auditlog.IsTruncation)
	replayed := append(slices.Clone(between), between[i])
	if done, err := verify(between, replayed); err == nil {
		t.Errorf("a repeated statement excuses what was lost later: %+v", done)
	}
	if done, err := verify(replayed, between); err == nil {
		t.Errorf("a repeated statement excuses what was lost later: %+v", done)
	}
	// All checkpoints of this file are newer than the database, but the database has a signed
	// checkpoint of its own to continue from.
	late := filepath.Join(t.TempDir(), "late")
	if err := auditlog.AppendCheckpoint(late, between[len(between)-1]); err != nil {
		t.Fatal(err)
	}
	dry := decisionlog.Truncation{
		Signing: decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: late}, Operator: "ann", Reason: "none",
	}
	done, err := decisionlog.TruncateLog(t.Context(), openServer(t, second), dry)
	if err != nil || done.Number != 2 || done.To.Size == 0 || done.To.Size > done.Batches || done.From.Size <= done.Batches {
		t.Errorf("%+v, %v", done, err)
	}
	servertest.Tamper(t, unsigned, "delete from checkpoints")
	servertest.Tamper(t, unsigned, "delete from events where kind = 'log_truncated'")
	_, err = decisionlog.TruncateLog(t.Context(), openServer(t, unsigned), dry)
	if err == nil || !strings.HasPrefix(err.Error(), late) || !strings.Contains(err.Error(), "give an older copy") || strings.Contains(err.Error(), "another name") {
		t.Errorf("got %v", err)
	}
	truncate(second)
	on(second, 1)
	now := notesIn(t, checkpoints)
	if !bytes.Equal(bytes.Join(now[:len(between)], nil), bytes.Join(between, nil)) {
		t.Fatal("the file does not begin with its older copy")
	}
	// A witness keeps some of the checkpoints. This one has none since the second loss.
	var witness, only [][]byte
	for j, signed := range between {
		if j%2 == 0 || auditlog.IsTruncation(signed) {
			witness = append(witness, signed)
		}
		if j >= i {
			only = append(only, signed) // a file that lost its beginning
		}
	}
	for name, files := range map[string][][][]byte{
		"the current file":   {now},
		"a copy":             {now, between},
		"a copy first":       {between, now},
		"a witness":          {now, witness},
		"copies of each age": {before, between, now, witness},

		"the copy alone":                    {between},
		"the copy beside an older one":      {between, before},
		"the copy with its statement twice": {between, replayed},
		"a file without its beginning":      {now, only},
	} {
		done, err := verify(files...)
		if err != nil || len(done.Truncations) != 2 {
			t.Errorf("%s: %+v, %v", name, done, err)
		}
	}
}

// A truncation does not make a missing checkpoint file, with or without confirmation.
func TestTruncationMakesNoFile(t *testing.T) {
	t.Parallel() // it takes long
	key, _ := servertest.LogKey(t, "test.example/log")
	file := filepath.Join(t.TempDir(), "mistyped")
	s := servertest.New(t)
	for _, confirm := range []bool{false, true} {
		_, err := decisionlog.TruncateLog(t.Context(), s.DB, decisionlog.Truncation{
			Signing:  decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: file},
			Operator: "ann", Reason: "none", Confirm: confirm,
		})
		if err == nil || !strings.Contains(err.Error(), "no such file") || !strings.Contains(err.Error(), file) {
			t.Errorf("got %v", err)
		}
		if made, _ := filepath.Glob(file); len(made) > 0 {
			t.Error("the file was made")
		}
	}
}
