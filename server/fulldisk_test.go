package server_test

import (
	"errors"
	"net/http"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/localpg"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// smallDisk mounts a file system of 64 MiB in memory, which Postgres can use. It returns "" if
// this process may not mount one.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cedarpost-disk-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	who, err := localpg.StepDown()
	if err != nil || who == nil {
		return "" // not root
	}
	if osexec.Command("mount", "-t", "tmpfs", "-o", "size=64m,mode=0755", "tmpfs", dir).Run() != nil {
		return ""
	}
	t.Cleanup(func() {
		if err := osexec.Command("umount", "--lazy", dir).Run(); err != nil {
			t.Error(err)
		}
	})
	tables := filepath.Join(dir, "tables")
	if err := errors.Join(os.Mkdir(tables, 0o700), os.Chown(tables, int(who.Uid), int(who.Gid))); err != nil {
		t.Fatal(err)
	}
	return dir
}

// When the disk of the log is full, the server says that it is not ready, and nothing is allowed
// without a record. When there is room again, it finds out by itself, although it gets no calls.
func TestAttackFullDisk(t *testing.T) {
	t.Parallel() // it waits most of the time
	disk := smallDisk(t)
	pg := storetest.NewServer(t)
	admin := servertest.Session(t, pg.URL())
	var fill, free func()
	if disk != "" {
		servertest.MustExec(t, admin, "create tablespace small location '"+filepath.Join(disk, "tables")+"'")
		servertest.MustExec(t, admin, "grant create on tablespace small to public")
		servertest.MustExec(t, admin, "alter database cedarpost set default_tablespace = small")
		filler := filepath.Join(disk, "filler")
		fill = func() {
			f, err := os.Create(filler)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for err == nil {
				_, err = f.Write(make([]byte, 4096))
			}
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
		}
		free = func() {
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
		}
	} else {
		t.Log("this process may not mount a small disk: the database refuses writes instead")
		fill = func() {
			servertest.MustExec(t, admin, "alter system set default_transaction_read_only = on")
			servertest.MustExec(t, admin, "select pg_reload_conf()")
		}
		free = func() {
			servertest.MustExec(t, admin, "set transaction_read_only = off")
			servertest.MustExec(t, admin, "alter system reset default_transaction_read_only")
			servertest.MustExec(t, admin, "select pg_reload_conf()")
		}
	}
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	s := servertest.On(t, pg.URL())
	s.MustLoadShop()
	ask := func() error {
		r, err := s.Authorization.Authorize(t.Context(), servertest.WithAllFields(servertest.AskShop("bob", "ViewOrder", "42", true)))
		if err == nil && r.DecisionId == "" {
			t.Error("an answer without a record")
		}
		return err
	}
	failures := func() float64 { return number(t, s, "cedarpost_record_failures_total") }
	ready := func() bool { status, _ := readyz(t, s); return status == http.StatusOK }
	if err := ask(); err != nil || !ready() {
		t.Fatalf("before: %v, ready: %t", err, ready())
	}

	fill()
	asked, refused := 0, 0
	servertest.Eventually(t, "a server that is not ready", func() bool {
		for range 20 {
			asked++
			if err := ask(); err != nil {
				refused++
				if connect.CodeOf(err) != connect.CodeUnavailable {
					t.Fatal(err)
				}
			}
		}
		return !ready()
	})
	if status, reason := readyz(t, s); status != http.StatusServiceUnavailable || !strings.Contains(reason, "not ready: the decision log cannot be written for ") {
		t.Errorf("%d %s", status, reason)
	}
	// No load balancer sends calls now. The server goes on looking.
	idle := failures()
	servertest.Eventually(t, "probes", func() bool { return failures() >= idle+3 })
	if ready() {
		t.Error("ready with a full disk")
	}
	free()
	servertest.Eventually(t, "a server that is ready again", ready)
	if err := ask(); err != nil {
		t.Error(err)
	}
	var unrecorded int
	if err := servertest.Session(t, pg.URL()).QueryRow(t.Context(), "select $1::int - count(*) from decisions", asked-refused+2).Scan(&unrecorded); err != nil || unrecorded > 0 {
		t.Errorf("%d answers have no record, %v", unrecorded, err)
	}
	t.Logf("attack: a full disk (real: %t): %d of %d calls refused until the server is not ready, %d answers without a record",
		disk != "", refused, asked, max(unrecorded, 0))
}

// A signer that stopped is visible as the age of the newest checkpoint, in the metrics and in
// the warning, on servers that do not sign, too.
func TestCheckpointAge(t *testing.T) {
	t.Parallel() // it waits most of the time
	key, verifier := servertest.LogKey(t, "log.example/test")
	s := servertest.New(t, servertest.Signing(key, filepath.Join(t.TempDir(), "checkpoints")), func(c *server.Config) { c.Signing.Overdue = time.Second })
	servertest.Covered(t, s, verifier)
	age := func() float64 { return number(t, s, "cedarpost_checkpoint_age_seconds") }
	// Somebody holds the lock of the signer, and the log grows.
	thief := servertest.Session(t, s.URL)
	servertest.MustExec(t, thief, `select pg_terminate_backend(pid, 60000) from pg_locks join pg_class on pg_class.oid = relation
		where relname = 'signer_lock' and locktype = 'relation'`)
	servertest.MustExec(t, thief, "begin; lock table signer_lock in share update exclusive mode")
	if _, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{}); err != nil { // it is recorded
		t.Fatal(err)
	}
	servertest.Eventually(t, "an age", func() bool { return age() > 0 })
	servertest.Eventually(t, "a warning", func() bool {
		status, text := readyz(t, s)
		return status == http.StatusOK && strings.Contains(text, "warning: signing: ") && strings.Contains(text, "the newest one is ")
	})
	servertest.MustExec(t, thief, "rollback")
	servertest.Eventually(t, "no age", func() bool { return age() == 0 })
}
