package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/store/localpg"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// replicas are two servers on one database, in which dave may see an order.
type replicas struct {
	pg              *localpg.Server
	running, paused *daemon
	admin           *shell // of the running one
	key             string
}

func newReplicas(t *testing.T, bound time.Duration) *replicas {
	t.Helper()
	r := &replicas{pg: storetest.NewServer(t)}
	keyFile := filepath.Join(t.TempDir(), "key")
	sh := newShell("CEDARPOST_DATABASE_URL="+r.pg.URL(), "CEDARPOST_BOOTSTRAP_KEY_FILE="+keyFile, "CEDARPOST_TOKEN_FILE="+keyFile)
	serve := append([]string{"serve", "--migrate", "--development-database"}, anyPort...)
	r.running = sh.start(t, serve...)
	r.admin = sh.with("CEDARPOST_ADMIN_URL=" + r.running.url("admin"))
	r.admin.exits(t, 0, nil, "apply", "../../policies/shop")
	r.admin.exits(t, 0, nil, "entities", "import", "../../policies/shop/entities.json")
	// The staleness bound is close to the second between two polls of the database, so this server
	// can exceed it at any time. The other one has the usual bound.
	r.paused = sh.with("CEDARPOST_MAX_STALENESS="+bound.String()).start(t, serve...)
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	r.key = strings.TrimSpace(string(key))
	for _, d := range []*daemon{r.running, r.paused} {
		a, err := r.ask(d)
		for deadline := time.Now().Add(2 * time.Minute); err != nil && time.Now().Before(deadline); {
			time.Sleep(20 * time.Millisecond)
			a, err = r.ask(d)
		}
		if err != nil || a.Decision != "ALLOW" {
			t.Fatalf("%v, %v before", a, err)
		}
	}
	return r
}

func (r *replicas) ask(d *daemon) (answer, error) { return askOnce(d.url("decision"), r.key, "42") }

// revoke removes dave's right through the running server.
func (r *replicas) revoke(t *testing.T) (denied answer) {
	t.Helper()
	r.admin.exits(t, 0, nil, "entities", "import", write(t, t.TempDir(), "dave.json",
		`[{"uid":{"type":"Shop::User","id":"dave"},"attrs":{"region":"eu","suspended":false},"parents":[]}]`))
	denied, err := r.ask(r.running)
	if err != nil || denied.Decision != "DENY" {
		t.Fatalf("%v, %v from the other server", denied, err)
	}
	return denied
}

// pause stops the other server. resume continues it, a given time after the stop.
func (r *replicas) pause(t *testing.T) (resume func(after time.Duration)) {
	t.Helper()
	signal := func(s syscall.Signal) {
		if err := r.paused.cmd.Process.Signal(s); err != nil {
			t.Error(err)
		}
	}
	signal(syscall.SIGSTOP)
	waitStopped(t, r.paused.cmd.Process.Pid)
	since := time.Now()
	cont := sync.OnceFunc(func() { signal(syscall.SIGCONT) })
	t.Cleanup(cont)
	return func(after time.Duration) {
		time.Sleep(time.Until(since.Add(after)))
		cont()
	}
}

// waitStopped waits until each thread of a process has stopped. On a busy machine a thread can run
// on for some time after the signal. Without /proc it does not wait.
func waitStopped(t *testing.T, pid int) {
	t.Helper()
	for running := true; running; time.Sleep(time.Millisecond) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		running = slices.ContainsFunc(threads, func(name string) bool {
			stat, err := os.ReadFile(name)
			// 7 (name, which can hold anything) T 1 …: the state
			return err == nil && !strings.HasPrefix(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " T")
		})
	}
}

// TestReplicaPaused stops one of two servers, like a suspended machine, for longer than its staleness
// bound. Meanwhile a right is revoked through the other server.
func TestReplicaPaused(t *testing.T) { replicaPaused(t, 2*time.Second, 3*time.Second) }

// TestSoakReplicaPaused is the long form.
func TestSoakReplicaPaused(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("long: make soak")
	}
	replicaPaused(t, 5*time.Second, 30*time.Second)
}

func replicaPaused(t *testing.T, bound, pause time.Duration) {
	r := newReplicas(t, bound)
	resume := r.pause(t)
	revoked := r.revoke(t)
	check := func(a answer) {
		if a.Decision != "DENY" || a.Revision.Number < revoked.Revision.Number {
			t.Errorf("%s at revision %d after the pause, revoked at %d", a.Decision, a.Revision.Number, revoked.Revision.Number)
		}
	}
	// Some requests arrive while it is stopped, so it finds them first when it continues.
	var asked sync.WaitGroup
	for range 20 {
		asked.Go(func() {
			if a, err := r.ask(r.paused); err == nil {
				check(a)
			}
		})
	}
	resume(pause)
	asked.Wait()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		a, err := r.ask(r.paused)
		if err == nil {
			check(a)
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("does not recover: %v\n%s", err, r.paused.errs)
		}
	}
}

// TestReplicaPausedBeforeItsAnswer stops the server after it has decided, while it waits for the
// commit. When it continues, its data is older than its bound.
func TestReplicaPausedBeforeItsAnswer(t *testing.T) {
	t.Parallel() // it takes long
	const bound = 1200 * time.Millisecond
	r := newReplicas(t, bound)
	conn, err := pgx.Connect(t.Context(), r.pg.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "begin; lock table decisions in exclusive mode"); err != nil {
		t.Fatal(err)
	}
	var asked sync.WaitGroup
	var paused atomic.Bool
	for range 8 {
		asked.Go(func() {
			for { // its data can be too old before the pause too
				last := paused.Load()
				a, err := r.ask(r.paused)
				if err == nil && a.Decision != "DENY" {
					t.Errorf("%s at revision %d, more than %v after it was asked", a.Decision, a.Revision.Number, bound)
				}
				if err == nil || last {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	observer, err := pgx.Connect(t.Context(), r.pg.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer observer.Close(context.Background())
	for commits := false; !commits; {
		err := observer.QueryRow(t.Context(), "select exists (select from pg_stat_activity where query like '%copy decisions%' and wait_event_type = 'Lock')").Scan(&commits)
		if err != nil {
			t.Fatal(err)
		}
	}
	resume := r.pause(t)
	paused.Store(true)
	if _, err := conn.Exec(t.Context(), "rollback"); err != nil {
		t.Fatal(err)
	}
	r.revoke(t)
	resume(bound + 200*time.Millisecond)
	asked.Wait()
}
