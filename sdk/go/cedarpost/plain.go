package cedarpost

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"
)

// errNotHTTP2 is in the errors of calls over plain http to a server whose first bytes are
// not HTTP/2. The server answered, so the error does not show that the service is away.
var errNotHTTP2 = errors.New("the server does not speak HTTP/2: a wrong port, or a proxy that speaks HTTP/1.1 only")

// plainTransport speaks HTTP/2 without TLS to one server. [http.Transport] reports a server
// that answers in another protocol as a broken connection, in several ways. So this looks
// at the first bytes that the server sends.
type plainTransport struct {
	*http.Transport
	// foreign says that the newest connection with an answer did not begin with HTTP/2.
	foreign atomic.Bool
}

// newPlainTransport makes the transport to the server at u. Behind a SOCKS proxy, or a
// proxy that is reached over TLS, the first bytes are the proxy's, so they are not checked.
func newPlainTransport(u *url.URL, pings bool) *plainTransport {
	t := &plainTransport{Transport: newTransport(false, pings)}
	if proxy, err := t.Proxy(&http.Request{URL: u}); err != nil || proxy != nil && proxy.Scheme != "http" {
		return t
	}
	dial := t.DialContext
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &plainConn{Conn: c, transport: t}, nil
	}
	return t
}

// RoundTrip implements [http.RoundTripper].
func (t *plainTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := t.Transport.RoundTrip(req)
	if err != nil && t.foreign.Load() {
		return nil, errors.Join(errNotHTTP2, err)
	}
	return res, err
}

// plainConn is a connection that checks whether the server begins with HTTP/2: with a frame
// of type SETTINGS (RFC 9113, section 3.4).
type plainConn struct {
	net.Conn
	transport *plainTransport

	judged atomic.Bool
	mu     sync.Mutex // held to read before the connection is judged
	read   int        // bytes of the frame's header that were read
}

const (
	typeAt       = 3 // where the type is in a frame's header; its length is before
	typeSettings = 4

	// lastWords bounds the wait for bytes that the server sent before it broke the
	// connection. They have arrived already, if there are any.
	lastWords = 100 * time.Millisecond
)

// Read implements net.Conn. It fails once the server is known not to speak HTTP/2.
func (c *plainConn) Read(b []byte) (int, error) {
	if c.judged.Load() {
		return c.Conn.Read(b)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.Conn.Read(b)
	if !c.judge(b[:n]) {
		return 0, errNotHTTP2
	}
	return n, err
}

// Write implements net.Conn. A server that answers and closes at once can break the
// connection before its answer is read. So if a write fails before the connection is
// judged, Write reads the answer.
func (c *plainConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil && !c.judged.Load() {
		_ = c.SetReadDeadline(time.Now().Add(lastWords)) // it also ends a Read that holds mu
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.judged.Load() {
			var head [typeAt + 1]byte
			n, _ := c.Conn.Read(head[:])
			_ = c.judge(head[:n])
			_ = c.Close() // a later Read would miss the bytes that were read here
		}
	}
	return n, err
}

// judge looks at the next bytes of the server, and returns false if they are not HTTP/2.
// The length of a SETTINGS frame is far below 64 KiB, so its first byte is zero.
func (c *plainConn) judge(next []byte) bool {
	for _, b := range next {
		if c.judged.Load() {
			break
		}
		foreign := c.read == 0 && b != 0 || c.read == typeAt && b != typeSettings
		if foreign || c.read == typeAt {
			c.transport.foreign.Store(foreign)
			c.judged.Store(true)
		}
		if foreign {
			return false
		}
		c.read++
	}
	return true
}
