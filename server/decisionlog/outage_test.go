package decisionlog

import (
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// hungLog is the reader of a log that does not read.
type hungLog struct{ entered, release chan struct{} }

func (b *hungLog) Write(p []byte) (int, error) {
	select {
	case b.entered <- struct{}{}:
	default:
	}
	<-b.release
	return len(p), nil
}

// A recorder that hangs, here because its log blocks, is an outage although only one commit has failed.
// It is over when the recorder goes on.
func TestRecorderThatHangsIsSeen(t *testing.T) {
	db := storetest.Open(t)
	if err := db.EnsurePartitions(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	log := &hungLog{make(chan struct{}, 1), make(chan struct{})}
	r := startRecorder(t, Config{DB: db, Name: "test", Mode: auditlog.Strict, Log: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelError})), maxWaiting: time.Millisecond})
	d := aDecision(t)
	d.Caller = "not\x00text" // Postgres refuses it
	failed := make(chan error, 1)
	go func() { failed <- r.Record(t.Context(), []store.Decision{d}, nil) }()
	<-log.entered
	for r.Outage() == nil {
		time.Sleep(time.Millisecond)
	}
	close(log.release)
	if err := <-failed; !errors.Is(err, store.ErrText) {
		t.Errorf("recorded: %v", err)
	}
	for r.Outage() != nil {
		time.Sleep(time.Millisecond)
	}
}
