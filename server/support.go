package server

import (
	"encoding/json"
	"net/http"
	"runtime/pprof"
	"strconv"
	"sync"
	"time"

	"github.com/cedarpost/cedarpost/internal/recentlog"
)

// dumpInterval is the least time between two dumps of goroutines. A dump stops all of them for a moment.
const dumpInterval = 10 * time.Second

// serveSupport adds what cedarpost support-bundle asks for: how the server was started, its newest
// warnings and errors, and its goroutines. Like profiles these are only for this machine, because log lines
// have names of callers and addresses. They have no secrets.
func (s *Server) serveSupport(mux *http.ServeMux) {
	handle := func(path, kind string, h http.HandlerFunc) {
		mux.Handle("GET /debug/"+path, onlyForTools(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
	var dumps interval
	handle("goroutines", "text/plain; charset=utf-8", func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead {
			return
		}
		if !dumps.take(time.Now(), dumpInterval) {
			w.Header().Set("Retry-After", strconv.Itoa(int(dumpInterval.Seconds())))
			http.Error(w, "a dump was made in the last "+dumpInterval.String(), http.StatusTooManyRequests)
			return
		}
		_ = pprof.Lookup("goroutine").WriteTo(w, 2)
	})
}

// interval lets something happen at most once in some time. Its zero value works.
type interval struct {
	mu   sync.Mutex
	last time.Time
}

// take reports whether it may happen now, and then it has.
func (i *interval) take(now time.Time, every time.Duration) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.last.IsZero() && now.Sub(i.last) < every {
		return false
	}
	i.last = now
	return true
}
