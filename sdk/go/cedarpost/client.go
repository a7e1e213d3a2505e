// Package cedarpost is the client of the Cedarpost policy decision service: it asks
// "may this principal do this action on this resource, and which fields?", and keeps
// the answers, so that most questions are answered in the process that asks.
//
// A kept answer is given again only while the service would give it too: a change
// that bears on it drops it within milliseconds, and where the connection is lost it
// is given for [Config].MaxStaleness at most. Each use is reported, so that the log
// of the service has all that was decided and used.
//
// Whatever goes wrong is an error, and an error means deny.
package cedarpost

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"connectrpc.com/connect/v2"
	"go.opentelemetry.io/otel/trace"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

// Client asks one service. Make it with [New], share it, and close it. All its
// methods may be called by many at once.
type Client struct {
	cfg     Config
	servers *servers
	cache   *cache // nil: answers are not kept
	reports *reporter
	batches *batcher // nil: checks are sent alone
	tracer  trace.Tracer
	counts  counts

	// seen is the newest revision that an answer came with: later ones are not older.
	seen seen

	cut   atomic.Pointer[context.CancelCauseFunc] // ends the watch under way
	begun chan struct{}                           // a watch began

	flights  flights
	failOpen failOpenTime

	// open is held, shared, by each call, so that Close knows all uses.
	open   sync.RWMutex
	closed atomic.Bool
	done   chan struct{} // Close has ended
	// life ends with stop, and with it all calls and loops.
	life   context.Context //nolint:containedctx // the client's own
	stop   context.CancelFunc
	cutOff atomic.Int64 // checks that stop ended
	loops  sync.WaitGroup
	gauges func() // unregisters them
}

// New makes a client. It does not wait for the service: one that is away is noticed by
// the first question. Errors are mistakes in the configuration.
func New(cfg Config) (*Client, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	c := &Client{cfg: cfg, reports: newReporter(), begun: make(chan struct{}, 1), done: make(chan struct{})}
	var err error
	if c.servers, err = c.cfg.dial(); err != nil {
		return nil, err
	}
	c.servers.patience = cfg.Timeout / 2
	c.failOpen = failOpenTime{most: cfg.FailOpenTime, log: cfg.Log}
	c.tracer = cfg.TracerProvider.Tracer(scope)
	if c.gauges, err = c.observe(cfg.MeterProvider.Meter(scope)); err != nil {
		return nil, err
	}
	c.reports.send = func(ctx context.Context, req *cedarpostv1.ReportReuseRequest) (res *cedarpostv1.ReportReuseResponse, err error) {
		err = c.servers.call(ctx, func(ctx context.Context, client cedarpostv1connect.AuthorizationServiceClient) (err error) {
			res, err = client.ReportReuse(ctx, req)
			return err
		})
		return res, err
	}
	ctx, stop := context.WithCancel(context.Background())
	c.life, c.stop = ctx, stop
	if cfg.Coalesce {
		c.batches = &batcher{send: c.sendBatch, timeout: cfg.Timeout, ctx: ctx, start: c.loops.Go}
	}
	c.loops.Go(func() { c.reports.run(ctx, cfg.ReportInterval) })
	if cfg.CacheBytes > 0 {
		c.cache = newCache(uint64(cfg.CacheBytes), &c.cfg, &c.seen)
		c.loops.Go(func() { c.watch(ctx) })
		c.loops.Go(func() { c.renew(ctx) })
	}
	return c, nil
}

// Close waits for calls under way, reports what was not reported yet, and ends the
// client. When ctx ends it waits no longer: calls under way are cut off and get
// [ErrClosed], as calls that come later do. Its error says how many checks were cut
// off, and how many uses could not be reported until ctx ended, or will not be taken,
// as of a key that was revoked.
//
// If ctx has no deadline, it tries to report for 10 s at most. If ctx has ended already,
// calls under way are cut off at once, and nothing more is reported.
func (c *Client) Close(ctx context.Context) error {
	if c.closed.Swap(true) {
		select { // who ends the program now would end what is under way
		case <-c.done:
		case <-ctx.Done():
		}
		return nil
	}
	ended := make(chan error, 1)
	go func() {
		ended <- c.shut(ctx)
		close(c.done)
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(closeGrace):
		// The transport ignores its context. What waits for it ends when it returns.
		return fmt.Errorf("cedarpost: calls do not end although they were cut off, and uses of answers that were not reported yet are not in the log: %w", context.Cause(ctx))
	}
}

// closeReports is how long Close tries to report what remains when its context has no
// deadline.
const closeReports = 10 * time.Second

// closeGrace is how long Close waits for calls that it cut off. They end at once, unless
// a transport of the caller's does not heed its context.
const closeGrace = 250 * time.Millisecond

// shut waits for the calls under way, until ctx ends and cuts them off, and then ends
// the client.
func (c *Client) shut(ctx context.Context) error {
	defer context.AfterFunc(ctx, c.stop)()
	c.open.Lock() // held for good: nobody may come in any more
	c.stop()
	c.loops.Wait()
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, closeReports)
		defer cancel()
	}
	err := c.reports.close(ctx)
	c.gauges()
	c.servers.close()
	if n := c.cutOff.Load(); n > 0 {
		err = errors.Join(fmt.Errorf("cedarpost: %d checks under way were cut off", n), err)
	}
	return err
}

// bound bounds a call in time, and ends it when Close cuts off what is under way.
func (c *Client) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	bounded, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	release := context.AfterFunc(c.life, cancel)
	return bounded, func() {
		release()
		cancel()
	}
}

// enter lets a call in, unless the client is closed. Whoever was let in leaves.
func (c *Client) enter() bool { return !c.closed.Load() && c.open.TryRLock() }

func (c *Client) leave() { c.open.RUnlock() }

// keys are buffers for keys.
var keys = sync.Pool{New: func() any { return new(make([]byte, 0, 512)) }}

// Authorize asks one question. The error is one of [ErrUnavailable], [ErrInvalid],
// [ErrUnknownRevision], [ErrWrongServer], [ErrUnauthenticated] and [ErrClosed], or that of
// ctx; each means deny.
func (c *Client) Authorize(ctx context.Context, check Check) (Result, error) {
	if !c.enter() {
		return Result{}, ErrClosed
	}
	defer c.leave()
	if c.cache == nil {
		bounded, cancel := c.bound(ctx)
		defer cancel()
		return c.ask(ctx, bounded, check, nil)
	}
	buf := keys.Get().(*[]byte)
	defer keys.Put(buf)
	key, err := appendKey((*buf)[:0], &check)
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	*buf = key[:0]
	if check.FullyConsistent {
		bounded, cancel := c.bound(ctx)
		defer cancel()
		return c.ask(ctx, bounded, check, c.keep(string(key)))
	}
	// The cache keeps no key that it looks for, so that this one need not be copied.
	if r, ok := c.reuse(unsafe.String(unsafe.SliceData(key), len(key)), check.AtLeastAsFresh); ok { //nolint:gosec // as said
		return r, nil
	}
	return c.miss(ctx, check, string(key))
}

// reuse gives a kept answer, after its use was counted.
func (c *Client) reuse(key, fresh string) (Result, bool) {
	e, now := c.cache.get(key, fresh)
	if e == nil || !c.reports.use(e, now) {
		return Result{}, false
	}
	c.counts.reused.Add(1)
	return Result{e.response, reused}, true
}

// miss asks a question whose answer is not kept. If many calls ask it at once, one of
// them sends it, and the others use its answer. If it fails, the next one sends it: a
// service in trouble does not get all of them at once. If it succeeds and the answer may
// not be used again, each of the others sends the question too.
func (c *Client) miss(ctx context.Context, check Check, key string) (Result, error) {
	bounded, cancel := c.bound(ctx)
	defer cancel()
	keep := c.keep(key)
	if !c.cache.leased() {
		c.counts.unleased.Add(1)
		return c.ask(ctx, bounded, check, keep)
	}
	for gaveUp := 0; ; {
		f, first := c.flights.join(key)
		if first {
			return c.lead(ctx, bounded, check, key, f)
		}
		select {
		case <-f.done:
		case <-bounded.Done():
			return c.failed(ctx, bounded, &check, connect.NewError(connect.CodeDeadlineExceeded, "the same question is under way still"))
		}
		if r, ok := c.reuse(key, check.AtLeastAsFresh); ok {
			return r, nil
		}
		if f.gaveUp {
			gaveUp++
		}
		// Callers with short deadlines must not hold this one back one after the other.
		if f.answered || gaveUp == maxGaveUp {
			return c.ask(ctx, bounded, check, keep)
		}
	}
}

// lead sends the question of a flight, for all who wait for it.
func (c *Client) lead(ctx, bounded context.Context, check Check, key string, f *flight) (Result, error) {
	defer c.flights.end(key, f)
	r, err := c.ask(ctx, bounded, check, c.keep(key))
	f.answered, f.gaveUp = err == nil && r.source == decided, over(ctx)
	return r, err
}

// keep takes the answer to the question of a key.
func (c *Client) keep(key string) func(*cedarpostv1.AuthorizeResponse, instant) {
	return func(res *cedarpostv1.AuthorizeResponse, sent instant) { c.cache.put(key, res, sent) }
}

// ask asks the service within bounded, and hands the answer to keep, if that is not
// nil. ctx is the caller's.
func (c *Client) ask(ctx, bounded context.Context, check Check, keep func(*cedarpostv1.AuthorizeResponse, instant)) (Result, error) {
	req, err := request(&check)
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	req.WantCacheHint = keep != nil
	bounded, span := c.tracer.Start(bounded, "cedarpost.Authorize", trace.WithSpanKind(trace.SpanKindClient))
	defer span.End()
	sent := c.cfg.clock()
	res, err := c.send(bounded, req, check.AtLeastAsFresh, check.FullyConsistent)
	if err != nil {
		span.RecordError(err)
		return c.failed(ctx, bounded, &check, err)
	}
	c.seen.see(res.GetRevision().GetToken())
	if keep != nil {
		keep(res, sent)
	}
	c.counts.decided.Add(1)
	return Result{res, decided}, nil
}

// send sends one question, alone or with others.
func (c *Client) send(ctx context.Context, req *cedarpostv1.AuthorizeRequest, fresh string, fully bool) (res *cedarpostv1.AuthorizeResponse, err error) {
	if c.batches != nil && fresh == "" && !fully {
		return c.batches.do(ctx, req)
	}
	var named []string
	if fresh != "" {
		named = []string{fresh}
	}
	err = c.consistently(named, fully, func(consistency *cedarpostv1.Consistency) (string, error) {
		req.Consistency = consistency
		err := c.servers.call(ctx, func(ctx context.Context, client cedarpostv1connect.AuthorizationServiceClient) (err error) {
			res, err = client.Authorize(ctx, req)
			return err
		})
		return res.GetRevision().GetToken(), err
	})
	return res, err
}

// consistently calls fn with how fresh an answer has to be: at least as new as each
// revision that the caller named, and as the newest one that this client has seen. If
// the service has lost that one in a failover or a restore, the client forgets it and
// asks again without it. fn returns the revision of its answer. It may be called several
// times, and its last answer is the one to use.
//
// Each revision that the caller named is sent to the service until the service has
// accepted it once: only the service can tell a lost revision from another one with the
// same number.
func (c *Client) consistently(fresh []string, fully bool, fn func(*cedarpostv1.Consistency) (string, error)) error {
	if fully {
		_, err := fn(&cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: true}})
		return err
	}
	newest, trusted := "", c.seen.trusted()
	for _, token := range fresh {
		newest = newer(token, newest)
	}
	own := newer(c.newest(), newest)
	for _, token := range fresh {
		if token == own || trusted.has(token) {
			continue
		}
		got, err := fn(atLeast(token))
		if err != nil {
			return err
		}
		trusted.add(token)
		if len(fresh) == 1 && (got == own || newer(got, own) == got) {
			return nil
		}
	}
	_, err := fn(atLeast(own))
	if err == nil && own == newest && own != "" {
		trusted.add(own)
	}
	if connect.CodeOf(err) == connect.CodeAborted && own != newest {
		c.seen.forget()
		if c.cache != nil {
			c.cache.forget()
			c.cutWatch(errHistory)
		}
		_, err = fn(atLeast(newest))
	}
	return err
}

var errHistory = errors.New("the service is on another history")

// newest is the newest revision that this client knows of, or "".
func (c *Client) newest() string {
	token := ""
	if seen := c.seen.Load(); seen != nil {
		token = *seen
	}
	if c.cache != nil {
		// Where they are of two histories, the watch knows better.
		token = newer(token, c.cache.reached())
	}
	return token
}

// newer picks the newer of two tokens: the second, where they do not compare.
func newer(a, b string) string {
	ha, na, okA := readToken(a)
	hb, nb, okB := readToken(b)
	if okA && (b == "" || okB && ha == hb && na > nb) {
		return a
	}
	return b
}

func atLeast(token string) *cedarpostv1.Consistency {
	if token == "" {
		return nil
	}
	return &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: &cedarpostv1.Revision{Token: token}}}
}

// seen is the token of the newest revision that an answer came with, and the tokens that
// are known to be of the same history.
type seen struct {
	atomic.Pointer[string]
	tokens atomic.Pointer[tokens]
}

// maxTrusted bounds how many tokens a client remembers to be of its present history.
const maxTrusted = 1024

// tokens is a set of tokens of one history: the service accepted or sent each of them.
type tokens struct {
	mu  sync.Mutex
	set map[string]struct{}
}

func (t *tokens) has(token string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.set[token]
	return ok
}

func (t *tokens) add(token string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.set) >= maxTrusted {
		clear(t.set)
	}
	if token != "" {
		t.set[token] = struct{}{}
	}
}

// trusted returns the tokens of the present history. Call it before a question is sent,
// and add the accepted token to what it returned: if the history has changed meanwhile,
// the token ends up in the set of the old history.
func (s *seen) trusted() *tokens {
	if t := s.tokens.Load(); t != nil {
		return t
	}
	s.tokens.CompareAndSwap(nil, &tokens{set: map[string]struct{}{}})
	return s.trusted()
}

// forget drops all tokens, because the service has another history.
func (s *seen) forget() {
	s.Store(nil)
	s.distrust()
}

// distrust makes the client ask the service about each token again.
func (s *seen) distrust() { s.tokens.Store(&tokens{set: map[string]struct{}{}}) }

// see takes that of an answer, before the answer is used.
func (s *seen) see(token string) {
	for {
		old := s.Load()
		if old != nil && newer(*old, token) == *old {
			return
		}
		if s.CompareAndSwap(old, &token) {
			return
		}
	}
}

// beyond says whether an answer came from after a revision.
func (s *seen) beyond(history string, number int64) bool {
	token := s.Load()
	if token == nil {
		return false
	}
	h, n, ok := readToken(*token)
	return ok && h == history && n > number
}

// failed turns what went wrong within bounded into an error of this package, or lets
// the check through if it says so. ctx is the caller's.
func (c *Client) failed(ctx, bounded context.Context, check *Check, err error) (Result, error) {
	if c.life.Err() != nil {
		c.cutOff.Add(1)
		c.counts.errors.Add(1)
		return Result{}, ErrClosed
	}
	code, gaveUp := connect.CodeOf(err), ctx.Err()
	if end, ok := ctx.Deadline(); ok && gaveUp == nil && away(err) {
		// The service knows when its caller gives up, and may say so a moment before.
		ours, _ := bounded.Deadline()
		if over(ctx) || code == connect.CodeDeadlineExceeded && ours.Equal(end) {
			gaveUp = context.DeadlineExceeded
		}
	}
	if gaveUp != nil {
		c.counts.errors.Add(1)
		return Result{}, fmt.Errorf("cedarpost: %w", gaveUp)
	}
	kind := ErrUnavailable
	switch code {
	case connect.CodeInvalidArgument, connect.CodeFailedPrecondition, connect.CodeOutOfRange:
		kind = ErrInvalid
	case connect.CodeAborted:
		kind = ErrUnknownRevision
	case connect.CodeUnimplemented:
		kind = ErrWrongServer
	case connect.CodeUnauthenticated, connect.CodePermissionDenied:
		kind = ErrUnauthenticated
	}
	if check.FailOpen != "" && away(err) {
		if !c.failOpen.allow(c.cfg.clock()) {
			c.counts.failOpenRefused.Add(1)
			c.counts.errors.Add(1)
			return Result{}, fmt.Errorf("%w: %w: %w", kind, errFailOpenUsedUp, err)
		}
		c.reports.letThrough(check, code, c.cfg.clock())
		c.counts.failedOpen.Add(1)
		return Result{source: failedOpen}, nil
	}
	c.counts.errors.Add(1)
	return Result{}, fmt.Errorf("%w: %w", kind, err)
}

// flights are the questions under way, by their key.
type flights struct {
	mu    sync.Mutex
	under map[string]*flight
}

// flight is one question under way. What comes of it is set before done is closed.
type flight struct {
	done     chan struct{}
	answered bool
	gaveUp   bool // the time of the caller that sent it ended
}

// maxGaveUp is how many callers that gave up one waits for before it sends the question
// by itself.
const maxGaveUp = 2

// join returns the flight of a question. If there was none, the caller is the first: it
// sends the question, and then calls end.
func (f *flights) join(key string) (_ *flight, first bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if under := f.under[key]; under != nil {
		return under, false
	}
	if f.under == nil {
		f.under = map[string]*flight{}
	}
	own := &flight{done: make(chan struct{})}
	f.under[key] = own
	return own, true
}

func (f *flights) end(key string, own *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.under, key)
	close(own.done)
}
