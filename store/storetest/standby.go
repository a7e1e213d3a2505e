//go:build unix

package storetest

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/store/localpg"
)

// NewStandby returns a hot standby of a server of [NewServer]: a copy that follows it by
// streaming replication. Commits do not wait for it. It is removed after the test.
func NewStandby(t testing.TB, primary *localpg.Server) *localpg.Server {
	t.Helper()
	return newCopy(t, primary, "--write-recovery-conf")
}

// NewCopy returns a server with a copy of the files of a server of [NewServer], like a
// snapshot of its disks. Both can be written to, and neither knows of the other. It is
// removed after the test.
func NewCopy(t testing.TB, original *localpg.Server) *localpg.Server {
	t.Helper()
	return newCopy(t, original)
}

func newCopy(t testing.TB, primary *localpg.Server, options ...string) *localpg.Server {
	t.Helper()
	dir, err := tempDir("")
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := copyServer(t.Context(), primary, dir, options...); err != nil {
		t.Fatalf("storetest: %v", err)
	}
	standby, err := localpg.Start(t.Context(), localpg.Config{Dir: dir, Durable: true})
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	t.Cleanup(func() {
		if err := standby.Stop(); err != nil {
			t.Errorf("storetest: %v", err)
		}
	})
	return standby
}

// copyServer fills a folder with a copy of a server, in the layout of localpg.
func copyServer(ctx context.Context, from *localpg.Server, dir string, options ...string) error {
	bin, err := localpg.FindBinaries()
	if err != nil {
		return err
	}
	u, err := url.Parse(from.URL())
	if err != nil {
		return err
	}
	password, _ := u.User.Password()
	if err := os.WriteFile(filepath.Join(dir, "postgres.password"), []byte(password), 0o600); err != nil {
		return err
	}
	cluster := filepath.Join(dir, "postgres")
	if err := os.Mkdir(cluster, 0o700); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "pg_basebackup"), append(options, "--pgdata", filepath.Join(cluster, "data"),
		"--dbname", from.URL(), "--checkpoint=fast", "--no-sync", "--no-password")...)
	cmd.Dir, cmd.Env = cluster, []string{"LC_ALL=C"}
	if os.Geteuid() == 0 { // the user that the other server runs as
		info, err := os.Stat(from.ClusterDir())
		if err != nil {
			return err
		}
		owner := info.Sys().(*syscall.Stat_t)
		if err := os.Chown(cluster, int(owner.Uid), int(owner.Gid)); err != nil {
			return err
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: owner.Uid, Gid: owner.Gid}}
	}
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("pg_basebackup: %w\n%s", err, output)
	}
	return nil
}

// CutOff ends the connection between a standby and its primary for good. The standby has
// everything that was committed before, and nothing that is committed later.
func CutOff(t testing.TB, standby, primary *localpg.Server) {
	t.Helper()
	at := ask[string](t, primary, "select pg_current_wal_flush_lsn()::text")
	until(t, standby, "pg_last_wal_replay_lsn() >= '"+at+"'")
	mustRun(t, standby, "alter system set primary_conninfo = ''")
	mustRun(t, standby, "select pg_reload_conf()")
	until(t, standby, "not exists (select from pg_stat_wal_receiver)")
}

// PauseReplay makes a standby receive changes without applying them, so that reads see an
// earlier state.
func PauseReplay(t testing.TB, standby *localpg.Server) {
	t.Helper()
	mustRun(t, standby, "select pg_wal_replay_pause()")
	until(t, standby, "pg_get_wal_replay_pause_state() = 'paused'")
}

// ResumeReplay undoes PauseReplay.
func ResumeReplay(t testing.TB, standby *localpg.Server) {
	t.Helper()
	mustRun(t, standby, "select pg_wal_replay_resume()")
}

// Promote makes a standby a primary, on a new timeline, with all that it has received.
// The old primary does not notice.
func Promote(t testing.TB, standby *localpg.Server) {
	t.Helper()
	if !ask[bool](t, standby, "select pg_promote()") {
		t.Fatal("storetest: the standby is not promoted")
	}
}

// until waits for a condition.
func until(t testing.TB, server *localpg.Server, condition string) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if ask[bool](t, server, "select "+condition) {
			return
		}
	}
	t.Fatalf("storetest: never came true: %s", condition)
}

func mustRun(t testing.TB, server *localpg.Server, sql string) {
	t.Helper()
	if err := runAt(server.URL(), sql); err != nil {
		t.Fatalf("storetest: %s: %v", sql, err)
	}
}

func ask[T any](t testing.TB, server *localpg.Server, sql string) (answer T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, server.URL())
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	defer conn.Close(ctx)
	if err := conn.QueryRow(ctx, sql).Scan(&answer); err != nil {
		t.Fatalf("storetest: %s: %v", sql, err)
	}
	return answer
}
