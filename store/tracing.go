package store

import (
	"context"
	"errors"

	"github.com/exaring/otelpgx"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/codes"
	noopmetric "go.opentelemetry.io/otel/metric/noop"
	semconv "go.opentelemetry.io/otel/semconv/v1.37.0"
	"go.opentelemetry.io/otel/trace"
)

// queryTracer makes spans of the statements of calls that are sampled: with the SQL text, and
// without parameters. It does not pass other statements to otelpgx, which would allocate for each of
// them.
type queryTracer struct{ spans *otelpgx.Tracer }

// newQueryTracer returns a tracer for connections, or nil if there is no provider.
func newQueryTracer(p trace.TracerProvider) pgx.QueryTracer {
	if p == nil {
		return nil
	}
	return queryTracer{otelpgx.NewTracer(
		otelpgx.WithTracerProvider(p), otelpgx.WithMeterProvider(noopmetric.NewMeterProvider()), otelpgx.WithDisableConnectionDetailsInAttributes())}
}

func sampled(ctx context.Context) bool { return trace.SpanFromContext(ctx).IsRecording() }

// errorClass returns an error that says only of which class err is. An error text of Postgres can contain
// values of the statement, and that of a connection contains its user, database and address.
func errorClass(err error) error {
	if err == nil {
		return nil
	}
	for _, class := range []error{pgx.ErrNoRows, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, class) {
			return class
		}
	}
	if state, ok := errors.AsType[*pgconn.PgError](err); ok {
		return &pgconn.PgError{Severity: state.Severity, Code: state.Code, Message: "the statement failed"}
	}
	return errConnection
}

var errConnection = errors.New("the statement or its connection failed")

// TraceQueryStart implements pgx.QueryTracer.
func (t queryTracer) TraceQueryStart(ctx context.Context, c *pgx.Conn, d pgx.TraceQueryStartData) context.Context {
	if !sampled(ctx) {
		return ctx
	}
	return t.spans.TraceQueryStart(ctx, c, d)
}

// TraceQueryEnd implements pgx.QueryTracer.
func (t queryTracer) TraceQueryEnd(ctx context.Context, c *pgx.Conn, d pgx.TraceQueryEndData) {
	if sampled(ctx) {
		d.Err = errorClass(d.Err)
		t.spans.TraceQueryEnd(ctx, c, d)
	}
}

// TraceBatchStart implements pgx.BatchTracer.
func (t queryTracer) TraceBatchStart(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchStartData) context.Context {
	if !sampled(ctx) {
		return ctx
	}
	return t.spans.TraceBatchStart(ctx, c, d)
}

// TraceBatchQuery implements pgx.BatchTracer.
func (t queryTracer) TraceBatchQuery(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchQueryData) {
	if sampled(ctx) {
		d.Err = errorClass(d.Err)
		t.spans.TraceBatchQuery(ctx, c, d)
	}
}

// TraceBatchEnd implements pgx.BatchTracer.
func (t queryTracer) TraceBatchEnd(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchEndData) {
	if sampled(ctx) {
		d.Err = errorClass(d.Err)
		t.spans.TraceBatchEnd(ctx, c, d)
	}
}

// TraceCopyFromStart implements pgx.CopyFromTracer.
func (t queryTracer) TraceCopyFromStart(ctx context.Context, c *pgx.Conn, d pgx.TraceCopyFromStartData) context.Context {
	if !sampled(ctx) {
		return ctx
	}
	return t.spans.TraceCopyFromStart(ctx, c, d)
}

// TraceCopyFromEnd implements pgx.CopyFromTracer.
func (t queryTracer) TraceCopyFromEnd(ctx context.Context, c *pgx.Conn, d pgx.TraceCopyFromEndData) {
	if sampled(ctx) {
		d.Err = errorClass(d.Err)
		t.spans.TraceCopyFromEnd(ctx, c, d)
	}
}

// TracePrepareStart implements pgx.PrepareTracer.
func (t queryTracer) TracePrepareStart(ctx context.Context, c *pgx.Conn, d pgx.TracePrepareStartData) context.Context {
	if !sampled(ctx) {
		return ctx
	}
	return t.spans.TracePrepareStart(ctx, c, d)
}

// TracePrepareEnd implements pgx.PrepareTracer.
func (t queryTracer) TracePrepareEnd(ctx context.Context, c *pgx.Conn, d pgx.TracePrepareEndData) {
	if sampled(ctx) {
		d.Err = errorClass(d.Err)
		t.spans.TracePrepareEnd(ctx, c, d)
	}
}

// TraceConnectStart implements pgx.ConnectTracer.
func (t queryTracer) TraceConnectStart(ctx context.Context, d pgx.TraceConnectStartData) context.Context {
	if !sampled(ctx) {
		return ctx
	}
	return t.spans.TraceConnectStart(ctx, d)
}

// TraceConnectEnd implements pgx.ConnectTracer.
func (t queryTracer) TraceConnectEnd(ctx context.Context, d pgx.TraceConnectEndData) {
	if sampled(ctx) {
		d.Err = errorClass(d.Err)
		t.spans.TraceConnectEnd(ctx, d)
	}
}

// TraceAcquireStart implements pgxpool.AcquireTracer.
func (t queryTracer) TraceAcquireStart(ctx context.Context, p *pgxpool.Pool, d pgxpool.TraceAcquireStartData) context.Context {
	if !sampled(ctx) {
		return ctx
	}
	return t.spans.TraceAcquireStart(ctx, p, d)
}

// TraceAcquireEnd implements pgxpool.AcquireTracer.
func (t queryTracer) TraceAcquireEnd(ctx context.Context, p *pgxpool.Pool, d pgxpool.TraceAcquireEndData) {
	if sampled(ctx) {
		d.Err = errorClass(d.Err)
		t.spans.TraceAcquireEnd(ctx, p, d)
	}
}

// traceAppend begins the span of a commit to the log, which queryTracer does not see because it does not
// use the query methods of pgx. The span is nil if no call of the batch is sampled.
func traceAppend(ctx context.Context) trace.Span {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() {
		return nil
	}
	_, span := parent.TracerProvider().Tracer("github.com/cedarpost/cedarpost/store").Start(ctx, "append_batch", trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(semconv.DBSystemNamePostgreSQL, semconv.DBOperationName("append_batch"), semconv.DBQueryText(appendBatch)))
	return span
}

// endAppend ends the span of traceAppend; nil: there is none.
func endAppend(span trace.Span, err error) {
	if span == nil {
		return
	}
	if err = errorClass(err); err != nil {
		span.RecordError(err)
		span.SetStatus(codes.Error, err.Error())
	}
	span.End()
}
