package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/cedarpost/cedarpost/internal/pause"
	"github.com/cedarpost/cedarpost/proto/grpc/health/v1/healthv1connect"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/store"
)

const (
	readyInterval = time.Second
	readyTimeout  = 2 * time.Second
	// maxFoundAge is longer than a look at the database takes, with the pause before it.
	maxFoundAge = 5 * readyTimeout
	maxWatches  = 64 // of health, open at once on one plane; half of them from one address
)

// readiness says whether the server can decide now. One loop asks the database, and calls of
// the health service read its result, so that callers without an API key cannot load the
// database.
type readiness struct {
	db       *store.DB
	follower *snapshot.Follower
	found    atomic.Pointer[found] // the result of the last look at the database; never nil
	started  atomic.Bool           // the server was ready once
	stopping chan struct{}         // closed when the server stops
	recorder *decisionlog.Recorder // nil until New has made it
	clock    *skew
	cert     *certificate // nil: no TLS
	clients  *clientCAs   // nil: no client certificates
}

// found is the result of a look at the database.
type found struct {
	at       time.Time
	reasons  []reason
	warnings []string
}

func newReadiness(db *store.DB, f *snapshot.Follower, log *slog.Logger) *readiness {
	r := &readiness{db: db, follower: f, stopping: make(chan struct{}), clock: &skew{log: log}}
	r.found.Store(&found{at: time.Now(), reasons: []reason{{reasonDatabase, "the server has not looked at its database yet"}}})
	return r
}

// run looks each second until ctx ends.
func (r *readiness) run(ctx context.Context) {
	for ctx.Err() == nil {
		r.look(ctx)
		if r.ready() {
			r.started.Store(true)
		}
		pause.For(ctx, readyInterval)
	}
}

// look asks the database whether it can record decisions of today and tomorrow.
func (r *readiness) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if r.recorder != nil {
		r.recorder.CheckClock()
	}
	asked := time.Now()
	days := []time.Time{asked.UTC(), asked.UTC().AddDate(0, 0, 1)}
	ready, clock, err := r.db.PartitionsReady(ctx, days...)
	found := found{at: time.Now()}
	if err != nil {
		found.reasons = append(found.reasons, reason{reasonDatabase, "the database does not answer"})
	} else {
		r.clock.note(asked, time.Now(), clock)
	}
	for i, ok := range ready {
		if !ok && (r.recorder == nil || !r.recorder.EnsurePartition(ctx, days[i])) {
			found.noPartition(days[i], asked)
		}
	}
	r.found.Store(&found)
}

// noPartition notes that the log has no partition for a day. That of tomorrow is a reason only in the
// last hour before it is needed, because all servers have the same reason, and until then an operator
// can help while they decide.
func (f *found) noPartition(day, now time.Time) {
	text := "the decision log has no partition for " + day.Format(time.DateOnly)
	if day.UTC().Truncate(24*time.Hour).Sub(now) > time.Hour {
		f.warnings = append(f.warnings, reasonPartition+": "+text)
		return
	}
	f.reasons = append(f.reasons, reason{reasonPartition, text})
}

// lastLook returns what the last look at the database has found, unless it is too old to count.
func (r *readiness) lastLook() found {
	last := *r.found.Load()
	if age := time.Since(last.at); age > maxFoundAge {
		return found{reasons: []reason{{reasonDatabase, fmt.Sprintf("the server has not looked at its database for %v", age.Round(time.Second))}}}
	}
	return last
}

// stop makes the server unready for good, and ends all watches.
func (r *readiness) stop() { close(r.stopping) }

// ready reports whether the server can decide now.
func (r *readiness) ready() bool { return len(r.reasons()) == 0 }

// health is the health service of one plane. A service is serving if the server can decide.
type health struct {
	ready    *readiness
	services map[string]bool // full names served on this listener
	watches  *sharedPlaces[netip.Addr]
}

func newHealth(r *readiness) *health {
	return &health{ready: r, services: map[string]bool{}, watches: newSharedPlaces[netip.Addr](maxWatches, maxWatches/2)}
}

// Check implements grpc.health.v1.Health.
func (h *health) Check(_ context.Context, req *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	status := h.status(req.GetService())
	if status == healthv1.HealthCheckResponse_SERVICE_UNKNOWN {
		return nil, connect.NewError(connect.CodeNotFound, "no such service on this listener")
	}
	return &healthv1.HealthCheckResponse{Status: status}, nil
}

func (h *health) status(service string) healthv1.HealthCheckResponse_ServingStatus {
	switch {
	case service != "" && !h.services[service]:
		return healthv1.HealthCheckResponse_SERVICE_UNKNOWN
	case !h.ready.ready():
		return healthv1.HealthCheckResponse_NOT_SERVING
	}
	return healthv1.HealthCheckResponse_SERVING
}

// Watch implements grpc.health.v1.Health.
func (h *health) Watch(ctx context.Context, req *healthv1.HealthCheckRequest, stream healthv1connect.HealthWatchServerStream) error {
	address := addressOf(requestFrom(ctx).peer)
	leave, ok := h.watches.enter(address)
	if !ok {
		return connect.Errorf(connect.CodeResourceExhausted, "%d callers watch already, or %d from this address; ask with Check", maxWatches, maxWatches/2)
	}
	defer leave()
	tick := time.NewTicker(readyInterval)
	defer tick.Stop()
	last := healthv1.HealthCheckResponse_UNKNOWN
	for stopping := false; ; {
		if status := h.status(req.GetService()); status != last {
			if err := stream.Send(&healthv1.HealthCheckResponse{Status: status}); err != nil {
				return err
			}
			last = status
		}
		if stopping {
			return nil
		}
		select {
		case <-tick.C:
		case <-h.ready.stopping:
			stopping = true // send the last status, and end
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// opsHandler serves what the configuration has not switched off of /livez, /readyz and /startupz,
// /metrics for Prometheus, and /debug/pprof/. On a loopback address it also serves what a support
// bundle asks for, if that is not switched off.
func (s *Server) opsHandler() http.Handler {
	mux := http.NewServeMux()
	if !s.cfg.NoMetrics {
		// OpenMetrics, which has exemplars, is for scrapers that ask for it.
		h := promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{EnableOpenMetrics: true})
		if isLoopback(s.cfg.OpsListen) { // else the scraper may use any name of the machine
			h = onlyForLoopback(h)
		}
		mux.Handle("GET /metrics", h)
	}
	if !s.cfg.NoHealth {
		s.serveHealth(mux)
	}
	if s.cfg.Pprof {
		servePprof(mux)
	}
	if !s.cfg.NoDebug && isLoopback(s.cfg.OpsListen) {
		s.serveSupport(mux)
	}
	return mux
}
