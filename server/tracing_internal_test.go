package server

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

// Without spans nothing but the ids of the caller's trace is read.
func TestTraceStateIsReadForSpansOnly(t *testing.T) {
	header := http.Header{"Traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, "Tracestate": {"vendor=value"}}
	for on, want := range map[*tracing]string{nil: "", newTracing(unsampled(t)): "vendor=value"} {
		parent, id := on.parent(t.Context(), header)
		if got := trace.SpanContextFromContext(parent).TraceState().String(); got != want || !id.IsValid() {
			t.Errorf("traces on: %v: %q, %v", on != nil, got, id)
		}
	}
}

// A tracestate in several headers is one, and is dropped if it is too long.
func TestTraceStateOfSeveralHeaders(t *testing.T) {
	long := strings.Repeat("x", 250)
	for _, c := range []struct {
		states []string
		want   string
	}{
		{[]string{"a=1", "b=2"}, "a=1,b=2"},
		{[]string{"a=" + long, "b=" + long}, "a=" + long + ",b=" + long},
		{[]string{"a=" + long, "b=" + long, "c=1234"}, "a=" + long + ",b=" + long + ",c=1234"},
		{[]string{"a=" + long, "b=" + long, "c=12345"}, ""},
	} {
		if got := traceHeaders(http.Header{"Tracestate": c.states}).Get("tracestate"); got != c.want {
			t.Errorf("%d headers: %q", len(c.states), got)
		}
	}
}

// observed counts what a histogram gets.
type observed int

func (o *observed) Observe(float64) { *o++ }

// The span of a stage ends, whatever the stage does, and its time counts if it succeeds.
func TestStagesEnd(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	ctx, call := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)).Tracer("test").Start(t.Context(), "call")
	defer call.End()
	for name, do := range map[string]func(context.Context, trace.Span) error{
		"succeeds": func(context.Context, trace.Span) error { return nil },
		"fails":    func(context.Context, trace.Span) error { return errors.New("no") },
		"panics":   func(context.Context, trace.Span) error { panic("no") },
	} {
		var seconds observed
		panicked := true
		func() {
			defer func() { _ = recover() }()
			_ = (&stage{name, &seconds}).run(ctx, do)
			panicked = false
		}()
		ended := spans.Ended()
		if len(ended) == 0 || ended[len(ended)-1].Name() != name {
			t.Errorf("%s: the span did not end", name)
			continue
		}
		ok := name == "succeeds"
		if failed := ended[len(ended)-1].Status().Code == codes.Error; failed == ok || panicked != (name == "panics") {
			t.Errorf("%s: failed %v, panicked %v", name, failed, panicked)
		}
		if counted := seconds == 1; counted != ok {
			t.Errorf("%s: counted %d times", name, seconds)
		}
	}
}
