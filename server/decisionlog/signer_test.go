package decisionlog_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// signWith is [servertest.Signing] for a signer with short pauses.
func signWith(checkpoints string, keys ...string) servertest.Option {
	return func(c *server.Config) {
		c.Signing = decisionlog.SignOften(decisionlog.Signing{KeyFiles: keys, CheckpointFile: checkpoints})
	}
}

// signedShop returns a stopped server with the example bundle, whose log has some decisions and
// is signed with a key up to a checkpoint.
func signedShop(t *testing.T) (s *servertest.Server, key string, verifier note.Verifier, checkpoints string, last auditlog.Checkpoint) {
	t.Helper()
	key, verifier = servertest.LogKey(t, "test.example/log")
	checkpoints = filepath.Join(t.TempDir(), "checkpoints")
	s = servertest.New(t, signWith(checkpoints, key))
	s.MustLoadShop()
	servertest.DecideSome(t, s, 5)
	last, _ = servertest.Covered(t, s, verifier)
	s.Stop()
	return s, key, verifier, checkpoints, last
}

// signed starts a server with the example bundle that signs its log.
func signed(t *testing.T) (s *servertest.Server, verifier note.Verifier, checkpoints string) {
	t.Helper()
	key, verifier := servertest.LogKey(t, "test.example/log")
	checkpoints = filepath.Join(t.TempDir(), "checkpoints")
	s = servertest.New(t, signWith(checkpoints, key))
	s.MustLoadShop()
	return s, verifier, checkpoints
}

func hashes(t *testing.T, list [][]byte) (out []tlog.Hash) {
	t.Helper()
	for _, h := range list {
		out = append(out, tlog.Hash(h))
	}
	return out
}

// There is a proof that each record is covered by a signed checkpoint, and that each checkpoint
// covers the log of the one before.
func TestProofs(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, checkpoints := signed(t)
	ids := servertest.DecideSome(t, s, 30)
	first, _ := servertest.Covered(t, s, verifier)
	for _, id := range ids {
		p, err := s.Audit.GetInclusionProof(t.Context(), &cedarpostv1.GetInclusionProofRequest{Id: id, Size: first.Size})
		if err != nil {
			t.Fatal(err)
		}
		in := auditlog.Inclusion{
			Record: p.Record, Row: int(p.Row), RowProof: hashes(t, p.RowProof),
			Header: p.Header, Leaf: p.Leaf, Proof: hashes(t, p.Proof),
		}
		if err := in.Check(first); err != nil {
			t.Fatalf("%s: %v", id, err)
		}
		in.Record[len(in.Record)/2] ^= 1
		if in.Check(first) == nil {
			t.Fatalf("%s: an altered record is proven", id)
		}
	}
	servertest.DecideSome(t, s, 10)
	second, _ := servertest.Covered(t, s, verifier)
	if second.Size <= first.Size {
		t.Fatalf("the log did not grow from %d", first.Size)
	}
	p, err := s.Audit.GetConsistencyProof(t.Context(), &cedarpostv1.GetConsistencyProofRequest{First: first.Size, Second: second.Size})
	if err != nil {
		t.Fatal(err)
	}
	if err := tlog.CheckTree(hashes(t, p.Proof), second.Size, second.Root, first.Size, first.Root); err != nil {
		t.Error(err)
	}
	// The checkpoint is in the file, too.
	file, err := os.ReadFile(checkpoints)
	if err != nil || !strings.Contains(string(file), fmt.Sprintf("test.example/log\n%d\n%s\n", second.Size, second.Root)) {
		t.Errorf("the file does not hold the checkpoint: %v\n%s", err, file)
	}
	_, err = s.Audit.GetInclusionProof(t.Context(), &cedarpostv1.GetInclusionProofRequest{Id: "01890a5d-ac96-774b-bcce-b302099a8057"})
	servertest.WantCode(t, err, connect.CodeNotFound, "no record")
	_, err = s.Audit.GetConsistencyProof(t.Context(), &cedarpostv1.GetConsistencyProofRequest{First: 1 << 40})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "the log has")
}

// A database that was restored to an earlier state is not signed as the same log. With a key of
// another name, it is signed as another log.
func TestRestoredBackupIsNotSigned(t *testing.T) {
	t.Parallel() // it takes long
	s, key, verifier, checkpoints, before := signedShop(t)
	backup := copyDatabase(t, s.URL)
	s = servertest.On(t, s.URL, signWith(checkpoints, key))
	servertest.DecideSome(t, s, 5)
	after, kept := servertest.Covered(t, s, verifier)
	s.Stop()
	if after.Size <= before.Size {
		t.Fatal("the log did not grow")
	}

	restored := servertest.On(t, backup, signWith(checkpoints, key))
	servertest.DecideSome(t, restored, 20) // the log is longer than the signed one
	conn := servertest.Session(t, backup)
	servertest.Eventually(t, "a refusal to sign", func() bool {
		return strings.Contains(servertest.Metrics(t, restored), "cedarpost_checkpoint_refused 1")
	})
	var newest int64
	if err := conn.QueryRow(t.Context(), "select max(size) from checkpoints").Scan(&newest); err != nil || newest != before.Size {
		t.Errorf("%d batches were signed, %v; before the backup %d", newest, err, before.Size)
	}
	_, err := decisionlog.VerifyLog(t.Context(), restored.DB, decisionlog.Verification{Against: [][][]byte{{[]byte(kept)}}})
	if err == nil {
		t.Error("a restored log passes for the one that was signed")
	}
	restored.Stop()

	other, otherVerifier := servertest.LogKey(t, "test.example/log-2")
	anew := servertest.On(t, backup, signWith(checkpoints, other))
	if c, _ := servertest.Covered(t, anew, otherVerifier); c.Origin != "test.example/log-2" || c.Size <= before.Size {
		t.Errorf("signed anew: %+v", c)
	}
}

// Checkpoints that no key of this log signed are counted, and do not keep a server from signing.
// A changed tree is not signed.
func TestSignsOnlyWhatIsTrue(t *testing.T) {
	t.Parallel() // it takes long
	s, key, verifier, checkpoints, before := signedShop(t)
	conn := servertest.Session(t, s.URL)
	for _, size := range []int64{before.Size + 1, before.Size + 2, 1e9} {
		servertest.MustExec(t, conn, fmt.Sprintf("insert into checkpoints (origin, size, note) values ('test.example/log', %d, 'junk')", size))
	}
	again := servertest.On(t, s.URL, signWith(checkpoints, key))
	servertest.DecideSome(t, again, 5)
	if c, _ := servertest.Covered(t, again, verifier); c.Size <= before.Size {
		t.Errorf("signed up to %d, before the junk up to %d", c.Size, before.Size)
	}
	text := servertest.Metrics(t, again)
	if strings.Contains(text, `cedarpost_checkpoint_failures_total{cause="foreign"} 0`) || !strings.Contains(text, "cedarpost_checkpoint_refused 0") {
		t.Error("the junk is not counted, or signing is refused")
	}
	_, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, s.URL), decisionlog.Verification{Keys: []note.Verifier{verifier}})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("checkpoint of size %d in the database", before.Size+1)) || !strings.Contains(err.Error(), "covers 1000000000 batches") {
		t.Errorf("got %v", err)
	}
	again.Stop()

	servertest.Tamper(t, s.URL, "update audit_nodes set hashes = set_byte(hashes, 0, get_byte(hashes, 0) # 1) where level = 0 and tile = 0")
	changed := servertest.On(t, s.URL, signWith(checkpoints, key))
	servertest.DecideSome(t, changed, 5)
	servertest.Eventually(t, "a refusal to sign", func() bool { return strings.Contains(servertest.Metrics(t, changed), "cedarpost_checkpoint_refused 1") })
}

// A running signer notices that the stored tree was changed, and stops signing.
func TestSignerNoticesAChangedTree(t *testing.T) {
	s, verifier, _ := signed(t)
	servertest.DecideSome(t, s, 5)
	servertest.Covered(t, s, verifier)
	conn := servertest.Session(t, s.URL)
	servertest.MustExec(t, conn, "update audit_nodes set hashes = set_byte(hashes, 0, get_byte(hashes, 0) # 1) where level = 0 and tile = 0")
	servertest.DecideSome(t, s, 5)
	servertest.Eventually(t, "a refusal to sign", func() bool { return strings.Contains(servertest.Metrics(t, s), "cedarpost_checkpoint_refused 1") })
}
