package telemetry

import (
	"context"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// defaultQueue is the bound of both libraries for the spans or lines that wait to be sent.
const defaultQueue = 2048

// queued counts what waits to be sent of one signal, and refuses what is beyond the bound. The queues of
// the libraries have the same bound, but drop what is beyond it without saying so.
type queued struct {
	most    int64
	n       atomic.Int64
	dropped prometheus.Counter
}

func newQueued(variable string, dropped prometheus.Counter) *queued {
	most, err := strconv.Atoi(value(variable))
	if err != nil {
		most = defaultQueue
	}
	return &queued{most: int64(most), dropped: dropped}
}

// enter reports whether there is a place for one more.
func (q *queued) enter() bool {
	if q.n.Add(1) <= q.most {
		return true
	}
	q.n.Add(-1)
	q.dropped.Inc()
	return false
}

// leave notes that an attempt to send some of them is over. What could not be sent is dropped.
func (q *queued) leave(n int, err error) {
	q.n.Add(-int64(n))
	if err != nil {
		q.dropped.Add(float64(n))
	}
}

// spanQueue gives spans to a processor while there is a place for them.
type spanQueue struct {
	sdktrace.SpanProcessor
	q *queued
}

// OnEnd implements sdktrace.SpanProcessor.
func (p spanQueue) OnEnd(s sdktrace.ReadOnlySpan) {
	if s.SpanContext().IsSampled() && p.q.enter() {
		p.SpanProcessor.OnEnd(s)
	}
}

// lineQueue gives log lines to a processor while there is a place for them.
type lineQueue struct {
	sdklog.Processor
	q *queued
}

// OnEmit implements sdklog.Processor.
func (p lineQueue) OnEmit(ctx context.Context, r *sdklog.Record) error {
	if !p.q.enter() {
		return nil
	}
	return p.Processor.OnEmit(ctx, r)
}

// libraryLog passes on the warnings and errors of the libraries of OpenTelemetry, at most one a minute of
// each level. Its handler gets them at the levels of slog: the libraries log a warning one below
// slog.LevelInfo.
type libraryLog struct {
	slog.Handler
	last *libraryLast
}

type libraryLast struct {
	mu sync.Mutex
	at map[slog.Level]time.Time
}

const libraryWarning = slog.LevelInfo - 1

func newLibraryLog(h slog.Handler) libraryLog {
	return libraryLog{h, &libraryLast{at: map[slog.Level]time.Time{}}}
}

// levelOf returns the level of a line of the libraries.
func levelOf(l slog.Level) slog.Level {
	if l == libraryWarning {
		return slog.LevelWarn
	}
	return l
}

// Enabled implements slog.Handler.
func (h libraryLog) Enabled(ctx context.Context, l slog.Level) bool {
	l = levelOf(l)
	return l >= slog.LevelWarn && h.Handler.Enabled(ctx, l)
}

// Handle implements slog.Handler.
func (h libraryLog) Handle(ctx context.Context, r slog.Record) error {
	r.Level = levelOf(r.Level)
	if !h.last.due(r.Level, time.Now()) {
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

func (l *libraryLast) due(level slog.Level, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if last, ok := l.at[level]; ok && now.Sub(last) < reportEvery {
		return false
	}
	l.at[level] = now
	return true
}

// WithAttrs implements slog.Handler.
func (h libraryLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return libraryLog{h.Handler.WithAttrs(attrs), h.last}
}

// WithGroup implements slog.Handler.
func (h libraryLog) WithGroup(name string) slog.Handler {
	return libraryLog{h.Handler.WithGroup(name), h.last}
}
