package server

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectproto"
	"go.opentelemetry.io/otel/trace"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/proto/grpc/health/v1/healthv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/wire"
)

// Larger calls are refused before they are decoded. The limits of messages are in package
// wire.
const (
	maxHeaderBytes = 16 << 10  // the headers of a call
	maxStreamBytes = 300 << 20 // all messages of a call
	maxNesting     = 100       // of JSON
	maxRest        = 64 << 20  // bytes of an ended call of HTTP/1.1 that are read and dropped

	maxStreams       = 100       // calls at the same time on one connection of HTTP/2
	maxReceiveBuffer = 256 << 10 // bytes of bodies that one connection of HTTP/2 sends ahead
	maxStrangers     = 256       // calls without a key whose body a plane waits for
)

// past is a deadline that has ended.
var past = time.Unix(1, 0)

// timeouts bound how long a caller may keep the server waiting.
type timeouts struct {
	header, read, write, idle time.Duration // of a connection, as in http.Server

	message time.Duration // to receive or send one message of a stream
	upload  time.Duration // for all that a caller streams in one call, and for a call that handles a whole bundle
	answer  time.Duration // that a caller may take to read all messages of a stream, besides a second for each `slowest` bytes
	slowest int           // bytes of a stream that a caller reads in a second, at least
	discard time.Duration // to read what a caller still sends after its call has ended
	keys    time.Duration // that one call waits for keys of issuers, to verify tokens of users
	health  time.Duration // to receive the message of a call of the health service, which needs no key

	heartbeat time.Duration // between two messages of a watch if nothing changes

	check time.Duration // to check a bundle, and to wait for other checks

	shadow time.Duration // between two looks for changes in shadow
	// late is how old decisions are when they are compared with those by a change in shadow: those that
	// were recorded late are in the log by then.
	late time.Duration
}

var defaultTimeouts = timeouts{
	header: 5 * time.Second, read: 10 * time.Second, write: 30 * time.Second, idle: time.Minute,
	message: 30 * time.Second, upload: 15 * time.Minute, answer: 30 * time.Second, slowest: 64 << 10, discard: 2 * time.Second, keys: time.Second, health: 2 * time.Second,
	heartbeat: 10 * time.Second, check: time.Minute, shadow: 10 * time.Second, late: 2 * decisionlog.RecordTimeout,
}

// callerFrom returns the name of the authenticated caller of a call.
func callerFrom(ctx context.Context) string { return access.CallerFrom(ctx).Name }

// request is the HTTP request of a call, in the context of the call.
type request struct {
	header     http.Header
	tls        *tls.ConnectionState // nil without TLS
	peer       string               // address and port
	controller *http.ResponseController
	answer     http.Header        // of the response
	conn       *boundedConn       // nil in tests without a listener
	snapshot   *snapshot.Snapshot // that the caller was admitted by, or an older one; nil after the first message
	admitted   time.Time
	known      bool              // the caller is authenticated
	span       trace.Span        // of the call; nil: it is not sampled
	rights     access.HeldRights // of the caller
	body       body
	reply      reply
}

type requestKey struct{}

// withRequest puts each request into its context. discard is how long it reads what a caller still sends
// after its call has ended.
func withRequest(h http.Handler, discard time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		in := &request{header: r.Header, tls: r.TLS, peer: r.RemoteAddr, controller: http.NewResponseController(w), answer: w.Header()}
		in.body.ReadCloser, in.body.announced = r.Body, r.ContentLength
		in.conn, _ = r.Context().Value(connKey{}).(*boundedConn)
		r = r.WithContext(context.WithValue(r.Context(), requestKey{}, in))
		in.body.http1 = r.ProtoMajor == 1
		r.Body = &in.body
		h.ServeHTTP(w, r)
		if in.known && in.body.http1 && r.Header.Get("Expect") == "" {
			in.readRest(discard)
		}
	})
}

// readRest reads and drops what the caller still sends in HTTP/1.1, for a bounded time. A connection that
// is closed with bytes that nobody has read is reset, and the caller may then not get the answer
// (RFC 9112, section 9.6).
func (r *request) readRest(within time.Duration) {
	if r.body.ended || r.body.broken || r.body.announced > maxRest || r.controller.Flush() != nil {
		return
	}
	_ = r.controller.SetReadDeadline(time.Now().Add(within))
	_, _ = io.CopyN(io.Discard, r.body.ReadCloser, maxRest)
}

// requestFrom returns the request of a context.
func requestFrom(ctx context.Context) *request {
	r, ok := ctx.Value(requestKey{}).(*request)
	if !ok {
		panic("no withRequest around the handler")
	}
	return r
}

// edge is what every call passes before its handler.
type edge struct {
	gate      *gate
	limits    *access.Limiter
	log       *slog.Logger // a sampler
	metric    *callMetrics
	tracing   *tracing // nil: none
	noted     *decisionlog.Noted
	failures  *access.Failures
	timeout   time.Duration // of a unary handler
	times     timeouts
	strangers waitingRoom
	bodies    *bodies // of requests
	answers   *bodies
	maxBytes  int // of a message, for procedures that have no bound of their own
}

// guard is the one choke point of all calls: it authenticates the caller, bounds how often
// and how long it calls, and logs failures. It runs before the body is read, so a caller that
// is not authenticated cannot make the server decode anything.
func (e *edge) guard(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) (err error) {
		began := time.Now()
		defer func() {
			if r := recover(); r != nil {
				e.log.Error("panic", "procedure", spec.Procedure, "peer", requestFrom(ctx).peer, "panic", r, "stack", string(debug.Stack()))
				err = connect.NewError(connect.CodeInternal, "internal error")
			}
			if refused, ok := errors.AsType[*refusedError](err); ok {
				e.metric.refused.WithLabelValues(procedureLabel(spec)).Inc()
				e.noted.RefusedRight(ctx, spec.Procedure, refused.reason())
			}
			if err != nil {
				err = bodyError(requestFrom(ctx), callerError(ctx, publicError(spec.Procedure, err)))
			}
			e.logFailure(ctx, spec, err)
			span := requestFrom(ctx).span
			e.metric.call(spec, began, span, err)
			endCall(span, requestFrom(ctx).header, err)
		}()
		r := requestFrom(ctx)
		defer r.body.end()
		defer r.reply.release()
		wait := e.times.message
		if isHealth(spec) {
			// Load balancers call the health service and have no API key.
			leave := e.strangers.enter(r.controller)
			defer leave()
			stream, wait = strangerStream{stream, leave}, e.times.health
		} else if ctx, err = e.admit(ctx, r, spec, began); err != nil {
			// HTTP/1.1 reads some of the body that is left.
			_ = r.controller.SetReadDeadline(time.Now().Add(e.times.discard))
			return err
		}
		if !isHealth(spec) {
			r.reply.measure(ctx, e.answers, callerFrom(ctx))
			stream = countedStream{stream, &r.reply}
		}
		streams := spec.StreamType == connect.StreamTypeClient || spec.StreamType == connect.StreamTypeBidi
		r.body.measure(ctx, e.bodies, callerFrom(ctx), maxMessage(spec.Procedure, e.maxBytes), streams)
		long := handlesBundle(spec.Procedure)
		if spec.StreamType == connect.StreamTypeUnary && !isHealth(spec) && !long {
			ctx, cancel := context.WithTimeout(ctx, e.timeout)
			defer cancel()
			return next(ctx, spec, stream)
		}
		bounded := ctx // callerError needs ctx, which is without the server's own deadline
		if spec.StreamType == connect.StreamTypeClient || long {
			var cancel context.CancelFunc
			bounded, cancel = context.WithTimeout(ctx, e.times.upload)
			defer cancel()
		}
		paced := e.pace(bounded, r, stream, wait)
		defer paced.end()
		return next(bounded, spec, paced)
	}
}

// handlesBundle reports whether a unary call reads or checks a whole bundle, and so may take as long as an
// upload.
func handlesBundle(procedure string) bool {
	switch procedure {
	case cedarpostv1connect.PolicyServiceDeleteBundleProcedure, cedarpostv1connect.PolicyServiceRollbackVersionProcedure, cedarpostv1connect.PolicyServiceCreateChangeProcedure, cedarpostv1connect.PolicyServiceUpdateChangeProcedure,
		cedarpostv1connect.PolicyServiceCheckChangeProcedure, cedarpostv1connect.PolicyServicePublishChangeProcedure:
		return true
	}
	return false
}

// strangerStream leaves the waiting room when its message has come.
type strangerStream struct {
	connect.ServerStream
	leave func()
}

func (s strangerStream) Receive(msg any) error {
	defer s.leave()
	return s.ServerStream.Receive(msg)
}

func isHealth(spec connect.Spec) bool {
	return strings.HasPrefix(spec.Procedure, "/"+healthv1connect.HealthName+"/")
}

// admit authenticates the caller of a request and takes one token of its rate limit. It
// returns a context with the caller, and with what the log records about the call. The span of the call
// begins here, because neither a stranger nor a caller above its rate may make the server trace anything.
func (e *edge) admit(ctx context.Context, r *request, spec connect.Spec, began time.Time) (context.Context, error) {
	procedure := spec.Procedure
	r.snapshot, r.admitted = e.gate.follower.Latest(), time.Now()
	caller, rights, err := e.gate.authenticate(ctx, r.header, r.tls)
	if reason, ok := unauthenticated(err); ok {
		e.metric.unauthenticated.WithLabelValues(reason).Inc()
		e.noted.AuthenticationFailure(r.peer, procedure, reason)
		if r.conn != nil {
			r.conn.hasNoKey()
		}
		if !e.failures.Allow(addressOf(r.peer), time.Now()) {
			if r.conn == nil || !r.conn.known.Load() { // else it is that of a proxy
				r.answer.Set("Connection", "close") // in HTTP/2 it ends the connection, too
			}
			return ctx, access.ErrTooManyFailures
		}
	}
	if err != nil {
		return ctx, err
	}
	if r.conn != nil {
		r.conn.hasKey(caller.Name)
	}
	r.known = true
	call := decisionlog.Call{Caller: caller.Name, Procedure: procedure}
	parent, traceID := e.tracing.parent(ctx, r.header)
	allowed := e.limits.Allow(rights, 1)
	if allowed {
		if ctx, r.span = e.tracing.begin(ctx, parent, r.header, spec, began, caller.Name); r.span != nil {
			traceID = r.span.SpanContext().TraceID()
		}
	}
	if traceID.IsValid() {
		call.TraceID = traceID.String()
	}
	r.rights.Set(rights)
	ctx = decisionlog.WithCall(access.WithRights(access.WithCaller(ctx, caller), &r.rights), call)
	if !allowed {
		e.noted.Probing(ctx, decisionlog.ProbingRateLimited, "", procedure)
		return ctx, e.limits.Refusal(rights)
	}
	return ctx, mayBegin(rights, procedure)
}

// unauthenticated returns why a caller is not authenticated, for the log.
func unauthenticated(err error) (reason string, ok bool) {
	if e, ok := errors.AsType[*access.UnauthenticatedError](err); ok {
		return e.Reason, true
	}
	if e, ok := errors.AsType[*access.TokenError](err); ok {
		return "token: " + string(e.Reason), true
	}
	return "", false
}

// logFailure logs the error of a call. e.log samples the lines, because a caller can cause one
// with each call.
func (e *edge) logFailure(ctx context.Context, spec connect.Spec, err error) {
	if err == nil || errors.Is(err, errWatchStopped) { // a line for each watcher would not help
		return
	}
	code, level, message := connect.CodeOf(err), slog.LevelDebug, "call refused"
	caller, peer := callerFrom(ctx), requestFrom(ctx).peer
	switch code {
	case connect.CodeUnavailable, connect.CodeInternal, connect.CodeUnknown, connect.CodeDataLoss:
		level, message = slog.LevelError, "call failed"
	case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeResourceExhausted:
		level = slog.LevelWarn
		// Strangers have a message of their own: the lines of a message are bounded, and
		// strangers must not use up those of callers.
		if caller == "" {
			message = "call refused without a key"
		}
	}
	if !e.log.Enabled(ctx, level) {
		return
	}
	attrs := []any{"procedure", spec.Procedure, "code", code.String(), "caller", caller, "peer", peer, "err", err}
	if caller == "" {
		attrs = append(attrs, "address", addressOf(peer).String())
	}
	var ce *connect.Error
	if errors.As(err, &ce) && ce.Unwrap() != nil {
		attrs = append(attrs, "cause", cut(ce.Unwrap().Error()))
	}
	e.log.Log(ctx, level, message, attrs...)
}

// wireOptions returns the codecs and limits of a plane. Compression is off, because a small
// gzip body can inflate a thousandfold. maxBytes bounds the messages of procedures that have
// no bound of their own.
func wireOptions(maxBytes int) []connecthttp.Option {
	return []connecthttp.Option{
		connecthttp.WithCodecs(strictBinary{connectproto.NewBinaryCodec()}, newStrictJSON()),
		connecthttp.WithCompressors(),
		connecthttp.WithConditionalOptions(func(spec connect.Spec) []connecthttp.Option {
			return []connecthttp.Option{connecthttp.WithReadMaxBytes(maxMessage(spec.Procedure, maxBytes))}
		}),
	}
}

// maxMessage returns how many bytes a message to a procedure may have, or other if it has no
// bound of its own.
func maxMessage(procedure string, other int) int {
	switch procedure {
	case cedarpostv1connect.AuthorizationServiceAuthorizeProcedure:
		return wire.MaxAuthorizeBytes
	case cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure:
		return wire.MaxBatchBytes
	case cedarpostv1connect.AuthorizationServiceReportReuseProcedure:
		return wire.MaxReportBytes
	case cedarpostv1connect.AuthorizationServiceGetRevisionProcedure, cedarpostv1connect.AuthorizationServiceWatchProcedure,
		healthv1connect.HealthCheckProcedure, healthv1connect.HealthWatchProcedure:
		return wire.MaxSmallBytes
	}
	return other
}
