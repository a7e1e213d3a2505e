package server

import (
	"encoding/json"
	"net/http"
	"runtime/pprof"
	"sync"

	"github.com/cedarpost/cedarpost/internal/recentlog"
)

// serveSupport adds what cedarpost support-bundle asks for: how the server was started, its newest
// warnings and errors, and its goroutines. Like profiles these are only for this machine, because log lines
// have names of callers and addresses. They have no secrets.
func (s *Server) serveSupport(mux *http.ServeMux) {
	handle := func(path, kind string, h http.HandlerFunc) {
		mux.Handle("GET /debug/"+path, onlyForLoopback(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", kind)
			w.Header().Set("X-Content-Type-Options", "nosniff")
			w.Header().Set("Cache-Control", "no-store")
			h(w, r)
		})))
	}
	handle("start", "application/json", func(w http.ResponseWriter, _ *http.Request) {
		start := s.cfg.Start
		_ = json.NewEncoder(w).Encode(map[string]any{
			"name": s.cfg.Name, "version": start.Version, "commit": start.Commit, "go_version": start.GoVersion,
			"settings": start.Settings, "settings_digest": settingsDigest(start.Settings),
		})
	})
	handle("errors", "application/x-ndjson", func(w http.ResponseWriter, _ *http.Request) {
		if recent, ok := s.cfg.Log.Handler().(*recentlog.Handler); ok {
			for _, line := range recent.Lines() {
				_, _ = w.Write(line)
			}
		}
	})
	// A dump stops all goroutines for a moment, so one is made at a time.
	var dumping sync.Mutex
	handle("goroutines", "text/plain; charset=utf-8", func(w http.ResponseWriter, _ *http.Request) {
		if !dumping.TryLock() {
			http.Error(w, "another dump is under way", http.StatusTooManyRequests)
			return
		}
		defer dumping.Unlock()
		_ = pprof.Lookup("goroutine").WriteTo(w, 2)
	})
}
