package storetest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/store/localpg"
)

// Dump writes a database into a file, with pg_dump.
func Dump(t testing.TB, databaseURL string) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "dump")
	tool(t, "pg_dump", "--format=custom", "--file", file, "--dbname", databaseURL)
	return file
}

// Restore makes a new database from a file of [Dump] with pg_restore, in the cluster of
// another database. It is dropped after the test.
func Restore(t testing.TB, file, besideURL string) (databaseURL string) {
	t.Helper()
	databaseURL = beside(t, besideURL, "")
	tool(t, "pg_restore", "--exit-on-error", "--dbname", databaseURL, file)
	return databaseURL
}

// Clone makes a copy of a database in the same cluster. No session may use the original.
// The copy is dropped after the test.
func Clone(t testing.TB, databaseURL string) string {
	t.Helper()
	return beside(t, databaseURL, " template "+nameOf(databaseURL))
}

// CloneAsFiles is [Clone], except that the copy is not recognized as one, like a copy of
// the files of a cluster.
func CloneAsFiles(t testing.TB, databaseURL string) string {
	t.Helper()
	clone := Clone(t, databaseURL)
	if err := runAt(clone, "update revision set home = database_home()"); err != nil {
		t.Fatalf("storetest: %v", err)
	}
	return clone
}

// Replace gives two databases each other's names, and ends all sessions of both.
func Replace(t testing.TB, databaseURL, byURL string) {
	t.Helper()
	admin := withDatabase(databaseURL, "postgres")
	name, by := nameOf(databaseURL), nameOf(byURL)
	for _, sql := range []string{
		"alter database " + name + " allow_connections false",
		"alter database " + by + " allow_connections false",
		"select pg_terminate_backend(pid, 60000) from pg_stat_activity where datname in ('" + name + "', '" + by + "')",
		"alter database " + name + " rename to " + name + "_away",
		"alter database " + by + " rename to " + name,
		"alter database " + name + "_away rename to " + by,
		"alter database " + name + " allow_connections true",
		"alter database " + by + " allow_connections true",
	} {
		if err := runAt(admin, sql); err != nil {
			t.Fatalf("storetest: %s: %v", sql, err)
		}
	}
}

func nameOf(databaseURL string) string {
	path, _, _ := strings.Cut(databaseURL, "?")
	return path[strings.LastIndex(path, "/")+1:]
}

// beside makes a database in the cluster of another one.
func beside(t testing.TB, databaseURL, options string) string {
	t.Helper()
	admin, name := withDatabase(databaseURL, "postgres"), "copy_"+strings.ReplaceAll(uuid.NewString(), "-", "")
	if err := runAt(admin, "create database "+name+options); err != nil {
		t.Fatalf("storetest: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() && os.Getenv(KeepEnv) != "" {
			return
		}
		_ = runAt(admin, "drop database if exists "+name+" with (force)") // its cluster may be stopped
	})
	return withDatabase(databaseURL, name)
}

// tool runs a program of Postgres.
func tool(t testing.TB, name string, args ...string) {
	t.Helper()
	bin, err := localpg.FindBinaries()
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, name), args...)
	cmd.Env = []string{"LC_ALL=C"}
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("storetest: %s: %v\n%s", name, err, output)
	}
}
