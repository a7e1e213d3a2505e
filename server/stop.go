package server

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"
)

// lastPart is how long before its listeners close a server makes each answer the last one of its
// connection, or half of the delay if that is shorter.
const lastPart = 2 * time.Second

// leave stops serving. err is the error of a listener, or nil if the server was told to stop. leave returns
// it, or the error of a listener that fails during the delay.
func (s *Server) leave(ctx context.Context, err error, failed <-chan error) error {
	s.ready.stop()
	if err == nil && s.cfg.DrainDelay > 0 {
		// Stopping does not wait for the reader of the log.
		go s.cfg.Log.Info("stopping: not ready any more, and serving on until clients have gone elsewhere", "drain_delay", s.cfg.DrainDelay)
		last := min(lastPart, s.cfg.DrainDelay/2)
		err = s.serveOn(s.cfg.DrainDelay-last, s.cfg.leaving, failed)
		close(s.leaving)
		if err == nil {
			err = s.serveOn(last, s.cfg.drained, failed)
		}
	}
	s.drain(ctx)
	return err
}

// serveOn waits for a time, or until over is closed. It returns the error of a listener that fails
// meanwhile.
func (*Server) serveOn(d time.Duration, over <-chan struct{}, failed <-chan error) error {
	select {
	case <-time.After(d):
	case <-over:
	case err := <-failed:
		return err
	}
	return nil
}

type connBefore struct{}

// connContext is the ConnContext of an http.Server. It notes whether the connection is from before the
// stop.
func (s *Server) connContext(ctx context.Context, c net.Conn) context.Context {
	if !isClosed(s.ready.stopping) {
		ctx = context.WithValue(ctx, connBefore{}, true)
	}
	return withConn(ctx, c)
}

// lastCalls makes an answer of a server that stops the last one of its connection: "Connection:
// close" in HTTP/1.1, and GOAWAY in HTTP/2, for which net/http takes the same header. A client that has
// its answer then opens a new connection. If the server closed an idle connection instead, the client
// could send a call on it at the same moment, and nobody would read that call.
//
// It does so at once for connections from before the stop. A new connection comes from a load balancer
// that has not noticed the stop, or has no other server. It carries calls until leaving is closed, so
// that a server which still has its load does not make a TLS handshake for each call.
func lastCalls(h http.Handler, stopping, leaving <-chan struct{}) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isClosed(stopping) && (r.Context().Value(connBefore{}) != nil || isClosed(leaving)) {
			w.Header().Set("Connection", "close")
		}
		h.ServeHTTP(w, r)
	})
}

// drain closes all planes at the same time, and lets the calls in flight finish for up to
// drainTimeout.
func (s *Server) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, p := range s.planes {
		wg.Go(func() {
			if err := p.http.Shutdown(ctx); err != nil {
				_ = p.http.Close()
				s.cfg.Log.Warn("calls cut off", "plane", p.name, "err", err)
			}
		})
	}
	wg.Wait()
}
