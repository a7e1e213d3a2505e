package server_test

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// healthJSON is what /readyz and /startupz answer in JSON.
type healthJSON struct {
	Ready             bool
	Reasons, Warnings []struct{ Name, Text string }
}

func (h healthJSON) names() (list []string) {
	for _, r := range h.Reasons {
		list = append(list, r.Name)
	}
	return list
}

func askHealth(t *testing.T, s *servertest.Server, path string) (h healthJSON, status int) {
	t.Helper()
	reply := send(t, http.MethodGet, s.Ops+path, "Accept", "application/json")
	if err := json.Unmarshal([]byte(reply.body), &h); err != nil || reply.header.Get("Content-Type") != "application/json" {
		t.Fatalf("%v: %v %s", err, reply.header, reply.body)
	}
	if same := send(t, http.MethodGet, s.Ops+path+"?format=json"); !strings.HasPrefix(same.body, `{"ready":`) {
		t.Errorf("?format=json: %s", same.body)
	}
	return h, reply.code
}

// A server that is not ready says all reasons, as text, as JSON and as metrics.
func TestAllReasonsAtOnce(t *testing.T) {
	t.Parallel() // it takes long
	certFile, keyFile := server.WritePair(t, t.TempDir(), "expired", time.Now().Add(-time.Hour))
	s := servertest.On(t, storetest.New(t), func(c *server.Config) {
		c.TLSCert, c.TLSKey, c.MaxStaleness = certFile, keyFile, time.Second
	})
	if h, status := askHealth(t, s, "/readyz"); status != http.StatusServiceUnavailable || !slices.Equal(h.names(), []string{"certificate"}) || len(h.Warnings) == 0 || h.Warnings[0].Name != "certificate" {
		t.Errorf("%d, %+v", status, h)
	}
	locker := servertest.Session(t, s.URL)
	servertest.MustExec(t, locker, "begin; lock table pg_catalog.pg_inherits, revision")
	want := []string{"database", "behind", "certificate"}
	servertest.Eventually(t, "three reasons", func() bool {
		h, _ := askHealth(t, s, "/readyz")
		return slices.Equal(h.names(), want)
	})
	_, text := readyz(t, s)
	for _, line := range []string{
		"not ready: the database does not answer", "not ready: policy and data are older than this server may use",
		"not ready: the TLS certificate has expired at ", "warning: certificate: it has expired at ",
	} {
		if !strings.Contains("\n"+text, "\n"+line) {
			t.Errorf("no line %q in\n%s", line, text)
		}
	}
	if n := number(t, s, "cedarpost_ready"); n != 0 {
		t.Errorf("ready %v", n)
	}
	for _, name := range []string{"stopping", "database", "partition", "behind", "policy", "log", "certificate", "client_ca"} {
		is := 0.0
		if slices.Contains(want, name) {
			is = 1
		}
		if n := number(t, s, `cedarpost_not_ready{reason="`+name+`"}`); n != is {
			t.Errorf("%s: %v, want %v", name, n, is)
		}
	}
	servertest.MustExec(t, locker, "rollback")
}

// The probe of the start fails until the server was ready once, and never after that.
func TestStartIsOverOnce(t *testing.T) {
	t.Parallel() // it takes long
	dir := t.TempDir()
	certFile, keyFile := server.WritePair(t, dir, "expired", time.Now().Add(-time.Hour))
	s := servertest.New(t, func(c *server.Config) { c.TLSCert, c.TLSKey = certFile, keyFile })
	if reply := send(t, http.MethodGet, s.Ops+"/startupz"); reply.code != http.StatusServiceUnavailable || !strings.HasPrefix(reply.body, "not started: the TLS certificate has expired at ") {
		t.Errorf("%d %s", reply.code, reply.body)
	}
	if reply := send(t, http.MethodGet, s.Ops+"/livez"); reply.code != http.StatusOK {
		t.Errorf("%d %s", reply.code, reply.body)
	}
	server.WritePair(t, dir, "valid", time.Now().AddDate(1, 0, 0))
	servertest.Eventually(t, "started", func() bool { _, status := askHealth(t, s, "/startupz"); return status == http.StatusOK })
	if n := number(t, s, "cedarpost_ready"); n != 1 {
		t.Errorf("ready %v", n)
	}
	locker := servertest.Session(t, s.URL)
	servertest.MustExec(t, locker, "begin; lock table pg_catalog.pg_inherits")
	servertest.Eventually(t, "not ready", func() bool { _, status := askHealth(t, s, "/readyz"); return status != http.StatusOK })
	if h, status := askHealth(t, s, "/startupz"); status != http.StatusOK || !h.Ready {
		t.Errorf("%d, %+v", status, h)
	}
	servertest.MustExec(t, locker, "rollback")
}

// During the delay before its listeners close, a server is not ready and answers all calls. The answer is
// the last one of a connection from before, and in the last part of the delay of each connection. The
// watches of callers end.
func TestDrainDelay(t *testing.T) {
	leaving, over := make(chan struct{}), make(chan struct{})
	s := docServer(t, server.DrainUntil(leaving, over))
	var dials atomic.Int64
	client := func(protocols func(*http.Protocols)) cedarpostv1connect.AuthorizationServiceClient {
		p := new(http.Protocols)
		protocols(p)
		transport := &http.Transport{Protocols: p, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials.Add(1)
			return new(net.Dialer).DialContext(ctx, network, addr)
		}}
		t.Cleanup(transport.CloseIdleConnections)
		return cedarpostv1connect.NewAuthorizationServiceClient(connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: transport}, s.API), func(next connect.ClientFunc) connect.ClientFunc {
			return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
				if info, ok := connect.CallInfoForClientContext(ctx); ok {
					info.RequestHeader().Set("Authorization", "Bearer "+s.Token)
				}
				return next(ctx, spec)
			}
		}))
	}
	one := client(func(p *http.Protocols) { p.SetHTTP1(true) })
	two := client(func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) })
	asks := func(c cedarpostv1connect.AuthorizationServiceClient) {
		t.Helper()
		if _, err := c.Authorize(t.Context(), servertest.AskShop("ann", "ViewOrder", "1", true)); err != nil && connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Error(err)
		}
	}
	for _, c := range []cedarpostv1connect.AuthorizationServiceClient{one, two} {
		for range 3 {
			asks(c)
		}
	}
	if n := dials.Load(); n != 2 {
		t.Fatalf("%d connections before", n)
	}
	watching, err := s.Authorization.Watch(t.Context(), &cedarpostv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watching.Close() }()
	if _, err := watching.Receive(); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.Stop()
	}()
	defer func() { close(over); <-stopped }()
	for err = nil; err == nil; _, err = watching.Receive() {
	}
	if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "watch another one") {
		t.Errorf("the watch ends with %v", err)
	}
	if h, status := askHealth(t, s, "/readyz"); status != http.StatusServiceUnavailable || !slices.Equal(h.names(), []string{"stopping"}) {
		t.Errorf("%d, %+v", status, h)
	}
	res, err := healthOf(s, s.API).Check(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil || res.Status != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("%v, %v", res, err)
	}
	if reply := send(t, http.MethodGet, s.Ops+"/livez"); reply.code != http.StatusOK {
		t.Errorf("livez %d", reply.code)
	}
	for _, c := range []cedarpostv1connect.AuthorizationServiceClient{one, two} {
		before := dials.Load()
		asks(c) // on the connection from before
		for range 3 {
			stream, err := c.Watch(t.Context(), &cedarpostv1.WatchRequest{})
			if err == nil {
				_, err = stream.Receive()
				_ = stream.Close()
			}
			if connect.CodeOf(err) != connect.CodeUnavailable {
				t.Errorf("a watch begins: %v", err)
			}
		}
		servertest.Eventually(t, "calls use a new connection", func() bool { asks(c); return dials.Load() > before || t.Failed() })
	}
	before := dials.Load()
	for _, c := range []cedarpostv1connect.AuthorizationServiceClient{one, two} {
		for range 20 {
			asks(c)
		}
	}
	if n := dials.Load() - before; n > 4 { // each client may have had a watch on a connection of its own
		t.Errorf("%d connections for 40 calls", n)
	}
	close(leaving)
	for _, c := range []cedarpostv1connect.AuthorizationServiceClient{one, two} {
		before := dials.Load()
		servertest.Eventually(t, "each call uses a new connection", func() bool { asks(c); return dials.Load() > before+1 || t.Failed() })
	}
}

// docs/operations.md has each reason.
func TestReasonsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range server.ReasonNames {
		if !strings.Contains(string(text), "| `"+name+"` |") {
			t.Errorf("docs/operations.md does not name the reason %s", name)
		}
	}
}
