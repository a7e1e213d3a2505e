package store_test

import (
	"context"
	"net/url"
	"sync/atomic"
	"testing"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// New connections, of the pools and outside of them, use the password that a live URL has then. An
// unusable URL leaves the one before in use.
func TestPasswordIsReadAgain(t *testing.T) {
	root := storetest.New(t)
	login := storetest.Login(t, root, serving...)
	u, err := url.Parse(login)
	if err != nil {
		t.Fatal(err)
	}
	name := u.User.Username()
	var now atomic.Pointer[string]
	now.Store(&login)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.Live(func() string { return *now.Load() }), MaxConns: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	cut := func() {
		t.Helper()
		mustRaw(t, root, "select pg_terminate_backend(pid, 60000) from pg_stat_activity where usename = '"+name+"'")
	}
	use := func() error {
		_, err := db.MinRetention(t.Context()) // of the pool of administration
		for range 3 {                          // a pool may first give out connections that were cut
			if err != nil {
				_, err = db.MinRetention(t.Context())
			}
		}
		if err == nil {
			// A connection outside of the pools.
			_, err = db.Lead(t.Context(), store.SignerLock, func(context.Context, func(context.Context) error) error { return nil })
		}
		return err
	}
	if err := use(); err != nil {
		t.Fatal(err)
	}
	mustRaw(t, root, "alter role "+name+" password 'second'")
	cut()
	if err := use(); err == nil {
		t.Fatal("the database accepts the old password")
	}
	u.User = url.UserPassword(name, "second")
	second := u.String()
	now.Store(&second)
	if err := use(); err != nil {
		t.Fatal(err)
	}
	broken := "postgres://%zz"
	now.Store(&broken)
	cut()
	if err := use(); err != nil {
		t.Fatal(err)
	}
}
