package server

import (
	"context"
	"errors"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect/v2"
)

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

func (e *edge) pace(ctx context.Context, rc *http.ResponseController, stream connect.ServerStream) *pacedStream {
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
func (s *pacedStream) readWithin(d time.Duration) { _ = s.rc.SetReadDeadline(deadline(d)) }

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
