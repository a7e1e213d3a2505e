//go:build unix

package localpg_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/cedarpost/cedarpost/store/localpg"
)

// childEnv makes the test binary a parent process that is going to be killed: it starts a
// server in the folder, prints the URL, and waits.
const childEnv = "LOCALPG_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		server, err := localpg.Start(context.Background(), localpg.Config{Dir: dir})
		fmt.Println(server.URL(), err)
		select {}
	}
	os.Exit(m.Run())
}

// folder makes a folder that the user of Postgres can reach. It is removed after the
// test.
func folder(t *testing.T, mode os.FileMode) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "localpg-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cluster, err := filepath.EvalSymlinks(filepath.Join(dir, "postgres")); err == nil {
			os.RemoveAll(cluster)
		}
		os.RemoveAll(dir)
	})
	if err := os.Chmod(dir, mode); err != nil {
		t.Fatal(err)
	}
	return dir
}

func start(t *testing.T, config localpg.Config) *localpg.Server {
	t.Helper()
	server, err := localpg.Start(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

func query(t *testing.T, url, sql string) (result string, err error) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		return "", err
	}
	defer conn.Close(context.Background())
	err = conn.QueryRow(t.Context(), sql).Scan(&result)
	return result, err
}

func must(t *testing.T, url, sql, want string) {
	t.Helper()
	if got, err := query(t, url, sql); err != nil || got != want {
		t.Fatalf("%s: %q, want %q, %v", sql, got, want, err)
	}
}

func TestLife(t *testing.T) {
	dir := folder(t, 0o755)
	server := start(t, localpg.Config{Dir: dir, Durable: true})
	must(t, server.URL(), "select current_user || ' ' || current_database()", "cedarpost cedarpost")
	must(t, server.URL(), "show fsync", "on")
	if _, err := localpg.Start(t.Context(), localpg.Config{Dir: dir}); !errors.Is(err, localpg.ErrInUse) {
		t.Errorf("a second server on the folder: %v", err)
	}
	if _, err := query(t, strings.Replace(server.URL(), "cedarpost:", "cedarpost:not", 1), "select ''"); err == nil {
		t.Error("a wrong password is accepted")
	}
	info, err := os.Stat(filepath.Join(dir, "postgres.password"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("password file: %v, %v", info, err)
	}
}

func TestKillAndRestart(t *testing.T) {
	dir := folder(t, 0o755)
	server := start(t, localpg.Config{Dir: dir, Durable: true})
	if _, err := query(t, server.URL(), "create table kept as select 'yes' as x"); !errors.Is(err, pgx.ErrNoRows) {
		t.Fatal(err)
	}
	url := server.URL()
	session, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close(context.Background())
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	// The process of the session was killed too, before it could send a message.
	var said *pgconn.PgError
	if _, err := session.Exec(t.Context(), "select 1"); err == nil || errors.As(err, &said) {
		t.Errorf("got %v, want a broken connection", err)
	}
	select {
	case <-server.Done():
	default:
		t.Error("Done is not closed")
	}
	if _, err := query(t, url, "select ''"); err == nil {
		t.Error("answers after Kill")
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	must(t, url, "select x from kept", "yes")
	log, err := os.ReadFile(server.LogFile())
	if err != nil || !strings.Contains(string(log), "was not properly shut down") || strings.Contains(string(log), "shutdown request") {
		t.Errorf("not a kill -9: %v\n%s", err, log)
	}
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	// Another Server on the same folder finds the data. A port in use is refused.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	busy := listener.Addr().(*net.TCPAddr).Port
	if _, err := localpg.Start(t.Context(), localpg.Config{Dir: dir, Port: busy}); !errors.Is(err, localpg.ErrPortBusy) {
		t.Errorf("got %v", err)
	}
	again := start(t, localpg.Config{Dir: dir})
	must(t, again.URL(), "select x from kept", "yes")
}

// TestOrphan starts a server that does not notice that its parent has ended.
func TestOrphan(t *testing.T) {
	dir := folder(t, 0o755)
	server := start(t, localpg.Config{Dir: dir})
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	bin, err := localpg.FindBinaries()
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(server.ClusterDir())
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	orphan := exec.Command(filepath.Join(bin, "postgres"), "-D", filepath.Join(server.ClusterDir(), "data"),
		"-c", "listen_addresses=127.0.0.1", "-c", "port="+u.Port(), "-c", "unix_socket_directories=")
	orphan.Dir = server.ClusterDir()
	if os.Geteuid() == 0 {
		orphan.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: owner.Uid, Gid: owner.Gid}}
	}
	if err := orphan.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- orphan.Wait() }()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) { // until it is up
		pidfile, _ := os.ReadFile(filepath.Join(server.ClusterDir(), "data", "postmaster.pid"))
		if strings.Contains(string(pidfile), "ready") {
			break
		}
	}
	must(t, start(t, localpg.Config{Dir: dir}).URL(), "select 'up'", "up")
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("the orphan ended badly: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("the orphan still runs")
		orphan.Process.Kill()
	}
}

// TestParentKilled kills the parent of a server with kill -9.
func TestParentKilled(t *testing.T) {
	dir := folder(t, 0o755)
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+dir)
	output, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 1000)
	n, err := output.Read(line)
	if err != nil || !strings.Contains(string(line[:n]), "<nil>") {
		t.Fatalf("%s, %v", line[:n], err)
	}
	url := strings.Fields(string(line[:n]))[0]
	if _, err := localpg.Start(t.Context(), localpg.Config{Dir: dir}); !errors.Is(err, localpg.ErrInUse) {
		t.Errorf("another process's folder: %v", err)
	}
	must(t, url, "select 'up'", "up")
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	server := start(t, localpg.Config{Dir: dir})
	must(t, server.URL(), "select 'up'", "up")
	log, err := os.ReadFile(server.LogFile())
	if err != nil || !strings.Contains(string(log), "fast shutdown request") {
		t.Errorf("the orphan was not told to stop: %v\n%s", err, log)
	}
}

func TestInterruptedInit(t *testing.T) {
	dir := folder(t, 0o755)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := localpg.Start(ctx, localpg.Config{Dir: dir}); err == nil {
		t.Skip("initdb is too quick to interrupt on this machine")
	}
	server := start(t, localpg.Config{Dir: dir})
	must(t, server.URL(), "select 'up'", "up")
}

func TestFailureShowsLog(t *testing.T) {
	dir := folder(t, 0o755)
	server := start(t, localpg.Config{Dir: dir})
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(server.ClusterDir(), "data", "postgresql.auto.conf"), []byte("nonsense = 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := localpg.Start(t.Context(), localpg.Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("got %v", err)
	}
}

func TestClosedFolder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root runs Postgres as someone else")
	}
	dir := folder(t, 0o700)
	server := start(t, localpg.Config{Dir: dir})
	if !strings.HasPrefix(server.ClusterDir(), "/var/lib/cedarpost/") {
		t.Errorf("the cluster is in %s", server.ClusterDir())
	}
	must(t, server.URL(), "select 'up'", "up")
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	again := start(t, localpg.Config{Dir: dir})
	if again.ClusterDir() != server.ClusterDir() {
		t.Errorf("first in %s, then in %s", server.ClusterDir(), again.ClusterDir())
	}
}

func TestFindBinaries(t *testing.T) {
	t.Setenv(localpg.BinEnv, t.TempDir())
	if _, err := localpg.FindBinaries(); !errors.Is(err, localpg.ErrNoPostgres) {
		t.Errorf("got %v", err)
	}
}
