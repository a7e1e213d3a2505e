package server

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/server/decisionlog"
)

// runRecorder runs a recorder until the test ends.
func runRecorder(t *testing.T, cfg decisionlog.Config) *decisionlog.Recorder {
	t.Helper()
	cfg.Metrics = prometheus.NewRegistry()
	r, err := decisionlog.NewRecorder(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}
