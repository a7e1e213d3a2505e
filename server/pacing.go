package server

import (
	"context"
	"errors"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
)

// pacedStream gives each message of a stream its own deadline, instead of one for the whole
// stream: a long upload goes on, and a stalled one is ended. Between messages there is no
// deadline, because the handler takes its own time.
type pacedStream struct {
	connect.ServerStream
	ctx   context.Context
	rc    *http.ResponseController
	body  *body
	times timeouts
	wait  time.Duration // for one message
	total time.Duration // how long the stream may take, by the server's or the caller's deadline; 0: unbounded

	sent    int64         // bytes of messages
	reading time.Duration // that the caller took to read them
}

func (e *edge) pace(ctx context.Context, r *request, stream connect.ServerStream, wait time.Duration) *pacedStream {
	s := &pacedStream{ServerStream: stream, ctx: ctx, rc: r.controller, body: &r.body, times: e.times, wait: wait}
	if end, ok := ctx.Deadline(); ok {
		s.total = time.Until(end).Round(10 * time.Millisecond)
	}
	s.readWithin(0)
	s.writeWithin(0)
	return s
}

// readWithin and writeWithin set a deadline; 0 means none. They fail only if the connection
// is gone, and then the next read or write fails too.
func (s *pacedStream) readWithin(d time.Duration) { _ = s.rc.SetReadDeadline(deadline(d)) }

func (s *pacedStream) writeWithin(d time.Duration) { _ = s.rc.SetWriteDeadline(deadline(d)) }

func deadline(d time.Duration) (t time.Time) {
	if d > 0 {
		t = time.Now().Add(d)
	}
	return t
}

func (s *pacedStream) Receive(msg any) error {
	wait := s.wait
	end, bounded := s.ctx.Deadline()
	if bounded {
		wait = min(wait, time.Until(end))
	}
	err := os.ErrDeadlineExceeded
	if wait > 0 {
		s.readWithin(wait)
		s.body.release() // the handler asks for the next message when it is done with the last one
		err = s.ServerStream.Receive(msg)
		s.readWithin(0)
		s.body.settle()
	}
	switch {
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case bounded && time.Until(end) <= 0:
		return connect.Errorf(connect.CodeDeadlineExceeded, "the stream took longer than %v in all", s.total).WithCause(err)
	}
	return connect.Errorf(connect.CodeDeadlineExceeded, "no message came within %v", s.wait).WithCause(err)
}

func (s *pacedStream) SendHeaders() error {
	s.writeWithin(s.times.message)
	defer s.writeWithin(0)
	return s.ServerStream.SendHeaders()
}

// Send bounds the time for one message, and the time that the caller takes to read all of them by
// how large they are. Between messages no time of the caller passes, so a watch has no end.
func (s *pacedStream) Send(msg any) error {
	wait := s.times.message
	if s.times.answer > 0 {
		left := s.times.answer + time.Duration(float64(s.sent)/float64(s.times.slowest)*float64(time.Second)) - s.reading
		if left <= 0 {
			return connect.Errorf(connect.CodeDeadlineExceeded, "the caller reads less than %d KiB of the stream in a second", s.times.slowest>>10)
		}
		wait = min(wait, left)
	}
	s.writeWithin(wait)
	defer s.writeWithin(0)
	began := time.Now()
	err := s.ServerStream.Send(msg)
	s.reading += time.Since(began)
	if m, ok := msg.(proto.Message); ok {
		s.sent += int64(proto.Size(m))
	}
	return err
}

// end bounds the time after the handler: HTTP/1.1 reads some of what the caller still sends,
// and then writes the end of the answer.
func (s *pacedStream) end() {
	s.readWithin(s.times.discard)
	s.writeWithin(s.times.discard + s.times.message)
}
