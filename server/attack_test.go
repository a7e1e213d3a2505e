package server_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

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
				if code := connect.CodeOf(err); code != connect.CodeUnauthenticated {
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

// Calls of the health service whose body does not come do not pile up, and do not keep probes out.
func TestAttackHealthCallsWithoutBody(t *testing.T) {
	s := servertest.New(t, server.PatientHealth)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	defer transport.CloseIdleConnections()
	const calls = 2 * server.MaxStrangers
	var ended atomic.Int64
	var group sync.WaitGroup
	for range calls {
		body, open := io.Pipe()
		t.Cleanup(func() { _ = open.Close() })
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.API+"/grpc.health.v1.Health/Check", body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/proto")
		req.Header.Set("X-Large", strings.Repeat("x", 8<<10))
		group.Go(func() {
			res, err := transport.RoundTrip(req)
			if err == nil {
				_ = res.Body.Close()
			}
			ended.Add(1)
		})
	}
	h := healthOf(s, s.API)
	seen := honest(t, func() error { _, err := h.Check(t.Context(), &healthv1.HealthCheckRequest{}); return err })
	servertest.Eventually(t, "a bound", func() bool { return calls-ended.Load() <= server.MaxStrangers })
	t.Logf("%d calls of health without a body: %d wait, %s", calls, calls-ended.Load(), seen())
	if _, err := h.Check(t.Context(), &healthv1.HealthCheckRequest{}); err != nil {
		t.Error(err)
	}
	stop()
	group.Wait()
}

// connectionsOf returns the metric of the open connections of the decision plane.
func connectionsOf(t *testing.T, s *servertest.Server) int {
	return int(number(t, s, `cedarpost_connections{plane="decision"}`))
}

// Strangers that open connections and keep them do not end the connections of callers with a
// key, and do not keep new callers and probes out. Nor does one caller that opens many.
func TestAttackIdleConnections(t *testing.T) {
	const most = 20
	s := servertest.New(t, func(c *server.Config) { c.MaxConnections = most })
	ask := asks(t, s)
	if err := ask(); err != nil { // the connection of a caller, which is used again
		t.Fatal(err)
	}
	flood := func(address string, n int) {
		t.Helper()
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
		for range n {
			conn, err := dialer.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
			if _, err := conn.Write([]byte("POST / HTTP/1.1\r\n")); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
				t.Fatal(err)
			}
		}
	}
	const connections = 100
	flood("127.0.0.2", connections)
	servertest.Eventually(t, "half of the places", func() bool { return connectionsOf(t, s) <= most/2+1 })
	for i := range 5 {
		flood(fmt.Sprintf("127.0.0.%d", i+3), connections/5)
	}
	servertest.Eventually(t, "a bound", func() bool { return connectionsOf(t, s) <= most })
	if err := ask(); err != nil {
		t.Errorf("the caller: %v", err)
	}
	s.UseKey(s.Token) // new connections
	if err := asks(t, s)(); err != nil {
		t.Errorf("a new caller: %v", err)
	}
	if _, err := healthOf(s, s.API).Check(t.Context(), &healthv1.HealthCheckRequest{}); err != nil {
		t.Errorf("a probe: %v", err)
	}
	t.Logf("%d connections of strangers: %d of %d places taken, %v displaced", 2*connections, connectionsOf(t, s), most,
		number(t, s, `cedarpost_connections_closed_total{plane="decision",why="displaced"}`))

	// A caller with a key does not get all places either.
	key := tenant(t, s)
	for i := range 2 * most {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(10+i%4))}}
		conn, err := dialer.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
			cedarpostv1connect.AuthorizationServiceGetRevisionProcedure, key)
		_, _ = conn.Read(make([]byte, 1))
	}
	s.UseKey(s.Token)
	if err := asks(t, s)(); err != nil {
		t.Errorf("a new caller: %v", err)
	}
	t.Logf("%d connections of one caller: %d of %d places taken, %v of others refused", 2*most, connectionsOf(t, s), most,
		number(t, s, `cedarpost_connections_closed_total{plane="decision",why="refused"}`))
}

// A call without a key whose body does not come is ended soon, and so is its connection.
func TestAttackSlowBodies(t *testing.T) {
	s := servertest.New(t)
	for name, path := range map[string]string{"no key": "/cedarpost.v1.AuthorizationService/Authorize", "health": "/grpc.health.v1.Health/Check"} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{", path); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		answer, err := io.ReadAll(conn)
		t.Logf("%s: ended after %v", name, time.Since(began))
		if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 ")) || bytes.HasPrefix(answer, []byte("HTTP/1.1 200")) {
			t.Errorf("%s: %q, %v", name, answer, err)
		}
	}
}

// tenant stores a second API key and returns it.
func tenant(t *testing.T, s *servertest.Server) string {
	t.Helper()
	const key = "cedarpost_key-of-a-tenant-0123456789abcdef"
	servertest.AddCaller(t, s.DB, "tenant", key)
	c := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, key))
	servertest.Eventually(t, "the key", func() bool {
		_, err := c.GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
		return err == nil
	})
	return key
}

// Two callers take all connections. When their keys are revoked, their connections become those of
// strangers, and give way to a new caller.
func TestAttackRevokedConnections(t *testing.T) {
	const most = 6
	s := servertest.New(t, func(c *server.Config) { c.MaxConnections = most })
	type client struct {
		conn net.Conn
		in   *bufio.Reader
		key  string
	}
	call := func(c client) (status int) {
		_, _ = fmt.Fprintf(c.conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
			cedarpostv1connect.AuthorizationServiceGetRevisionProcedure, c.key)
		res, err := http.ReadResponse(c.in, nil)
		if err != nil {
			return 0
		}
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		return res.StatusCode
	}
	var held []client
	for i := range 2 * most {
		key := fmt.Sprintf("cedarpost_key-of-tenant-%d-0123456789abcdef", i%2)
		if i < 2 {
			servertest.AddCaller(t, s.DB, key, key)
		}
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(20+i))}}
		conn, err := dialer.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		c := client{conn, bufio.NewReader(conn), key}
		if i < 2 {
			servertest.Eventually(t, "the key", func() bool { return call(c) == http.StatusOK })
		}
		if call(c) == http.StatusOK {
			held = append(held, c)
		}
	}
	s.UseKey(s.Token) // new connections
	if err := asks(t, s)(); err == nil {
		t.Fatal("a new caller finds a place while others hold all, so this test is of something else")
	}
	servertest.MustExec(t, servertest.Session(t, s.URL), "update api_keys set revoked_at = now() where name <> 'bootstrap'")
	refused := 0
	for _, c := range held {
		servertest.Eventually(t, "refused calls", func() bool {
			switch call(c) {
			case http.StatusUnauthorized, http.StatusTooManyRequests:
				refused++
			}
			return refused%10 == 0 && refused > 0
		})
	}
	s.UseKey(s.Token)
	if err := asks(t, s)(); err != nil {
		t.Errorf("a new caller: %v", err)
	}
	t.Logf("%d of %d connections had a key that is revoked; after %d refused calls a new caller finds a place", len(held), most, refused)
}

// Bodies that come slowly hold what has come, and no more than the share of their caller. Another
// caller is answered meanwhile.
func TestAttackLargeBodies(t *testing.T) {
	const size, budget = 4 << 20, 16 << 20
	s := servertest.New(t, func(c *server.Config) { c.RequestBytes = budget })
	key := tenant(t, s)
	list := func(key string, body io.Reader) (status int, text string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.Admin+"/cedarpost.v1.EntityService/ListEntities", body)
		if err != nil {
			t.Error(err)
			return 0, ""
		}
		req.ContentLength = size
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+key)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	whole := func() io.Reader { return strings.NewReader("{" + strings.Repeat(" ", size-2) + "}") }
	seen := honest(t, asks(t, s))
	for _, attack := range []struct{ calls, sent, refused int }{
		{64, 1, 0},
		{12, size / 2, 8}, // the share has room for four at most
	} {
		var refused, other atomic.Int64
		var group sync.WaitGroup
		var bodies []*io.PipeWriter
		for range attack.calls {
			body, write := io.Pipe()
			bodies = append(bodies, write)
			group.Go(func() { _, _ = write.Write(bytes.Repeat([]byte(" "), attack.sent)) })
			group.Go(func() {
				if status, text := list(key, body); status == http.StatusTooManyRequests && strings.Contains(text, "this caller hold 8 MiB") {
					refused.Add(1)
				} else {
					other.Add(1)
				}
				_ = body.Close()
			})
		}
		servertest.Eventually(t, "refusals", func() bool { return refused.Load() >= int64(attack.refused) })
		if status, text := list(s.Token, whole()); status != http.StatusOK {
			t.Errorf("another caller: %d %s", status, text)
		}
		if attack.refused == 0 {
			if status, text := list(key, whole()); status != http.StatusOK {
				t.Errorf("the caller itself: %d %s", status, text)
			}
		}
		for _, w := range bodies {
			_ = w.CloseWithError(io.ErrUnexpectedEOF)
		}
		group.Wait()
		t.Logf("%d bodies of %d MiB, of which %d bytes are sent: %d refused", attack.calls, size>>20, attack.sent, refused.Load())
	}
	t.Log(seen())
	servertest.Eventually(t, "the share of the tenant", func() bool { status, _ := list(key, whole()); return status == http.StatusOK })
}

// An address that guesses keys is told to slow down, and its connections are closed. A caller
// with a key and the same address, as behind a proxy, is answered all the time.
func TestAttackKeyGuesses(t *testing.T) {
	var log lines
	s := servertest.New(t, logLines(&log))
	seen := honest(t, asks(t, s))
	var dials atomic.Int64
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials.Add(1)
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	guesser := connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: transport}, s.API), func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			info, _ := connect.CallInfoForClientContext(ctx)
			info.RequestHeader().Set("Authorization", "Bearer cedarpost_guess")
			return next(ctx, spec)
		}
	})
	const guesses = 600
	began, refused, unknown := time.Now(), 0, 0
	for range guesses {
		_, err := cedarpostv1connect.NewAuthorizationServiceClient(guesser).GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
		if servertest.WantCode(t, err, connect.CodeUnauthenticated, ""); strings.Contains(err.Error(), access.ErrTooManyFailures.Error()) {
			refused++
		} else {
			unknown++
		}
	}
	seconds := int(time.Since(began).Seconds())
	t.Logf("%d guesses of a key: %d refused by the rate of their address, over %d connections, %s", guesses, refused, dials.Load(), seen())
	if most := 50 * (seconds + 2); unknown > most {
		t.Errorf("%d guesses were looked up, want at most %d", unknown, most)
	}
	if refused > 0 && dials.Load() < 2 {
		t.Errorf("%d guesses are refused on one connection", refused)
	}
	if err := asks(t, s)(); err != nil {
		t.Errorf("a caller with a key: %v", err)
	}
}

// Atomic imports, which are kept in memory to their end, are bounded in number, and one caller does
// not keep another one from importing.
func TestAttackAtomicImports(t *testing.T) {
	s := docServer(t)
	tenants := cedarpostv1connect.NewEntityServiceClient(s.Client(s.Admin, tenant(t, s)))
	whole := &cedarpostv1.ImportOptions{Atomic: true}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	const imports = 5
	var refused atomic.Int64
	var group sync.WaitGroup
	for range imports {
		stream, err := tenants.ImportEntities(ctx)
		if err != nil {
			t.Fatal(err)
		}
		group.Go(func() {
			for n, o := 0, whole; ctx.Err() == nil && stream.Send(people(t, o, n, n+1)) == nil; n, o = n+1, nil {
				time.Sleep(20 * time.Millisecond)
			}
			if _, err := stream.CloseAndReceive(); connect.CodeOf(err) == connect.CodeResourceExhausted && strings.Contains(err.Error(), "of this caller") {
				refused.Add(1)
			}
		})
	}
	servertest.Eventually(t, "refusals", func() bool { return refused.Load() == imports-2 })
	if _, err := importAll(t, s, people(t, whole, 0, 10)); err != nil {
		t.Errorf("another caller: %v", err)
	}
	t.Logf("%d atomic imports of one caller: %d refused", imports, refused.Load())
	stop()
	group.Wait()
}
