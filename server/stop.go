package server

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// leave stops serving. err is the error of a listener, or nil if the server was told to stop. leave returns
// it, or the error of a listener that fails during the delay.
func (s *Server) leave(ctx context.Context, err error, failed <-chan error) error {
	s.ready.stop()
	if err == nil && s.cfg.DrainDelay > 0 {
		s.cfg.Log.Info("stopping: not ready any more, and serving on until clients have gone elsewhere", "drain_delay", s.cfg.DrainDelay)
		select {
		case <-time.After(s.cfg.DrainDelay):
		case <-s.cfg.drained:
		case err = <-failed:
		}
	}
	s.drain(ctx)
	return err
}

// lastCalls makes each answer of a server that stops the last one of its connection: "Connection:
// close" in HTTP/1.1, and GOAWAY in HTTP/2, for which net/http takes the same header. A client that has
// its answer then opens a new connection. If the server closed an idle connection instead, the client
// could send a call on it at the same moment, and nobody would read that call.
func lastCalls(h http.Handler, stopping <-chan struct{}) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isClosed(stopping) {
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
				s.cfg.Log.Warn("calls cut off", "plane", p.name, "err", err)
				_ = p.http.Close()
			}
		})
	}
	wg.Wait()
}
