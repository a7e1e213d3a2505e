package server

import (
	"context"
	"errors"
	"net/http"
	"time"

	"connectrpc.com/connect/v2"

	healthv1 "github.com/cedarpost/cedarpost/proto/grpc/health/v1"
	"github.com/cedarpost/cedarpost/proto/grpc/health/v1/healthv1connect"
	"github.com/cedarpost/cedarpost/store"
)

const readyTimeout = 2 * time.Second

// health says whether this server can decide and record. Live means the process
// answers; ready means a question asked now would be decided.
type health struct {
	db       *store.DB
	follower *follower
	services map[string]bool // full names served on this listener
}

// ready returns nil, or why not.
func (h *health) ready(ctx context.Context) error {
	if _, err := h.follower.current(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for _, day := range []time.Time{time.Now(), time.Now().Add(24 * time.Hour)} {
		ok, err := h.db.PartitionReady(ctx, day.UTC())
		if err != nil {
			return errors.New("the database does not answer")
		}
		if !ok {
			return errors.New("the decision log has no partition for " + day.UTC().Format(time.DateOnly))
		}
	}
	return nil
}

// Check implements grpc.health.v1.Health.
func (h *health) Check(ctx context.Context, req *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	if req.GetService() != "" && !h.services[req.GetService()] {
		return nil, connect.NewError(connect.CodeNotFound, "no such service on this listener")
	}
	return &healthv1.HealthCheckResponse{Status: h.status(ctx)}, nil
}

func (h *health) status(ctx context.Context) healthv1.HealthCheckResponse_ServingStatus {
	if h.ready(ctx) != nil {
		return healthv1.HealthCheckResponse_NOT_SERVING
	}
	return healthv1.HealthCheckResponse_SERVING
}

// Watch implements grpc.health.v1.Health.
func (h *health) Watch(ctx context.Context, req *healthv1.HealthCheckRequest, stream healthv1connect.HealthWatchServerStream) error {
	last := healthv1.HealthCheckResponse_UNKNOWN
	for ctx.Err() == nil {
		status := healthv1.HealthCheckResponse_SERVICE_UNKNOWN
		if req.GetService() == "" || h.services[req.GetService()] {
			status = h.status(ctx)
		}
		if status != last {
			if err := stream.Send(&healthv1.HealthCheckResponse{Status: status}); err != nil {
				return err
			}
			last = status
		}
		sleep(ctx, time.Second)
	}
	return nil
}

// opsHandler serves /livez and /readyz in plain text, and /metrics for
// Prometheus.
func (h *health) opsHandler(m *metrics) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.handler())
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := h.ready(r.Context()); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ready\n"))
	})
	return mux
}
