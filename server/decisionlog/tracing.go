package decisionlog

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// tracerName is the instrumentation scope of the spans of this package.
const tracerName = "github.com/cedarpost/cedarpost/server/decisionlog"

// maxLinks bounds the calls that the span of a commit is linked to.
const maxLinks = 32

// traceCommit begins the span of a commit if calls of its batch are sampled; otherwise the span is nil. It
// is a child of the first of these calls, so that the trace of a call that is alone in its batch is
// complete. It has links to the sampled calls, up to maxLinks, and each of these has a link to it.
func traceCommit(batch []*pendingRecord, decisions, events int) (context.Context, trace.Span) {
	var spans []trace.Span
	for _, p := range batch {
		if p.span != nil && len(spans) < maxLinks {
			spans = append(spans, p.span)
		}
	}
	if len(spans) == 0 {
		return context.Background(), nil
	}
	links := make([]trace.Link, len(spans))
	for i, s := range spans {
		links[i].SpanContext = s.SpanContext()
	}
	ctx, span := spans[0].TracerProvider().Tracer(tracerName).Start(trace.ContextWithSpan(context.Background(), spans[0]), "commit",
		trace.WithLinks(links...), trace.WithAttributes(
			attribute.Int("cedarpost.calls", len(batch)), attribute.Int("cedarpost.decisions", decisions), attribute.Int("cedarpost.events", events)))
	for _, s := range spans { // does nothing if the call has ended
		s.AddLink(trace.Link{SpanContext: span.SpanContext()})
	}
	return ctx, span
}

// noteLeaf adds the place of a batch in the log to the span of its commit. A batch that spans two days has
// two places; the span keeps the last one.
func noteLeaf(ctx context.Context, leaf int64) {
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		span.SetAttributes(attribute.Int64("cedarpost.batch", leaf))
	}
}

// endCommit ends the span of a commit; nil: there is none. The text of an error can name entities,
// so the span does not have it.
func endCommit(span trace.Span, err error) {
	if span == nil {
		return
	}
	if err != nil {
		span.SetStatus(codes.Error, "not recorded")
	}
	span.End()
}
