package decisionlog_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// signed starts a server with the example that signs its log.
func signed(t *testing.T) (s *servertest.Server, verifier note.Verifier, checkpoints string) {
	t.Helper()
	key, verifier := servertest.LogKey(t, "test.example/log")
	checkpoints = filepath.Join(t.TempDir(), "checkpoints")
	s = servertest.New(t, servertest.Signing(key, checkpoints))
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

// Every record can be proven to be below a signed checkpoint, and each checkpoint
// to be the beginning of the next.
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
	// Every checkpoint is outside of the database too.
	file, err := os.ReadFile(checkpoints)
	if err != nil || !strings.Contains(string(file), fmt.Sprintf("test.example/log\n%d\n%s\n", second.Size, second.Root)) {
		t.Errorf("the file does not hold the checkpoint: %v\n%s", err, file)
	}
	_, err = s.Audit.GetInclusionProof(t.Context(), &cedarpostv1.GetInclusionProofRequest{Id: "01890a5d-ac96-774b-bcce-b302099a8057"})
	servertest.WantCode(t, err, connect.CodeNotFound, "no record")
	_, err = s.Audit.GetConsistencyProof(t.Context(), &cedarpostv1.GetConsistencyProofRequest{First: 1 << 40})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "the log has")
}

// change is tamper for one column of one row, which a subquery finds by its ctid. The
// test can take it back.
func change(t *testing.T, url, table, column, value, row string) (undo func()) {
	t.Helper()
	conn := servertest.Session(t, url)
	servertest.MustExec(t, conn, "set session_replication_role = replica") // no triggers
	servertest.MustExec(t, conn, fmt.Sprintf("create temp table kept as select ctid as id, %[2]s as was from %[1]s where ctid = (%[3]s)", table, column, row))
	var id string
	query := fmt.Sprintf("update %[1]s set %[2]s = %[3]s where ctid = (select id from kept) returning ctid::text", table, column, value)
	if err := conn.QueryRow(t.Context(), query).Scan(&id); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return func() {
		t.Helper()
		tag, err := conn.Exec(t.Context(), fmt.Sprintf("update %[1]s set %[2]s = (select was from kept) where ctid = '%[3]s'", table, column, id))
		if err != nil || tag.RowsAffected() != 1 {
			t.Fatalf("%s.%s is not as it was: %v, %v", table, column, tag, err)
		}
		conn.Close(t.Context())
	}
}

// Whatever is altered, removed or moved is found and named.
func TestVerifyFinds(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, _ := signed(t)
	servertest.DecideSome(t, s, 12)
	_, kept := servertest.Covered(t, s, verifier)
	s.Stop()
	verify := func(t *testing.T, sql string) error {
		url := copyDatabase(t, s.URL)
		if sql != "" {
			servertest.Tamper(t, url, sql)
		}
		_, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, url),
			decisionlog.Verification{Keys: []note.Verifier{verifier}, Against: [][][]byte{{[]byte(kept)}}})
		return err
	}
	if err := verify(t, ""); err != nil {
		t.Fatalf("a whole log: %v", err)
	}
	const victim = "(select decision_id from decisions order by batch, pos offset 5 limit 1)"
	flip := func(column string) string {
		return fmt.Sprintf("set_byte(%[1]s, length(%[1]s) / 2, get_byte(%[1]s, length(%[1]s) / 2) # 1)", column)
	}
	for name, c := range map[string]struct{ sql, want string }{
		"a byte of a row":             {"update decisions set record = " + flip("record") + " where decision_id = " + victim, "row"},
		"a byte and its checksum":     {"update decisions set record = " + flip("record") + ", crc = 0 where decision_id = " + victim, "altered"},
		"a column":                    {"update decisions set allowed = not allowed where decision_id = " + victim, "column allowed"},
		"who asked":                   {"update decisions set caller = 'nobody' where decision_id = " + victim, "column caller"},
		"a byte of a header":          {"update audit_batches set header = " + flip("header") + " where seq = 3", "batch 3: "},
		"a column of a batch":         {"update audit_batches set writer_seq = 99 where seq = 3", "batch 3: column writer_seq"},
		"a byte of a node":            {"update audit_nodes set hashes = set_byte(hashes, 40, get_byte(hashes, 40) # 1) where level = 0", "the stored tree does not match the batches"},
		"a row that is gone":          {"delete from decisions where decision_id = " + victim, "missing"},
		"an event that is gone":       {"delete from events where subject = 'shop'", "missing"},
		"a batch that is gone":        {"delete from audit_batches where seq = 3", "batch 3: is missing"},
		"the tail of the log":         {"delete from audit_batches where seq >= (select max(seq) - 2 from audit_batches)", "is missing"},
		"two rows that changed place": {"update decisions set pos = 1 - pos where batch = (select batch from decisions where pos = 1 limit 1) and pos < 2", "two rows changed places"},
		"a row that is new": {`insert into decisions select gen_random_uuid(), at, revision, caller, server, principal_type, principal_id, action_type, action_id,
			resource_type, resource_id, allowed, denied_at, policies, request_id, trace_id, record, fields, masked, batch, pos, crc from decisions where decision_id = ` + victim, "another row has this place"},
		"a checkpoint": {"update checkpoints set note = " + flip("note") + " where size = (select max(size) from checkpoints)", "checkpoint"},
	} {
		t.Run(name, func(t *testing.T) {
			err := verify(t, c.sql)
			var bad *decisionlog.BadLogError
			if !errors.As(err, &bad) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			t.Log(err)
		})
	}
}

// A database that went back to an earlier state is not signed as if nothing had
// happened, but under another name it is.
func TestRestoredBackupIsNotSigned(t *testing.T) {
	t.Parallel() // it takes long
	key, verifier := servertest.LogKey(t, "test.example/log")
	checkpoints := filepath.Join(t.TempDir(), "checkpoints")
	s := servertest.New(t, servertest.Signing(key, checkpoints))
	s.MustLoadShop()
	servertest.DecideSome(t, s, 5)
	before, _ := servertest.Covered(t, s, verifier)
	s.Stop()
	backup := copyDatabase(t, s.URL)
	s = servertest.On(t, s.URL, servertest.Signing(key, checkpoints))
	servertest.DecideSome(t, s, 5)
	after, kept := servertest.Covered(t, s, verifier)
	s.Stop()
	if after.Size <= before.Size {
		t.Fatal("the log did not grow")
	}

	restored := servertest.On(t, backup, servertest.Signing(key, checkpoints))
	servertest.DecideSome(t, restored, 20) // the log is longer than the one that was signed
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
	anew := servertest.On(t, backup, servertest.Signing(other, checkpoints))
	if c, _ := servertest.Covered(t, anew, otherVerifier); c.Origin != "test.example/log-2" || c.Size <= before.Size {
		t.Errorf("signed anew: %+v", c)
	}
}

// copyDatabase is a backup and its restore.
func copyDatabase(t *testing.T, url string) string {
	t.Helper()
	config, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	from, name := config.Database, "copy_"+strings.ReplaceAll(uuid.NewString(), "-", "")
	config.Database = "postgres"
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = conn.Exec(context.Background(), "drop database if exists "+name+" with (force)")
		conn.Close(context.Background())
	})
	// Sessions that were closed may still be ending.
	servertest.MustExec(t, conn, "select pg_terminate_backend(pid, 60000) from pg_stat_activity where datname = '"+from+"'")
	servertest.MustExec(t, conn, "create database "+name+" template "+from+" strategy file_copy")
	return strings.Replace(url, "/"+from, "/"+name, 1)
}

// Checkpoints that this log's keys did not sign stop nobody from signing, and are
// counted, and a tree that was changed is not signed.
func TestSignsOnlyWhatIsTrue(t *testing.T) {
	t.Parallel() // it takes long
	key, verifier := servertest.LogKey(t, "test.example/log")
	checkpoints := filepath.Join(t.TempDir(), "checkpoints")
	s := servertest.New(t, servertest.Signing(key, checkpoints))
	s.MustLoadShop()
	servertest.DecideSome(t, s, 5)
	before, _ := servertest.Covered(t, s, verifier)
	s.Stop()
	conn := servertest.Session(t, s.URL)
	for _, size := range []int64{before.Size + 1, before.Size + 2, 1e9} {
		servertest.MustExec(t, conn, fmt.Sprintf("insert into checkpoints (origin, size, note) values ('test.example/log', %d, 'junk')", size))
	}
	again := servertest.On(t, s.URL, servertest.Signing(key, checkpoints))
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
	changed := servertest.On(t, s.URL, servertest.Signing(key, checkpoints))
	servertest.DecideSome(t, changed, 5)
	servertest.Eventually(t, "a refusal to sign", func() bool { return strings.Contains(servertest.Metrics(t, changed), "cedarpost_checkpoint_refused 1") })
}

// A tree that is changed while a server signs is not signed on.
func TestSignerNoticesAChangedTree(t *testing.T) {
	s, verifier, _ := signed(t)
	servertest.DecideSome(t, s, 5)
	servertest.Covered(t, s, verifier)
	conn := servertest.Session(t, s.URL)
	servertest.MustExec(t, conn, "update audit_nodes set hashes = set_byte(hashes, 0, get_byte(hashes, 0) # 1) where level = 0 and tile = 0")
	servertest.DecideSome(t, s, 5)
	servertest.Eventually(t, "a refusal to sign", func() bool { return strings.Contains(servertest.Metrics(t, s), "cedarpost_checkpoint_refused 1") })
}
