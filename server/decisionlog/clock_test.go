package decisionlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// setClock is a clock that is set by hand.
type setClock struct {
	wall    time.Time
	running time.Duration
}

func (c *setClock) pass(d time.Duration) { c.wall, c.running = c.wall.Add(d), c.running+d }

func idsOf(c *setClock, log *slog.Logger) (*ids, *[]time.Duration) {
	var steps []time.Duration
	g := newIDs(log, func(by time.Duration) { steps = append(steps, by) })
	g.clock = func() (time.Time, time.Duration) { return c.wall, c.running }
	return g, &steps
}

// A clock that is set back two hours takes the times of records back with it, and
// does not make them stand still.
func TestClockSetBack(t *testing.T) {
	var logged bytes.Buffer
	c := &setClock{wall: time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)}
	g, steps := idsOf(c, slog.New(slog.NewTextHandler(&logged, nil)))
	if _, _, err := g.next(); err != nil {
		t.Fatal(err)
	}
	c.pass(time.Second)
	c.wall = c.wall.Add(-2 * time.Hour)
	for range 3 {
		id, at, err := g.next()
		if err != nil || !at.Equal(c.wall) || !time.Unix(id.Time().UnixTime()).Truncate(time.Millisecond).Equal(c.wall) {
			t.Errorf("%v at %v, want %v, %v", id, at, c.wall, err)
		}
		c.pass(time.Minute)
	}
	if fmt.Sprint(*steps) != "[-2h0m0s]" || strings.Count(logged.String(), "was set back") != 1 {
		t.Errorf("%v\n%s", *steps, &logged)
	}
	// Forward is noticed without an id that is made.
	c.wall = c.wall.AddDate(0, 0, 12)
	g.checkClock()
	g.checkClock()
	if fmt.Sprint(*steps) != "[-2h0m0s 288h0m0s]" || strings.Count(logged.String(), "was set forward") != 1 {
		t.Errorf("%v\n%s", *steps, &logged)
	}
}

// However a clock goes: no id comes twice, the times are the clock's, and ids are in
// order as long as it is not set back by more than a little.
func TestIDsFollowTheClock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &setClock{wall: time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)}
		g, _ := idsOf(c, nil)
		seen := map[uuid.UUID]bool{}
		var last uuid.UUID
		var lastAt time.Time
		for range rapid.IntRange(1, 60).Draw(t, "ids") {
			c.pass(time.Duration(rapid.Int64Range(0, int64(3*time.Millisecond)).Draw(t, "passes")))
			if rapid.IntRange(0, 4).Draw(t, "set") == 0 {
				c.wall = c.wall.Add(time.Duration(rapid.Int64Range(-int64(5*time.Second), int64(5*time.Second)).Draw(t, "by")))
			}
			id, at, err := g.next()
			if err != nil || id.Version() != 7 || id.Variant() != uuid.RFC4122 || seen[id] {
				t.Fatal(id, err)
			}
			seen[id] = true
			if got := time.UnixMilli(int64(id[0])<<40 | int64(id[1])<<32 | int64(id[2])<<24 | int64(id[3])<<16 | int64(id[4])<<8 | int64(id[5])); !got.Equal(at) {
				t.Fatalf("%v has time %v, not %v", id, got, at)
			}
			off := at.Sub(c.wall)
			if off > clockTolerance+time.Millisecond || off < -time.Millisecond {
				t.Fatalf("at %v, the clock says %v", at, c.wall)
			}
			back := lastAt.Sub(c.wall.Truncate(time.Millisecond))
			if bytes.Compare(id[:8], last[:8]) <= 0 && back <= clockTolerance {
				t.Fatalf("%v after %v, which is %v ahead of the clock", id, last, back)
			}
			last, lastAt = id, at
		}
	})
}

// A partition that is missing today is made by the first record that needs it, for
// days near a clock alone, and not again and again.
func TestPartitionsAreMadeWhenNeeded(t *testing.T) {
	t.Parallel() // it takes long
	databaseURL := storetest.New(t)
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: databaseURL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	var logged bytes.Buffer
	r := startRecorder(t, Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.NewTextHandler(&logged, nil))})
	decide := func(days int) error {
		d := aDecision(t)
		d.At = d.At.AddDate(0, 0, days)
		for i := range 6 {
			d.ID[i] = byte(d.At.UnixMilli() >> (8 * (5 - i)))
		}
		return r.Record(t.Context(), []store.Decision{d}, nil)
	}
	drop := func(days int) {
		t.Helper()
		day := time.Now().UTC().AddDate(0, 0, days).Format("20060102")
		if _, err := conn.Exec(t.Context(), "drop table decisions_"+day+", events_"+day); err != nil {
			t.Fatal(err)
		}
	}
	for _, days := range []int{0, 3, -1, 7} {
		r.partitions.last = time.Time{}
		drop(days)
		if err := decide(days); err != nil {
			t.Errorf("%d days ahead: %v", days, err)
		}
	}
	for _, days := range []int{12, -2, 4000} {
		r.partitions.last = time.Time{}
		if err := decide(days); !errors.Is(err, store.ErrNoPartition) {
			t.Errorf("%d days ahead: %v", days, err)
		}
	}
	r.partitions.every = 24 * time.Hour
	drop(3)
	if err := decide(3); !errors.Is(err, store.ErrNoPartition) {
		t.Errorf("made again at once: %v", err)
	}
	for _, want := range []string{"is needed now: made", "server_ahead_of_database", "not near the clock"} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, &logged)
		}
	}
}

// After an outage of the database the signer is back within about a second; only a
// log that contradicts what was signed is looked at less often.
func TestSignerIsBackSoon(t *testing.T) {
	t.Parallel() // it takes long
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: pg.URL()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	if err := pg.Stop(); err != nil {
		t.Fatal(err)
	}
	s, err := readSigner(db, slog.New(slog.DiscardHandler), Signing{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = db.Lead(t.Context(), "signer", s.lead); err == nil || s.pauseAfter(err) != signInterval {
		t.Errorf("%v: again after %v", err, s.pauseAfter(err))
	}
	if pause := s.pauseAfter(fmt.Errorf("%w: at 7 batches", errContradiction)); pause != refusedRetry {
		t.Errorf("a contradiction: again after %v", pause)
	}
	if pg.Restart(t.Context()) != nil {
		t.Fatal("no database")
	}
}
