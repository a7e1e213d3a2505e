package server

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"golang.org/x/sync/semaphore"

	"github.com/cedarpost/cedarpost/server/wire"
)

const (
	defaultRequestBytes = 32 << 20
	minRequestBytes     = 2 * wire.MaxAdminBytes // one caller may hold half, and needs that for one message

	answerBytes = 32 << 20 // of the answers of a plane; one caller may hold half
	pageBytes   = 2 << 20  // of the rows of one page, which ends early at them
	rowsStep    = 64 << 10 // bytes that are taken for rows at a time

	bodyWait  = 500 * time.Millisecond // for bytes that other calls hold
	firstStep = 4 << 10                // bytes that are taken for a body before any of it has come
)

// bodies bounds how many bytes of messages the calls of a plane hold at the same time: one for
// requests, while calls read, decode and answer them, and another for answers, from the reading of
// their rows until they are sent. One caller may hold half. A decoded message takes several
// times its encoded bytes.
type bodies struct {
	total int64
	all   *semaphore.Weighted

	mu     sync.RWMutex
	shares map[string]*semaphore.Weighted // of callers, by name
}

func newBodies(total int64) *bodies {
	return &bodies{total: total, all: semaphore.NewWeighted(total), shares: map[string]*semaphore.Weighted{}}
}

// of returns the share of a caller.
func (b *bodies) of(caller string) *semaphore.Weighted {
	b.mu.RLock()
	share := b.shares[caller]
	b.mu.RUnlock()
	if share != nil {
		return share
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.shares[caller] == nil {
		if len(b.shares) >= maxShares {
			b.forget()
		}
		b.shares[caller] = semaphore.NewWeighted(b.total / 2)
	}
	return b.shares[caller]
}

// maxShares is how many shares are kept while nothing is held of them. Callers with tokens are not
// bounded by the number of the API keys.
const maxShares = 4096

// forget drops the shares of which nothing is held. The caller holds mu.
func (b *bodies) forget() {
	for caller, share := range b.shares {
		if share.TryAcquire(b.total / 2) {
			delete(b.shares, caller)
		}
	}
}

// take takes n bytes of the share of a caller and of the whole. It waits a short time for them,
// unless the call holds bytes already: calls that hold some and wait for more would keep each
// other waiting.
func (b *bodies) take(ctx context.Context, share *semaphore.Weighted, held, n int64) error {
	if share.TryAcquire(n) {
		if b.all.TryAcquire(n) {
			return nil
		}
		share.Release(n)
	}
	ctx, cancel := context.WithTimeout(ctx, bodyWait)
	defer cancel()
	if held > 0 {
		cancel()
	}
	if share.Acquire(ctx, n) != nil {
		return connect.Errorf(connect.CodeResourceExhausted, "the calls of this caller hold %d MiB already; send fewer at the same time", b.total/2>>20)
	}
	if b.all.Acquire(ctx, n) != nil {
		share.Release(n)
		return connect.Errorf(connect.CodeResourceExhausted, "all calls together hold %d MiB already; try again later", b.total>>20)
	}
	return nil
}

// body is the body of a request. From measure on it takes its bytes from the budget before it
// reads them, in steps that grow with what has come. So a caller that announces a length, and
// sends nothing, holds next to nothing. It is used by the handler only.
type body struct {
	io.ReadCloser
	announced int64 // Content-Length; less than 0: unknown

	ctx    context.Context //nolint:containedctx // of the call
	budget *bodies
	share  *semaphore.Weighted
	most   int64 // of one message; Connect reads the rest of a larger one, refuses it and keeps nothing
	held   int64 // bytes taken from the budget
	used   int64 // bytes read since the last release

	http1  bool
	ended  bool // all of it was read
	broken bool // it ended before its end, or is not what its headers say
}

// measure begins to take bytes from the budget, for a caller whose messages have at most so many
// bytes. streams says that the body can have several messages.
func (b *body) measure(ctx context.Context, budget *bodies, caller string, most int, streams bool) {
	b.ctx, b.budget, b.share, b.most = ctx, budget, budget.of(caller), int64(most)
	if !streams && b.announced >= 0 {
		b.most = min(b.most, b.announced)
	}
}

func (b *body) Read(p []byte) (int, error) {
	if b.budget == nil {
		return b.read(p)
	}
	if b.used >= b.held && b.held < b.most {
		step := min(max(b.held, firstStep), b.most-b.held)
		if err := b.budget.take(b.ctx, b.share, b.held, step); err != nil {
			return 0, err
		}
		b.held += step
	}
	if b.held < b.most {
		p = p[:min(int64(len(p)), b.held-b.used)]
	}
	n, err := b.read(p)
	b.used += int64(n)
	if err != nil {
		b.settle()
	}
	return n, err
}

// read reads the body as it comes.
func (b *body) read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.ended = errors.Is(err, io.EOF)
		b.broken = !b.ended
	}
	return n, err
}

// Close leaves a body of HTTP/1.1 open, so that the rest of it can still be read. The server closes it
// after the handler.
func (b *body) Close() error {
	if b.http1 {
		return nil
	}
	return b.ReadCloser.Close()
}

// settle gives back what was taken and not used.
func (b *body) settle() { b.giveBack(b.held - min(b.used, b.held)) }

// release gives back everything: the message is not needed any more.
func (b *body) release() {
	b.giveBack(b.held)
	b.used = 0
}

// end gives back everything. What is read after it is not kept.
func (b *body) end() {
	b.release()
	b.budget = nil
}

func (b *body) giveBack(n int64) {
	if n > 0 {
		b.budget.all.Release(n)
		b.share.Release(n)
		b.held -= n
	}
}
