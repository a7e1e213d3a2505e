package store_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A lead outlives the timeouts of idle transactions, because its session waits in one.
func TestLeadHasNoTimeout(t *testing.T) {
	const timeout = 500 * time.Millisecond
	url := fmt.Sprintf("%s&idle_in_transaction_session_timeout=%d", storetest.New(t), timeout.Milliseconds())
	// On a slow machine the timeout can end a session that is still being opened. That is tried again.
	for began := false; !began; {
		db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), MaxConns: 2, Event: storetest.Event})
		if isIdleTimeout(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		led, err := db.Lead(t.Context(), store.SignerLock, func(ctx context.Context, alive func(context.Context) error) error {
			began = true
			time.Sleep(3 * timeout)
			return alive(ctx)
		})
		db.Close()
		if began || !isIdleTimeout(err) {
			if err != nil || !led {
				t.Fatal(led, err)
			}
		}
	}
}

func isIdleTimeout(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == "25P03"
}
