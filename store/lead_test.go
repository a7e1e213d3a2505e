package store_test

import (
	"context"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A lead outlives the timeouts of idle transactions, because its session waits in one.
func TestLeadHasNoTimeout(t *testing.T) {
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(storetest.New(t) + "&idle_in_transaction_session_timeout=100"), MaxConns: 2, Event: storetest.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	led, err := db.Lead(t.Context(), store.SignerLock, func(ctx context.Context, alive func(context.Context) error) error {
		time.Sleep(500 * time.Millisecond) // five times the timeout
		return alive(ctx)
	})
	if err != nil || !led {
		t.Error(led, err)
	}
}
