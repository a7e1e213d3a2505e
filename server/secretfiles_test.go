package server_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// Metrics have the age of each file with a secret, and name those that are overdue: of two files of one
// setting the older one counts. A new file ends that without a restart.
func TestAgesOfSecretFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string, age time.Duration) string {
		name = filepath.Join(dir, name)
		at := time.Now().Add(-age).Truncate(time.Second)
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, at, at); err != nil {
			t.Fatal(err)
		}
		return name
	}
	const day = 24 * time.Hour
	young, old := file("young", day), file("old", 11*day)
	s := servertest.New(t, func(c *server.Config) {
		c.MaxSecretAge = 10 * day
		c.SecretFiles = []server.SecretFile{
			{Setting: "audit-key-file", Path: young}, {Setting: "audit-key-file", Path: old}, {Setting: "mask-key-file", Path: young},
			{Setting: "tls-key", Path: filepath.Join(dir, "none")},
		}
	})
	overdue := func(setting, want string) {
		t.Helper()
		metrics := servertest.Metrics(t, s)
		if line := `cedarpost_secret_file_overdue{setting="` + setting + `"} ` + want + "\n"; !strings.Contains(metrics, line) {
			t.Errorf("there is no %s", line)
		}
		if strings.Contains(metrics, dir) {
			t.Error("metrics have the name of a file")
		}
	}
	overdue("audit-key-file", "1")
	overdue("mask-key-file", "0")
	overdue("tls-key", "0") // it has no age; doctor and the log of the server say that it is missing
	if !strings.Contains(servertest.Metrics(t, s), `cedarpost_secret_file_timestamp_seconds{setting="tls-key"} NaN`) {
		t.Error("a file that is missing has an age")
	}
	file("old", 0)
	overdue("audit-key-file", "0")
}
