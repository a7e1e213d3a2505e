package snapshot

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A login without rights floods the channel of notifications. The server asks the database at
// most a hundred times per second more than there are revisions, and follows them all the same.
func TestAttackNotifyFlood(t *testing.T) {
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), Event: storetest.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	metrics := prometheus.NewRegistry()
	f := NewFollower(Config{DB: db, Log: slog.New(slog.DiscardHandler), MaxStaleness: time.Minute, Metrics: metrics})
	looked := func() (n float64) {
		families, err := metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			if family.GetName() == "cedarpost_follow_looks_total" {
				n = family.GetMetric()[0].GetCounter().GetValue()
			}
		}
		return n
	}
	if err := f.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { f.Run(ctx) })
	defer running.Wait()
	defer stop()

	stranger, err := pgx.Connect(t.Context(), storetest.Login(t, url))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stranger.Close(context.Background()) }()
	const rounds, each, revisions = 300, 100, 5
	began, before := time.Now(), looked()
	for i := range rounds {
		_, err := stranger.Exec(t.Context(), "select pg_notify('cedarpost_revision', n || repeat('x', 1000)) from generate_series(1, $1::int) n", each)
		if err != nil {
			t.Fatal(err)
		}
		if i%(rounds/revisions) == 0 {
			storetest.WriteOp(t, db, store.Put, "a")
			storetest.WriteOp(t, db, store.Delete, "a")
		}
	}
	looks, took := looked()-before, time.Since(began)
	most := float64(took/vainPause) + 2*revisions + 2
	if looks > most {
		t.Errorf("%v looks in %v, at most %v are allowed", looks, took, most)
	}
	for deadline := time.Now().Add(time.Minute); f.Latest().Position.Number < 2*revisions && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
	}
	if n := f.Latest().Position.Number; n != 2*revisions {
		t.Errorf("at revision %d", n)
	}
	t.Logf("attack: %d notifications with 1 KB each from a login without rights: %.0f looks at the database in %v, %.0f allowed",
		rounds*each, looks, took.Round(time.Millisecond), most)
}
