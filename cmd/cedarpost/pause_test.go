package main

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// TestReplicaPaused stops one of two servers, as a suspended machine does, for
// longer than its data may be old. Meanwhile a right is revoked through the other.
func TestReplicaPaused(t *testing.T) { replicaPaused(t, 2*time.Second, 3*time.Second) }

// TestSoakReplicaPaused is the long form.
func TestSoakReplicaPaused(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("long: make soak")
	}
	replicaPaused(t, 5*time.Second, 30*time.Second)
}

func replicaPaused(t *testing.T, bound, pause time.Duration) {
	pg := storetest.NewServer(t)
	dir := t.TempDir()
	keyFile := filepath.Join(dir, "key")
	sh := newShell("CEDARPOST_DATABASE_URL="+pg.URL(), "CEDARPOST_BOOTSTRAP_KEY_FILE="+keyFile, "CEDARPOST_TOKEN_FILE="+keyFile,
		"CEDARPOST_MAX_STALENESS="+bound.String())
	serve := append([]string{"serve", "--migrate"}, anyPort...)
	running := sh.start(t, serve...)
	admin := sh.with("CEDARPOST_ADMIN_URL=" + running.url("admin"))
	admin.exits(t, 0, nil, "apply", "../../policies/shop")
	admin.exits(t, 0, nil, "entities", "import", "../../policies/shop/entities.json")
	paused := sh.start(t, serve...)
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(d *daemon) (answer, error) {
		return askOnce(d.url("decision"), strings.TrimSpace(string(key)), "42")
	}
	for _, d := range []*daemon{running, paused} {
		if a, err := ask(d); err != nil || a.Decision != "ALLOW" {
			t.Fatalf("%v, %v before", a, err)
		}
	}

	// Some ask all the time, so that there are calls in flight when it stops.
	var over atomic.Bool
	var callers sync.WaitGroup
	defer callers.Wait()
	defer over.Store(true)
	for range 16 {
		callers.Go(func() {
			for !over.Load() {
				_, _ = ask(paused)
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	if err := paused.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = paused.cmd.Process.Signal(syscall.SIGCONT) }()
	since := time.Now()
	admin.exits(t, 0, nil, "entities", "import", write(t, dir, "dave.json",
		`[{"uid":{"type":"Shop::User","id":"dave"},"attrs":{"region":"eu","suspended":false},"parents":[]}]`))
	revoked, err := ask(running)
	if err != nil || revoked.Decision != "DENY" {
		t.Fatalf("%v, %v from the other server", revoked, err)
	}
	// Others ask while it is stopped: the first thing that it finds when it wakes up.
	var asked sync.WaitGroup
	for range 20 {
		asked.Go(func() {
			if a, err := ask(paused); err == nil && (a.Decision != "DENY" || a.Revision.Number < revoked.Revision.Number) {
				t.Errorf("%s at revision %d after the pause, revoked at %d", a.Decision, a.Revision.Number, revoked.Revision.Number)
			}
		})
	}
	time.Sleep(time.Until(since.Add(pause)))
	if err := paused.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	asked.Wait()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		a, err := ask(paused)
		if err == nil {
			if a.Decision != "DENY" || a.Revision.Number < revoked.Revision.Number {
				t.Errorf("%s at revision %d, revoked at %d", a.Decision, a.Revision.Number, revoked.Revision.Number)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("does not recover: %v\n%s", err, paused.errs)
		}
	}
}
