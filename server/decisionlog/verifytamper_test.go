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
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// unproven are the columns of the log that no proof covers, with the reason.
var unproven = map[string]string{
	"checkpoints.at": "when the database stored the checkpoint; nothing is decided by it",
}

// tampered is an expression of another value for a column of a type.
func tampered(t *testing.T, column, typ string) string {
	t.Helper()
	if column == "seq" {
		return "(select max(seq) + 1 from audit_batches)" // it is unique
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

// Whatever column of the log is changed, in whatever row, is found: all columns that
// there are, but for those listed above.
func TestVerifyFindsEachColumn(t *testing.T) {
	t.Parallel() // it takes long
	s, verifier, _ := signed(t)
	servertest.DecideSome(t, s, 6)
	servertest.Covered(t, s, verifier)
	s.Stop()
	rows, err := servertest.Session(t, s.URL).Query(t.Context(), `
		select table_name, column_name, data_type || case when data_type = 'ARRAY' then udt_name else '' end
		from information_schema.columns
		where table_schema = current_schema() and table_name in ('decisions', 'events', 'audit_batches', 'audit_nodes', 'checkpoints')
		order by table_name, ordinal_position`)
	if err != nil {
		t.Fatal(err)
	}
	type column struct{ Table, Name, Type string }
	columns, err := pgx.CollectRows(rows, pgx.RowToStructByPos[column])
	if err != nil || len(columns) < 50 {
		t.Fatalf("%d columns, %v", len(columns), err)
	}
	db := servertest.OpenAuditor(t, s.URL)
	for _, c := range columns {
		name := c.Table + "." + c.Name
		if unproven[name] != "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			value := tampered(t, c.Name, c.Type)
			// Of the rows in the middle, one for which the column is not empty, if there is one.
			undo := change(t, s.URL, partitionOf(t, s.URL, c.Table), c.Name, value, fmt.Sprintf(
				"select ctid from %[1]s order by %[2]s is null, ctid offset (select count(*) / 2 from %[1]s where %[2]s is not null) limit 1",
				partitionOf(t, s.URL, c.Table), c.Name))
			defer undo()
			_, err := decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{Keys: []note.Verifier{verifier}})
			var bad *decisionlog.BadLogError
			if !errors.As(err, &bad) {
				t.Errorf("%s = %s passes: %v", name, value, err)
			}
			t.Log(err)
		})
	}
	if _, err := decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{Keys: []note.Verifier{verifier}}); err != nil {
		t.Errorf("all taken back: %v", err)
	}
}

// partitionOf is the partition of today, or the table itself.
func partitionOf(t *testing.T, url, table string) string {
	t.Helper()
	if table != "decisions" && table != "events" {
		return table
	}
	var name string
	err := servertest.Session(t, url).QueryRow(t.Context(), "select tableoid::regclass::text from "+table+" limit 1").Scan(&name)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// Rows that belong to no batch, or not to theirs, are found, and readers do not show
// them. Whoever has the login of a server can put them there.
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
			url := copyDatabase(t, s.URL)
			conn := servertest.Session(t, url)
			servertest.MustExec(t, conn, c.sql)
			db := servertest.OpenAuditor(t, url)
			_, err := decisionlog.VerifyLog(t.Context(), db, decisionlog.Verification{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			// A row that takes the place of another one is in the batch, as far as a reader can
			// tell without its proof.
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
}

// recordedDecision is a decision of a time whose columns are what its record says.
func recordedDecision(t *testing.T, at time.Time) store.Decision {
	t.Helper()
	d := servertest.DecisionAt(at)
	uid := &cedarpostv1.EntityUid{Type: "T", Id: "x"}
	record, err := proto.Marshal(&cedarpostv1.DecisionRecord{
		DecisionId: d.ID.String(), Time: timestamppb.New(at.Truncate(time.Millisecond)), Principal: uid, Action: uid, Resource: uid,
		Decision: cedarpostv1.Decision_ALLOW,
	})
	if err != nil {
		t.Fatal(err)
	}
	d.Record = record
	return d
}

// recordedDrop is the event that a day is dropped.
func recordedDrop(t *testing.T, drop *cedarpostv1.RetentionDrop) store.Event {
	t.Helper()
	id := uuid.Must(uuid.NewV7())
	at := time.Unix(id.Time().UnixTime()).UTC().Truncate(time.Millisecond)
	record, err := proto.Marshal(&cedarpostv1.EventRecord{
		EventId: id.String(), Time: timestamppb.New(at), Kind: cedarpostv1.EventRecord_RETENTION_DROP, Subject: drop.Day,
		Detail: &cedarpostv1.EventRecord_RetentionDrop{RetentionDrop: drop},
	})
	if err != nil {
		t.Fatal(err)
	}
	return store.Event{ID: id, Kind: "retention_drop", Subject: drop.Day, Record: record}
}

// Rows may be missing only where the log proves that their whole day was dropped, when
// it was old enough.
func TestVerifyBelievesProvenDropsOnly(t *testing.T) {
	t.Parallel() // it takes long
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	w := db.NewLogWriter("s", auditlog.Strict, 0)
	defer w.Close()
	noon := time.Now().UTC().Truncate(day).Add(day / 2)
	ago := func(days int) time.Time { return noon.AddDate(0, 0, -days) }
	date := func(days int) string { return ago(days).Format(time.DateOnly) }
	conn := servertest.Session(t, url)
	for _, days := range []int{60, 50, 20, 10} {
		servertest.MustExec(t, conn, fmt.Sprintf("select create_log_partitions('%s', 1)", date(days)))
		for i := range 2 {
			if _, err := w.Append(t.Context(), []store.Decision{recordedDecision(t, ago(days).Add(time.Duration(i)*time.Second)), recordedDecision(t, ago(days).Add(time.Minute))}, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, days := range []int{60, 50} {
		if _, err := w.Append(t.Context(), nil, []store.Event{recordedDrop(t, &cedarpostv1.RetentionDrop{Day: date(days), Decisions: 4})}); err != nil {
			t.Fatal(err)
		}
	}
	// A record that a young day is dropped is in the tree like any other: whoever has the
	// login of a server can append it.
	if _, err := w.Append(t.Context(), nil, []store.Event{recordedDrop(t, &cedarpostv1.RetentionDrop{Day: date(20), Decisions: 4})}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	db.Close()

	drop := func(days int) string {
		return fmt.Sprintf("drop table decisions_%s; drop table events_%[1]s;", ago(days).Format("20060102"))
	}
	junk := func(days int) string {
		return fmt.Sprintf(`insert into events (event_id, at, kind, caller, server, subject, record, batch, pos, crc)
			values (gen_random_uuid(), now(), 'retention_drop', '', '', '%s', '', gen_random_uuid(), 0, 0);`, date(days))
	}
	rowsOf := func(days int) string {
		return "delete from decisions_" + ago(days).Format("20060102") + " where batch = (select batch from audit_batches where day = '" + date(days) + "' order by seq limit 1);"
	}
	for name, c := range map[string]struct {
		sql, want string
		keep      time.Duration
	}{
		"nothing is missing":                   {sql: ""},
		"a dropped day":                        {sql: drop(60)},
		"two dropped days":                     {sql: drop(60) + drop(50)},
		"a day, and a later one stays":         {sql: drop(60) + "select 1"},
		"a day, and nothing says so":           {sql: drop(60) + drop(50) + drop(10), want: "all 4 rows of 2 batches of " + date(10) + " are missing"},
		"a day, and a row of no batch says so": {sql: drop(10) + junk(10), want: "all 4 rows of 2 batches of " + date(10) + " are missing"},
		"a young day, and a record says so":    {sql: drop(20), want: "all 4 rows of 2 batches of " + date(20) + " are missing"},
		"a day that is kept longer":            {sql: drop(60), want: "all 4 rows of 2 batches of " + date(60) + " are missing", keep: 90 * day},
		"rows of a day, which is still there":  {sql: rowsOf(60), want: "all 2 rows are missing, and their day was not dropped"},
		"rows, and a row of no batch says so":  {sql: rowsOf(10) + junk(10), want: "all 2 rows are missing, and their day was not dropped"},
		"rows, and their day is said to be another": {sql: drop(60) + rowsOf(10) +
			"update audit_batches set day = '" + date(60) + "' where seq = 6", want: "column day"},
		"one row of a day that is still there": {sql: "delete from decisions_" + ago(60).Format("20060102") + " where pos = 1", want: "row 1: is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			url := copyDatabase(t, url)
			conn := servertest.Session(t, url)
			servertest.MustExec(t, conn, "set session_replication_role = replica")
			servertest.MustExec(t, conn, c.sql)
			done, err := decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, url), decisionlog.Verification{MinRetention: c.keep})
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			case c.want == "" && strings.Contains(c.sql, "drop table") && done.Dropped == 0:
				t.Errorf("%+v", done)
			}
			t.Log(err)
		})
	}
}

// The oldest batches may be missing in whole tiles, where the log proves that the days
// of their rows were dropped.
func TestVerifyWithoutOldestBatches(t *testing.T) {
	t.Parallel() // it takes long
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	w := db.NewLogWriter("s", auditlog.Strict, 0)
	defer w.Close()
	for range 600 {
		if _, err := w.Append(t.Context(), nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	today := time.Now().UTC()
	drops := func(day time.Time, firstLeaf int64) store.Event {
		return recordedDrop(t, &cedarpostv1.RetentionDrop{Day: day.Format(time.DateOnly), FirstLeaf: firstLeaf})
	}
	keep := time.Nanosecond // yesterday may be dropped
	for name, c := range map[string]struct {
		events  []store.Event
		missing int
		ok      bool
	}{
		"a tile":                              {[]store.Event{drops(today.AddDate(0, 0, -1), 0)}, 256, true},
		"a tile, and more is said":            {[]store.Event{drops(today.AddDate(0, 0, -1), 512)}, 256, true},
		"all tiles that may be missing":       {[]store.Event{drops(today.AddDate(0, 0, -1), 512)}, 512, true},
		"more than is said":                   {[]store.Event{drops(today.AddDate(0, 0, -1), 300)}, 512, false},
		"more than one of the records says":   {[]store.Event{drops(today.AddDate(0, 0, -1), 300), drops(today.AddDate(0, 0, -1), 600)}, 512, false},
		"more than one says, another nothing": {[]store.Event{drops(today.AddDate(0, 0, -1), 300), drops(today.AddDate(0, 0, -1), 0)}, 512, false},
		"not a whole tile":                    {[]store.Event{drops(today.AddDate(0, 0, -1), 512)}, 300, false},
		"and nothing says so":                 {nil, 256, false},
		"and a young day is said to be":       {[]store.Event{drops(today, 512)}, 256, false},
		"of a day after the dropped one":      {[]store.Event{drops(today.AddDate(0, 0, -4), 512)}, 256, false},
	} {
		t.Run(name, func(t *testing.T) {
			url := copyDatabase(t, url)
			db, err := store.Open(t.Context(), store.Config{DatabaseURL: url})
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			w := db.NewLogWriter("s2", auditlog.Strict, 0)
			defer w.Close()
			for _, e := range c.events {
				if _, err := w.Append(t.Context(), nil, []store.Event{e}); err != nil {
					t.Fatal(err)
				}
			}
			saveTree(t, db, 600)
			servertest.Tamper(t, url, fmt.Sprintf("delete from audit_batches where seq < %d", c.missing))
			_, err = decisionlog.VerifyLog(t.Context(), servertest.OpenAuditor(t, url), decisionlog.Verification{MinRetention: keep})
			if (err == nil) != c.ok {
				t.Error(err)
			}
			t.Log(err)
		})
	}
}

// saveTree stores the tree of the first batches, with a checkpoint.
func saveTree(t *testing.T, db *store.DB, size int) {
	t.Helper()
	batches, err := db.Batches(t.Context(), 0, size)
	if err != nil {
		t.Fatal(err)
	}
	root, tiles, err := decisionlog.Grow(0, batches, db.Tiles(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	keyFile, _ := servertest.LogKey(t, "test.example/log")
	key, err := auditlog.ReadKey(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := auditlog.Checkpoint{Origin: key.Name(), Size: int64(size), Root: root}.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.SaveTree(t.Context(), tiles, store.Checkpoint{Origin: key.Name(), Size: int64(size), Note: signed}); err != nil {
		t.Fatal(err)
	}
}

// Since begins where the headers say, whatever the columns say.
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

// A log that was signed has checkpoints.
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

// Verification goes on after a fault, and lists all.
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
	// What the login of a server can append: a header that is none, and a record that is none.
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

// What the login of a server can append about itself proves nothing: times in headers that
// no row can have, or that have not come yet.
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
	// And what no batch can be is refused, for nobody could take it away again.
	conn := servertest.Session(t, s.URL)
	for _, values := range []string{
		"0, 0, 'x', 'infinity', null, null", "0, 1, 'x', current_date, '-infinity', 'infinity'", "0, 1, 'x', current_date, now(), 'infinity'",
		"0, -1, 'x', current_date, now(), now()", "-1, 1, 'x', current_date, now(), now()", "0, 2147483647, 'x', current_date, now(), now()",
		"0, 1, 'x', '5874897-12-31', now(), now()", "0, 1, 'x', current_date, null, null", "0, 0, 'x', current_date, now(), now()",
		"0, 0, convert_to(repeat('x', 70000), 'UTF8'), current_date, null, null", "null, 0, 'x', current_date, null, null", "0, 0, null, current_date, null, null",
	} {
		if _, err := conn.Exec(t.Context(), "select log_append(gen_random_uuid(), gen_random_uuid(), "+values+")"); err == nil {
			t.Errorf("a batch of %s is taken", values)
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
	// Nor does the time that history is kept for depend on the signs inside of an interval.
	servertest.MustExec(t, conn, "set role cedarpost_app")
	if _, err := conn.Exec(t.Context(), "select raise_oldest('-1200 mon 36002 days')"); err == nil {
		t.Error("history is given up that is younger than 48 hours")
	}
}

// A decision cannot be passed off as an event, nor an event as a decision.
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

// idTime is the time inside of an id.
func idTime(id uuid.UUID) time.Time {
	return time.Unix(id.Time().UnixTime()).UTC().Truncate(time.Millisecond)
}
