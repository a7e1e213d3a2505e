package store_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

func TestNewDatabaseIsQuick(t *testing.T) {
	storetest.New(t) // starts the server
	start := time.Now()
	const n = 5
	for range n {
		storetest.New(t)
	}
	t.Logf("storetest.New: %v", time.Since(start)/n)
}

// uid reads "User alice".
func uid(s string) store.UID {
	typ, id, ok := strings.Cut(s, " ")
	if !ok {
		panic("no space in " + s)
	}
	return store.UID{Type: typ, ID: id}
}

func uids(names ...string) (list []store.UID) {
	for _, name := range names {
		list = append(list, uid(name))
	}
	return list
}

func entity(name, attrs string, parents ...string) store.Entity {
	return store.Entity{UID: uid(name), Attrs: []byte(attrs), Parents: uids(parents...)}
}

func put(name, attrs string, parents ...string) store.Op {
	return store.Op{Kind: store.Put, Entity: entity(name, attrs, parents...)}
}

func remove(name string) store.Op { return store.Op{Kind: store.Delete, Entity: entity(name, "")} }

func cascade(name string) store.Op {
	return store.Op{Kind: store.Delete, Entity: entity(name, ""), Cascade: true}
}

func join(name string, parents ...string) store.Op {
	return store.Op{Kind: store.AddParents, Entity: entity(name, "", parents...)}
}

func leave(name string, parents ...string) store.Op {
	return store.Op{Kind: store.RemoveParents, Entity: entity(name, "", parents...)}
}

func set(name, attrs string, remove ...string) store.Op {
	return store.Op{Kind: store.SetAttributes, Entity: entity(name, attrs), Remove: remove}
}

func ifRevision(n int64, op store.Op) store.Op {
	op.Precondition.IfRevision = &n
	return op
}

func mustExist(op store.Op) store.Op    { op.Precondition.MustExist = true; return op }
func mustNotExist(op store.Op) store.Op { op.Precondition.MustNotExist = true; return op }

// write must succeed.
func write(t testing.TB, db *store.DB, ops ...store.Op) store.WriteResult {
	t.Helper()
	r, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops, Caller: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// refused must fail at the operation with the error, and change nothing.
func refused(t testing.TB, db *store.DB, index int, want error, ops ...store.Op) {
	t.Helper()
	before := current(t, db)
	_, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops, Caller: "test"})
	var opErr *store.OpError
	if !errors.Is(err, want) || !errors.As(err, &opErr) {
		t.Fatalf("got %v, want %v", err, want)
	}
	if opErr.Index != index || opErr.UID != ops[index].Entity.UID {
		t.Fatalf("%v names operation %d of %v, want %d", err, opErr.Index, opErr.UID, index)
	}
	if after := current(t, db); after != before {
		t.Fatalf("a refused write made revision %d of %d", after, before)
	}
}

func current(t testing.TB, db *store.DB) int64 {
	t.Helper()
	p, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p.Number
}

// show reads an entity as `{"a": 1} [User x]`, or "absent".
func show(t testing.TB, db *store.DB, revision int64, name string) string {
	t.Helper()
	e, err := db.GetEntity(t.Context(), revision, uid(name))
	if errors.Is(err, store.ErrNotFound) {
		return "absent"
	}
	if err != nil {
		t.Fatal(err)
	}
	return describe(e)
}

func describe(e store.Entity) string {
	names := make([]string, len(e.Parents))
	for i, p := range e.Parents {
		names[i] = p.Type + " " + p.ID
	}
	return fmt.Sprintf("%s [%s]", e.Attrs, strings.Join(names, ", "))
}

func is(t testing.TB, db *store.DB, name, want string) {
	t.Helper()
	if got := show(t, db, current(t, db), name); got != want {
		t.Fatalf("%s is %s, want %s", name, got, want)
	}
}

// raw runs SQL in a session of its own.
func raw(t testing.TB, url, sql string, args ...any) error {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), sql, args...)
	return err
}

func mustRaw(t testing.TB, url, sql string, args ...any) {
	t.Helper()
	if err := raw(t, url, sql, args...); err != nil {
		t.Fatal(err)
	}
}

// openURL opens a new database and returns its URL too.
func openURL(t testing.TB) (*store.DB, string) {
	t.Helper()
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), MaxConns: 8, Event: storetest.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db, url
}

// session returns a connection outside of the store.
func session(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func mustExec(t testing.TB, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

// publishBundle publishes a bundle, and returns the revision and the bundle's version.
func publishBundle(t *testing.T, db *store.DB, p store.Publish) (revision, version int64, err error) {
	t.Helper()
	made, err := db.PublishBundle(t.Context(), p)
	return made.Revision, made.Version, err
}

// changes reads what changed after a revision, as followers do.
func changes(t testing.TB, db *store.DB, after int64, limit int) (list []store.Change) {
	t.Helper()
	err := db.View(t.Context(), func(v *store.View) (err error) {
		list, err = v.Changes(t.Context(), after, limit)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}
