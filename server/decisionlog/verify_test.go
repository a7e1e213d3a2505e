package decisionlog_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// The verification finds and names what was altered, removed or moved.
func TestVerifyFinds(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, _ := signed(t)
	servertest.DecideSome(t, s, 12)
	_, kept := servertest.Covered(t, s, verifier)
	s.Stop()
	x, db := startTampering(t, s.URL, logTables...), servertest.OpenAuditor(t, s.URL)
	verify := func(t *testing.T) error {
		_, err := decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{Keys: []note.Verifier{verifier}, Against: [][][]byte{{[]byte(kept)}}})
		return err
	}
	if err := verify(t); err != nil {
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
			x.do(t, c.sql)
			err := verify(t)
			var bad *decisionlog.BadLogError
			if !errors.As(err, &bad) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			t.Log(err)
		})
	}
	if err := verify(t); err != nil {
		t.Errorf("after all changes were undone: %v", err)
	}
}

// copyDatabase makes a copy of a database, as a backup that is restored beside it.
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
