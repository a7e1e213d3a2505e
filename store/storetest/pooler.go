//go:build unix

package storetest

import (
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

	"github.com/cedarpost/cedarpost/store/localpg"
)

// Pooler starts a PgBouncer in front of the server of a database, and returns the URL of
// the same database through it. Each setting is a line of its configuration, such as
// "pool_mode = session". It is stopped after the test.
func Pooler(t testing.TB, databaseURL string, settings ...string) string {
	t.Helper()
	through, err := startPooler(t, databaseURL, settings)
	if err != nil {
		t.Fatalf("storetest: pgbouncer: %v", err)
	}
	return through
}

func startPooler(t testing.TB, databaseURL string, settings []string) (string, error) {
	program, err := findPgBouncer()
	if err != nil {
		return "", err
	}
	u, err := url.Parse(databaseURL)
	if err != nil {
		return "", err
	}
	dir, err := tempDir("")
	if err != nil {
		return "", err
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	password, _ := u.User.Password()
	users, config := filepath.Join(dir, "users.txt"), filepath.Join(dir, "pgbouncer.ini")
	lines := append([]string{
		"[databases]",
		fmt.Sprintf("* = host=%s port=%s", u.Hostname(), u.Port()),
		"[pgbouncer]",
		"unix_socket_dir = " + dir, // and no port, which another program could take first
		"auth_type = trust", "auth_file = " + users,
		"default_pool_size = 50", "max_client_conn = 200",
	}, settings...)
	for file, text := range map[string]string{
		users:  fmt.Sprintf("%q %q\n", u.User.Username(), password),
		config: strings.Join(lines, "\n") + "\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	// PgBouncer refuses to run as root.
	who, err := localpg.StepDown()
	if err != nil {
		return "", err
	}
	if who != nil {
		if err := os.Chown(dir, int(who.Uid), int(who.Gid)); err != nil {
			return "", err
		}
	}
	// The shell ends PgBouncer when its input ends: after the test, or when the test
	// process is killed.
	cmd := exec.Command("sh", "-c", `"$1" -q "$2" & read -r _; kill -INT $!; wait`, "sh", program, config)
	cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Credential: who, Setpgid: true}
	output, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		return "", err
	}
	defer output.Close()
	cmd.Stdout, cmd.Stderr = output, output
	alive, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	t.Cleanup(func() {
		alive.Close()
		_ = cmd.Wait() // it was told to end
	})
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("unix", filepath.Join(dir, ".s.PGSQL.6432"))
		if err == nil {
			_ = conn.Close()
			u.Host = ""
			query := u.Query()
			query.Set("host", dir)
			query.Set("port", "6432")
			u.RawQuery = strings.ReplaceAll(query.Encode(), "+", "%20")
			return u.String(), nil
		}
	}
	said, _ := os.ReadFile(output.Name())
	return "", fmt.Errorf("does not listen:\n%s", said)
}

// findPgBouncer looks for the program in the PATH and in the folders of packages, which
// are not in the PATH of every user.
func findPgBouncer() (string, error) {
	for _, name := range []string{"pgbouncer", "/usr/sbin/pgbouncer", "/usr/local/sbin/pgbouncer", "/opt/homebrew/bin/pgbouncer", "/usr/local/bin/pgbouncer"} {
		if program, err := exec.LookPath(name); err == nil {
			return program, nil
		}
	}
	return "", fmt.Errorf("not found: scripts/install-pgbouncer.sh installs it")
}
