package decisionlog

import (
	"context"
	"log/slog"
	"testing"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// Background tasks report their outcome: nil while the database is available, and an error
// otherwise.
func TestTasksAreReported(t *testing.T) {
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
	outcomes := make(chan error, 1)
	var task string
	r := startRecorder(t, Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler), Task: func(name string, err error) {
		if name == task {
			outcomes <- err
		}
	}})
	failures := NewAuthenticationFailures(r)
	signer, err := NewSigner(r, Signing{})
	if err != nil {
		t.Fatal(err)
	}
	work := map[string]func(){
		TaskAuthenticationFailures: func() {
			failures.Note("10.0.0.1:1", "p", "no key")
			failures.record(t.Context(), true)
		},
		TaskWatchLog: func() {
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { defer close(ended); signer.WatchLog(ctx) }()
			err := <-outcomes
			cancel()
			<-ended
			outcomes <- err
		},
	}
	for _, there := range []bool{true, false} {
		if !there {
			if err := pg.Stop(); err != nil {
				t.Fatal(err)
			}
		}
		for name, do := range work {
			task = name
			do()
			if err := <-outcomes; (err == nil) != there {
				t.Errorf("%s: %v; the database is available: %v", name, err, there)
			}
		}
	}
}
