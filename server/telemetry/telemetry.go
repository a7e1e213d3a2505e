// Package telemetry sends traces, metrics and log lines of one server to an OpenTelemetry
// collector. It exists so that one package reads the standard OTEL_* variables, bounds what a
// collector that is away can cost, and closes everything within a bounded time. The other
// packages use only the API of OpenTelemetry, and Prometheus.
package telemetry

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/bridges/otelslog"
	"go.opentelemetry.io/otel"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.37.0"
	"go.opentelemetry.io/otel/trace"
)

// How long [Telemetry.Close] sends what is left: less while the collector is away.
const (
	closeTimeout     = 5 * time.Second
	closeTimeoutAway = time.Second
)

// Config says what the telemetry of a process is about. Log is required.
type Config struct {
	// Version is the version of the program, and Name the name of the server.
	Version, Name string
	// Log gets a line when telemetry cannot be sent. Its lines must not be sent as telemetry.
	Log *slog.Logger
	// Level is the least level of the log lines that are sent.
	Level slog.Leveler
	// AllowPlaintext lets telemetry go to another machine without TLS.
	AllowPlaintext bool
}

// Telemetry is what the environment asks for. Signals that it does not ask for are off, and cost
// nothing. It is safe for concurrent use.
type Telemetry struct {
	cfg      Config
	env      environment
	resource *resource.Resource
	failures *prometheus.CounterVec // signal
	dropped  *prometheus.CounterVec // signal
	senders  []*sender
	// sending ends when Close has waited long enough. It ends attempts that are under way.
	sending context.Context
	stop    context.CancelFunc

	traces  *sdktrace.TracerProvider // nil: off
	logs    *sdklog.LoggerProvider   // nil: off
	metrics *sdkmetric.MeterProvider // nil: off, or [Telemetry.SendMetrics] was not called
	points  sdkmetric.Exporter       // sends the metrics; nil: off
	closed  sync.Once
}

// Open reads the OTEL_* variables and makes what they ask for. The error names the variable with a
// value that is not valid. Nothing has to listen at the collector's address. Errors that the
// OpenTelemetry libraries report for the whole process go to the log, at most one a minute.
func Open(ctx context.Context, cfg Config) (_ *Telemetry, err error) {
	t := &Telemetry{cfg: cfg, failures: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "cedarpost_telemetry_failures_total", Help: "Attempts to send telemetry to an OpenTelemetry collector that failed, by signal: traces, metrics or logs."}, []string{"signal"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_telemetry_dropped_total", Help: "Spans (traces) and log lines (logs) that were not sent: their queue was full, or the attempt to send them failed."}, []string{"signal"})}
	for _, s := range []signal{traces, logs} {
		t.dropped.WithLabelValues(s.String())
	}
	for s := range signals {
		t.failures.WithLabelValues(s.String())
	}
	if t.env, err = readEnvironment(cfg.AllowPlaintext); err != nil {
		return nil, err
	}
	t.sending, t.stop = context.WithCancel(context.WithoutCancel(ctx))
	if !t.env.on() {
		return t, nil
	}
	if t.resource, err = newResource(ctx, cfg); err != nil {
		return nil, err
	}
	library := &sender{t: t, what: "telemetry"}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { library.note(err) }))
	otel.SetLogger(logr.FromSlogHandler(newLibraryLog(cfg.Log.Handler())))
	for _, open := range []struct {
		signal signal
		open   func(context.Context) error
	}{{traces, t.openTraces}, {metrics, t.openMetrics}, {logs, t.openLogs}} {
		if !t.env.signals[open.signal].on {
			continue
		}
		if err := open.open(ctx); err != nil {
			t.Close()
			return nil, err
		}
	}
	for _, name := range t.env.plaintext {
		cfg.Log.Warn("telemetry is sent to another machine without TLS, with credentials in headers if there are any: use a URL with https", "variable", name)
	}
	return t, nil
}

// newResource says what the telemetry is about. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
// override it.
func newResource(ctx context.Context, cfg Config) (*resource.Resource, error) {
	return resource.New(ctx,
		resource.WithTelemetrySDK(),
		resource.WithAttributes(semconv.ServiceName("cedarpost"), semconv.ServiceVersion(cfg.Version), semconv.ServiceInstanceID(cfg.Name)),
		resource.WithFromEnv(),
	)
}

func (t *Telemetry) openTraces(ctx context.Context) error {
	out, err := t.env.newSpanExporter(ctx)
	if err != nil {
		return err
	}
	// The sampler and the bounds of spans and of the queue are those of the environment. A span that
	// finds the queue full is dropped.
	q := newQueued("OTEL_BSP_MAX_QUEUE_SIZE", t.dropped.WithLabelValues(traces.String()))
	batches := sdktrace.NewBatchSpanProcessor(spanSender{out, t.newSender(traces), q})
	t.traces = sdktrace.NewTracerProvider(sdktrace.WithResource(t.resource), sdktrace.WithSpanProcessor(spanQueue{batches, q}))
	return nil
}

func (t *Telemetry) openMetrics(ctx context.Context) error {
	out, err := t.env.newMetricExporter(ctx)
	if err != nil {
		return err
	}
	t.points = metricSender{out, t.newSender(metrics)}
	return nil
}

func (t *Telemetry) openLogs(ctx context.Context) error {
	out, err := t.env.newLogExporter(ctx)
	if err != nil {
		return err
	}
	q := newQueued("OTEL_BLRP_MAX_QUEUE_SIZE", t.dropped.WithLabelValues(logs.String()))
	batches := sdklog.NewBatchProcessor(logSender{out, t.newSender(logs), q})
	t.logs = sdklog.NewLoggerProvider(sdklog.WithResource(t.resource), sdklog.WithProcessor(lineQueue{batches, q}))
	return nil
}

func (t *Telemetry) newSender(s signal) *sender {
	out := &sender{t: t, what: s.String(), failures: t.failures.WithLabelValues(s.String())}
	t.senders = append(t.senders, out)
	return out
}

// Tracing returns the provider that spans are made with, or nil if traces are off.
func (t *Telemetry) Tracing() trace.TracerProvider {
	if t.traces == nil {
		return nil
	}
	return t.traces
}

// Logger returns a logger that gives each line to local, and also sends it if logs are on. If
// traces are on, local gets the ids of the trace with the lines of a call that is sampled.
func (t *Telemetry) Logger(local slog.Handler) *slog.Logger {
	if t.traces != nil {
		local = withTrace{local}
	}
	if t.logs == nil {
		return slog.New(local)
	}
	sent := otelslog.NewHandler("cedarpost", otelslog.WithLoggerProvider(t.logs))
	return slog.New(slog.NewMultiHandler(local, atLeast{sent, t.cfg.Level}))
}

// SendMetrics begins to send what g gathers, under the same names, if metrics are on. It must be
// called at most once.
func (t *Telemetry) SendMetrics(g prometheus.Gatherer) {
	if t.points == nil {
		return
	}
	reader := sdkmetric.NewPeriodicReader(t.points, sdkmetric.WithProducer(newProducer(g)))
	t.metrics = sdkmetric.NewMeterProvider(sdkmetric.WithResource(t.resource), sdkmetric.WithReader(reader))
}

// Failures returns the metrics that count what could not be sent.
func (t *Telemetry) Failures() []prometheus.Collector {
	return []prometheus.Collector{t.failures, t.dropped}
}

// Close sends what is left, for at most five seconds, or one if the last attempt failed. What is not
// sent by then is dropped. A log that blocks delays it by at most a second.
func (t *Telemetry) Close() {
	t.closed.Do(func() {
		limit := closeTimeout
		for _, s := range t.senders {
			if s.failed.Load() {
				limit = closeTimeoutAway
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		var late [signals]bool
		var wg sync.WaitGroup
		if t.traces != nil {
			wg.Go(func() { late[traces] = closeOne(ctx, t.traces.Shutdown) })
		}
		if t.metrics != nil {
			wg.Go(func() { late[metrics] = closeOne(ctx, t.metrics.Shutdown) })
		}
		if t.logs != nil {
			wg.Go(func() { late[logs] = closeOne(ctx, t.logs.Shutdown) })
		}
		wg.Wait()
		t.stop()
		logged := make(chan struct{})
		go func() {
			defer close(logged)
			for s, late := range late {
				if late {
					t.cfg.Log.Warn("telemetry that was left at the end is dropped, because it could not be sent in time", "signal", signal(s).String())
				}
			}
		}()
		select {
		case <-logged:
		case <-time.After(flushTimeout):
		}
	})
}

// closeOne reports whether a signal was not closed in time.
func closeOne(ctx context.Context, shutdown func(context.Context) error) (late bool) {
	ended := make(chan error, 1)
	go func() { ended <- shutdown(ctx) }()
	select {
	case err := <-ended:
		return errors.Is(err, context.DeadlineExceeded)
	case <-ctx.Done(): // also if the library does not look at ctx
		return true
	}
}

// atLeast drops lines below a level.
type atLeast struct {
	slog.Handler
	level slog.Leveler
}

// Enabled implements slog.Handler.
func (h atLeast) Enabled(ctx context.Context, l slog.Level) bool {
	return (h.level == nil || l >= h.level.Level()) && h.Handler.Enabled(ctx, l)
}

// WithAttrs implements slog.Handler.
func (h atLeast) WithAttrs(attrs []slog.Attr) slog.Handler {
	return atLeast{h.Handler.WithAttrs(attrs), h.level}
}

// WithGroup implements slog.Handler.
func (h atLeast) WithGroup(name string) slog.Handler {
	return atLeast{h.Handler.WithGroup(name), h.level}
}

// withTrace adds the ids of a sampled trace to lines.
type withTrace struct{ slog.Handler }

// Handle implements slog.Handler.
func (h withTrace) Handle(ctx context.Context, r slog.Record) error {
	if sc := trace.SpanContextFromContext(ctx); sc.IsSampled() {
		r = r.Clone()
		r.AddAttrs(slog.String("trace_id", sc.TraceID().String()), slog.String("span_id", sc.SpanID().String()))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h withTrace) WithAttrs(attrs []slog.Attr) slog.Handler {
	return withTrace{h.Handler.WithAttrs(attrs)}
}

// WithGroup implements slog.Handler.
func (h withTrace) WithGroup(name string) slog.Handler { return withTrace{h.Handler.WithGroup(name)} }

// otherMachine reports whether a URL leads out of this machine.
func otherMachine(u *url.URL) bool {
	host := u.Hostname()
	ip := net.ParseIP(host)
	return !strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") && (ip == nil || !ip.IsLoopback())
}
