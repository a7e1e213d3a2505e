package telemetry

import (
	"context"
	"encoding/hex"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	promBridge "go.opentelemetry.io/contrib/bridges/prometheus"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

const (
	reportEvery = time.Minute // between two lines of the log about failures of one signal
	maxReport   = 300         // bytes of the error in a line; a collector can put text into it
)

// sender counts and logs the attempts to send one signal that fail, and ends those that are under
// way when the telemetry is closed. The libraries drop what they could not send, so their queues
// stay bounded.
type sender struct {
	t        *Telemetry
	what     string
	failures prometheus.Counter // nil: they are not counted

	failed atomic.Bool // the last attempt

	mu       sync.Mutex
	reported time.Time // the last line
	silent   int       // failures since then
}

// send makes one attempt. It reports the error itself, and not to the library, which would report
// it to the whole process.
func (s *sender) send(ctx context.Context, attempt func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.t.sending, cancel)()
	err := attempt(ctx)
	if s.t.sending.Err() == nil {
		s.note(err)
	}
	return nil
}

// note counts the outcome of an attempt. The first failure is logged at once, and then one a minute.
func (s *sender) note(err error) {
	was := s.failed.Swap(err != nil)
	if err == nil {
		if was && s.failures != nil {
			s.t.cfg.Log.Info("telemetry can be sent again", "signal", s.what)
		}
		return
	}
	if s.failures != nil {
		s.failures.Inc()
	}
	if report, more := s.due(time.Now()); report {
		text := err.Error()
		s.t.cfg.Log.Warn("telemetry cannot be sent, and is dropped", "signal", s.what, "more", more, "err", strings.ToValidUTF8(text[:min(len(text), maxReport)], ""))
	}
}

// due reports whether a failure is to be logged, and how many were not logged before it. The log is
// written without a lock, because its reader may be slow.
func (s *sender) due(now time.Time) (report bool, more int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.reported) < reportEvery {
		s.silent++
		return false, 0
	}
	more = s.silent
	s.reported, s.silent = now, 0
	return true, more
}

type spanSender struct {
	sdktrace.SpanExporter
	s *sender
	q *queued
}

// ExportSpans implements sdktrace.SpanExporter.
func (e spanSender) ExportSpans(ctx context.Context, list []sdktrace.ReadOnlySpan) error {
	return e.s.send(ctx, func(ctx context.Context) error {
		err := e.SpanExporter.ExportSpans(ctx, list)
		e.q.leave(len(list), err)
		return err
	})
}

type metricSender struct {
	sdkmetric.Exporter
	s *sender
}

// Export implements sdkmetric.Exporter.
func (e metricSender) Export(ctx context.Context, list *metricdata.ResourceMetrics) error {
	return e.s.send(ctx, func(ctx context.Context) error { return e.Exporter.Export(ctx, list) })
}

type logSender struct {
	sdklog.Exporter
	s *sender
	q *queued
}

// Export implements sdklog.Exporter.
func (e logSender) Export(ctx context.Context, list []sdklog.Record) error {
	return e.s.send(ctx, func(ctx context.Context) error {
		err := e.Exporter.Export(ctx, list)
		e.q.leave(len(list), err)
		return err
	})
}

// producer reads the metrics of Prometheus. The bridge puts the hexadecimal text of trace ids where
// their bytes belong, and collectors refuse a whole message because of that.
type producer struct{ sdkmetric.Producer }

func newProducer(g prometheus.Gatherer) producer {
	return producer{promBridge.NewMetricProducer(promBridge.WithGatherer(g))}
}

// Produce implements sdkmetric.Producer.
func (p producer) Produce(ctx context.Context) ([]metricdata.ScopeMetrics, error) {
	list, err := p.Producer.Produce(ctx)
	for _, scope := range list {
		for _, m := range scope.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Histogram[float64]:
				for i := range data.DataPoints {
					mendExemplars(data.DataPoints[i].Exemplars)
				}
			case metricdata.Sum[float64]:
				for i := range data.DataPoints {
					mendExemplars(data.DataPoints[i].Exemplars)
				}
			}
		}
	}
	return list, err
}

func mendExemplars(list []metricdata.Exemplar[float64]) {
	for i := range list {
		list[i].TraceID = idBytes(list[i].TraceID, 16)
		list[i].SpanID = idBytes(list[i].SpanID, 8)
	}
}

// idBytes returns the bytes of an id of some length: text in hexadecimal, or the bytes already.
func idBytes(id []byte, length int) []byte {
	if len(id) == length {
		return id
	}
	out, err := hex.DecodeString(string(id))
	if err != nil || len(out) != length {
		return nil
	}
	return out
}
