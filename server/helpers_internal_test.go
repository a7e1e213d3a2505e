package server

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// runRecorder runs a recorder until the test ends.
func runRecorder(t *testing.T, cfg recorderConfig) *recorder {
	t.Helper()
	cfg.Metrics = prometheus.NewRegistry()
	r, err := newRecorder(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	return r
}
