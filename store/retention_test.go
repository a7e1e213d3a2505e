package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

const day = 24 * time.Hour

// ago returns noon (UTC) of the day that is so many days ago.
func ago(days int) time.Time {
	return time.Now().UTC().Truncate(day).AddDate(0, 0, -days).Add(12 * time.Hour)
}

// oldLog makes the partitions of days that are so many days ago, each with two decisions
// and an event. It also records the state root of today, without which no day is dropped.
func oldLog(t *testing.T, db *store.DB, url string, days ...int) *store.LogWriter {
	t.Helper()
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	for _, n := range days {
		mustRaw(t, url, "select create_log_partitions($1::date, 1)", ago(n))
		_, err := w.Append(t.Context(), []store.Decision{decision(ago(n), 1), decision(ago(n), 2)}, []store.Event{logEvent(ago(n), "change", "x")})
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Append(t.Context(), nil, []store.Event{logEvent(time.Now(), "state_root", "")}); err != nil {
		t.Fatal(err)
	}
	return w
}

func logEvent(at time.Time, kind, subject string) store.Event {
	return store.Event{ID: idAt(at, byte(at.Nanosecond())), Kind: kind, Server: "s1", Subject: subject, Record: []byte(subject)}
}

// record makes the record of a drop like a server.
func record(w *store.LogWriter) func(context.Context, store.LogDay) error {
	return func(ctx context.Context, d store.LogDay) error {
		_, err := w.Append(ctx, nil, []store.Event{logEvent(time.Now(), "retention_drop", d.Day.Format(time.DateOnly))})
		return err
	}
}

// daysOf lists the past days of the log, each as the number of days since.
func daysOf(t *testing.T, url string) (list []int) {
	t.Helper()
	rows, _ := connect(t, url).Query(t.Context(), `
		select (now() at time zone 'UTC')::date - to_date(right(relname, 8), 'YYYYMMDD') as ago
		from pg_inherits join pg_class on pg_class.oid = inhrelid
		where inhparent in ('decisions'::regclass, 'events'::regclass)
		group by ago having count(*) = 2
		order by ago desc`)
	list, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(list, func(n int) bool { return n <= 1 })
}

func TestDropLogDays(t *testing.T) {
	db, url := openURL(t)
	w := oldLog(t, db, url, 41, 42, 43, 100)
	mustRaw(t, url, "drop table events_"+ago(100).Format("20060102")) // a day from before events existed
	if keep, err := db.MinRetention(t.Context()); err != nil || keep != 30*day {
		t.Errorf("%v, %v", keep, err)
	}
	var recorded []string
	note := func(ctx context.Context, d store.LogDay) error {
		recorded = append(recorded, fmt.Sprint(d.Day.Format(time.DateOnly), d.Decisions, d.Events))
		return record(w)(ctx, d)
	}
	// The last decision of the day that is 41 days ago may be little more than 40 days
	// old.
	dropped, err := db.DropLogDays(t.Context(), 41*day, note)
	want := []string{fmt.Sprint(ago(100).Format(time.DateOnly), 2, 0), fmt.Sprint(ago(43).Format(time.DateOnly), 2, 1), fmt.Sprint(ago(42).Format(time.DateOnly), 2, 1)}
	if err != nil || len(dropped) != 3 || !slices.Equal(recorded, want) {
		t.Fatalf("dropped %v, recorded %q, want %q, %v", dropped, recorded, want, err)
	}
	if got := daysOf(t, url); !slices.Equal(got, []int{41}) {
		t.Errorf("left is the log of %v days ago", got)
	}
	// All leaves of the tree are still stored.
	mustRaw(t, url, `do $$ begin
		assert (select count(*) = 2 from decisions);
		assert (select count(*) = 1 + 1 + 3 from events);
		assert (select count(*) = 4 + 1 + 3 from audit_batches);
	end $$`)

	recorded = nil
	if dropped, err := db.DropLogDays(t.Context(), 41*day, note); err != nil || len(dropped)+len(recorded) != 0 {
		t.Errorf("again: %v, %q, %v", dropped, recorded, err)
	}
	// The database refuses to drop a day this young. No record is made for it.
	oldLog(t, db, url, 29)
	if dropped, err := db.DropLogDays(t.Context(), 10*day, note); state(err) != "23001" || len(dropped) != 1 {
		t.Errorf("got %v, %v", dropped, err)
	}
	if got := daysOf(t, url); !slices.Equal(got, []int{29}) || len(recorded) != 1 {
		t.Errorf("left is the log of %v days ago, recorded %q", got, recorded)
	}
	mustRaw(t, url, "update log_retention set days = 20")
	if dropped, err := db.DropLogDays(t.Context(), 10*day, note); err != nil || len(dropped) != 1 || len(daysOf(t, url)) != 0 {
		t.Errorf("got %v, %v", dropped, err)
	}
}

// A day is dropped only if the log has a record of its drop.
func TestDropNeedsItsRecord(t *testing.T) {
	db, url := openURL(t)
	w := oldLog(t, db, url, 50, 51)
	date := func(n int) string { return ago(n).Format(time.DateOnly) }
	conn := connect(t, storetest.Login(t, url, serving...))
	drop := func(says, want string) {
		t.Helper()
		err := actAs(t, conn, "cedarpost_app", "select drop_log_day('"+date(51)+"')")
		if got := state(err); got != want {
			t.Errorf("%s: %q, want %q", says, got, want)
		}
	}
	const notYet = "55000" // object_not_in_prerequisite_state
	drop("nothing is recorded", notYet)
	for kind, subject := range map[string]string{"change": date(51), "retention_drop": date(50)} {
		if _, err := w.Append(t.Context(), nil, []store.Event{logEvent(time.Now(), kind, subject)}); err != nil {
			t.Fatal(err)
		}
	}
	drop("another thing is recorded", notYet)
	const insert = `insert into events (event_id, at, kind, caller, server, subject, record, batch, pos, crc)
		values (gen_random_uuid(), now(), 'retention_drop', '', '', '%s', '', '%s', 0, 0)`
	const batch = "00000000-0000-0000-0000-00000000000a"
	mustRaw(t, url, fmt.Sprintf(insert, date(51), batch))
	drop("the record is in no batch", notYet)
	seal := fmt.Sprintf("select log_append('%s', gen_random_uuid(), 0, 1, 'header', current_date, now(), now())", batch)
	other := strings.ReplaceAll(seal, batch, "00000000-0000-0000-0000-00000000000b")
	insertOther := fmt.Sprintf(insert, date(51), "00000000-0000-0000-0000-00000000000b")
	for says, sql := range map[string]string{
		"the record is of the same transaction":    insertOther + "; " + other,
		"the record is of the same subtransaction": "savepoint s; " + insertOther + "; " + other + "; release s",
		"its batch is of the same transaction":     seal,
	} {
		if got := state(actAs(t, conn, "cedarpost_app", sql+"; select drop_log_day('"+date(51)+"')")); got != notYet {
			t.Errorf("%s: %q", says, got)
		}
	}
	mustRaw(t, url, seal)
	drop("the record is there", "")
	for _, null := range []string{"null", "'infinity'", "'-infinity'"} {
		if err := actAs(t, conn, "cedarpost_app", "select drop_log_day("+null+")"); err == nil {
			t.Errorf("drops %s", null)
		}
	}
	// If a server made the record before it stopped, it is not made again.
	never := func(context.Context, store.LogDay) error { return errors.New("recorded twice") }
	if dropped, err := db.DropLogDays(t.Context(), 49*day, never); err != nil || len(dropped) != 2 {
		t.Errorf("got %v, %v", dropped, err)
	}
}

// Days are dropped oldest first, and only if the log has a state root of a later day.
func TestDropOldestFirst(t *testing.T) {
	db, url := openURL(t)
	w := oldLog(t, db, url, 50, 51)
	conn := connect(t, storetest.Login(t, url, serving...))
	for _, n := range []int{50, 51} {
		if err := record(w)(t.Context(), store.LogDay{Day: ago(n)}); err != nil {
			t.Fatal(err)
		}
	}
	drop := func(days int) error {
		return actAs(t, conn, "cedarpost_app", "select drop_log_day('"+ago(days).Format(time.DateOnly)+"')")
	}
	if err := drop(50); state(err) != "23001" || !strings.Contains(err.Error(), "only after that of "+ago(51).Format(time.DateOnly)) {
		t.Errorf("the younger one: %v", err)
	}
	root := "delete from events where kind = 'state_root'"
	mustRaw(t, url, "set session_replication_role = replica; "+root)
	if err := drop(51); state(err) != "23001" || !strings.Contains(err.Error(), "no root of the stored data") {
		t.Errorf("without a root: %v", err)
	}
	// A state root without a batch does not count, nor does one of the same day.
	mustRaw(t, url, `insert into events (event_id, at, kind, caller, server, subject, record, batch, pos, crc)
		values (gen_random_uuid(), now(), 'state_root', '', '', '', '', gen_random_uuid(), 0, 0)`)
	if _, err := w.Append(t.Context(), nil, []store.Event{logEvent(ago(51), "state_root", "")}); err != nil {
		t.Fatal(err)
	}
	if err := drop(51); state(err) != "23001" {
		t.Errorf("without a root: %v", err)
	}
	if _, err := w.Append(t.Context(), nil, []store.Event{logEvent(ago(50), "state_root", "")}); err != nil {
		t.Fatal(err)
	}
	if err := drop(51); err != nil {
		t.Error(err)
	}
}

// If the record cannot be committed, nothing is dropped.
func TestNoDropWithoutRecord(t *testing.T) {
	db, url := openURL(t)
	oldLog(t, db, url, 50)
	full := errors.New("full")
	dropped, err := db.DropLogDays(t.Context(), 40*day, func(context.Context, store.LogDay) error { return full })
	if !errors.Is(err, full) || len(dropped) != 0 {
		t.Errorf("got %v, %v", dropped, err)
	}
	// The same if the server only claims that it was committed.
	dropped, err = db.DropLogDays(t.Context(), 40*day, func(context.Context, store.LogDay) error { return nil })
	if state(err) != "55000" || len(dropped) != 0 {
		t.Errorf("got %v, %v", dropped, err)
	}
	if got := daysOf(t, url); !slices.Equal(got, []int{50}) {
		t.Errorf("left is the log of %v days ago", got)
	}
}

// One process drops days at a time.
func TestOneDropsAtATime(t *testing.T) {
	db, url := openURL(t)
	w := oldLog(t, db, url, 50)
	inside, goOn := make(chan bool), make(chan bool)
	var group sync.WaitGroup
	group.Go(func() {
		dropped, err := db.DropLogDays(t.Context(), 40*day, func(ctx context.Context, d store.LogDay) error {
			inside <- true
			<-goOn
			return record(w)(ctx, d)
		})
		if err != nil || len(dropped) != 1 {
			t.Errorf("got %v, %v", dropped, err)
		}
	})
	<-inside
	if dropped, err := db.DropLogDays(t.Context(), 40*day, record(w)); err != nil || len(dropped) != 0 {
		t.Errorf("the other one: %v, %v", dropped, err)
	}
	close(goOn)
	group.Wait()
}

// Writers go on while days are dropped, and lose nothing.
func TestWritersRaceADrop(t *testing.T) {
	db, url := openURL(t)
	days := []int{50, 51, 52, 53, 54, 55, 56, 57, 58, 59}
	w := oldLog(t, db, url, days...)
	var (
		group sync.WaitGroup
		stop  = make(chan bool)
		mu    sync.Mutex
		took  []time.Duration
	)
	for n := range 4 {
		writer := db.NewLogWriter(fmt.Sprint("s", n), auditlog.Strict, 0)
		t.Cleanup(writer.Close)
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				began := time.Now()
				_, err := writer.Append(t.Context(), []store.Decision{decision(began, 0)}, nil)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				took = append(took, time.Since(began))
				mu.Unlock()
			}
		})
	}
	var before []time.Duration
	for len(before) < 20 && !t.Failed() {
		time.Sleep(time.Millisecond)
		mu.Lock()
		before = slices.Clone(took)
		mu.Unlock()
	}
	began := time.Now()
	dropped, err := db.DropLogDays(t.Context(), 40*day, record(w))
	if err != nil || len(dropped) != len(days) {
		t.Errorf("got %v, %v", dropped, err)
	}
	t.Logf("%d days in %v", len(dropped), time.Since(began))
	close(stop)
	group.Wait()
	t.Logf("the longest append took %v, before %v", slices.Max(took), slices.Max(before))
	mustRaw(t, url, fmt.Sprintf("do $$ begin assert (select count(*) = %d from decisions); end $$", len(took)))
}

// A long read of the log delays a drop. The drop does not delay writers: it stops waiting
// for its lock, and tries again later.
func TestReaderHoldsADropUp(t *testing.T) {
	db, url := openURL(t)
	w := oldLog(t, db, url, 50)
	release := hold(t, url, "select count(*) from decisions")
	done := make(chan error, 1)
	go func() {
		for {
			_, err := db.DropLogDays(t.Context(), 40*day, record(w))
			if state(err) != "55P03" { // lock_not_available: it gave up after several tries
				done <- err
				return
			}
		}
	}()
	writer := db.NewLogWriter("s2", auditlog.Strict, 0)
	t.Cleanup(writer.Close)
	var (
		writing  sync.WaitGroup
		stop     atomic.Bool
		appended atomic.Int64
	)
	writing.Go(func() {
		for n := byte(3); !stop.Load(); n++ {
			if _, err := writer.Append(t.Context(), []store.Decision{decision(time.Now(), n)}, nil); err != nil {
				t.Error(err)
				return
			}
			appended.Add(1)
		}
	})
	waitForLocks(t, url, 2) // the drop waits for the reader, and the writer for the drop
	before := appended.Load()
	within(t, "the writer goes on, before the reader ends", func(ctx context.Context) error {
		for appended.Load() < before+2 && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		return ctx.Err()
	})
	stop.Store(true)
	writing.Wait()
	select {
	case err := <-done:
		t.Errorf("dropped under a reader: %v", err)
	default:
	}
	release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := daysOf(t, url); len(got) != 0 {
		t.Errorf("left is the log of %v days ago", got)
	}
}

// Batches are dropped as whole tiles whose hashes stay, and only if all their rows are
// dropped.
func TestDropLogBatches(t *testing.T) {
	url := storetest.New(t)
	conn := connect(t, url)
	before := func(days int) string { return "'" + ago(days).Format(time.DateOnly) + "'" }
	// Three tiles of dropped days, one of a day that is still there, and the newest.
	_, err := conn.Exec(t.Context(), `
		select log_append(gen_random_uuid(), '00000000-0000-0000-0000-000000000001', n, 1, convert_to('header ' || n, 'UTF8'),
			$1::date - case when n < 768 then 60 when n < 1024 then 50 else 0 end, now(), now())
		from generate_series(0, 1024) as n order by n`, ago(0))
	if err != nil {
		t.Fatal(err)
	}
	mustRaw(t, url, "select create_log_partitions("+before(50)+", 1)")
	tile := func(n int64) []byte {
		var hashes bytes.Buffer
		for leaf := n * 256; leaf < (n+1)*256; leaf++ {
			h := auditlog.Hash(fmt.Append(nil, "header ", leaf))
			hashes.Write(h[:])
		}
		return hashes.Bytes()
	}
	drop := func(says, day string, most, want int) {
		t.Helper()
		var got int
		err := conn.QueryRow(t.Context(), "select drop_log_batches("+day+", $1)", most).Scan(&got)
		if err != nil || got != want {
			t.Errorf("%s: %d, want %d, %v", says, got, want, err)
		}
	}
	store := func(n int64, hashes []byte) {
		t.Helper()
		mustRaw(t, url, `insert into audit_nodes (level, tile, hashes) values (0, $1, $2)
			on conflict (level, tile) do update set hashes = excluded.hashes`, n, hashes)
	}
	if _, err := conn.Exec(t.Context(), "select drop_log_batches("+before(29)+", 10000)"); state(err) != "23001" {
		t.Errorf("younger than the retention of the log: %v", err)
	}
	if _, err := conn.Exec(t.Context(), "select drop_log_batches(null, 10000)"); state(err) != "23001" {
		t.Errorf("no day: %v", err)
	}
	drop("no tile is stored", before(40), 10000, 0)
	store(0, tile(0)[:255*32])
	drop("the tile is partial", before(40), 10000, 0)
	store(0, tile(1))
	drop("the tile has other hashes", before(40), 10000, 0)
	for n := range int64(4) {
		store(n, tile(n))
	}
	drop("the day is younger", before(60), 10000, 0)
	if err := actAs(t, conn, "cedarpost_owner", "select drop_log_batches("+before(40)+", 1); delete from audit_batches"); state(err) != "23001" {
		t.Errorf("drop_log_batches leaves its setting on: %v", err)
	}
	drop("one tile at a time", before(40), 100, 256)
	drop("all but what has rows", before(40), 10000, 512)
	drop("nothing is left of that", before(40), 10000, 0)
	mustRaw(t, url, "drop table decisions_"+ago(50).Format("20060102"))
	drop("there may be events", before(40), 10000, 0)
	mustRaw(t, url, "drop table events_"+ago(50).Format("20060102"))
	mustRaw(t, url, "create table saved as select * from audit_batches where seq = 1024")
	_, err = conn.Exec(t.Context(), "alter table audit_batches disable trigger all; delete from audit_batches where seq = 1024; alter table audit_batches enable trigger all")
	if err != nil {
		t.Fatal(err)
	}
	drop("it is the newest", before(40), 10000, 0)
	mustRaw(t, url, "insert into audit_batches select * from saved")
	drop("all is gone but the newest", before(40), 10000, 256)
	mustRaw(t, url, "do $$ begin assert (select count(*) = 1 and min(seq) = 1024 from audit_batches); end $$")
}
