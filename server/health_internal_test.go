package server

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A server that records no decisions makes the partitions of today and tomorrow, too, because
// writes of policy or data need them.
func TestReadinessMakesPartitions(t *testing.T) {
	databaseURL := storetest.New(t)
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(databaseURL)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	r := runRecorder(t, decisionlog.Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler)})
	day := time.Now().UTC().AddDate(0, 0, 1).Format("20060102")
	if _, err := conn.Exec(t.Context(), "drop table decisions_"+day+", events_"+day); err != nil {
		t.Fatal(err)
	}
	ready := newReadiness(db, nil, slog.New(slog.DiscardHandler))
	ready.recorder = r
	ready.look(t.Context())
	if found := ready.lastLook(); len(found.reasons)+len(found.warnings) > 0 {
		t.Error(found)
	}
}
