package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

const keep = 90 * 24 * time.Hour

// grow makes revisions up to one, which are so old that nothing needs them.
func grow(t testing.TB, conn *pgx.Conn, upTo int64) {
	t.Helper()
	mustExec(t, conn, "update revisions set at = now() - interval '100 days' where n <= $1", upTo)
}

func sweep(t testing.TB, db *store.DB) store.Swept {
	t.Helper()
	swept, err := db.Sweep(t.Context(), keep)
	if err != nil {
		t.Fatal(err)
	}
	return swept
}

// After a sweep, revisions that are left read as before, swept ones cannot be read, and
// writes go on as before.
func TestSweptHistory(t *testing.T) {
	db, url := openURL(t)
	conn := session(t, url)
	storetest.Check(t, 50, func(rt *rapid.T) {
		emptied(t, conn)
		w := newWorld()
		for range rapid.IntRange(2, 6).Draw(rt, "writes") {
			w.draw(rt, t, db)
		}
		old := rapid.Int64Range(0, w.newest()).Draw(rt, "old")
		grow(t, conn, old)
		if swept := sweep(t, db); swept.Oldest != old {
			rt.Fatalf("history begins at %d, want %d", swept.Oldest, old)
		}
		for range rapid.IntRange(0, 2).Draw(rt, "writes after") {
			w.draw(rt, t, db)
		}
		for _, revision := range []int64{old, w.newest()} {
			compare(rt, t, db, revision, w[revision])
		}
		if old > 0 {
			_, err := db.GetEntity(t.Context(), old-1, uid(ids[0]))
			var swept *store.SweptError
			if !errors.As(err, &swept) || swept.Oldest != old {
				rt.Fatalf("revision %d, swept up to %d: %v", old-1, old, err)
			}
		}
		compareChanges(rt, t, db, w, old)
	})
}

func TestStaleWritersAfterASweep(t *testing.T) {
	db, url := openURL(t)
	made := write(t, db, put("U a", `{}`), put("U b", `{}`)).Revision
	write(t, db, remove("U a"))
	oldest := write(t, db, put("U c", `{}`)).Revision
	grow(t, session(t, url), oldest)
	sweep(t, db)
	refused(t, db, 0, store.ErrStale, ifRevision(made, put("U a", `{}`)))
	refused(t, db, 0, store.ErrStale, ifRevision(made, remove("U a")))
	refused(t, db, 1, store.ErrStale, put("U d", `{}`), ifRevision(oldest-1, put("U never", `{}`)))
	// It is known when a stored entity changed, and after oldest also when one was
	// deleted.
	write(t, db, ifRevision(made, put("U b", `{"n": 1}`)))
	write(t, db, ifRevision(oldest, put("U a", `{}`)), ifRevision(oldest, put("U never", `{}`)))
}

// A database without writes keeps all of its newest revision, however old it is, and what
// is needed to follow the database and to decide at that revision.
func TestSweepOfAnOldDatabase(t *testing.T) {
	db, url := openURL(t)
	if swept := sweep(t, db); swept.Oldest != 0 {
		t.Errorf("an empty database was swept: %+v", swept)
	}
	write(t, db, put("U a", `{}`))
	write(t, db, put("U a", `{"n": 1}`))
	newest := write(t, db, put("U b", `{}`)).Revision
	before, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	grow(t, session(t, url), newest)
	swept := sweep(t, db)
	if swept.Oldest != newest || swept.Rows["entities"] != 1 || swept.Rows["revisions"] != 2 || swept.Rows["revision_entries"] != 2 {
		t.Errorf("%+v", swept)
	}
	if after, err := db.Current(t.Context()); err != nil || after != before {
		t.Errorf("%+v, then %+v, %v", before, after, err)
	}
	if list, err := db.LoadEntitiesAt(t.Context(), before, uids("U a", "U b"), anyWeight); err != nil || len(list) != 2 {
		t.Errorf("%v, %v", list, err)
	}
	if list := changes(t, db, newest-1, 10); len(list) != 1 {
		t.Errorf("%v", list)
	}
	// If the clock was set back, later revisions seem older than the last old one.
	young := write(t, db, put("U c", `{}`)).Revision
	grown := write(t, db, put("U d", `{}`)).Revision
	mustRaw(t, url, "update revisions set at = now() - interval '100 days' where n = $1", grown)
	if swept := sweep(t, db); swept.Oldest != young-1 {
		t.Errorf("%+v, though revision %d is young", swept, young)
	}
}

func TestSweepKeepsWhatDecisionsNeed(t *testing.T) {
	db, url := openURL(t)
	conn := session(t, url)
	for range 9 {
		write(t, db, put("U a", fmt.Sprintf(`{"n": %d}`, current(t, db))))
	}
	grow(t, conn, 9)
	const day = 24 * time.Hour
	today := time.Now().UTC().Truncate(day)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	var n byte
	decide := func(at time.Time, revision int64) {
		t.Helper()
		mustExec(t, conn, "select create_log_partitions($1::date, 1)", at)
		n++
		d := decision(at, n)
		d.Revision = revision
		if _, err := w.Append(t.Context(), []store.Decision{d}, nil); err != nil {
			t.Fatal(err)
		}
	}
	drop := func(at time.Time) { mustExec(t, conn, "drop table decisions_"+at.Format("20060102")) }
	oldest := func(why string, want int64) {
		t.Helper()
		if got := sweep(t, db).Oldest; got != want {
			t.Errorf("%s: history begins at %d, want %d", why, got, want)
		}
	}

	long, older, recent := today.Add(-200*day), today.Add(-20*day), today.Add(-2*day)
	decide(long.Add(time.Hour), 3)
	decide(long.Add(day-time.Millisecond), 4)
	decide(older, 5)
	decide(recent, 7)
	mustExec(t, conn, "select create_log_partitions($1::date, 1)", older.Add(day)) // without decisions
	// Decisions of today and yesterday are covered by the least retention, and their
	// partitions are not read.
	decide(today.Add(-time.Millisecond), 2)
	oldest("a decision at revision 3", 3)
	oldest("once more", 3)
	// A day is read once.
	mustExec(t, conn, "update decision_days set min_revision = 4 where day = $1", older)
	drop(long)
	oldest("the day with revision 3 is gone", 4)
	drop(older)
	oldest("only the day before yesterday is left", 7)
	drop(recent)
	oldest("no past day is left", 9)
	decide(recent, 8)
	oldest("history does not come back", 9)
	var days int
	if err := conn.QueryRow(t.Context(), "select count(*) from decision_days").Scan(&days); err != nil || days != 2 {
		t.Errorf("%d days are remembered, of partitions for the day before yesterday and one without decisions: %v", days, err)
	}
}

// More rows than one statement removes, in one revision and in many.
func TestSweepInParts(t *testing.T) {
	db, url := openURL(t)
	const many = 2*store.SweepRows + 5
	write(t, db, put("U a", `{}`))
	mustRaw(t, url, `insert into entities (type, id, attrs, tags, parents, since, until)
		select 'E', n::text, '{}', '{}', '{}', 0, 1 + n % 2 from generate_series(1, $1::int) n`, many)
	mustRaw(t, url, `insert into revision_entries select 1, 'entity', 'E', n::text from generate_series(1, $1::int) n`, many)
	mustRaw(t, url, `insert into revisions (n, caller) select n, '' from generate_series(2, $1::int) n`, many)
	mustRaw(t, url, `update revision set n = $1`, many)
	mustRaw(t, url, `insert into imports (id, entities, revision, caller, updated_at)
		values ('left', 1, 1, '', now() - interval '31 days'), ('under way', 1, 1, '', now() - interval '29 days')`)
	grow(t, session(t, url), many)
	swept := sweep(t, db)
	want := map[string]int64{"entities": many, "revision_entries": many + 1, "revisions": many - 1, "imports": 1}
	for table, n := range want {
		if swept.Rows[table] != n {
			t.Errorf("%s: %d rows, want %d", table, swept.Rows[table], n)
		}
	}
	is(t, db, "U a", `{} []`)
}

// The sweep does not wait for a writer, a writer does not wait for the sweep, and one
// sweep does not wait for another.
func TestSweepIsNoObstacle(t *testing.T) {
	db, url := openURL(t)
	write(t, db, put("U a", `{}`))
	other := session(t, url)
	mustExec(t, other, "begin; lock table sweep_lock in share update exclusive mode")
	if swept := sweep(t, db); !swept.Elsewhere {
		t.Errorf("two at once: %+v", swept)
	}
	mustExec(t, other, "rollback")
	release := hold(t, url, "update revision set n = n + 1")
	if swept := sweep(t, db); swept.Elsewhere {
		t.Errorf("%+v", swept)
	}
	release()

	ctx, stop := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		for ctx.Err() == nil {
			if _, err := db.Sweep(ctx, keep); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for i := range 50 {
		grow(t, other, write(t, db, put("U a", fmt.Sprintf(`{"n": %d}`, i))).Revision)
	}
	stop()
	group.Wait()
	sweep(t, db)
	is(t, db, "U a", `{"n": 49} []`)
	if _, err := db.Sweep(t.Context(), store.MinHistoryRetention-1); err == nil {
		t.Error("what the decisions of yesterday need was swept")
	}
}
