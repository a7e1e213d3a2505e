package store_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// When the deadline of a call ends, its statement ends in Postgres too: on every pool, for reads and
// for writes. The tables are locked, so that nothing else could end it, and statement_timeout, which
// is the backstop, is long. (A batch of the log has a deadline of its own.)
func TestDeadlineEndsStatements(t *testing.T) {
	t.Parallel()
	url := withParameter(t, storetest.New(t), "statement_timeout", "1h")
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), ReadURLs: []secret.Secret{secret.New(url)}, MaxConns: 2, Event: storetest.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	write(t, db, put("User a", `{}`))
	at, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	watcher := session(t, url) // statements of a session that holds locks are not blocked by them
	blocker := session(t, url)
	mustExec(t, blocker, "begin; lock table events, entities, api_keys, decisions, revision, history, imports in access exclusive mode")
	// active counts statements of the store that run, or wait for a lock.
	active := func() (n int) {
		if err := watcher.QueryRow(t.Context(), `
			select count(*) from pg_stat_activity
			where datname = current_database() and state = 'active' and backend_type = 'client backend' and pid <> pg_backend_pid()`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, c := range []struct {
		name string
		call func(context.Context) error
	}{
		{"a read of a decision", func(ctx context.Context) error {
			_, err := db.LoadEntitiesAt(ctx, at, uids("User a"), anyWeight)
			return err
		}},
		{"a read of administration", func(ctx context.Context) error {
			_, err := db.Keys(ctx)
			return err
		}},
		{"a write", func(ctx context.Context) error {
			_, err := db.WriteEntities(ctx, store.EntityWrite{Ops: []store.Op{put("User b", `{}`)}, Caller: "test"})
			return err
		}},
		{"a change of grants", func(ctx context.Context) error {
			_, err := db.ChangeAccess(ctx, "test", func(context.Context, store.Access) (store.AccessChange, error) { return store.AccessChange{}, nil })
			return err
		}},
		{"a read of the log", func(ctx context.Context) error {
			_, err := db.QueryEvents(ctx, store.EventQuery{Limit: 1})
			return err
		}},
		{"a read that every decision depends on", func(ctx context.Context) error {
			return db.View(ctx, func(*store.View) error { return nil })
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- c.call(ctx) }()
			for deadline := time.Now().Add(time.Minute); active() == 0; {
				if time.Now().After(deadline) {
					t.Fatal("no statement waits for the lock")
				}
			}
			cancel() // as a deadline does
			select {
			case err := <-ended:
				if !errors.Is(err, context.Canceled) {
					t.Errorf("%v", err)
				}
			case <-time.After(time.Minute):
				t.Fatal("the call does not end")
			}
			began := time.Now()
			for active() > 0 {
				if time.Since(began) > time.Minute {
					t.Fatal("the statement does not end")
				}
			}
		})
	}
	mustExec(t, blocker, "rollback")
	is(t, db, "User a", `{} []`)
}
