package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// A server signs with a key of OpenSSH's agent, which agent-keys prints the verifier key of, and the
// log is verified with that.
func TestAuditAgent(t *testing.T) {
	t.Parallel()                          // it takes long
	dir, err := os.MkdirTemp("", "agent") // the path of a socket is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket, key := filepath.Join(dir, "s"), filepath.Join(dir, "id")
	agent := exec.Command("ssh-agent", "-D", "-a", socket)
	if err := agent.Start(); err != nil {
		t.Fatalf("%v: scripts/install-ssh-agent.sh installs it", err)
	}
	t.Cleanup(func() {
		_ = agent.Process.Kill()
		_ = agent.Wait()
	})
	eventually(t, "the agent listens", func() bool {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	sh := newShell("SSH_AUTH_SOCK=" + socket)
	sh.exits(t, 1, says("--audit-agent", "has no Ed25519 key"), "audit", "agent-keys", "--name=audit.example.org/x")
	newShell("SSH_AUTH_SOCK=").exits(t, 2, says("--audit-agent"), "audit", "agent-keys", "--name=audit.example.org/x")
	for _, args := range [][]string{{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "key of the log", "-f", key}, {"ssh-add", "-q", key}} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = sh.env
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	line := sh.exits(t, 0, says("audit.example.org/x+", "key of the log"), "audit", "agent-keys", "--name=audit.example.org/x").out
	sh.exits(t, 1, says("cannot name a log"), "audit", "agent-keys", "--name=a b")
	verifier, _, _ := strings.Cut(line, "\t")

	pg := storetest.NewServer(t)
	checkpoints := filepath.Join(t.TempDir(), "checkpoints")
	sh = newShell(databaseURLEnv+"="+pg.URL(), "CEDARPOST_AUDIT_AGENT="+socket, "CEDARPOST_AUDIT_AGENT_KEY="+verifier)
	serve := append([]string{"serve", "--migrate", "--development-database"}, anyPort...)
	sh.exits(t, 2, says("--audit-agent-key need --audit-checkpoint-file"), serve...)
	sh.exits(t, 1, says("--audit-agent-key", "is not a verifier key"), append(serve, "--audit-agent-key=x", "--audit-checkpoint-file", checkpoints)...)
	d := sh.start(t, append(serve, "--audit-checkpoint-file", checkpoints)...)
	eventually(t, "the log is signed", func() bool {
		text, err := os.ReadFile(checkpoints)
		return err == nil && strings.Contains(string(text), "audit.example.org/x")
	})
	d.stop(t, syscall.SIGTERM)
	sh.exits(t, 0, nil, "audit", "verify", "--verifier-key", verifier, "--against", checkpoints)
}
