package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectproto"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/proto/grpc/health/v1/healthv1connect"
)

// Sizes and times at the edge. What is larger is refused before it is decoded.
const (
	maxHeaderBytes    = 16 << 10
	maxAuthorizeBytes = 64 << 10
	maxBatchBytes     = 1 << 20
	maxAdminBytes     = 4 << 20
	maxStreamBytes    = 300 << 20
	maxNesting        = 100 // of JSON

	headerTimeout  = 5 * time.Second
	readTimeout    = 10 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = 60 * time.Second
	messageTimeout = 30 * time.Second // between two messages of a stream
)

type contextKey int

const (
	callerKey contextKey = iota
	traceKey
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
	timeout  time.Duration // of a unary handler
}

var traceparent = regexp.MustCompile(`^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}`)

// guard is the one choke point of all calls: it knows who calls, bounds how
// often and how long, and logs what failed. It runs before the body is read, so
// a stranger cannot make the server decode anything.
func (e *edge) guard(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) (err error) {
		began := time.Now()
		defer func() {
			if r := recover(); r != nil {
				e.log.Error("panic", "procedure", spec.Procedure, "panic", r, "stack", string(debug.Stack()))
				err = connect.NewError(connect.CodeInternal, "internal error")
			}
			e.logFailure(ctx, spec, err)
			e.metric.call(spec, began, err)
		}()
		// Load balancers ask for health and have no key.
		if strings.HasPrefix(spec.Procedure, "/"+healthv1connect.HealthName+"/") {
			return next(ctx, spec, stream)
		}
		info, ok := connect.CallInfoForServerContext(ctx)
		if !ok {
			return errUnauthenticated
		}
		caller, err := e.authenticate(info.RequestHeader().Values("Authorization"))
		if err != nil {
			return err
		}
		ctx = context.WithValue(ctx, callerKey, caller)
		if m := traceparent.FindStringSubmatch(info.RequestHeader().Get("Traceparent")); m != nil {
			ctx = context.WithValue(ctx, traceKey, m[1])
		}
		if !e.limits.allow(caller, 1) {
			return errRateLimited
		}
		if spec.StreamType == connect.StreamTypeUnary {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, e.timeout)
			defer cancel()
			return next(ctx, spec, stream)
		}
		rc, _ := ctx.Value(controllerKey).(*http.ResponseController)
		return next(ctx, spec, &pacedStream{stream, rc})
	}
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
		return "", publicError(err)
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
	switch code {
	case connect.CodeUnavailable, connect.CodeInternal, connect.CodeUnknown, connect.CodeDataLoss:
		e.log.Error("call failed", attrs...)
	case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeResourceExhausted:
		e.log.Warn("call refused", attrs...)
	default:
		e.log.Debug("call refused", attrs...)
	}
}

// pacedStream gives each message of a stream its own deadline, so that a long
// upload lives and a stalled one does not.
type pacedStream struct {
	connect.ServerStream
	rc *http.ResponseController
}

func (s *pacedStream) Receive(msg any) error {
	if s.rc != nil {
		_ = s.rc.SetReadDeadline(time.Now().Add(messageTimeout))
	}
	return s.ServerStream.Receive(msg)
}

func (s *pacedStream) Send(msg any) error {
	if s.rc != nil {
		_ = s.rc.SetWriteDeadline(time.Now().Add(messageTimeout))
	}
	return s.ServerStream.Send(msg)
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
			limit := maxAdminBytes
			switch spec.Procedure {
			case cedarpostv1connect.AuthorizationServiceAuthorizeProcedure:
				limit = maxAuthorizeBytes
			case cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure:
				limit = maxBatchBytes
			case cedarpostv1connect.AuthorizationServiceGetRevisionProcedure:
				limit = maxHeaderBytes
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
