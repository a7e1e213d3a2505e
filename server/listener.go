package server

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// places are at most total ones, and at most each of them for one key, such as an address.
type places[K comparable] struct {
	total, each int

	taken int
	by    map[K]int
}

func newPlaces[K comparable](total, each int) places[K] {
	return places[K]{total: total, each: each, by: map[K]int{}}
}

// fullFor reports whether a key has all places that it may have.
func (p *places[K]) fullFor(k K) bool { return p.by[k] >= p.each }

// take takes a place if there is one.
func (p *places[K]) take(k K) bool {
	if p.taken >= p.total || p.fullFor(k) {
		return false
	}
	p.taken++
	p.by[k]++
	return true
}

func (p *places[K]) free(k K) {
	p.taken--
	if p.by[k]--; p.by[k] == 0 {
		delete(p.by, k)
	}
}

// sharedPlaces are places for calls.
type sharedPlaces[K comparable] struct {
	mu     sync.Mutex
	places places[K]
}

func newSharedPlaces[K comparable](total, each int) *sharedPlaces[K] {
	return &sharedPlaces[K]{places: newPlaces[K](total, each)}
}

// enter takes a place, or returns false. leave gives it back.
func (s *sharedPlaces[K]) enter(k K) (leave func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.places.take(k) {
		return nil, false
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.places.free(k)
	}, true
}

// boundedListener bounds the connections of a plane. When a new one finds no place, it gets the
// place of the oldest stranger. If its own address has too many connections, it gets the place of
// the oldest stranger from that address. A stranger is a
// connection that has had no call with an API key, or only calls without a valid one for some
// time, or whose caller already has half of all places. So strangers, and one caller, cannot keep
// others out, and cannot end their connections. If there is no stranger, the new one is closed.
type boundedListener struct {
	net.Listener
	refused, displaced atomic.Int64

	mu        sync.Mutex
	places    places[netip.Addr]
	strangers list.List      // of *boundedConn, the oldest first
	callers   map[string]int // connections that are no strangers, by their first caller
}

func newBoundedListener(l net.Listener, total, perAddress int) *boundedListener {
	return &boundedListener{Listener: l, places: newPlaces[netip.Addr](total, perAddress), callers: map[string]int{}}
}

// maxRefusals is how many calls without a valid key, with none with a valid key in between, make a
// connection a stranger again: its key was revoked.
const maxRefusals = 10

// boundedConn is a connection that has a place.
type boundedConn struct {
	net.Conn
	listener *boundedListener
	address  netip.Addr
	since    time.Time
	known    atomic.Bool  // it is no stranger
	refusals atomic.Int32 // calls without a valid key since the last one with a valid key

	// Guarded by listener.mu.
	caller string        // the first one, if known
	place  *list.Element // in strangers; nil if known or closed
	closed bool          // has no place any more
}

func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := l.admit(raw); c != nil {
			return c, nil
		}
		l.refused.Add(1)
		_ = raw.Close()
	}
}

// admit gives a connection a place, or returns nil.
func (l *boundedListener) admit(raw net.Conn) *boundedConn {
	c := &boundedConn{Conn: raw, listener: l, address: addressOf(raw.RemoteAddr().String()), since: time.Now()}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.places.take(c.address) {
		oldest := l.oldest(c.address)
		if oldest == nil {
			return nil
		}
		l.displaced.Add(1)
		l.leave(oldest)
		_ = oldest.Conn.Close() // net/http notices, and calls Close
		l.places.take(c.address)
	}
	c.place = l.strangers.PushBack(c)
	return c
}

// oldest returns the connection whose place a new one from an address may take, or nil. The
// caller holds mu.
func (l *boundedListener) oldest(a netip.Addr) *boundedConn {
	for e := l.strangers.Front(); e != nil; e = e.Next() {
		if c := e.Value.(*boundedConn); !l.places.fullFor(a) || c.address == a {
			return c
		}
	}
	return nil
}

// leave frees the place of a connection. The caller holds mu.
func (l *boundedListener) leave(c *boundedConn) {
	if c.closed {
		return
	}
	c.closed = true
	l.places.free(c.address)
	if c.known.Load() {
		l.forget(c)
		return
	}
	l.strangers.Remove(c.place)
	c.place = nil
}

// forget takes a connection from those of its caller. The caller holds mu.
func (l *boundedListener) forget(c *boundedConn) {
	c.known.Store(false)
	if l.callers[c.caller]--; l.callers[c.caller] == 0 {
		delete(l.callers, c.caller)
	}
}

// open returns the number of connections.
func (l *boundedListener) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.places.taken
}

// hasKey notes that a call on the connection had an API key.
func (c *boundedConn) hasKey(caller string) {
	if c.refusals.Load() != 0 {
		c.refusals.Store(0)
	}
	if c.known.Load() {
		return
	}
	l := c.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.closed || c.known.Load() || l.callers[caller] >= (l.places.total+1)/2 {
		return
	}
	c.known.Store(true)
	c.caller = caller
	l.callers[caller]++
	l.strangers.Remove(c.place)
	c.place = nil
}

// hasNoKey notes that a call on the connection had no valid API key. The connections of a proxy
// also have calls with one, so they stay known.
func (c *boundedConn) hasNoKey() {
	if !c.known.Load() || c.refusals.Add(1) < maxRefusals {
		return
	}
	l := c.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	if !c.closed && c.known.Load() {
		l.forget(c)
		c.place = l.strangers.PushBack(c)
	}
}

func (c *boundedConn) Close() error {
	c.listener.mu.Lock()
	c.listener.leave(c)
	c.listener.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite lets net/http end an answer before the caller has sent all of its request.
func (c *boundedConn) CloseWrite() error { return closeWrite(c.Conn) }

type connKey struct{}

// withConn is the ConnContext of an http.Server: it puts the connection into the contexts of
// its requests.
func withConn(ctx context.Context, c net.Conn) context.Context {
	for {
		switch wrapped := c.(type) {
		case *boundedConn:
			return context.WithValue(ctx, connKey{}, wrapped)
		case *tls.Conn:
			c = wrapped.NetConn()
		case *strictConn:
			c = wrapped.Conn
		case *strictTLSConn:
			c = wrapped.Conn
		default:
			return ctx
		}
	}
}

// strictListener is a listener without TLS whose connections read strictly.
type strictListener struct{ net.Listener }

func (l strictListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &strictConn{Conn: c}, nil
}

// strictTLSConn is a strictConn over TLS. net/http asks it for the state of TLS.
type strictTLSConn struct {
	strictConn
	state tls.ConnectionState
}

func (c *strictTLSConn) ConnectionState() tls.ConnectionState { return c.state }

// tlsListener is a listener with TLS whose connections of HTTP/1 read strictly. net/http does
// not let anything read between TLS and itself, so the handshake is made here.
type tlsListener struct {
	net.Listener
	config  *tls.Config
	timeout time.Duration // of a handshake
	log     *log.Logger
	refused func(peer string) // notes that a client certificate is not accepted
	shaking sync.WaitGroup    // handshakes, and run

	ctx   context.Context //nolint:containedctx // ends with the listener
	close context.CancelFunc
	conns chan net.Conn
	errs  chan error
}

func newTLSListener(l net.Listener, config *tls.Config, timeout time.Duration, errorLog *log.Logger, refused func(peer string)) *tlsListener {
	t := &tlsListener{Listener: l, config: config, timeout: timeout, log: errorLog, refused: refused, conns: make(chan net.Conn), errs: make(chan error)}
	t.ctx, t.close = context.WithCancel(context.Background())
	t.shaking.Go(t.run)
	return t
}

// run accepts connections until the listener is closed.
func (l *tlsListener) run() {
	for l.ctx.Err() == nil {
		raw, err := l.Listener.Accept()
		if err == nil {
			l.shaking.Add(1)
			go l.handshake(raw)
			continue
		}
		select {
		case l.errs <- err: // net/http pauses if the error is temporary
		case <-l.ctx.Done():
		}
	}
}

func (l *tlsListener) handshake(raw net.Conn) {
	ctx, cancel := context.WithTimeout(l.ctx, l.timeout)
	defer cancel()
	c := tls.Server(raw, l.config)
	err := c.HandshakeContext(ctx)
	if ctx.Err() != nil {
		err = c.HandshakeContext(context.Background()) // the error that it had before ctx ended; it does not begin anew
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		l.refused(raw.RemoteAddr().String())
	}
	l.shaking.Done()
	if err != nil {
		if plain, ok := errors.AsType[tls.RecordHeaderError](err); ok && plain.Conn != nil && looksLikeHTTP(plain.RecordHeader) {
			_, _ = io.WriteString(plain.Conn, "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n")
		}
		l.log.Printf("http: TLS handshake error from %s: %v", raw.RemoteAddr(), err)
		if l.config.ClientAuth != tls.NoClientCert {
			letRead(raw)
		}
		_ = raw.Close()
		return
	}
	var conn net.Conn = c
	if state := c.ConnectionState(); state.NegotiatedProtocol != "h2" {
		conn = &strictTLSConn{strictConn{Conn: c}, state}
	}
	select {
	case l.conns <- conn:
	case <-l.ctx.Done():
		_ = c.Close()
	}
}

// alertTime is how long a client has to read why its handshake failed.
const alertTime = time.Second

// letRead waits until a client has read the alert of a failed handshake and has closed the connection.
// In TLS 1.3 a client sends its first request before the server has looked at its certificate. If the
// connection were closed before that request is read, the client would often find a broken connection
// instead of the alert.
func letRead(c net.Conn) {
	_ = closeWrite(c)
	_ = c.SetDeadline(time.Now().Add(alertTime))
	_, _ = io.CopyN(io.Discard, c, maxReceiveBuffer)
}

// looksLikeHTTP reports whether the first bytes of a connection are those of a request.
func looksLikeHTTP(b [5]byte) bool {
	return slices.Contains([]string{"GET /", "HEAD ", "POST ", "PUT /", "OPTIO"}, string(b[:]))
}

func (l *tlsListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case err := <-l.errs:
		return nil, err
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close ends the handshakes. Those that failed before it returns are recorded.
func (l *tlsListener) Close() error {
	l.close()
	err := l.Listener.Close()
	l.shaking.Wait()
	return err
}

// waitingRoom holds calls without a key whose body the server waits for. When it is full, the
// oldest one is ended, so that a call whose body comes at once has time to be answered.
type waitingRoom struct {
	mu      sync.Mutex
	most    int
	waiting list.List // of *http.ResponseController, the oldest first
}

// enter adds a call. leave must be called before its handler returns.
func (w *waitingRoom) enter(call *http.ResponseController) (leave func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting.Len() >= w.most {
		oldest := w.waiting.Remove(w.waiting.Front()).(*http.ResponseController)
		_ = oldest.SetReadDeadline(past) // it fails only if the connection is gone
	}
	place := w.waiting.PushBack(call)
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.waiting.Remove(place) // does nothing if the call was ended
	}
}
