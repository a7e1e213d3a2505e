package cedarpostconnect

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// checked is the stream that a handler gets. Each message is checked before the handler gets
// it. After a refused message the call is over, even if the handler ignores the error. The
// handler can send only after a message has passed. If the check is too old by then, it is
// made again first.
//
// Receive and Send may run at the same time.
type checked struct {
	ctx       context.Context
	guard     *enforce.Guard
	route     *compiled
	procedure string
	inner     connect.ServerStream
	held      *enforce.Held
	recheck   time.Duration
	before    metadata // headers and trailers of the answer before the handler ran

	passed  atomic.Pointer[passed] // the check of the newest message that passed; nil: none
	closed  atomic.Bool            // the client sends no more messages
	sent    atomic.Bool            // the headers are sent
	refused atomic.Pointer[enforce.Refusal]
	filter  atomic.Pointer[fields.Filter]
}

// passed is a check that let a message through.
type passed struct {
	check cedarpost.Check
	at    time.Time
}

var (
	errSent      = errors.New("the handler sends before a message was checked")
	errUnchecked = errors.New("the handler returned, and no message was checked")
)

// Receive implements connect.ServerStream.
func (s *checked) Receive(msg any) error {
	if r := s.refused.Load(); r != nil {
		return plainError(r)
	}
	if err := s.inner.Receive(msg); err != nil {
		if errors.Is(err, io.EOF) {
			s.closed.Store(true)
		}
		return err
	}
	m, isMessage := msg.(proto.Message)
	if !isMessage {
		return plainError(s.fault(fmt.Errorf("a %T is not a protobuf message", msg)))
	}
	refused := s.enforce(nil, func() (cedarpost.Check, error) { return s.route.check(s.ctx, m) })
	if refused != nil {
		proto.Reset(m) // in case the handler ignores the error
		return plainError(refused)
	}
	return nil
}

// enforce makes a check, or repeats the check before, and keeps the outcome.
func (s *checked) enforce(before *passed, question func() (cedarpost.Check, error)) *enforce.Refusal {
	now := time.Now()
	var check cedarpost.Check
	result, refused := s.guard.Enforce(s.ctx, enforce.Question{
		Route: s.procedure, Hide: s.route.Hide, Again: before != nil,
		Check: func() (_ cedarpost.Check, err error) {
			check, err = question()
			return check, err
		},
	})
	if refused != nil {
		s.refused.Store(refused)
		return refused
	}
	if s.route.Filter {
		f := result.Fields()
		s.filter.Store(fields.New(f.Permitted(), f.Denied()))
	}
	// If a newer message has passed meanwhile, its check stays.
	if p := (&passed{check, now}); before == nil {
		s.held.Set(result)
		s.passed.Store(p)
	} else if s.passed.CompareAndSwap(before, p) {
		s.held.Set(result)
	}
	return nil
}

// open says whether the handler may send.
func (s *checked) open() error {
	if r := s.refused.Load(); r != nil {
		return plainError(r)
	}
	p := s.passed.Load()
	if p == nil {
		return plainError(s.unchecked(errSent))
	}
	if time.Since(p.at) >= s.recheck {
		if r := s.enforce(p, func() (cedarpost.Check, error) { return p.check, nil }); r != nil {
			return plainError(r)
		}
	}
	s.sent.Store(true)
	return nil
}

// SendHeaders implements connect.ServerStream.
func (s *checked) SendHeaders() error {
	if err := s.open(); err != nil {
		return err
	}
	return s.inner.SendHeaders()
}

// Send implements connect.ServerStream.
func (s *checked) Send(msg any) error {
	if err := s.open(); err != nil {
		return err
	}
	if !s.route.Filter {
		return s.inner.Send(msg)
	}
	m, ok := msg.(proto.Message)
	if !ok {
		return plainError(s.fault(fmt.Errorf("a %T cannot be filtered", msg)))
	}
	m = proto.Clone(m) // the handler may keep it
	s.guard.Dropped(s.procedure, s.filter.Load().Proto(m))
	return s.inner.Send(m)
}

// fault refuses the call because of a mistake of the program.
func (s *checked) fault(err error) *enforce.Refusal {
	return s.refuse(&enforce.Refusal{Kind: enforce.Fault, Err: err})
}

// unchecked refuses a call in which no message was checked. It is a mistake of the client if
// that sent no message, otherwise of the handler.
func (s *checked) unchecked(err error) *enforce.Refusal {
	if s.closed.Load() {
		return s.refuse(&enforce.Refusal{Kind: enforce.Malformed, Err: err})
	}
	return s.fault(err)
}

func (s *checked) refuse(r *enforce.Refusal) *enforce.Refusal {
	s.guard.Refuse(s.procedure, r)
	s.refused.Store(r)
	return r
}

// end turns the error of the handler into the error that the client gets.
func (s *checked) end(err error) error {
	r := s.refused.Load()
	if r == nil && err == nil && s.passed.Load() == nil {
		r = s.unchecked(errUnchecked)
	}
	if r != nil || s.passed.Load() == nil {
		s.before.restore(s.ctx, s.sent.Load())
	}
	if r != nil {
		return toError(s.ctx, r, s.sent.Load())
	}
	return err
}

// metadata has the headers and trailers of an answer.
type metadata struct{ header, trailer map[string][]string }

// metadataOf copies the headers and trailers that are set so far, by outer interceptors.
func metadataOf(ctx context.Context) (m metadata) {
	if info, ok := connect.CallInfoForServerContext(ctx); ok {
		m.header, m.trailer = cloned(info.ResponseHeader()), cloned(info.ResponseTrailer())
	}
	return m
}

func cloned(h *connect.Header) map[string][]string {
	out := map[string][]string{}
	for name, values := range h.All() {
		out[name] = slices.Clone(values)
	}
	return out
}

// restore removes the headers and trailers that the handler set. Headers that were sent
// stay.
func (m metadata) restore(ctx context.Context, sent bool) {
	info, ok := connect.CallInfoForServerContext(ctx)
	if !ok {
		return
	}
	reset(info.ResponseTrailer(), m.trailer)
	if !sent {
		reset(info.ResponseHeader(), m.header)
	}
}

func reset(h *connect.Header, to map[string][]string) {
	for name := range maps.Collect(h.All()) {
		h.Delete(name)
	}
	for name, values := range to {
		h.SetValues(name, values)
	}
}

var codes = map[enforce.Kind]connect.Code{
	enforce.Forbidden: connect.CodePermissionDenied, enforce.Hidden: connect.CodeNotFound,
	enforce.NoPrincipal: connect.CodeUnauthenticated, enforce.StepUp: connect.CodeUnauthenticated,
	enforce.Unmet: connect.CodePermissionDenied, enforce.Unavailable: connect.CodeUnavailable,
	enforce.Fault: connect.CodeInternal, enforce.Malformed: connect.CodeInvalidArgument,
	enforce.TooLarge: connect.CodeResourceExhausted, enforce.WrongType: connect.CodeInvalidArgument,
	enforce.Unmapped: connect.CodePermissionDenied, enforce.Conflict: connect.CodeAborted,
}

// NotFound returns the error that there is no such object. It is the same as the error of a
// route with Hide for an object that the user may not know of.
func NotFound() *connect.Error { return plainError(&enforce.Refusal{Kind: enforce.Hidden}) }

// plainError makes the error of a refusal for the client.
func plainError(r *enforce.Refusal) *connect.Error {
	code, known := codes[r.Kind]
	if !known {
		code = connect.CodeInternal
	}
	text := []string{r.Kind.Detail()}
	if text[0] == "" {
		text[0] = r.Kind.Title() + "."
	}
	if len(r.Fields) > 0 {
		text = append(text, "Denied fields: "+strings.Join(r.Fields, ", ")+".")
	}
	if r.DecisionID != "" && r.Kind != enforce.Hidden {
		text = append(text, "Decision "+r.DecisionID+".")
	}
	return connect.NewError(code, strings.Join(text, " ")).WithCause(r)
}

// toError is plainError, and sets the headers of a refusal, or trailers if the headers are
// sent. It must not run beside the handler.
func toError(ctx context.Context, r *enforce.Refusal, sent bool) error {
	if info, ok := connect.CallInfoForServerContext(ctx); ok {
		header := info.ResponseHeader()
		if sent {
			header = info.ResponseTrailer()
		}
		if r.Challenge != "" {
			header.Set("WWW-Authenticate", r.Challenge)
		}
		if r.RetryAfter > 0 {
			header.Set("Retry-After", strconv.FormatInt(int64((r.RetryAfter+time.Second-1)/time.Second), 10))
		}
	}
	return plainError(r)
}
