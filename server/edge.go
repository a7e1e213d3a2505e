package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectproto"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/proto/grpc/health/v1/healthv1connect"
	"github.com/cedarpost/cedarpost/server/wire"
)

// Sizes at the edge; package wire has those of messages. What is larger is refused
// before it is decoded.
const (
	maxHeaderBytes = 16 << 10  // the headers of a call
	maxStreamBytes = 300 << 20 // all messages of a call
	maxNesting     = 100       // of JSON
)

// timeouts bound how long a caller may keep the server waiting.
type timeouts struct {
	header, read, write, idle time.Duration // of a connection, as in http.Server

	message time.Duration // to receive or send one message of a stream
	upload  time.Duration // for all that a caller streams in one call
	discard time.Duration // to read on what a caller sends to a call that has ended

	heartbeat time.Duration // between two messages of a watch where nothing changes
}

var defaultTimeouts = timeouts{
	header: 5 * time.Second, read: 10 * time.Second, write: 30 * time.Second, idle: time.Minute,
	message: 30 * time.Second, upload: 15 * time.Minute, discard: 2 * time.Second,
	heartbeat: 10 * time.Second,
}

type contextKey int

const (
	callerKey contextKey = iota
	traceKey
	procedureKey
	controllerKey
)

// callerFrom returns the authenticated caller of a request.
func callerFrom(ctx context.Context) string {
	name, _ := ctx.Value(callerKey).(string)
	return name
}

// traceFrom returns the W3C trace id of a request, or "".
func traceFrom(ctx context.Context) string {
	id, _ := ctx.Value(traceKey).(string)
	return id
}

var errUnauthenticated = connect.NewError(connect.CodeUnauthenticated, `missing or unknown API key; send "Authorization: Bearer <key>"`)
var errRateLimited = connect.NewError(connect.CodeResourceExhausted, "this caller sends more than its rate limit; slow down")

// edge holds what every call passes before its handler.
type edge struct {
	follower *follower
	limits   *limits
	log      *slog.Logger
	metric   *metrics
	unknown  *strangers
	timeout  time.Duration // of a unary handler
	times    timeouts
}

// guard is the one choke point of all calls: it knows who calls, bounds how
// often and how long, and logs what failed. It runs before the body is read, so
// a stranger cannot make the server decode anything.
func (e *edge) guard(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) (err error) {
		began := time.Now()
		ctx = context.WithValue(ctx, procedureKey, spec.Procedure)
		defer func() {
			if r := recover(); r != nil {
				e.log.Error("panic", "procedure", spec.Procedure, "panic", r, "stack", string(debug.Stack()))
				err = connect.NewError(connect.CodeInternal, "internal error")
			}
			if err != nil {
				err = callerError(ctx, publicError(spec.Procedure, err))
			}
			e.logFailure(ctx, spec, err)
			e.metric.call(spec, began, err)
		}()
		// Load balancers ask for health and have no key.
		if !isHealth(spec) {
			if ctx, err = e.admit(ctx); err != nil {
				return err
			}
		}
		if spec.StreamType == connect.StreamTypeUnary {
			ctx, cancel := context.WithTimeout(ctx, e.timeout)
			defer cancel()
			return next(ctx, spec, stream)
		}
		bounded := ctx // callerError needs the context without the server's own bound
		if spec.StreamType == connect.StreamTypeClient {
			var cancel context.CancelFunc
			bounded, cancel = context.WithTimeout(ctx, e.times.upload)
			defer cancel()
		}
		paced := e.pace(bounded, stream)
		defer paced.end()
		return next(bounded, spec, paced)
	}
}

func isHealth(spec connect.Spec) bool {
	return strings.HasPrefix(spec.Procedure, "/"+healthv1connect.HealthName+"/")
}

// admit puts the caller and the trace into the context, if the caller may call.
func (e *edge) admit(ctx context.Context) (context.Context, error) {
	info, ok := connect.CallInfoForServerContext(ctx)
	if !ok {
		return ctx, errUnauthenticated
	}
	headers := info.RequestHeader().Values("Authorization")
	caller, err := e.authenticate(headers)
	if errors.Is(err, errUnauthenticated) {
		reason := "unknown key"
		if len(headers) == 0 {
			reason = "no credentials"
		}
		procedure, _ := ctx.Value(procedureKey).(string)
		e.unknown.note(info.PeerAddr, procedure, reason)
	}
	if err != nil {
		return ctx, err
	}
	ctx = context.WithValue(ctx, callerKey, caller)
	carrier := propagation.MapCarrier{"traceparent": info.RequestHeader().Get("Traceparent")}
	remote := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(ctx, carrier))
	if remote.HasTraceID() {
		ctx = context.WithValue(ctx, traceKey, remote.TraceID().String())
	}
	if !e.limits.allow(caller, 1) {
		return ctx, errRateLimited
	}
	return ctx, nil
}

// authenticate finds the caller of an API key. Keys are random 256-bit values,
// looked up by their hash, so neither guessing nor timing helps.
func (e *edge) authenticate(headers []string) (string, error) {
	if len(headers) != 1 {
		return "", errUnauthenticated
	}
	scheme, token, _ := strings.Cut(headers[0], " ")
	if !strings.EqualFold(scheme, "bearer") {
		return "", errUnauthenticated
	}
	snap, err := e.follower.current()
	if err != nil {
		return "", err
	}
	caller, ok := snap.callers[sha256.Sum256([]byte(strings.TrimSpace(token)))]
	if !ok {
		return "", errUnauthenticated
	}
	return caller, nil
}

func (e *edge) logFailure(ctx context.Context, spec connect.Spec, err error) {
	if err == nil {
		return
	}
	code := connect.CodeOf(err)
	attrs := []any{"procedure", spec.Procedure, "code", code.String(), "caller", callerFrom(ctx), "err", err}
	var ce *connect.Error
	if errors.As(err, &ce) && ce.Unwrap() != nil {
		attrs = append(attrs, "cause", ce.Unwrap())
	}
	if errors.Is(err, errWatchStopped) {
		return // one line for each watcher would say nothing
	}
	switch code {
	case connect.CodeUnavailable, connect.CodeInternal, connect.CodeUnknown, connect.CodeDataLoss:
		e.log.Error("call failed", attrs...)
	case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeResourceExhausted:
		e.log.Warn("call refused", attrs...)
	default:
		e.log.Debug("call refused", attrs...)
	}
}

// pacedStream gives each message of a stream its own deadline, in place of one
// for the whole: a long upload lives, and a stalled one does not. Between
// messages there is none, for the handler has a time of its own.
type pacedStream struct {
	connect.ServerStream
	ctx   context.Context
	rc    *http.ResponseController
	times timeouts
	total time.Duration // allowed for the stream, by the server or by its caller; 0: unbounded
}

func (e *edge) pace(ctx context.Context, stream connect.ServerStream) *pacedStream {
	rc, ok := ctx.Value(controllerKey).(*http.ResponseController)
	if !ok {
		panic("no withController around the handler")
	}
	s := &pacedStream{ServerStream: stream, ctx: ctx, rc: rc, times: e.times}
	if end, ok := ctx.Deadline(); ok {
		s.total = time.Until(end).Round(10 * time.Millisecond)
	}
	s.readWithin(0)
	s.writeWithin(0)
	return s
}

// readWithin and writeWithin set a deadline; 0 is none. They fail only on a
// connection that is gone, which the next read or write tells too.
func (s *pacedStream) readWithin(d time.Duration)  { _ = s.rc.SetReadDeadline(deadline(d)) }
func (s *pacedStream) writeWithin(d time.Duration) { _ = s.rc.SetWriteDeadline(deadline(d)) }

func deadline(d time.Duration) (t time.Time) {
	if d > 0 {
		t = time.Now().Add(d)
	}
	return t
}

func (s *pacedStream) Receive(msg any) error {
	wait := s.times.message
	end, bounded := s.ctx.Deadline()
	if bounded {
		wait = min(wait, time.Until(end))
	}
	err := os.ErrDeadlineExceeded
	if wait > 0 {
		s.readWithin(wait)
		err = s.ServerStream.Receive(msg)
		s.readWithin(0)
	}
	switch {
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case bounded && time.Until(end) <= 0:
		return connect.Errorf(connect.CodeDeadlineExceeded, "the stream took longer than %v in all", s.total).WithCause(err)
	}
	return connect.Errorf(connect.CodeDeadlineExceeded, "no message came within %v", s.times.message).WithCause(err)
}

func (s *pacedStream) SendHeaders() error {
	s.writeWithin(s.times.message)
	defer s.writeWithin(0)
	return s.ServerStream.SendHeaders()
}

func (s *pacedStream) Send(msg any) error {
	s.writeWithin(s.times.message)
	defer s.writeWithin(0)
	return s.ServerStream.Send(msg)
}

// end bounds what follows the handler: the end of the answer, before which
// HTTP/1.1 reads on some of what the caller still sends.
func (s *pacedStream) end() {
	s.readWithin(s.times.discard)
	s.writeWithin(s.times.discard + s.times.message)
}

// limits is a token bucket for each caller. The zero rate means no limit.
type limits struct {
	perSecond float64
	buckets   sync.Map // caller → *rate.Limiter
}

// allow takes n tokens. The number of callers is the number of live keys, so
// the map is bounded.
func (l *limits) allow(caller string, n int) bool {
	if l.perSecond <= 0 || n <= 0 {
		return true
	}
	b, ok := l.buckets.Load(caller)
	if !ok {
		b, _ = l.buckets.LoadOrStore(caller, rate.NewLimiter(rate.Limit(l.perSecond), max(int(l.perSecond), 100)))
	}
	return b.(*rate.Limiter).AllowN(time.Now(), n)
}

// withController hands the HTTP connection's deadlines to streams.
func withController(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), controllerKey, http.NewResponseController(w))))
	})
}

// wireOptions are the codecs and limits of both planes. Compression stays off: a
// small gzip body can inflate a thousandfold.
func wireOptions() []connecthttp.Option {
	return []connecthttp.Option{
		connecthttp.WithCodecs(strictBinary{connectproto.NewBinaryCodec()}, newStrictJSON()),
		connecthttp.WithCompressors(),
		connecthttp.WithConditionalOptions(func(spec connect.Spec) []connecthttp.Option {
			limit := wire.MaxAdminBytes
			switch spec.Procedure {
			case cedarpostv1connect.AuthorizationServiceAuthorizeProcedure:
				limit = wire.MaxAuthorizeBytes
			case cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure:
				limit = wire.MaxBatchBytes
			case cedarpostv1connect.AuthorizationServiceReportReuseProcedure:
				limit = wire.MaxReportBytes
			case cedarpostv1connect.AuthorizationServiceGetRevisionProcedure, cedarpostv1connect.AuthorizationServiceWatchProcedure,
				healthv1connect.HealthCheckProcedure, healthv1connect.HealthWatchProcedure:
				limit = wire.MaxWatchBytes
			}
			return []connecthttp.Option{connecthttp.WithReadMaxBytes(limit)}
		}),
	}
}

// strictBinary refuses fields that the contract does not know: a question that
// is understood in part could be answered wrongly.
type strictBinary struct{ *connectproto.BinaryCodec }

// UnmarshalRead implements connect.Codec.
func (c strictBinary) UnmarshalRead(ctx context.Context, src io.Reader, msg any) error {
	if err := c.BinaryCodec.UnmarshalRead(ctx, src, msg); err != nil {
		return cleanDecodeError(err)
	}
	if m, ok := msg.(proto.Message); ok {
		return refuseUnknown(m.ProtoReflect())
	}
	return nil
}

func refuseUnknown(m protoreflect.Message) (err error) {
	if len(m.GetUnknown()) > 0 {
		return fmt.Errorf("%s has fields that this version does not know", m.Descriptor().FullName())
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			if fd.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					err = refuseUnknown(v.Message())
					return err == nil
				})
			}
		case fd.Message() == nil:
		case fd.IsList():
			for i := range v.List().Len() {
				if err = refuseUnknown(v.List().Get(i).Message()); err != nil {
					break
				}
			}
		default:
			err = refuseUnknown(v.Message())
		}
		return err == nil
	})
	return err
}

// strictJSON refuses unknown fields and deep nesting. It writes empty lists and
// false too, because "permitted": [] is an answer.
type strictJSON struct{ *connectproto.JSONCodec }

func newStrictJSON() strictJSON {
	c := connectproto.NewJSONCodec()
	c.UnmarshalOptions = protojson.UnmarshalOptions{RecursionLimit: maxNesting}
	c.MarshalOptions = protojson.MarshalOptions{EmitDefaultValues: true}
	return strictJSON{c}
}

// UnmarshalRead implements connect.Codec.
func (c strictJSON) UnmarshalRead(ctx context.Context, src io.Reader, msg any) error {
	return cleanDecodeError(c.JSONCodec.UnmarshalRead(ctx, src, msg))
}

// protoPrefix is what the protobuf module puts before its errors, with a space
// that changes from build to build.
var protoPrefix = regexp.MustCompile(`^proto:[\s\x{a0}]*`)

// decodeError is a body that does not decode, in words for the caller.
type decodeError struct {
	msg   string
	cause error
}

func (e *decodeError) Error() string { return e.msg }
func (e *decodeError) Unwrap() error { return e.cause }

func cleanDecodeError(err error) error {
	if err == nil {
		return nil
	}
	return &decodeError{protoPrefix.ReplaceAllString(err.Error(), ""), err}
}
