package decisionlog_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// recordedDecision returns a decision of a time, with a record that matches its columns.
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

// recordedDrop returns the event that a day was dropped.
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

// Rows may be missing only if the log proves that their whole day was dropped, and that it was
// old enough.
func TestVerifyBelievesProvenDropsOnly(t *testing.T) {
	t.Parallel() // it takes long
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url)})
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
	// The login of a server can append a false record that a young day was dropped.
	if _, err := w.Append(t.Context(), nil, []store.Event{recordedDrop(t, &cedarpostv1.RetentionDrop{Day: date(20), Decisions: 4})}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	x, auditor := startTampering(t, url, logTables...), servertest.OpenAuditor(t, url)

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
			x.undoAfter(t)
			t.Cleanup(func() { // before the rows are put back
				for _, days := range []int{60, 50, 20, 10} {
					if _, err := x.conn.Exec(context.Background(), fmt.Sprintf("select create_log_partitions('%s', 1)", date(days))); err != nil {
						t.Error(err)
					}
				}
			})
			servertest.MustExec(t, x.conn, c.sql)
			done, err := decisionlog.VerifyLog(t.Context(), auditor, decisionlog.Verification{MinRetention: c.keep})
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
	if _, err := decisionlog.VerifyLog(t.Context(), auditor, decisionlog.Verification{}); err != nil {
		t.Errorf("after all changes were undone: %v", err)
	}
}

// The oldest batches may be missing in whole tiles, if the log proves that the days of their
// rows were dropped.
func TestVerifyWithoutOldestBatches(t *testing.T) {
	t.Parallel() // it takes long
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url)})
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
	keep := time.Nanosecond // so that yesterday may be dropped
	x, auditor := startTampering(t, url, logTables...), servertest.OpenAuditor(t, url)
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
			w := db.NewLogWriter("s2", auditlog.Strict, 0)
			defer w.Close()
			for _, e := range c.events {
				if _, err := w.Append(t.Context(), nil, []store.Event{e}); err != nil {
					t.Fatal(err)
				}
			}
			saveTree(t, db, 600)
			x.do(t, fmt.Sprintf("delete from audit_batches where seq < %d", c.missing))
			_, err = decisionlog.VerifyLog(t.Context(), auditor, decisionlog.Verification{MinRetention: keep})
			if (err == nil) != c.ok {
				t.Error(err)
			}
			t.Log(err)
		})
	}
}

// saveTree stores the tree of the first batches, and a checkpoint of it.
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
