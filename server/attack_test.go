package server_test

import (
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// honest asks every 50 ms while an attack runs, and returns what it saw, for the log of the test.
func honest(t *testing.T, ask func() error) (seen func() string) {
	t.Helper()
	var took []time.Duration
	failed := 0
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			began := time.Now()
			if ask() != nil {
				failed++
			}
			took = append(took, time.Since(began))
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	return func() string {
		close(stop)
		<-done
		slices.Sort(took)
		return fmt.Sprintf("an honest caller: %d calls, %d failed, p50 %v, p99 %v, max %v",
			len(took), failed, took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
	}
}

// asks returns a call of the decision plane that needs no data.
func asks(t *testing.T, s *servertest.Server) func() error {
	return func() error {
		_, err := s.Authorization.GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
		return err
	}
}

var moreLines = regexp.MustCompile(`more=(\d+)`)

// counted returns how many lines with a text were written, and how many calls they stand for.
func (l *lines) counted(of string) (written, calls int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, of) {
			written++
			n := 1
			if m := moreLines.FindStringSubmatch(line); m != nil {
				n, _ = strconv.Atoi(m[1])
			}
			calls += n
		}
	}
	return written, calls
}

// Calls without a key make few lines in the log of the server, which count all of them.
func TestAttackCallsWithoutKeyFillTheLog(t *testing.T) {
	var log lines
	s := servertest.New(t, logLines(&log))
	const calls, at = 1000, 10
	seen := honest(t, asks(t, s))
	var group sync.WaitGroup
	for range at {
		stranger := s.Client(s.API, "")
		group.Go(func() {
			for range calls / at {
				_, err := cedarpostv1connect.NewAuthorizationServiceClient(stranger).GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
				if code := connect.CodeOf(err); code != connect.CodeUnauthenticated && code != connect.CodeResourceExhausted {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	saw := seen()
	s.Stop()
	written, counted := log.counted("call refused without a key")
	t.Logf("%d calls without a key: %d lines in the log, %s", calls, written, saw)
	if counted != calls {
		t.Errorf("the lines count %d calls, want %d", counted, calls)
	}
	if most := 100; written > most {
		t.Errorf("%d lines, want at most %d", written, most)
	}
	if log.count("peer=127.0.0.1:") == 0 || log.count("address=127.0.0.1") == 0 {
		t.Error("no line has the address of the stranger")
	}
}

// Calls that fail because the database is away make few lines, too.
func TestAttackFailedCallsFillTheLog(t *testing.T) {
	p := servertest.NewProxy(t, storetest.New(t))
	var log lines
	s := servertest.On(t, p.URL(), logLines(&log), func(c *server.Config) { c.MaxStaleness = 500 * time.Millisecond })
	p.Refuse(true)
	p.Cut()
	servertest.Eventually(t, "a failed call", func() bool { return connect.CodeOf(asks(t, s)()) == connect.CodeUnavailable })
	const calls = 1000
	for range calls {
		if err := asks(t, s)(); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Fatal(err)
		}
	}
	p.Refuse(false)
	s.Stop()
	written, counted := log.counted("call failed")
	t.Logf("%d calls without a database: %d lines in the log", calls, written)
	if counted < calls {
		t.Errorf("the lines count %d calls, want at least %d", counted, calls)
	}
	if most := 50; written > most {
		t.Errorf("%d lines, want at most %d", written, most)
	}
}

// Strangers that do not finish the TLS handshake make few lines.
func TestAttackBrokenHandshakesFillTheLog(t *testing.T) {
	var log lines
	cert, key := server.WritePair(t, t.TempDir(), "localhost", time.Now().Add(time.Hour))
	s := servertest.New(t, logLines(&log), func(c *server.Config) { c.TLSCert, c.TLSKey = cert, key })
	const connections = 300
	for range connections {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		_, _ = io.ReadAll(conn) // the server answers, logs and closes
		_ = conn.Close()
	}
	s.Stop()
	written, counted := log.counted("TLS handshake error")
	t.Logf("%d broken handshakes: %d lines in the log", connections, written)
	if counted != connections {
		t.Errorf("the lines count %d connections, want %d", counted, connections)
	}
	if most := 50; written > most {
		t.Errorf("%d lines, want at most %d", written, most)
	}
}
