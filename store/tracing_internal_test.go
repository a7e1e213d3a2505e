package store

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Spans get the class of an error, and no text of it, also of a connection that is not made in time.
func TestErrorClass(t *testing.T) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0") // takes connections and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	connect := func(wait func(context.Context) (context.Context, context.CancelFunc)) error {
		ctx, cancel := wait(t.Context())
		defer cancel()
		_, err := pgconn.Connect(ctx, "postgres://swordfish@"+l.Addr().String()+"/orders?sslmode=disable")
		if _, ok := errors.AsType[*pgconn.ConnectError](err); !ok {
			t.Fatalf("%T %v", err, err)
		}
		return err
	}
	late := connect(func(ctx context.Context) (context.Context, context.CancelFunc) { return context.WithTimeout(ctx, 1) })
	ended := connect(func(ctx context.Context) (context.Context, context.CancelFunc) {
		ctx, cancel := context.WithCancel(ctx)
		cancel()
		return ctx, cancel
	})
	for _, c := range []struct{ err, want error }{
		{nil, nil},
		{late, context.DeadlineExceeded},
		{ended, context.Canceled},
		{fmt.Errorf("order 42: %w", pgx.ErrNoRows), pgx.ErrNoRows},
		{errors.New("swordfish"), errConnection},
	} {
		if got := errorClass(c.err); got != c.want { //nolint:errorlint // the class itself, and nothing around it
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
	state := errorClass(&pgconn.PgError{Severity: "ERROR", Code: "23505", Message: "swordfish", Detail: "swordfish"})
	if state.Error() != "ERROR: the statement failed (SQLSTATE 23505)" {
		t.Error(state)
	}
}
