package decisionlog_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// sshAgent is an ssh-agent of OpenSSH. scripts/install-ssh-agent.sh installs it.
type sshAgent struct {
	t      *testing.T
	socket string
	cmd    *exec.Cmd
}

func newSSHAgent(t *testing.T) *sshAgent {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent") // the path of a socket is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	a := &sshAgent{t: t, socket: filepath.Join(dir, "s")}
	a.start()
	t.Cleanup(a.stop)
	return a
}

// start starts the agent, without keys.
func (a *sshAgent) start() {
	a.t.Helper()
	_ = os.Remove(a.socket)
	a.cmd = exec.Command("ssh-agent", "-D", "-a", a.socket)
	if err := a.cmd.Start(); err != nil {
		a.t.Fatalf("%v: scripts/install-ssh-agent.sh installs it", err)
	}
	servertest.Eventually(a.t, "the agent listens", func() bool {
		conn, err := net.Dial("unix", a.socket)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
}

func (a *sshAgent) stop() {
	_ = a.cmd.Process.Kill()
	_ = a.cmd.Wait()
}

// run runs a program of OpenSSH with this agent.
func (a *sshAgent) run(input, name string, args ...string) {
	a.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "SSH_AUTH_SOCK="+a.socket)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		a.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// sshKey makes a key of a type and returns its file.
func (a *sshAgent) sshKey(kind string) string {
	a.t.Helper()
	file := filepath.Join(a.t.TempDir(), "id")
	a.run("", "ssh-keygen", "-q", "-t", kind, "-N", "", "-C", kind+" of a test", "-f", file)
	return file
}

// failures returns how often a server failed to sign, by cause.
func failures(t *testing.T, s *servertest.Server, cause string) string {
	t.Helper()
	m := regexp.MustCompile(`cedarpost_checkpoint_failures_total\{cause="` + cause + `"\} (\S+)`).FindStringSubmatch(servertest.Metrics(t, s))
	if m == nil {
		t.Fatalf("no metric of cause %s", cause)
	}
	return m[1]
}

// The log is signed with a key that an ssh-agent keeps. While the agent is away, has no such key or is
// locked, nothing is signed and that is seen, and decisions go on; then signing goes on.
func TestAgentSignsTheLog(t *testing.T) {
	t.Parallel() // it takes long
	a := newSSHAgent(t)
	key := a.sshKey("ed25519")
	a.run("", "ssh-add", "-q", a.sshKey("ecdsa"), key)
	const name = "test.example/log"
	keys, err := decisionlog.AgentKeys(a.socket, name)
	if err != nil || len(keys) != 1 || keys[0].Comment != "ed25519 of a test" {
		t.Fatalf("%v, %v, want the Ed25519 key", keys, err)
	}
	verifier, err := note.NewVerifier(keys[0].Verifier)
	if err != nil {
		t.Fatal(err)
	}
	checkpoints := filepath.Join(t.TempDir(), "checkpoints")
	signing := decisionlog.Signing{Agent: a.socket, AgentKeys: []string{keys[0].Verifier}, CheckpointFile: checkpoints, Overdue: 1}
	if err := decisionlog.TryKeys(signing); err != nil {
		t.Fatal(err)
	}
	s := servertest.New(t, func(c *server.Config) { c.Signing = decisionlog.SignOften(signing) })
	s.MustLoadShop()
	servertest.DecideSome(t, s, 5)
	last, _ := servertest.Covered(t, s, verifier) // it verifies the signature, as everybody can

	for _, broken := range []struct {
		what        string
		away, again func()
	}{
		{"is away", a.stop, func() { a.start(); a.run("", "ssh-add", "-q", key) }},
		{"has lost the key", func() { a.run("", "ssh-add", "-q", "-d", key) }, func() { a.run("", "ssh-add", "-q", key) }},
	} {
		broken.away()
		before := failures(t, s, "agent")
		servertest.DecideSome(t, s, 5)
		servertest.Eventually(t, "the metric counts that the agent "+broken.what, func() bool { return failures(t, s, "agent") != before })
		servertest.Eventually(t, "readiness warns that the agent "+broken.what, func() bool {
			status, text := readyz(t, s)
			return status == 200 && strings.Contains(text, "warning: signing: ") && strings.Contains(text, "the ssh-agent of this server is away or refuses to sign")
		})
		if err := decisionlog.TryKeys(signing); err == nil || !strings.Contains(err.Error(), "ssh-agent: ") {
			t.Errorf("the agent %s: %v", broken.what, err)
		}
		broken.again()
		c, _ := servertest.Covered(t, s, verifier)
		if c.Size <= last.Size {
			t.Errorf("the agent %s and is back: nothing was signed", broken.what)
		}
		last = c
	}
	s.Stop()

	// The key of the agent and that of a file sign together, while keys rotate.
	file, other := servertest.LogKey(t, name)
	signing.KeyFiles = []string{file}
	s = servertest.On(t, s.URL, func(c *server.Config) { c.Signing = decisionlog.SignOften(signing) })
	servertest.DecideSome(t, s, 5)
	_, signed := servertest.Covered(t, s, verifier)
	if _, err := auditlog.OpenCheckpoint([]byte(signed), other); err != nil {
		t.Errorf("the key of the file did not sign: %v", err)
	}
}

// A key of an agent that is configured wrongly is refused at the start, and no error shows a private
// key.
func TestAgentKeysThatAreRefused(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	secret, err := os.ReadFile(first(servertest.LogKey(t, "test.example/log")))
	if err != nil {
		t.Fatal(err)
	}
	_, one := servertest.LogKey(t, "test.example/log")
	_, two := servertest.LogKey(t, "test.example/other")
	text := func(v note.Verifier) string { return auditlog.KeyID(v) + "+AAAA" } // not a whole key
	for name, c := range map[string]struct {
		signing decisionlog.Signing
		want    string
	}{
		"no socket":        {decisionlog.Signing{AgentKeys: []string{"x"}}, "need an ssh-agent"},
		"no keys":          {decisionlog.Signing{Agent: "/x"}, "needs the verifier keys"},
		"not a key":        {decisionlog.Signing{Agent: "/x", AgentKeys: []string{text(one)}}, "is not a verifier key"},
		"a private key":    {decisionlog.Signing{Agent: "/x", AgentKeys: []string{strings.TrimSpace(string(secret))}}, "a private key is given"},
		"a key of no name": {decisionlog.Signing{Agent: "/x", AgentKeys: []string{text(two)[10:]}}, "is not a verifier key"},
	} {
		c.signing.CheckpointFile = filepath.Join(t.TempDir(), "checkpoints")
		_, err := server.New(t.Context(), server.Config{DB: s.DB, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: "127.0.0.1:0", Signing: c.signing, Log: slog.New(slog.DiscardHandler)})
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "PRIVATE") {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if _, err := decisionlog.AgentKeys("/nowhere", "x"); err == nil || !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func first(file string, _ note.Verifier) string { return file }

// An agent that answers nonsense, too much or nothing cannot make the server store a checkpoint without
// a valid signature, or wait for ever.
func TestAttackAgentLies(t *testing.T) {
	a := newSSHAgent(t)
	key := a.sshKey("ed25519")
	a.run("", "ssh-add", "-q", key)
	keys, err := decisionlog.AgentKeys(a.socket, "test.example/log")
	if err != nil {
		t.Fatal(err)
	}
	// The answer of the agent to one request for a signature: type 14, a signature, in a packet.
	packet := func(body []byte) []byte { return append([]byte{0, 0, byte(len(body) >> 8), byte(len(body))}, body...) }
	text := func(b []byte) []byte { return append([]byte{0, 0, 0, byte(len(b))}, b...) }
	signature := func(format string, blob []byte) []byte {
		return packet(append([]byte{14}, text(slices.Concat(text([]byte(format)), text(blob)))...))
	}
	refused := 0
	for name, answer := range map[string][]byte{
		"a signature of zeros":          signature("ssh-ed25519", make([]byte, 64)),
		"a short signature":             signature("ssh-ed25519", make([]byte, 5)),
		"an empty signature":            signature("ssh-ed25519", nil),
		"a signature of another format": signature("ssh-rsa", make([]byte, 64)),
		"a failure":                     packet([]byte{5}),
		"an unknown message":            packet([]byte{200, 1, 2, 3}),
		"an empty message":              {0, 0, 0, 0},
		"a message of 4 GiB":            {255, 255, 255, 255, 14},
		"half a message":                {0, 0, 0, 50, 14, 0},
		"noise":                         bytes.Repeat([]byte{0x41}, 100),
		"nothing":                       {},
	} {
		socket := filepath.Join(filepath.Dir(a.socket), "liar")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 1000))
			_, _ = conn.Write(answer)
			_ = conn.Close()
		}()
		err = decisionlog.TryKeys(decisionlog.Signing{Agent: socket, AgentKeys: []string{keys[0].Verifier}})
		if err == nil || !strings.Contains(err.Error(), "ssh-agent: ") {
			t.Errorf("%s: %v", name, err)
		} else {
			refused++
		}
		_ = l.Close()
		<-done
	}
	t.Logf("attack: an ssh-agent that gives 11 wrong answers; accepted: %d", 11-refused)
}

// readyz asks a server whether it is ready.
func readyz(t *testing.T, s *servertest.Server) (status int, text string) {
	t.Helper()
	res, err := http.Get(s.Ops + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}
