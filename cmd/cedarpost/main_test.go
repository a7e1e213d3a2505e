package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// binary is the command under test. The tests run it as people do.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "cedarpost-test-")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "cedarpost")
	build := exec.Command("go", "build", "-ldflags=-w", "-o", binary, ".")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	code := 1
	if err := build.Run(); err == nil {
		code = m.Run()
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// result is the exit code and the output of a command.
type result struct {
	code     int
	out, err string
}

// shell runs commands with an environment of its own, and keeps all output.
type shell struct {
	binary string
	env    []string
	log    *strings.Builder
}

func newShell(env ...string) *shell {
	// No test but those of a rolling upgrade waits until clients have gone elsewhere.
	s := &shell{binary: binary, env: []string{"CEDARPOST_DRAIN_DELAY=0s"}, log: &strings.Builder{}}
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "CEDARPOST_") || strings.HasPrefix(kv, "CEDARPOST_POSTGRES_BIN=") {
			s.env = append(s.env, kv)
		}
	}
	s.env = append(s.env, env...)
	return s
}

func (s *shell) with(env ...string) *shell {
	return &shell{s.binary, append(append([]string{}, s.env...), env...), s.log}
}

// of returns a shell that runs another binary.
func (s *shell) of(binary string) *shell { return &shell{binary, s.env, s.log} }

func (s *shell) run(t *testing.T, args ...string) result {
	t.Helper()
	cmd := exec.Command(s.binary, args...)
	var out, errs bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env, &out, &errs
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatal(err)
	}
	s.log.WriteString(out.String() + errs.String())
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// exits runs a command. It fails unless the command ends with the code and prints each of the words,
// on stdout or stderr.
func (s *shell) exits(t *testing.T, code int, words []string, args ...string) result {
	t.Helper()
	r := s.run(t, args...)
	if r.code != code {
		t.Errorf("cedarpost %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), r.code, code, r.out, r.err)
	}
	for _, w := range words {
		if !strings.Contains(r.out+r.err, w) {
			t.Errorf("cedarpost %s: does not say %q\n%s%s", strings.Join(args, " "), w, r.out, r.err)
		}
	}
	return r
}

// says returns words for exits.
func says(words ...string) []string { return words }

// daemon is a running dev or serve.
type daemon struct {
	cmd   *exec.Cmd
	shell *shell
	ready string // the ready line without its first word
	errs  *syncBuffer
	dead  chan struct{}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// start runs a server until the test ends, and waits until it is ready.
func (s *shell) start(t *testing.T, args ...string) *daemon {
	t.Helper()
	d := &daemon{cmd: exec.Command(s.binary, args...), shell: s, errs: &syncBuffer{}, dead: make(chan struct{})}
	d.cmd.Env, d.cmd.Stderr = s.env, d.errs
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 1)
	go func() {
		r := bufio.NewReader(out)
		line, _ := r.ReadString('\n')
		lines <- line
		rest, _ := io.ReadAll(r)
		if len(rest) > 0 {
			fmt.Fprintf(d.errs, "more on stdout: %s", rest)
		}
		_ = d.cmd.Wait()
		close(d.dead)
	}()
	t.Cleanup(func() {
		_ = d.cmd.Process.Signal(syscall.SIGTERM)
		<-d.dead
	})
	select {
	case line := <-lines:
		rest, ok := strings.CutPrefix(line, "ready ")
		if !ok {
			<-d.dead
			t.Fatalf("not ready: %q\n%s", line, d.errs)
		}
		d.ready = strings.TrimSpace(rest)
	case <-time.After(2 * time.Minute):
		_ = d.cmd.Process.Kill()
		t.Fatalf("not ready in two minutes\n%s", d.errs)
	}
	return d
}

// url returns the address of a plane from the ready line.
func (d *daemon) url(plane string) string {
	m := regexp.MustCompile(plane + `=(\S+)`).FindStringSubmatch(d.ready)
	if m == nil {
		return ""
	}
	return m[1]
}

// stop sends a signal and waits for the end.
func (d *daemon) stop(t *testing.T, signal syscall.Signal) int {
	t.Helper()
	if err := d.cmd.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.dead:
	case <-time.After(2 * time.Minute):
		t.Fatalf("still running after %v\n%s", signal, d.errs)
	}
	d.shell.log.WriteString(d.errs.String())
	return d.cmd.ProcessState.ExitCode()
}

// freePort returns a free port. It is outside of the range from which the kernel assigns ports, so no
// other process gets it by chance.
func freePort(t *testing.T) string {
	t.Helper()
	for range 1000 {
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", 10_000+rand.IntN(10_000)))
		if err == nil {
			_ = l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

// anyPort makes a server listen on free ports.
var anyPort = []string{"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0"}

// dataDir returns a folder for dev. After the test it is removed, with the database that can be
// outside of it.
func dataDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		if cluster, err := filepath.EvalSymlinks(filepath.Join(dir, "postgres")); err == nil {
			_ = os.RemoveAll(cluster)
		}
	})
	return dir
}

// readEnv reads a dev.env as a shell does.
func readEnv(t *testing.T, file string) []string {
	t.Helper()
	out, err := exec.Command("sh", "-c", `. "$1" && env`, "sh", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	var env []string
	for line := range strings.SplitSeq(string(out), "\n") {
		if strings.HasPrefix(line, "CEDARPOST_") {
			env = append(env, line)
		}
	}
	return env
}

func value(env []string, name string) string {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// shopCopy copies the example bundle into a folder named shop, and appends text to some of its
// files.
func shopCopy(t *testing.T, more map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "shop")
	if err := os.CopyFS(dir, os.DirFS("../../policies/shop")); err != nil {
		t.Fatal(err)
	}
	for name, text := range more {
		old, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		write(t, dir, name, string(old)+text)
	}
	return dir
}

const failingTest = `
  - name: bob sees the order of carol
    principal: Shop::User::"bob"
    action: Shop::Action::"ViewOrder"
    resource: Shop::Order::"99"
    context: {mfa: true}
    expect: allow
`
