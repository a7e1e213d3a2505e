package server_test

import (
	"context"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"

	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// nameServer answers with one address for all names, until another one is set. While the test runs, all
// names are resolved by it.
type nameServer struct {
	address atomic.Pointer[net.IP]
	asked   atomic.Int64
}

func newNameServer(t *testing.T) *nameServer {
	t.Helper()
	n := &nameServer{}
	socket, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &dns.Server{PacketConn: socket, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		n.asked.Add(1)
		m := new(dns.Msg)
		m.SetReply(q)
		if q.Question[0].Qtype == dns.TypeA {
			m.Answer = append(m.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 3600}, A: *n.address.Load(),
			})
		}
		_ = w.WriteMsg(m)
	})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.ActivateAndServe() // it ends with Shutdown
	}()
	before := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", socket.LocalAddr().String())
	}}
	t.Cleanup(func() {
		net.DefaultResolver = before
		_ = s.Shutdown()
		<-ended
	})
	return n
}

func (n *nameServer) set(ip string) {
	address := net.ParseIP(ip)
	n.address.Store(&address)
}

// The name of the database gets another address, and the old one goes silent, as when a cluster moves to
// another machine. Connections to the old address end by themselves, each new one resolves the name again,
// and the server decides without a restart.
func TestDatabaseMovesToAnotherAddress(t *testing.T) {
	names := newNameServer(t)
	database := storetest.New(t)
	before := servertest.NewProxyAt(t, "127.0.0.2:0", database)
	named, err := url.Parse(before.URL())
	if err != nil {
		t.Fatal(err)
	}
	after := servertest.NewProxyAt(t, net.JoinHostPort("127.0.0.3", named.Port()), database)
	named.Host = net.JoinHostPort("db.cedarpost.test", named.Port())
	names.set("127.0.0.2")
	s := servertest.On(t, named.String())
	s.MustLoadShop()
	ask := func() error {
		_, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("dave", "ViewOrder", "42", true))
		return err
	}
	if err := ask(); err != nil || before.Connections() == 0 || after.Connections() != 0 {
		t.Fatalf("%v, %d connections before, %d after", err, before.Connections(), after.Connections())
	}
	asked := names.asked.Load()
	names.set("127.0.0.3")
	before.Blackhole(true)
	servertest.Eventually(t, "decisions go on", func() bool { return ask() == nil })
	servertest.Eventually(t, "ready", func() bool { status, _ := readyz(t, s); return status == http.StatusOK })
	if after.Connections() == 0 || names.asked.Load() == asked {
		t.Errorf("%d connections to the new address, %d questions for the name", after.Connections(), names.asked.Load()-asked)
	}
	if _, err := servertest.Write(t, s, put(servertest.Entity(t, `{"uid":{"type":"Shop::Role","id":"after"},"attrs":{},"parents":[]}`))); err != nil {
		t.Error(err)
	}
	// What is left of the old connections is not used again, so the server does not notice their end.
	before.Cut()
	for range 20 {
		if err := ask(); err != nil {
			t.Error(err)
		}
	}
}
