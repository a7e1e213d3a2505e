package server

import (
	"context"
	"errors"

	"connectrpc.com/connect/v2"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"
)

// reply is what a call holds of the budget for answers. Only the handler uses it. The zero value
// has no budget, and bounds nothing.
type reply struct {
	ctx    context.Context //nolint:containedctx // of the call
	budget *bodies
	share  *semaphore.Weighted
	held   int64
}

// replyFrom returns the reply of a call. A call that no plane serves, as in tests, has no budget.
func replyFrom(ctx context.Context) *reply {
	if r, ok := ctx.Value(requestKey{}).(*request); ok {
		return &r.reply
	}
	return &reply{}
}

// measure begins to take the bytes of the answers to a caller from the budget.
func (a *reply) measure(ctx context.Context, budget *bodies, caller string) {
	a.ctx, a.budget, a.share = ctx, budget, budget.of(caller)
}

// take takes n bytes more. It waits for the first ones only. A message that is larger than the
// share of a caller takes the whole share.
func (a *reply) take(n int) error {
	if a.budget == nil {
		return nil
	}
	more := min(a.held+int64(n), a.budget.total/2) - a.held
	if more <= 0 {
		return nil
	}
	if err := a.budget.take(a.ctx, a.share, a.held, more); err != nil {
		return err
	}
	a.held += more
	return nil
}

// release gives back everything.
func (a *reply) release() {
	if a.held > 0 {
		a.budget.all.Release(a.held)
		a.share.Release(a.held)
		a.held = 0
	}
}

// countedStream takes the bytes of each message from the budget while it is sent, unless the
// handler has taken them.
type countedStream struct {
	connect.ServerStream
	reply *reply
}

func (s countedStream) Send(msg any) error {
	if m, ok := msg.(proto.Message); ok && s.reply.held == 0 {
		if err := s.reply.take(proto.Size(m)); err != nil {
			return err
		}
		defer s.reply.release()
	}
	return s.ServerStream.Send(msg)
}

// errPageFull ends the rows of a page.
var errPageFull = errors.New("the page is full")

// rowRoom bounds the rows of one page: by pageBytes, and by what the budget for answers has left.
type rowRoom struct {
	reply *reply
	used  int
	taken int
	full  bool // the page ended before all rows that the caller asked for
}

// roomFor takes the first bytes for a page. It waits for them here, where the call does not hold a
// connection to the database.
func roomFor(ctx context.Context) (*rowRoom, error) {
	r := &rowRoom{reply: replyFrom(ctx), taken: rowsStep}
	return r, r.reply.take(rowsStep)
}

// add is a [store.Room].
func (r *rowRoom) add(n int) error {
	err := errPageFull
	if r.used == 0 || r.used+n <= pageBytes {
		err = nil
	}
	if more := r.used + n - r.taken; err == nil && more > 0 {
		step := (more + rowsStep - 1) / rowsStep * rowsStep
		if err = r.reply.take(step); err == nil {
			r.taken += step
		}
	}
	if err != nil {
		r.full = true
		return err
	}
	r.used += n
	return nil
}
