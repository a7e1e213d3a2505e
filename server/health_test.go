package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"github.com/jackc/pgx/v5"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/grpc/health/v1/healthv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// waiting returns how many sessions wait for a lock.
func waiting(t *testing.T, conn *pgx.Conn) (n int) {
	t.Helper()
	err := conn.QueryRow(t.Context(), `select count(*) from pg_stat_activity
		where datname = current_database() and wait_event_type = 'Lock'`).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// healthOf returns a client of the health service without an API key.
func healthOf(s *servertest.Server, plane string) healthv1connect.HealthClient {
	return healthv1connect.NewHealthClient(s.Client(plane, ""))
}

func readyz(t *testing.T, s *servertest.Server) (status int, reason string) {
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
	return res.StatusCode, strings.TrimSpace(string(body))
}

// However many calls ask for health, only one loop asks the database, and all of them get its
// state.
func TestHealthDoesNotAskTheDatabase(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	h := healthOf(s, s.API)
	check := func() healthv1.HealthCheckResponse_ServingStatus {
		res, err := h.Check(t.Context(), &healthv1.HealthCheckRequest{})
		if err != nil {
			t.Error(err)
		}
		return res.GetStatus()
	}
	servertest.Eventually(t, "serving", func() bool { return check() == healthv1.HealthCheckResponse_SERVING })
	if status, reason := readyz(t, s); status != http.StatusOK {
		t.Errorf("%d %s", status, reason)
	}
	watch, err := h.Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watch.Close() }()
	watched := func(want healthv1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		if res, err := watch.Receive(); err != nil || res.Status != want {
			t.Errorf("watched %v, %v, want %v", res, err, want)
		}
	}
	watched(healthv1.HealthCheckResponse_SERVING)

	// The query that looks for partitions blocks now.
	locker, observer := servertest.Session(t, s.URL), servertest.Session(t, s.URL)
	servertest.MustExec(t, locker, "begin; lock table pg_catalog.pg_inherits")
	servertest.Eventually(t, "not serving", func() bool { return check() == healthv1.HealthCheckResponse_NOT_SERVING })
	watched(healthv1.HealthCheckResponse_NOT_SERVING)
	if status, reason := readyz(t, s); status != http.StatusServiceUnavailable || reason != "not ready: the database does not answer" {
		t.Errorf("%d %s", status, reason)
	}
	var group sync.WaitGroup
	for range 100 {
		group.Go(func() { check() })
	}
	for range 20 {
		if n := waiting(t, observer); n > 2 { // a canceled one may still be ending
			t.Errorf("%d sessions look for partitions", n)
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	group.Wait()
	servertest.MustExec(t, locker, "rollback")
	servertest.Eventually(t, "serving again", func() bool { return check() == healthv1.HealthCheckResponse_SERVING })
	watched(healthv1.HealthCheckResponse_SERVING)

	if _, err := h.Check(t.Context(), &healthv1.HealthCheckRequest{Service: "cedarpost.v1.EntityService"}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("a service of the other plane: %v", err)
	}
}

// from returns a client without a key whose connections come from an address of this machine.
func from(t *testing.T, url, address string) *connect.Client {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).DialContext}
	t.Cleanup(transport.CloseIdleConnections)
	return connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: transport}, url))
}

// The number of watches of the health service is bounded, and one address cannot take all.
func TestAttackWatchesOfHealth(t *testing.T) {
	s := servertest.New(t)
	open := func(h healthv1connect.HealthClient) (cancel func(), err error) {
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		stream, err := h.Watch(ctx, &healthv1.HealthCheckRequest{})
		if err == nil {
			_, err = stream.Receive()
		}
		return cancel, err
	}
	var first func()
	for i, address := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.3"} {
		h := healthv1connect.NewHealthClient(from(t, s.Admin, address))
		got := 0
		for range server.MaxWatches {
			cancel, err := open(h)
			if first == nil {
				first = cancel
			}
			if err == nil {
				got++
			} else if connect.CodeOf(err) != connect.CodeResourceExhausted {
				t.Fatal(err)
			}
		}
		t.Logf("%d watches from %s: %d open", server.MaxWatches, address, got)
		if want := []int{server.MaxWatches / 2, server.MaxWatches / 2, 0}[i]; got != want {
			t.Errorf("%d watches from %s are open, want %d", got, address, want)
		}
	}
	h := healthOf(s, s.Admin)
	if _, err := h.Check(t.Context(), &healthv1.HealthCheckRequest{}); err != nil {
		t.Error(err)
	}
	first()
	servertest.Eventually(t, "a free place", func() bool { _, err := open(h); return err == nil })
}

// When the server stops, watches end at once, and a call in flight can finish.
func TestShutdownFinishesCallsInFlight(t *testing.T) {
	s := docServer(t)
	watch, err := healthOf(s, s.API).Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watch.Close() }()
	if res, err := watch.Receive(); err != nil || res.Status != healthv1.HealthCheckResponse_SERVING {
		t.Fatalf("%v, %v", res, err)
	}
	locker, observer := servertest.Session(t, s.URL), servertest.Session(t, s.URL)
	servertest.MustExec(t, locker, "begin; update revision set n = n")
	written := make(chan error, 1)
	go func() {
		_, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: servertest.DocUser(t, "ann")}})
		written <- err
	}()
	servertest.Eventually(t, "a write in flight", func() bool { return waiting(t, observer) == 1 })

	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.Stop()
	}()
	if res, err := watch.Receive(); err != nil || res.Status != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("watched %v, %v", res, err)
	}
	if _, err := watch.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("the watch goes on: %v", err)
	}
	servertest.MustExec(t, locker, "rollback")
	if err := <-written; err != nil {
		t.Errorf("a call in flight was cut: %v", err)
	}
	<-stopped
}

// All planes stop at the same time: a busy plane does not keep another one open.
func TestPlanesStopTogether(t *testing.T) {
	s := servertest.New(t)
	dial := func(plane string) (net.Conn, error) {
		return net.Dial("tcp", strings.TrimPrefix(plane, "http://"))
	}
	busy, err := dial(s.API)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = busy.Close() }()
	// The server answers this when the handler waits for the body.
	_, err = fmt.Fprintf(busy, "POST /cedarpost.v1.AuthorizationService/Authorize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"+
		"Content-Type: application/json\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n", s.Token)
	if err != nil {
		t.Fatal(err)
	}
	const goOn = "HTTP/1.1 100 Continue\r\n\r\n"
	got := make([]byte, len(goOn))
	if _, err := io.ReadFull(busy, got); err != nil || string(got) != goOn {
		t.Fatalf("%q, %v", got, err)
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.Stop()
	}()
	servertest.Eventually(t, "a closed admin plane", func() bool {
		c, err := dial(s.Admin)
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
	if err := busy.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := busy.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the decision plane was through before: %v", err)
	}
	_ = busy.Close()
	<-stopped
}

// Writers that wait for each other do not block decisions.
func TestDecisionsGoOnWhileWritersWait(t *testing.T) {
	s := docServer(t)
	locker, observer := servertest.Session(t, s.URL), servertest.Session(t, s.URL)
	servertest.MustExec(t, locker, "begin; update revision set n = n")
	const writers = 20
	var group sync.WaitGroup
	defer group.Wait()
	defer servertest.MustExec(t, locker, "rollback")
	for range writers {
		group.Go(func() {
			if _, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: servertest.DocUser(t, "ann")}}); err != nil {
				t.Error(err)
			}
		})
	}
	servertest.Eventually(t, "a writer that waits", func() bool { return waiting(t, observer) > 0 })
	time.Sleep(200 * time.Millisecond) // until the other writers wait
	newest := &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: true}}
	for i := range 20 {
		r, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Doc::User::"bob"`), Action: servertest.UID(`Doc::Action::"Read"`), Resource: servertest.UID(`Doc::Paper::"p"`),
			Consistency: []*cedarpostv1.Consistency{nil, newest}[i%2],
		})
		if err != nil || r.DecisionId == "" {
			t.Fatalf("%v, %v", r, err)
		}
	}
}
