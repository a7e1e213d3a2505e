package decisionlog_test

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// states appends events with statements of truncation to the log, as the login of a server can.
func states(t *testing.T, url, subject string, statements ...string) {
	t.Helper()
	w := openServer(t, url).NewLogWriter("junk", auditlog.Strict, 0)
	defer w.Close()
	for _, statement := range statements {
		id := uuid.Must(uuid.NewV7())
		record, err := proto.Marshal(&cedarpostv1.EventRecord{
			EventId: id.String(), Time: timestamppb.New(time.Unix(id.Time().UnixTime()).UTC().Truncate(time.Millisecond)),
			Kind: cedarpostv1.EventRecord_LOG_TRUNCATED, Subject: subject,
			Detail: &cedarpostv1.EventRecord_LogTruncated{LogTruncated: &cedarpostv1.LogTruncated{Statement: statement}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Append(t.Context(), nil, []store.Event{{ID: id, Kind: "log_truncated", Subject: subject, Record: record}}); err != nil {
			t.Fatal(err)
		}
	}
}

// A statement does not excuse the loss of what was signed after it: servers do not sign, and
// the verification finds it. A second loss needs a second statement. With both, copies of the
// checkpoint file of any age are in order.
func TestTruncationShownAgain(t *testing.T) {
	t.Parallel() // it takes long
	s, key, verifier, checkpoints, _ := signedShop(t)
	states1, states2 := copyDatabase(t, s.URL), copyDatabase(t, s.URL)
	s = servertest.On(t, s.URL, signWith(checkpoints, key))
	servertest.DecideSome(t, s, 5)
	lost, _ := servertest.Covered(t, s, verifier)
	s.Stop()
	files := [][][]byte{notesIn(t, checkpoints)}
	request := decisionlog.Truncation{
		Signing: decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: checkpoints}, Operator: "ann", Reason: "lost", Server: "test", Confirm: true,
	}
	verify := func(db *store.DB, files ...[][]byte) (decisionlog.Verified, error) {
		return decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{Keys: []note.Verifier{verifier}, Against: files})
	}
	first, err := decisionlog.TruncateLog(context.Background(), openServer(t, states1), request)
	if err != nil || first.Number != 1 || first.From != lost {
		t.Fatalf("%+v, %v", first, err)
	}
	restored := servertest.On(t, states1, signWith(checkpoints, key))
	servertest.DecideSome(t, restored, 20)
	second, _ := servertest.Covered(t, restored, verifier)
	if second.Epoch != 1 || second.Size <= lost.Size {
		t.Fatalf("%+v after %+v", second, lost)
	}
	restored.Stop()
	files = append(files, notesIn(t, checkpoints))
	i := slices.IndexFunc(files[1], auditlog.IsTruncation)
	statement := string(files[1][i])
	auditor := servertest.OpenAuditor(t, states1)
	for n := range files[1] { // a copy of the file of any age
		if _, err := verify(auditor, files[1][:n+1]); err != nil {
			t.Errorf("the first %d notes: %v", n+1, err)
		}
	}

	auditor.Close()

	// Another server, whose file has the lost checkpoints and no statement, finds the statement in
	// the log.
	otherFile := filepath.Join(t.TempDir(), "checkpoints")
	for _, n := range files[0] {
		if err := auditlog.AppendCheckpoint(otherFile, n); err != nil {
			t.Fatal(err)
		}
	}
	other := servertest.On(t, copyDatabase(t, states1), signWith(otherFile, key))
	servertest.DecideSome(t, other, 1)
	if c, _ := servertest.Covered(t, other, verifier); c.Epoch != 1 {
		t.Errorf("another server signs %+v", c)
	}
	other.Stop()

	// The owner of the database restores the backup again, and adds the statement.
	states(t, states2, "any", statement)
	auditor = servertest.OpenAuditor(t, states2)
	for _, against := range [][][][]byte{{files[1]}, {append(slices.Clone(files[1]), []byte(statement))}, {files[1], files[0]}, {files[0], {[]byte(statement)}, files[1]}} {
		if done, err := verify(auditor, against...); err == nil {
			t.Errorf("the loss of epoch 1 goes unnoticed: %+v", done)
		}
	}
	again := servertest.On(t, states2, signWith(checkpoints, key))
	servertest.Eventually(t, "a refusal to sign", func() bool { return strings.Contains(servertest.Metrics(t, again), "cedarpost_checkpoint_refused 1") })
	servertest.DecideSome(t, again, 40) // the log is longer than the signed one
	if done, err := verify(auditor, files[1]); err == nil {
		t.Errorf("the loss of epoch 1 goes unnoticed in a longer log: %+v", done)
	}
	done, err := decisionlog.TruncateLog(context.Background(), openServer(t, states2), request)
	if err != nil || done.Number != 2 || done.From != second {
		t.Fatalf("%+v, %v", done, err)
	}
	third, _ := servertest.Covered(t, again, verifier)
	if third.Epoch != 2 {
		t.Errorf("signed as %+v", third)
	}
	files = append(files, notesIn(t, checkpoints))
	if got, err := verify(auditor, files...); err != nil || len(got.Truncations) != 2 {
		t.Errorf("all files: %+v, %v", got, err)
	}
	slices.Reverse(files)
	if got, err := verify(auditor, files...); err != nil || len(got.Truncations) != 2 {
		t.Errorf("all files, the other way round: %+v, %v", got, err)
	}
	for n := range files[0] {
		if _, err := verify(auditor, files[0][:n+1]); err != nil {
			t.Errorf("the first %d notes of the last file: %v", n+1, err)
		}
	}
	if _, err := decisionlog.VerifyLog(t.Context(), auditor, decisionlog.Verification{
		Keys: []note.Verifier{verifier}, Against: files[1:2], Since: time.Now().Add(time.Minute),
	}); err != nil {
		t.Errorf("an older file, and only new rows: %v", err)
	}
	// An edited file does not weaken the evidence of another file.
	edited := [][]byte{files[0][0]}
	for _, n := range files[0] {
		if auditlog.IsTruncation(n) {
			edited = append(edited, n)
		}
	}
	again.Stop()
	servertest.Tamper(t, states2, fmt.Sprintf("update audit_batches set header = header || 'x' where seq = %d", third.Size-1))
	if _, err := verify(auditor, edited, files[0]); err == nil || !strings.Contains(err.Error(), "kept elsewhere") {
		t.Errorf("beside an edited file: %v", err)
	}
}

// False events, which the login of a server can append, do not keep a statement from being
// recorded and returned, and do not make the response large.
func TestTruncationAmongJunk(t *testing.T) {
	t.Parallel() // it takes long
	key, verifier := servertest.LogKey(t, "test.example/log")
	dir := t.TempDir()
	checkpoints := filepath.Join(dir, "checkpoints")
	s := servertest.New(t, signWith(checkpoints, key))
	s.MustLoadShop()
	servertest.DecideSome(t, s, 5)
	servertest.Covered(t, s, verifier)
	s.Stop()
	backup := copyDatabase(t, s.URL)
	s = servertest.On(t, s.URL, signWith(checkpoints, key))
	servertest.DecideSome(t, s, 5)
	servertest.Covered(t, s, verifier)
	s.Stop()
	request := decisionlog.Truncation{
		Signing: decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: checkpoints}, Operator: "ann", Reason: "lost", Server: "test",
	}
	done, err := decisionlog.TruncateLog(context.Background(), openServer(t, backup), request)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := done.Sign(readKey(t, key))
	if err != nil {
		t.Fatal(err)
	}
	forged, err := done.Sign(newKey(t, "test.example/log"))
	if err != nil {
		t.Fatal(err)
	}
	// The statement is in the file alone, as after a crash.
	if err := auditlog.AppendCheckpoint(checkpoints, signed); err != nil {
		t.Fatal(err)
	}
	states(t, backup, fmt.Sprintf("test.example/log 1: %d to %d", done.From.Size, done.To.Size), "junk", string(forged))
	restored := servertest.On(t, backup, signWith(checkpoints, key))
	servertest.Covered(t, restored, verifier)
	told := func() {
		t.Helper()
		r, err := restored.Audit.GetCheckpoint(t.Context(), &cedarpostv1.GetCheckpointRequest{})
		if err != nil || !slices.Equal(r.Truncations, []string{string(signed)}) || proto.Size(r) > 10_000 {
			t.Errorf("%d statements, %d bytes, %v", len(r.GetTruncations()), proto.Size(r), err)
		}
	}
	told()
	junk := []string{strings.Repeat("x", 8<<20), string(signed) + strings.Repeat("\u2014 x AAAAAAAA\n", 1000)}
	for i := range 150 {
		junk = append(junk, fmt.Sprint("junk ", i), string(bytes.Replace(forged, []byte("ann"), fmt.Appendf(nil, "ann%d", i), 1)))
	}
	states(t, backup, "junk", junk...)
	servertest.Covered(t, restored, verifier)
	told()
}

// After a rotation, a statement that only the old key signed does not keep the new key from
// signing. Before the rotation is finished, an error names the missing key.
func TestTruncationThenRotation(t *testing.T) {
	t.Parallel() // it takes long
	older, olderVerifier := servertest.LogKey(t, "test.example/log")
	newer, newerVerifier := servertest.LogKey(t, "test.example/log")
	checkpoints := filepath.Join(t.TempDir(), "checkpoints")
	s := servertest.New(t, signWith(checkpoints, older))
	s.MustLoadShop()
	servertest.DecideSome(t, s, 5)
	servertest.Covered(t, s, olderVerifier)
	s.Stop()
	backup := copyDatabase(t, s.URL)
	s = servertest.On(t, s.URL, signWith(checkpoints, older))
	servertest.DecideSome(t, s, 5)
	last, _ := servertest.Covered(t, s, olderVerifier)
	s.Stop()
	request := decisionlog.Truncation{
		Signing: decisionlog.Signing{KeyFiles: []string{older}, CheckpointFile: checkpoints}, Operator: "ann", Reason: "lost", Server: "test", Confirm: true,
	}

	// Checkpoints without a valid signature cannot be stated to be lost.
	strange := newKey(t, "test.example/log")
	huge := auditlog.Checkpoint{Origin: last.Origin, Size: 9_000_000_000_000_000_000}
	byStranger, err := huge.Sign(strange)
	if err != nil {
		t.Fatal(err)
	}
	realNote := notesIn(t, checkpoints)[0]
	_, signature, _ := bytes.Cut(realNote, []byte("\n\n"))
	text, _, _ := bytes.Cut(byStranger, []byte("\n\n"))
	for note, want := range map[string]string{
		string(byStranger):                        "9000000000000000000 batches is not signed with a given key, but with " + auditlog.KeyID(verifierOf(t, strange)),
		string(text) + "\n\n" + string(signature): "9000000000000000000 batches names a key of this log",
	} {
		file := filepath.Join(t.TempDir(), "checkpoints")
		for _, n := range append(notesIn(t, checkpoints), []byte(note)) {
			if err := auditlog.AppendCheckpoint(file, n); err != nil {
				t.Fatal(err)
			}
		}
		bad := request
		bad.CheckpointFile = file
		if done, err := decisionlog.TruncateLog(context.Background(), openServer(t, backup), bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v, %v", done, err)
		}
	}

	if _, err := decisionlog.TruncateLog(context.Background(), openServer(t, backup), request); err != nil {
		t.Fatal(err)
	}
	request.KeyFiles = []string{newer}
	if _, err := decisionlog.TruncateLog(context.Background(), openServer(t, backup), request); err == nil || !strings.Contains(err.Error(), auditlog.KeyID(olderVerifier)) {
		t.Errorf("with the new key alone: %v", err)
	}
	s = servertest.On(t, backup, signWith(checkpoints, newer, older))
	servertest.DecideSome(t, s, 1)
	servertest.Covered(t, s, newerVerifier)
	s.Stop()
	s = servertest.On(t, backup, signWith(checkpoints, newer))
	servertest.DecideSome(t, s, 1)
	now, _ := servertest.Covered(t, s, newerVerifier)
	if now.Epoch != 1 {
		t.Errorf("signed as %+v", now)
	}
	verify := func(keys ...note.Verifier) error {
		_, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, backup), decisionlog.Verification{Keys: keys, Against: [][][]byte{notesIn(t, checkpoints)}})
		return err
	}
	if err := verify(olderVerifier, newerVerifier); err != nil {
		t.Error(err)
	}
	if err := verify(newerVerifier); err == nil || !strings.Contains(err.Error(), "verifier key is missing") {
		t.Errorf("without the old verifier key: %v", err)
	}
}
