package server

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.37.0"
	"go.opentelemetry.io/otel/trace"
)

// tracerName is the instrumentation scope of the spans of this package.
const tracerName = "github.com/cedarpost/cedarpost/server"

// tracing begins the spans of calls. A call that is not sampled costs three small allocations. Its
// context has no span, so the stages and the store do no more work for it.
type tracing struct {
	tracer  trace.Tracer
	options sync.Pool // of *[2]trace.SpanStartOption: the kind, and the start of one call
}

// newTracing returns nil if there is no provider.
func newTracing(p trace.TracerProvider) *tracing {
	if p == nil {
		return nil
	}
	t := &tracing{tracer: p.Tracer(tracerName)}
	t.options.New = func() any { return &[2]trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindServer)} }
	return t
}

// maxTraceState is how many bytes of a tracestate are taken, the least that W3C asks for
// (https://www.w3.org/TR/trace-context/#tracestate-limits). Each span of a call has the tracestate, so
// a longer one would let one caller fill the messages to the collector.
const maxTraceState = 512

// parent returns a context with the span of the caller, if the call names one, for [tracing.begin], and
// the id of its trace. t may be nil.
func (t *tracing) parent(ctx context.Context, header http.Header) (context.Context, trace.TraceID) {
	if len(header["Traceparent"]) == 0 {
		return ctx, trace.TraceID{}
	}
	var headers propagation.TextMapCarrier = traceHeaders(header)
	if t == nil {
		headers = parentHeader(header)
	}
	parent := propagation.TraceContext{}.Extract(ctx, headers)
	return parent, trace.SpanContextFromContext(parent).TraceID()
}

// begin begins the span of an authenticated call, as a child of the caller's in parent. The context that
// it returns, of ctx, has the span only if the call is sampled; else the span is nil. t may be nil.
func (t *tracing) begin(ctx, parent context.Context, header http.Header, spec connect.Spec, began time.Time, caller string) (context.Context, trace.Span) {
	if t == nil || spec.Schema == nil { // the caller chooses the name of a procedure that is not registered
		return ctx, nil
	}
	options := t.options.Get().(*[2]trace.SpanStartOption)
	options[1] = trace.WithTimestamp(began)
	traced, span := t.tracer.Start(parent, strings.TrimPrefix(spec.Procedure, "/"), options[:]...)
	t.options.Put(options)
	if !span.IsRecording() {
		return ctx, nil
	}
	service, method, _ := strings.Cut(strings.TrimPrefix(spec.Procedure, "/"), "/")
	system := semconv.RPCSystemConnectRPC
	if isGRPC(header) {
		system = semconv.RPCSystemGRPC
	}
	span.SetAttributes(system, semconv.RPCService(service), semconv.RPCMethod(method), attribute.String("cedarpost.caller", caller))
	return traced, span
}

// parentHeader reads the header with the ids of a trace, which is all that a record needs. Like
// traceHeaders it takes no memory.
type parentHeader http.Header

// Get implements propagation.TextMapCarrier.
func (h parentHeader) Get(key string) string {
	if key == "traceparent" {
		return first(h["Traceparent"])
	}
	return ""
}

// Set implements propagation.TextMapCarrier.
func (parentHeader) Set(string, string) {}

// Keys implements propagation.TextMapCarrier.
func (parentHeader) Keys() []string { return []string{"traceparent"} }

// traceHeaders reads all headers of a trace.
type traceHeaders http.Header

// Get implements propagation.TextMapCarrier.
func (h traceHeaders) Get(key string) string {
	if key != "tracestate" {
		return parentHeader(h).Get(key)
	}
	list := h["Tracestate"]
	size := len(list) - 1
	for _, part := range list {
		size += len(part)
	}
	switch {
	case len(list) == 0 || size > maxTraceState:
		return ""
	case len(list) == 1:
		return list[0]
	}
	return strings.Join(list, ",")
}

// Set implements propagation.TextMapCarrier.
func (traceHeaders) Set(string, string) {}

// Keys implements propagation.TextMapCarrier.
func (traceHeaders) Keys() []string { return []string{"traceparent", "tracestate"} }

func first(list []string) string {
	if len(list) == 0 {
		return ""
	}
	return list[0]
}

func isGRPC(header http.Header) bool {
	return strings.HasPrefix(header.Get("Content-Type"), "application/grpc")
}

// endCall ends the span of a call; nil: there is none. The text of an error can name principals and
// resources, so the span has only its code.
func endCall(span trace.Span, header http.Header, err error) {
	if span == nil {
		return
	}
	code := connect.Code(0)
	if err != nil {
		code = connect.CodeOf(err)
		span.SetAttributes(semconv.ErrorTypeKey.String(code.String()))
	}
	if isGRPC(header) {
		span.SetAttributes(semconv.RPCGRPCStatusCodeKey.Int(int(code)))
	} else if err != nil {
		span.SetAttributes(semconv.RPCConnectRPCErrorCodeKey.String(code.String()))
	}
	switch code {
	case connect.CodeUnknown, connect.CodeDeadlineExceeded, connect.CodeUnimplemented, connect.CodeInternal, connect.CodeUnavailable, connect.CodeDataLoss:
		span.SetStatus(codes.Error, code.String()) // other codes are not the fault of the server
	}
	span.End()
}

// stage is a part of calls that decide: a span, if the call is sampled, and a time.
type stage struct {
	name    string
	seconds prometheus.Observer
}

// errPanicked is the error of a stage that panics.
var errPanicked = errors.New("panicked")

// run runs one stage of a call. do gets its span, or nil if the call is not sampled. The span ends also
// if do panics. The time counts if do succeeds.
func (s *stage) run(ctx context.Context, do func(ctx context.Context, span trace.Span) error) (err error) {
	began := time.Now()
	var span trace.Span
	if parent := trace.SpanFromContext(ctx); parent.IsRecording() {
		ctx, span = parent.TracerProvider().Tracer(tracerName).Start(ctx, s.name)
	}
	err = errPanicked
	defer func() { s.end(span, began, err) }()
	return do(ctx, span)
}

func (s *stage) end(span trace.Span, began time.Time, err error) {
	if err == nil {
		observe(s.seconds, time.Since(began), span)
	}
	if span == nil {
		return
	}
	if err != nil {
		span.SetStatus(codes.Error, "failed")
	}
	span.End()
}

// observe adds a time to a histogram, with the trace of a span as its exemplar; nil: without.
func observe(o prometheus.Observer, took time.Duration, span trace.Span) {
	if with, ok := o.(prometheus.ExemplarObserver); ok && span != nil && span.SpanContext().IsSampled() {
		sc := span.SpanContext()
		with.ObserveWithExemplar(took.Seconds(), prometheus.Labels{"trace_id": sc.TraceID().String(), "span_id": sc.SpanID().String()})
		return
	}
	o.Observe(took.Seconds())
}
