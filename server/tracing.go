package server

import (
	"context"
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

// begin begins the span of an authenticated call, as a child of the caller's. The context that it
// returns has the span only if the call is sampled. traceID is that of the span, else that of the
// caller's headers; without both it is not valid. t may be nil.
func (t *tracing) begin(ctx context.Context, header http.Header, spec connect.Spec, began time.Time, caller string) (_ context.Context, span trace.Span, traceID trace.TraceID) {
	parent := ctx
	if len(header["Traceparent"]) > 0 {
		parent = propagation.TraceContext{}.Extract(ctx, traceHeaders(header))
		traceID = trace.SpanContextFromContext(parent).TraceID()
	}
	if t == nil || spec.Schema == nil { // the caller chooses the name of a procedure that is not registered
		return ctx, nil, traceID
	}
	options := t.options.Get().(*[2]trace.SpanStartOption)
	options[1] = trace.WithTimestamp(began)
	traced, span := t.tracer.Start(parent, strings.TrimPrefix(spec.Procedure, "/"), options[:]...)
	t.options.Put(options)
	if !span.IsRecording() {
		return ctx, nil, traceID
	}
	service, method, _ := strings.Cut(strings.TrimPrefix(spec.Procedure, "/"), "/")
	system := semconv.RPCSystemConnectRPC
	if isGRPC(header) {
		system = semconv.RPCSystemGRPC
	}
	span.SetAttributes(system, semconv.RPCService(service), semconv.RPCMethod(method), attribute.String("cedarpost.caller", caller))
	return traced, span, span.SpanContext().TraceID()
}

// traceHeaders reads the headers of a trace without taking memory.
type traceHeaders http.Header

// Get implements propagation.TextMapCarrier.
func (h traceHeaders) Get(key string) string {
	switch key {
	case "traceparent":
		return first(h["Traceparent"])
	case "tracestate":
		if list := h["Tracestate"]; len(list) > 1 {
			return strings.Join(list, ",")
		}
		return first(h["Tracestate"])
	}
	return ""
}

// Set implements propagation.TextMapCarrier.
func (h traceHeaders) Set(string, string) {}

// Keys implements propagation.TextMapCarrier.
func (h traceHeaders) Keys() []string { return []string{"traceparent", "tracestate"} }

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

// running is a stage that has begun in one call.
type running struct {
	stage *stage
	span  trace.Span // nil: the call is not sampled
	began time.Time
}

func (s *stage) begin(ctx context.Context) (context.Context, running) {
	r := running{stage: s, began: time.Now()}
	if parent := trace.SpanFromContext(ctx); parent.IsRecording() {
		ctx, r.span = parent.TracerProvider().Tracer(tracerName).Start(ctx, s.name)
	}
	return ctx, r
}

// end ends the stage. Its time counts if it succeeded.
func (r running) end(err error) {
	if err == nil {
		observe(r.stage.seconds, time.Since(r.began), r.span)
	}
	if r.span == nil {
		return
	}
	if err != nil {
		r.span.SetStatus(codes.Error, "failed")
	}
	r.span.End()
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
