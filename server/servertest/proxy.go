package servertest

import (
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"
)

// Proxy is a network between a server and its Postgres. A test can make it slow, cut it,
// or make it silent. It does not know the protocol. It is closed after the test.
type Proxy struct {
	listener net.Listener
	target   string
	url      url.URL
	running  sync.WaitGroup

	mu     sync.Mutex
	delay  func() time.Duration
	refuse bool
	silent chan struct{} // closed when the silence ends; nil if the proxy is not silent
	links  map[*link]bool
}

// link is one connection through the proxy: one to the client and one to the database.
type link struct {
	client, server *net.TCPConn
	cut            chan struct{} // closed with both
}

// NewProxy starts a proxy in front of the host of a database's URL.
func NewProxy(t testing.TB, databaseURL string) *Proxy {
	t.Helper()
	return NewProxyAt(t, "127.0.0.1:0", databaseURL)
}

// NewProxyAt is NewProxy with an address to listen on.
func NewProxyAt(t testing.TB, address, databaseURL string) *Proxy {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{listener: l, target: u.Host, url: *u, links: map[*link]bool{}}
	p.url.Host = l.Addr().String()
	p.running.Go(p.accept)
	t.Cleanup(func() {
		l.Close()
		p.Refuse(true) // connections that arrived in the meantime
		p.Cut()
		p.running.Wait()
	})
	return p
}

// URL is the URL of the database through the proxy.
func (p *Proxy) URL() string { return p.url.String() }

// Delay delays each piece of data from the database by the result of draw, which is never
// called twice at the same time. Nil means no delay.
func (p *Proxy) Delay(draw func() time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = draw
}

// Cut breaks all connections. Data on its way is lost, and both sides notice.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		p.drop(l)
	}
}

// Refuse breaks new connections at once, until it is called with false.
func (p *Proxy) Refuse(refuse bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = refuse
}

// Blackhole drops what either side sends, until it is called with false. Connections
// stay, new ones are accepted, and neither side notices: if one side closes, the other
// learns of it later.
func (p *Proxy) Blackhole(silent bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case silent && p.silent == nil:
		p.silent = make(chan struct{})
	case !silent && p.silent != nil:
		close(p.silent)
		p.silent = nil
	}
}

// Connections returns the number of open connections.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.running.Go(func() { p.connect(client.(*net.TCPConn)) })
	}
}

// connect forwards a new connection until both sides have closed it, or it is cut.
func (p *Proxy) connect(client *net.TCPConn) {
	defer func() { _ = client.Close() }()
	l := p.link(client)
	if l == nil {
		return
	}
	defer func() { _ = l.server.Close() }()
	var both sync.WaitGroup
	both.Go(func() { p.carry(l, l.server, l.client, false) })
	both.Go(func() { p.carry(l, l.client, l.server, true) })
	both.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.links, l)
}

// link connects a client to the database, or returns nil. It does so under the
// lock, so that a connection is refused or can be cut.
func (p *Proxy) link(client *net.TCPConn) *link {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuse {
		return nil
	}
	server, err := new(net.Dialer).DialContext(context.Background(), "tcp", p.target)
	if err != nil {
		return nil
	}
	l := &link{client, server.(*net.TCPConn), make(chan struct{})}
	p.links[l] = true
	return l
}

// carry forwards to one side what the other sends, and the close of the connection.
func (p *Proxy) carry(l *link, to, from *net.TCPConn, slowly bool) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 && slowly {
			select {
			case <-time.After(p.draw()):
			case <-l.cut:
			}
		}
		silent := p.silence()
		if n > 0 && silent == nil {
			if _, failed := to.Write(buffer[:n]); failed != nil {
				err = failed
			}
		}
		if err == nil {
			continue
		}
		if silent != nil {
			select {
			case <-silent:
			case <-l.cut:
			}
		}
		if errors.Is(err, io.EOF) {
			_ = to.CloseWrite() // that side may have closed too
			return
		}
		p.mu.Lock()
		p.drop(l)
		p.mu.Unlock()
		return
	}
}

func (p *Proxy) draw() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.delay == nil {
		return 0
	}
	return p.delay()
}

func (p *Proxy) silence() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.silent
}

// drop breaks a link, under the lock.
func (p *Proxy) drop(l *link) {
	if !p.links[l] {
		return
	}
	delete(p.links, l)
	close(l.cut)
	for _, side := range []*net.TCPConn{l.client, l.server} {
		_ = side.SetLinger(0) // reset the connection, so that nothing is sent any more
		_ = side.Close()
	}
}

// Retarget connects new connections to another server.
func (p *Proxy) Retarget(t testing.TB, rawURL string) {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = u.Host
}
