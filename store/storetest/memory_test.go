package storetest

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store/localpg"
)

// Folders that processes left behind are removed. Those of a server that runs, of a process that
// starts its server now, and of other programs stay.
func TestRemoveAbandoned(t *testing.T) {
	parent := t.TempDir()
	old := time.Now().Add(-2 * abandonedAfter)
	makeDir := func(name string) string {
		t.Helper()
		dir := filepath.Join(parent, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	age := func(dir string) {
		t.Helper()
		if err := os.Chtimes(dir, old, old); err != nil {
			t.Fatal(err)
		}
	}
	abandoned, starting, used, others := makeDir(tempPrefix+"1"), makeDir(tempPrefix+"2"), makeDir(tempPrefix+"3"), makeDir("others-1")
	server, err := localpg.Start(context.Background(), localpg.Config{Dir: used})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
		os.RemoveAll(server.ClusterDir())
	})
	for _, dir := range []string{abandoned, used, others} {
		age(dir)
	}

	removeAbandoned(parent)
	for dir, stays := range map[string]bool{abandoned: false, starting: true, used: true, others: true} {
		if _, err := os.Stat(dir); (err == nil) != stays {
			t.Errorf("%s: %v, want it to stay: %t", filepath.Base(dir), err, stays)
		}
	}
}
