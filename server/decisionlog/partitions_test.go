package decisionlog

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// The first record that needs a missing partition makes it, but only for days near a clock, and
// not more often than once in a while.
func TestPartitionsAreMadeWhenNeeded(t *testing.T) {
	t.Parallel() // it takes long
	databaseURL := storetest.New(t)
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(databaseURL)})
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
