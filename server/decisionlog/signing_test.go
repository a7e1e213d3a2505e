package decisionlog

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A signer tries again a second after an error of the database, and ten seconds after the log
// contradicted a checkpoint.
func TestSignerIsBackSoon(t *testing.T) {
	t.Parallel() // it takes long
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(pg.URL())})
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
	if _, err = db.Lead(t.Context(), store.SignerLock, s.lead); err == nil || s.pauseAfter(err) != time.Second || s.interval != time.Second {
		t.Errorf("%v: again after %v, looks every %v", err, s.pauseAfter(err), s.interval)
	}
	if pause := s.pauseAfter(fmt.Errorf("%w: at 7 batches", errContradiction)); pause != 10*time.Second {
		t.Errorf("a contradiction: again after %v", pause)
	}
	if pg.Restart(t.Context()) != nil {
		t.Fatal("no database")
	}
}
