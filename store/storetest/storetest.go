// Package storetest gives each test a real database of its own, in tens of milliseconds,
// so that no test needs a mock of the store or data of another test. Each test process
// starts one server when it is first needed. A database is a copy of a migrated template.
//
// Tests cannot be skipped: without Postgres they fail.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/localpg"
)

const (
	// URLEnv names an existing server to use, by the URL of a superuser.
	URLEnv = "CEDARPOST_TEST_DATABASE_URL"
	// KeepEnv keeps the folder of the server after a test has failed, if it is not empty.
	KeepEnv = "CEDARPOST_TEST_KEEP"
)

// shared is the server of this process with its template. A process has one, so it is a
// global variable.
var shared struct {
	once     sync.Once
	err      error
	server   *localpg.Server // nil with URLEnv
	dir      string          // of the server
	url      string          // of a superuser
	template string          // name of the migrated database that is copied
	failed   atomic.Bool     // a test with a database failed
	idle     chan *pgx.Conn  // to the database postgres; made by start
}

// New returns the URL of a new, migrated, empty database. It is dropped after the test.
// If the test failed, it stays as long as the server, and its URL is logged.
func New(t testing.TB) string {
	t.Helper()
	shared.once.Do(func() { shared.err = start() })
	if shared.err != nil {
		t.Fatalf("storetest: %v", shared.err)
	}
	name := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	if err := create(name); err != nil {
		t.Fatalf("storetest: %v", err)
	}
	// Positions must distinguish the copy from its template.
	if err := runIn(name, "update revision set database = gen_random_uuid()"); err != nil {
		t.Fatalf("storetest: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			shared.failed.Store(true)
			t.Logf("storetest: the database is kept (see %s): %s", KeepEnv, withDatabase(shared.url, name))
			return
		}
		if err := run("drop database " + name + " with (force)"); err != nil {
			t.Errorf("storetest: %v", err)
		}
	})
	return withDatabase(shared.url, name)
}

// Open opens a store on a new database. The store is closed after the test.
func Open(t testing.TB) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(New(t)), MaxConns: 8, Event: Event})
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	t.Cleanup(db.Close)
	return db
}

// Event makes the simplest record of a change, for a store without a server. Without a
// record no API key can be added.
func Event(_ context.Context, c store.Changed) (store.Event, error) {
	id, err := uuid.NewV7()
	return store.Event{ID: id, Kind: "change", Caller: c.Caller, Subject: c.ID, Revision: c.Revision, Record: id[:]}, err
}

// Login makes a login that has these roles and no other right, and returns the URL of the
// database for that login. databaseURL is that of a superuser. The login is dropped after
// the test.
func Login(t testing.TB, databaseURL string, roles ...string) string {
	t.Helper()
	name, password := "login_"+strings.ReplaceAll(uuid.NewString(), "-", ""), uuid.NewString()
	run := func(sql string) {
		t.Helper()
		if err := runAt(databaseURL, sql); err != nil {
			t.Fatalf("storetest: %v", err)
		}
	}
	secret, err := localpg.Secret(password)
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	sql := "create role " + name + " login password '" + secret + "'"
	for _, role := range roles {
		sql += "; grant " + role + " to " + name
	}
	run(sql)
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		// A session that was closed may still be ending on the server, and until it has
		// ended the login owns the session's temporary tables and cannot be dropped.
		run("select pg_terminate_backend(pid, 60000) from pg_stat_activity where usename = '" + name + "'; drop role " + name)
	})
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	u.User = url.UserPassword(name, password)
	return u.String()
}

// NewServer returns a server for this test alone, which it can stop and kill. It is not
// migrated, and durable as in production. It is removed after the test.
func NewServer(t testing.TB) *localpg.Server {
	t.Helper()
	dir, err := tempDir("")
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	server, err := localpg.Start(t.Context(), localpg.Config{Dir: dir, Durable: true})
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Errorf("storetest: %v", err)
		}
		os.RemoveAll(server.ClusterDir())
	})
	return server
}

// Main runs the tests of a package that uses New, stops the server, and exits:
//
//	func TestMain(m *testing.M) { storetest.Main(m) }
func Main(m *testing.M) {
	code := m.Run()
	if err := stop(); err != nil {
		fmt.Fprintln(os.Stderr, "storetest:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// start starts the server and makes the template.
func start() error {
	shared.idle = make(chan *pgx.Conn, 4)
	shared.url = os.Getenv(URLEnv)
	if shared.url == "" {
		dir, err := tempDir(memoryDir())
		if err != nil {
			return err
		}
		shared.dir = dir
		shared.server, err = localpg.Start(context.Background(), localpg.Config{Dir: dir, MaxConnections: 300})
		if err != nil {
			return err
		}
		shared.url = shared.server.URL()
	}
	// The name is unique: on a shared server other processes have templates too, perhaps
	// with other migrations.
	shared.template = "template_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	if err := run("create database " + shared.template); err != nil {
		return err
	}
	return store.Migrate(context.Background(), withDatabase(shared.url, shared.template), nil)
}

// stop undoes start, if start ran.
func stop() error {
	if shared.server == nil {
		if shared.template == "" {
			return nil
		}
		return run("drop database if exists " + shared.template + " with (force)")
	}
	err := shared.server.Stop()
	if shared.failed.Load() && os.Getenv(KeepEnv) != "" {
		fmt.Fprintf(os.Stderr, "storetest: kept %s\n", shared.dir)
		return err
	}
	return errors.Join(err, os.RemoveAll(shared.server.ClusterDir()), os.RemoveAll(shared.dir))
}

// tempDir makes a folder below parent, or below the system's folder of temporary files, that
// the user of Postgres can reach. It cannot reach those of testing.T.
func tempDir(parent string) (string, error) {
	dir, err := os.MkdirTemp(parent, tempPrefix)
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// create copies the template. A copy of the files is faster if nothing is synced to disk.
// Before Postgres 15 it is the only strategy, and has no keyword.
func create(name string) error {
	sql := "create database " + name + " template " + shared.template
	err := run(sql + " strategy file_copy")
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "42601" { // syntax_error
		err = run(sql)
	}
	return err
}

// run executes one statement on the server, outside of the databases of tests. It keeps its
// connections, because a new one costs more than most statements. A pool would do the same
// with a goroutine, which tests for leaks would find.
func run(sql string) error {
	ctx, cancel := context.WithTimeout(context.Background(), statementTimeout)
	defer cancel()
	var conn *pgx.Conn
	var err error
	select {
	case conn = <-shared.idle:
	default:
		if conn, err = pgx.Connect(ctx, withDatabase(shared.url, "postgres")); err != nil {
			return err
		}
	}
	_, err = conn.Exec(ctx, sql)
	if conn.IsClosed() {
		return err
	}
	select {
	case shared.idle <- conn:
	default:
		_ = conn.Close(ctx)
	}
	return err
}

// statementTimeout is how long one statement may take on a busy machine.
const statementTimeout = 2 * time.Minute

func runIn(database, sql string) error { return runAt(withDatabase(shared.url, database), sql) }

func runAt(databaseURL, sql string) error {
	ctx, cancel := context.WithTimeout(context.Background(), statementTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, sql)
	return err
}

// withDatabase returns the URL of another database of the same server.
func withDatabase(serverURL, name string) string {
	u, err := url.Parse(serverURL)
	if err != nil {
		return serverURL // connecting to it fails with a better error
	}
	u.Path = "/" + name
	return u.String()
}
