package store_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/migrations"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestEachUse(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	now := time.Now()
	ids := make([]uuid.UUID, 4)
	for i := range ids {
		ids[i] = idAt(now, byte(200+i))
	}
	reuse := func(n byte, after time.Duration, caller string, of ...uuid.UUID) store.Event {
		e := event(now.Add(after), n, "reuse", caller, fmt.Sprint("report ", n))
		e.Decisions = of
		return e
	}
	other := reuse(6, 0, "shop", ids[0])
	other.Kind = "change"
	if _, err := w.Append(t.Context(), nil, []store.Event{
		reuse(3, 2*time.Millisecond, "shop", ids[0]), reuse(1, 0, "shop", ids[0], ids[1]), reuse(2, time.Millisecond, "shop", ids[2]),
		reuse(4, 0, "crm", ids[0]), reuse(5, 0, "shop"), other,
	}); err != nil {
		t.Fatal(err)
	}
	tomorrow := reuse(7, 24*time.Hour, "shop", ids[1], ids[0])
	if _, err := w.Append(t.Context(), nil, []store.Event{tomorrow}); err != nil {
		t.Fatal(err)
	}
	day := 24 * time.Hour
	for name, c := range map[string]struct {
		of      []uuid.UUID
		callers []string
		from    time.Duration
		to      time.Duration
		limit   int
		want    string
	}{
		"one":         {ids[:1], []string{"shop"}, 0, day, 10, "[1 3 7]"},
		"several":     {ids[1:3], []string{"shop"}, 0, day, 10, "[1 2 7]"},
		"two callers": {ids[:1], []string{"shop", "crm"}, 0, day, 10, "[1 4 3 7]"},
		"none":        {ids[3:], []string{"shop"}, 0, day, 10, "[]"},
		"no decision": {nil, []string{"shop"}, 0, day, 10, "[]"},
		"a time":      {ids[:1], []string{"shop"}, time.Millisecond, day - time.Second, 10, "[3]"},
		"a limit":     {ids[:1], []string{"shop"}, 0, day, 2, "[1 3]"},
	} {
		got := []int{}
		err := db.EachUse(t.Context(), store.UsesQuery{
			Decisions: c.of, Callers: c.callers, From: now.Add(c.from).Truncate(time.Millisecond), To: now.Add(c.to), Limit: c.limit,
		}, func(e store.Event) error {
			got = append(got, int(e.Record[1]))
			return nil
		})
		if err != nil || fmt.Sprint(got) != c.want {
			t.Errorf("%s: %v, %v, want %s", name, got, err, c.want)
		}
	}
	// The events found by subject are those that were written.
	found, err := db.QueryEvents(t.Context(), store.EventQuery{Subject: "report 7", Limit: 1})
	if err != nil || len(found) != 1 || fmt.Sprint(found[0].Decisions) != fmt.Sprint(tomorrow.Decisions) {
		t.Errorf("%v, %v", found, err)
	}
}

// A query for uses reads an index, because uses are few among the events of a day.
func TestUsesAreIndexed(t *testing.T) {
	url := storetest.New(t)
	conn := session(t, url)
	mustExec(t, conn, `insert into events (event_id, at, kind, caller, server, subject, decisions, record, batch, pos, crc)
		select gen_random_uuid(), now(), 'reuse', 'shop', 's', '', array[gen_random_uuid(), gen_random_uuid()], '', gen_random_uuid(), 0, 0
		from generate_series(1, 20000)`)
	mustExec(t, conn, `analyze events`)
	var plan string
	rows, err := conn.Query(t.Context(), "explain "+store.QueryUses, time.Now().Add(-time.Hour), time.Now(), []uuid.UUID{uuid.New()}, []string{"shop"}, 10)
	if err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		var line string
		if err := rows.Scan(&line); err != nil {
			t.Fatal(err)
		}
		plan += line + "\n"
	}
	if rows.Err() != nil || !strings.Contains(plan, "decisions_idx") {
		t.Errorf("%v\n%s", rows.Err(), plan)
	}
}

// ChangesUpTo returns all changes or none.
func TestChangesUpTo(t *testing.T) {
	db, url := openURL(t)
	for i := range 5 {
		write(t, db, put(fmt.Sprint("User u", i), `{}`), put(fmt.Sprint("User v", i), `{}`))
	}
	here, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := here
	elsewhere.Mark = uuid.New()
	for name, c := range map[string]struct {
		after, to int64
		at        store.Position
		limit     int
		want      int // -1: not known
	}{
		"all":                 {0, 5, here, 10, 10},
		"some":                {1, 3, here, 10, 4},
		"none":                {3, 3, here, 10, 0},
		"too many":            {0, 5, here, 9, -1},
		"of another database": {1, 3, elsewhere, 10, -1},
	} {
		changes, known, err := db.ChangesUpTo(t.Context(), c.after, c.to, c.at, c.limit)
		if err != nil || known != (c.want >= 0) || known && (len(changes) != c.want || c.want > 0 && changes[0].Revision != c.after+1) {
			t.Errorf("%s: %v, %v, %v", name, changes, known, err)
		}
	}
	mustRaw(t, url, "update history set oldest = 3")
	for after, want := range map[int64]bool{2: false, 3: true} {
		if _, known, err := db.ChangesUpTo(t.Context(), after, 5, here, 10); err != nil || known != want {
			t.Errorf("after %d, which is swept up to 3: %v, %v", after, known, err)
		}
	}
}

// A log from before reports of uses existed can be migrated: its rows, its partitions,
// and writes of a server that does not know the column.
func TestMigrateALogWithoutUses(t *testing.T) {
	server := storetest.NewServer(t)
	url := server.URL()
	mustRaw(t, url, store.Roles())
	if _, err := newProvider(t, url, "cedarpost_owner", migrations.FS).UpTo(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, url, "select create_log_partitions(current_date - 1, 3)")
	at := time.Now().Format(time.RFC3339)
	insert := fmt.Sprintf(`with b as (insert into events (event_id, at, kind, caller, server, subject, record, batch, pos, crc)
			values (gen_random_uuid(), '%[1]s', 'change', 'shop', 's', '', '\x01', gen_random_uuid(), 0, 0) returning batch)
		select log_append(batch, gen_random_uuid(), 0, 1, 'header', current_date, '%[1]s', '%[1]s') from b`, at)
	mustRaw(t, url, insert)
	if err := store.Migrate(t.Context(), url, nil); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, url, insert)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	e := event(time.Now(), 9, "reuse", "shop", "r")
	e.Decisions = []uuid.UUID{uuid.New()}
	later := event(time.Now().AddDate(0, 0, 3), 10, "reuse", "shop", "r")
	later.Decisions = e.Decisions
	for _, e := range []store.Event{e, later} {
		if _, err := w.Append(t.Context(), nil, []store.Event{e}); err != nil {
			t.Fatal(err)
		}
	}
	events, err := db.QueryEvents(t.Context(), store.EventQuery{Limit: 10})
	if err != nil || len(events) != 4 || len(events[3].Decisions) != 0 {
		t.Errorf("%v, %v", events, err)
	}
	uses := 0
	err = db.EachUse(t.Context(), store.UsesQuery{Decisions: e.Decisions, Callers: []string{"shop"}, To: time.Now().AddDate(0, 0, 4), Limit: 10},
		func(store.Event) error { uses++; return nil })
	if err != nil || uses != 2 {
		t.Errorf("%d uses, %v", uses, err)
	}
}
