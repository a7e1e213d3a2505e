//go:build unix

package localpg

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a running Postgres.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed after the process has exited and was waited for
}

// command prepares to run one of the binaries as the owner. It does not pass on the
// environment of this process, because variables like PGPORT would have an effect.
func (s *Server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, name), args...)
	cmd.Dir = s.cluster
	cmd.Env = []string{"PATH=" + s.bin + ":/usr/bin:/bin", "LC_ALL=C", "TZ=UTC"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: s.owner,
		// Ctrl-C in the terminal must end this process only, which stops the database
		// last.
		Setpgid: true,
	}
	dieWithParent(cmd.SysProcAttr)
	return cmd
}

// startProcess starts cmd and waits for its end in the background.
func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// For Linux the parent is the thread and not the process, so the thread must live
		// as long as the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // its ProcessState has the result
		}
		close(p.done)
	}()
	return p, <-started
}

// state says how the process ended.
func (p *process) state() *os.ProcessState { return p.cmd.ProcessState }

// stop sends the signal and waits. If the process does not end in time, stop kills it.
func (p *process) stop(signal syscall.Signal, patience time.Duration) error {
	if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
	}
	_ = p.cmd.Process.Kill() // it may just have ended
	<-p.done
	return fmt.Errorf("the server did not stop within %v and was killed", patience)
}

// kill kills the process and its children, which are in sessions of their own, and waits
// until none is left. It suspends the parent first, so that the parent neither starts
// other children nor tells the rest that one died.
func (p *process) kill(patience time.Duration) error {
	defer func() {
		_ = p.cmd.Process.Kill() // it may have ended before
		<-p.done
	}()
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return nil
		}
		return err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		living, err := children(p.cmd.Process.Pid)
		if err != nil || len(living) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes of the server are still there %v after they were killed", len(living), patience)
		}
		for _, pid := range living {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may just have ended
		}
	}
}

// stopOrphan stops a server that still runs on the data although its parent, which had
// the lock, has ended.
func stopOrphan(data string) error {
	file, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	line, _, _ := strings.Cut(string(file), "\n")
	pid, err := strconv.Atoi(line)
	// If a crash left the file behind, Postgres removes it itself.
	if err != nil || !servesData(pid, data) {
		return nil //nolint:nilerr // a crash can leave a file without a number behind, too
	}
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT} {
		_ = syscall.Kill(pid, signal) // it may just have ended
		for range 500 {
			if !servesData(pid, data) {
				return nil
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return fmt.Errorf("a server left over from before does not stop: process %d", pid)
}
