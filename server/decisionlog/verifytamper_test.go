package decisionlog_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// tampering changes a database past the service and undoes the changes.
type tampering struct {
	conn   *pgx.Conn
	tables []string
}

// startTampering keeps the rows of the tables that are to be changed.
func startTampering(t *testing.T, url string, tables ...string) *tampering {
	t.Helper()
	x := &tampering{servertest.Session(t, url), tables}
	servertest.MustExec(t, x.conn, "set session_replication_role = replica") // no triggers
	for _, table := range tables {
		servertest.MustExec(t, x.conn, fmt.Sprintf("create temp table kept_%[1]s as table %[1]s", table))
	}
	return x
}

// do runs a statement, which must change a row. The change is undone at the end of the test.
func (x *tampering) do(t *testing.T, sql string) {
	t.Helper()
	x.undoAfter(t)
	if tag, err := x.conn.Exec(t.Context(), sql); err != nil || tag.RowsAffected() == 0 {
		t.Fatalf("%s: %v, %v", sql, tag, err)
	}
}

// undoAfter undoes all changes of the tables at the end of the test.
func (x *tampering) undoAfter(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		if err := x.undo(); err != nil {
			t.Fatal(err)
		}
	})
}

func (x *tampering) undo() error {
	for _, table := range x.tables {
		if _, err := x.conn.Exec(context.Background(), fmt.Sprintf("delete from %[1]s; insert into %[1]s table kept_%[1]s", table)); err != nil {
			return fmt.Errorf("table %s is not as it was: %w", table, err)
		}
	}
	return nil
}

// logTables are the tables of the log.
var logTables = []string{"decisions", "events", "audit_batches", "audit_nodes", "checkpoints"}

// unproven are the columns of the log that no proof covers, with the reason.
var unproven = map[string]string{
	"checkpoints.at": "when the database stored the checkpoint; no decision depends on it",
}

// tampered returns an SQL expression for another value of a column.
func tampered(t *testing.T, column, typ string) string {
	t.Helper()
	switch column { // unique columns
	case "seq":
		return "(select max(seq) + 1 from audit_batches)"
	case "size":
		return "(select max(size) + 1 from checkpoints)"
	}
	expression, ok := map[string]string{
		"uuid":                     "gen_random_uuid()",
		"timestamp with time zone": "%s - interval '1 second'",
		"bigint":                   "coalesce(%s, 0) + 1",
		"integer":                  "%s + 1",
		"smallint":                 "1 + coalesce(%s, 0) %% 3",
		"text":                     "coalesce(%s, '') || 'x'",
		"ARRAY_text":               "array_append(%s, 'x')",
		"ARRAY_uuid":               "array_append(%s, gen_random_uuid())",
		"ARRAY_bytea":              `array_append(%s, '\x01')`,
		"boolean":                  "not %s",
		"date":                     "%s - 1",
		"bytea":                    "set_byte(%[1]s, length(%[1]s) / 2, get_byte(%[1]s, length(%[1]s) / 2) # 1)",
	}[typ]
	if !ok {
		t.Fatalf("column %s: no other value for the type %s", column, typ)
	}
	if !strings.Contains(expression, "%") {
		return expression
	}
	return fmt.Sprintf(expression, column)
}

// The verification finds a change of each column of the log, except those listed above.
func TestVerifyFindsEachColumn(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, _ := signed(t)
	servertest.DecideSome(t, s, 6)
	servertest.Covered(t, s, verifier)
	s.Stop()
	rows, err := servertest.Session(t, s.URL).Query(t.Context(), `
		select table_name, column_name, data_type || case when data_type = 'ARRAY' then udt_name else '' end
		from information_schema.columns
		where table_schema = current_schema() and table_name = any($1)
		order by table_name, ordinal_position`, logTables)
	if err != nil {
		t.Fatal(err)
	}
	type column struct{ Table, Name, Type string }
	columns, err := pgx.CollectRows(rows, pgx.RowToStructByPos[column])
	if err != nil || len(columns) < 50 {
		t.Fatalf("%d columns, %v", len(columns), err)
	}
	db := servertest.OpenAuditor(t, s.URL)
	x := startTampering(t, s.URL, logTables...)
	for _, c := range columns {
		name := c.Table + "." + c.Name
		if unproven[name] != "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			value := tampered(t, c.Name, c.Type)
			// A row in the middle, of those in which the column is not null, if there are any. All
			// rows of the log are in the partition of one day, so a ctid is unique.
			x.do(t, fmt.Sprintf(`update %[1]s set %[2]s = %[3]s where ctid = (
				select ctid from %[1]s order by %[2]s is null, ctid offset (select count(*) / 2 from %[1]s where %[2]s is not null) limit 1)`, c.Table, c.Name, value))
			_, err := decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{Keys: []note.Verifier{verifier}})
			var bad *decisionlog.BadLogError
			if !errors.As(err, &bad) {
				t.Errorf("%s = %s is not found: %v", name, value, err)
			}
			t.Log(err)
		})
	}
	if _, err := decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{Keys: []note.Verifier{verifier}}); err != nil {
		t.Errorf("after all changes were undone: %v", err)
	}
}

// The login of a server can insert rows that belong to no batch, or not to the batch that they
// name. The verification finds them, and queries do not return them.
func TestVerifyFindsRowsOfNoBatch(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, _ := signed(t)
	ids := servertest.DecideSome(t, s, 6)
	if _, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: ids[0]}); err != nil { // an event
		t.Fatal(err)
	}
	servertest.Covered(t, s, verifier)
	s.Stop()
	const (
		decision = `insert into decisions (decision_id, at, revision, caller, server, principal_type, principal_id, action_type, action_id,
				resource_type, resource_id, allowed, denied_at, policies, request_id, trace_id, record, fields, masked, batch, pos, crc)
			select %s, %s, revision, 'forged', server, principal_type, principal_id, action_type, action_id,
				resource_type, resource_id, true, null, policies, request_id, trace_id, record, fields, masked, %s, %s, crc
			from decisions order by at limit 1`
		event = `insert into events (event_id, at, kind, caller, server, subject, revision, request_id, trace_id, decisions, record, batch, pos, crc)
			select %s, %s, kind, 'forged', server, subject, revision, request_id, trace_id, decisions, record, %s, %s, crc
			from events order by at limit 1`
		newID = "gen_random_uuid()"
	)
	x := startTampering(t, s.URL, logTables...)
	conn, db := servertest.Session(t, s.URL), servertest.OpenAuditor(t, s.URL)
	for name, c := range map[string]struct{ sql, want string }{
		"of the nil batch":               {fmt.Sprintf(decision, newID, "at", "'00000000-0000-0000-0000-000000000000'", "0"), "belongs to no batch"},
		"of an unknown batch":            {fmt.Sprintf(decision, newID, "at", newID, "0"), "belongs to no batch"},
		"of a batch, before its time":    {fmt.Sprintf(decision, newID, "at - interval '1 second'", "batch", "0"), "outside of its time"},
		"of a batch, after its time":     {fmt.Sprintf(decision, newID, "at + interval '1 minute'", "batch", "0"), "outside of its time"},
		"of a batch, beyond its places":  {fmt.Sprintf(decision, newID, "at", "batch", "100"), "the batch has no such place"},
		"of a batch, at a place below 0": {fmt.Sprintf(decision, newID, "at", "batch", "-1"), "the batch has no such place"},
		"of a batch, twice":              {fmt.Sprintf(decision, newID, "at", "batch", "pos"), "another row has this place"},
		"of the batch of an event":       {fmt.Sprintf(decision, newID, "at", "(select batch from events limit 1)", "0"), "outside of its time"},
		"an event of no batch":           {fmt.Sprintf(event, newID, "at", newID, "0"), "belongs to no batch"},
		"an event of another batch":      {fmt.Sprintf(event, newID, "at", "(select batch from decisions limit 1)", "0"), "outside of its time"},
		"tomorrow":                       {fmt.Sprintf(decision, newID, "at + interval '1 day'", "batch", "0"), "belongs to no batch"},
		"of an empty batch": {"select log_append('00000000-0000-0000-0000-00000000000a', gen_random_uuid(), 0, 0, 'junk', current_date, null, null);" +
			fmt.Sprintf(decision, newID, "at", "'00000000-0000-0000-0000-00000000000a'", "0"), "outside of its time"},
	} {
		t.Run(name, func(t *testing.T) {
			x.undoAfter(t)
			servertest.MustExec(t, conn, c.sql)
			_, err := decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			// A query cannot tell a row in the place of another one from the true row without a
			// proof.
			if strings.Contains(name, "twice") {
				return
			}
			day := store.DecisionQuery{From: time.Now().Add(-12 * time.Hour), Limit: 1000}
			list, err := db.QueryDecisions(t.Context(), day)
			if err != nil || len(list) != len(ids) {
				t.Errorf("%d decisions are listed, want %d, %v", len(list), len(ids), err)
			}
			counts, err := db.CountDecisions(t.Context(), day, store.ByAction)
			if err != nil || len(counts) == 0 || counts[0].Total != int64(len(ids)) {
				t.Errorf("counted %v, want %d in all, %v", counts, len(ids), err)
			}
			events, err := db.QueryEvents(t.Context(), store.EventQuery{Caller: "forged", Limit: 10})
			if err != nil || len(events) != 0 {
				t.Errorf("listed %v, %v", events, err)
			}
			var forged uuid.UUID
			if err := conn.QueryRow(t.Context(), "select decision_id from decisions where caller = 'forged' union all select event_id from events where caller = 'forged'").Scan(&forged); err != nil {
				t.Fatal(err)
			}
			if _, err := db.GetDecision(t.Context(), forged); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("given out: %v", err)
			}
		})
	}
	if _, err := decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{}); err != nil {
		t.Errorf("after all changes were undone: %v", err)
	}
}

// Since is compared with the times in headers, not with those in columns.
func TestVerifySinceTrustsHeaders(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, _ := signed(t)
	servertest.DecideSome(t, s, 6)
	servertest.Covered(t, s, verifier)
	s.Stop()
	servertest.Tamper(t, s.URL, `update audit_batches set day = day - 1, first_at = first_at - interval '1 day', last_at = last_at - interval '1 day'`)
	done, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, s.URL), decisionlog.Verification{Since: time.Now().Add(-time.Hour)})
	if err == nil || !strings.Contains(err.Error(), "column last_at is not what its header says") || done.Decisions == 0 {
		t.Errorf("%+v, %v", done, err)
	}
}

// The verification notices that all checkpoints of a signed log are missing.
func TestVerifyMissesCheckpoints(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, _ := signed(t)
	servertest.DecideSome(t, s, 2)
	servertest.Covered(t, s, verifier)
	s.Stop()
	servertest.Tamper(t, s.URL, "delete from checkpoints")
	for _, keys := range [][]note.Verifier{nil, {verifier}} {
		_, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, s.URL), decisionlog.Verification{Keys: keys})
		if err == nil || !strings.Contains(err.Error(), "the database has no checkpoint") {
			t.Errorf("got %v", err)
		}
	}
}

// The verification goes on after a fault, and lists all faults.
func TestVerifyGoesOn(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, _ := signed(t)
	servertest.DecideSome(t, s, 12)
	_, kept := servertest.Covered(t, s, verifier)
	s.Stop()
	whole, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, s.URL), decisionlog.Verification{})
	if err != nil {
		t.Fatal(err)
	}
	// The login of a server can append a batch with an invalid header.
	conn := servertest.Session(t, s.URL)
	servertest.MustExec(t, conn, "set role cedarpost_writer")
	servertest.MustExec(t, conn, "select log_append(gen_random_uuid(), gen_random_uuid(), 0, 100000, 'junk', current_date, now(), now())")
	servertest.MustExec(t, conn, "reset role")
	servertest.Tamper(t, s.URL, "update decisions set caller = 'nobody' where decision_id in (select decision_id from decisions order by batch, pos limit 2)")
	servertest.Tamper(t, s.URL, "delete from audit_batches where seq = 2")
	done, err := decisionlog.VerifyLog(context.Background(), servertest.OpenAuditor(t, s.URL),
		decisionlog.Verification{Keys: []note.Verifier{verifier}, Against: [][][]byte{{[]byte(kept)}}})
	var bad *decisionlog.BadLogError
	if !errors.As(err, &bad) {
		t.Fatalf("got %v", err)
	}
	text := bad.Error()
	for _, want := range []string{"column caller", "batch 2: is missing", "its header cannot be read"} {
		if !strings.Contains(text, want) {
			t.Errorf("not listed: %q", want)
		}
	}
	if done.Batches < whole.Batches-3 || done.Checkpoints < whole.Checkpoints {
		t.Errorf("verified %+v, and of the whole log %+v", done, whole)
	}
	t.Log(text)
}

// The login of a server can append headers with false times, which no row can have or which
// are in the future. The verification concludes nothing from them.
func TestVerifyBelievesNoMadeUpTimes(t *testing.T) {
	t.Parallel() // it takes long
	s, _, _ := signed(t)
	servertest.DecideSome(t, s, 3)
	s.Stop()
	today := time.Now().UTC().Truncate(day)
	root := auditlog.Root(nil)
	header := func(made, first time.Time, rows int) auditlog.Header {
		return auditlog.Header{Batch: uuid.New(), Writer: uuid.New(), Server: "forged", Mode: auditlog.Strict, Made: made, Rows: rows, Root: root, First: first, Last: first}
	}
	add := func(t *testing.T, url string, h auditlog.Header, events ...store.Event) {
		t.Helper()
		conn := servertest.Session(t, url)
		for i, e := range events {
			servertest.MustExec(t, conn, fmt.Sprintf(`insert into events (event_id, at, kind, caller, server, subject, record, batch, pos, crc)
				values ('%s', '%s', '%s', '', '', '%s', '\x%x', '%s', %d, %d)`, e.ID, idTime(e.ID).Format(time.RFC3339Nano), e.Kind, e.Subject, e.Record, h.Batch, i, store.Checksum(e.Record)))
			h.Root, h.First, h.Last = auditlog.Hash(e.Record), idTime(e.ID), idTime(e.ID)
		}
		at := "null, null"
		if h.Rows > 0 {
			at = fmt.Sprintf("greatest(timestamptz '%[1]s', '2000-01-01'), greatest(timestamptz '%[1]s', '2000-01-01')", h.First.UTC().Format("2006-01-02 15:04:05.000+00"))
		}
		servertest.MustExec(t, conn, fmt.Sprintf("select log_append('%s', '%s', 0, %d, '\\x%x', current_date, %s)", h.Batch, h.Writer, h.Rows, h.Bytes(), at))
	}
	for name, c := range map[string]struct {
		do   func(t *testing.T, url string)
		want string
	}{
		"a batch of the zero time": {func(t *testing.T, url string) {
			add(t, url, header(time.Now(), time.Time{}, 1000))
		}, "times that its rows cannot have"},
		"a record of a drop that is made in the future": {func(t *testing.T, url string) {
			add(t, url, header(time.Now().AddDate(1, 0, 0), time.Time{}, 1), recordedDrop(t, &cedarpostv1.RetentionDrop{Day: today.Format(time.DateOnly)}))
			servertest.Tamper(t, url, "delete from decisions")
			conn := servertest.Session(t, url)
			servertest.MustExec(t, conn, fmt.Sprintf("drop table decisions_%[1]s; alter table events_%[1]s rename to events_x", today.Format("20060102")))
		}, "are missing, and no record in the log"},
	} {
		t.Run(name, func(t *testing.T) {
			url := copyDatabase(t, s.URL)
			c.do(t, url)
			_, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, url), decisionlog.Verification{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			t.Log(err)
		})
	}
	// The database refuses batches that are impossible, because nobody could remove them.
	conn := servertest.Session(t, s.URL)
	for _, values := range []string{
		"0, 0, 'x', 'infinity', null, null", "0, 1, 'x', current_date, '-infinity', 'infinity'", "0, 1, 'x', current_date, now(), 'infinity'",
		"0, -1, 'x', current_date, now(), now()", "-1, 1, 'x', current_date, now(), now()", "0, 2147483647, 'x', current_date, now(), now()",
		"0, 1, 'x', '5874897-12-31', now(), now()", "0, 1, 'x', current_date, null, null", "0, 0, 'x', current_date, now(), now()",
		"0, 0, convert_to(repeat('x', 70000), 'UTF8'), current_date, null, null", "null, 0, 'x', current_date, null, null", "0, 0, null, current_date, null, null",
	} {
		if _, err := conn.Exec(t.Context(), "select log_append(gen_random_uuid(), gen_random_uuid(), "+values+")"); err == nil {
			t.Errorf("a batch of %s is accepted", values)
		}
	}
	// Days do not depend on how the session writes dates.
	servertest.MustExec(t, conn, "set datestyle = 'German, YMD'; set role cedarpost_app")
	if _, err := conn.Exec(t.Context(), "select create_log_partitions('0005-12-26', 1)"); err == nil {
		t.Error("a partition of the year 5 is made")
	}
	servertest.MustExec(t, conn, fmt.Sprintf("select create_log_partitions(date '%s', 1)", today.AddDate(0, 0, 60).Format("2006-01-02")))
	var bounds string
	servertest.MustExec(t, conn, "reset datestyle; reset role; set timezone = 'UTC'")
	if err := conn.QueryRow(t.Context(), "select pg_get_expr(relpartbound, oid) from pg_class where relname = 'decisions_"+today.AddDate(0, 0, 60).Format("20060102")+"'").Scan(&bounds); err != nil ||
		!strings.Contains(bounds, "FROM ('"+today.AddDate(0, 0, 60).Format(time.DateOnly)+" 00:00:00+00')") {
		t.Errorf("%s, %v", bounds, err)
	}
	// The least retention of history holds for an interval whose parts have different signs.
	servertest.MustExec(t, conn, "set role cedarpost_app")
	if _, err := conn.Exec(t.Context(), "select raise_oldest('-1200 mon 36002 days')"); err == nil {
		t.Error("history is given up that is younger than 48 hours")
	}
}

// No record is valid both as a decision and as an event.
func TestVerifyTellsDecisionsFromEvents(t *testing.T) {
	s, _, _ := signed(t)
	servertest.DecideSome(t, s, 6)
	s.Stop()
	rows, err := servertest.Session(t, s.URL).Query(t.Context(), "select record from decisions union all select record from events")
	if err != nil {
		t.Fatal(err)
	}
	records, err := pgx.CollectRows(rows, pgx.RowTo[[]byte])
	if err != nil || len(records) < 8 {
		t.Fatalf("%d records, %v", len(records), err)
	}
	for _, record := range records {
		if decision, event := decisionlog.IsDecision(record) == nil, decisionlog.IsEvent(record) == nil; decision == event {
			t.Errorf("%x: a decision: %v, an event: %v", record, decision, event)
		}
	}
}

// idTime returns the time in an id.
func idTime(id uuid.UUID) time.Time {
	return time.Unix(id.Time().UnixTime()).UTC().Truncate(time.Millisecond)
}
