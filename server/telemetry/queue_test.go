package telemetry

import (
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
)

// lost returns how much of a signal was dropped.
func (t *Telemetry) lost(s signal) float64 {
	all := prometheus.NewRegistry()
	all.MustRegister(t.dropped.WithLabelValues(s.String()))
	families, err := all.Gather()
	if err != nil {
		panic(err)
	}
	return families[0].GetMetric()[0].GetCounter().GetValue()
}

// What finds its queue full is counted, and so is what a collector refuses.
func TestDroppedTelemetryIsCounted(t *testing.T) {
	hangs, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0") // takes connections and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer hangs.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"+hangs.Addr().String())
	t.Setenv("OTEL_METRICS_EXPORTER", "none")
	t.Setenv("OTEL_TRACES_SAMPLER", "always_on")
	t.Setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
	t.Setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "32")
	t.Setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600000")
	t.Setenv("OTEL_BSP_EXPORT_TIMEOUT", "600000")
	t.Setenv("OTEL_BLRP_EXPORT_TIMEOUT", "600000")
	tel, err := Open(t.Context(), Config{Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	tracer, log := tel.Tracing().Tracer("test"), tel.Logger(slog.DiscardHandler)
	for range 200 {
		_, span := tracer.Start(t.Context(), "x")
		span.End()
		log.Info("x")
	}
	if spans, lines := tel.lost(traces), tel.lost(logs); spans != 200-64 || lines != 200-32 {
		t.Errorf("%v spans and %v lines", spans, lines)
	}
	q := newQueued("OTEL_BSP_MAX_QUEUE_SIZE", tel.dropped.WithLabelValues("traces"))
	before := tel.lost(traces)
	for range 3 {
		q.enter()
	}
	q.leave(2, nil)
	q.leave(1, errors.New("refused"))
	if n := tel.lost(traces) - before; n != 1 || q.n.Load() != 0 {
		t.Errorf("%v dropped, %d left", n, q.n.Load())
	}
	tel.Close()
}

// Warnings and errors of the libraries reach the log, a few, and nothing else of them does.
func TestLibraryWarningsAreLogged(t *testing.T) {
	var out strings.Builder
	log := logr.FromSlogHandler(newLibraryLog(slog.NewTextHandler(&out, nil)))
	for range 100 {
		log.V(1).Info("a warning", "dropped", 7)
		log.V(4).Info("nothing")
		log.V(8).Info("nothing")
		log.Info("nothing")
		log.Error(errors.New("why"), "an error")
	}
	text := out.String()
	if strings.Count(text, "\n") != 2 || !strings.Contains(text, `level=WARN msg="a warning" dropped=7`) || !strings.Contains(text, `level=ERROR msg="an error" err=why`) {
		t.Error(text)
	}
}
