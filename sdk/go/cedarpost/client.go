// Package cedarpost is the client of the Cedarpost policy decision service. It asks "may
// this principal do this action on this resource, and which fields?", and keeps the
// answers, so that it answers most questions without a call.
//
// The client reuses a kept answer only while the service would give the same one: it
// drops an answer within milliseconds of a change that the answer depends on, and after
// the connection is lost it reuses answers for at most [Config].MaxStaleness. It reports
// each use, so the log of the service has every decision and every use of it.
//
// Every failure is an error, and an error means deny.
package cedarpost

import (
	"cmp"
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

// Client asks one service. Make it with [New], share it, and close it. Its methods may be
// called concurrently.
type Client struct {
	cfg     Config
	servers *servers
	cache   *cache // nil: answers are not kept
	reports *reporter
	batches *batcher // nil: checks are sent alone
	tracer  trace.Tracer
	counts  counts

	// seen is the newest revision that an answer had. Later answers must not be older.
	seen seen

	cut   atomic.Pointer[context.CancelCauseFunc] // ends the watch under way
	begun chan struct{}                           // gets a value when a watch begins

	flights  flights
	failOpen failOpenTime

	// Each call holds open, shared, so that Close knows when all calls have ended.
	open   sync.RWMutex
	closed atomic.Bool
	done   chan struct{} // closed when Close has ended
	// life is the context of all calls and loops. stop ends it.
	life   context.Context //nolint:containedctx // the client's own
	stop   context.CancelFunc
	cutOff atomic.Int64 // checks that were under way when life ended
	loops  sync.WaitGroup
	gauges func() // unregisters the metrics
}

// New makes a client. Its errors are mistakes in the configuration. It does not wait for
// the service: the first question fails if the service is away.
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

// Close waits for calls under way, reports the uses that are not reported yet, and ends
// the client. When ctx ends it waits no longer: calls under way are cut off and get
// [ErrClosed], as all later calls do. Its error says how many checks were cut off, and
// how many uses could not be reported before ctx ended or are refused by the service, for
// example because the key was revoked.
//
// If ctx has no deadline, Close tries to report for at most 10 s. If ctx has ended
// already, calls under way are cut off at once, and nothing more is reported.
func (c *Client) Close(ctx context.Context) error {
	if c.closed.Swap(true) {
		select { // wait for the Close under way, or a program that exits now would cut it off
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
		// The transport ignores its context. shut goes on until the transport returns.
		return fmt.Errorf("cedarpost: calls do not end although they were cut off, and uses of answers that were not reported yet are not in the log: %w", context.Cause(ctx))
	}
}

// closeReports is how long Close tries to report what remains when its context has no
// deadline.
const closeReports = 10 * time.Second

// closeGrace is how long Close waits for calls that it cut off. They end at once, unless
// a transport from Config.Transports ignores its context.
const closeGrace = 250 * time.Millisecond

// shut waits for the calls under way, or cuts them off when ctx ends. Then it ends the
// client.
func (c *Client) shut(ctx context.Context) error {
	defer context.AfterFunc(ctx, c.stop)()
	c.open.Lock() // never unlocked: there are no more calls
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

// bound makes the context of a call: it ends after Timeout, or when Close cuts off calls.
func (c *Client) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	bounded, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	release := context.AfterFunc(c.life, cancel)
	return bounded, func() {
		release()
		cancel()
	}
}

// enter begins a call, unless the client is closed. The call ends with leave.
func (c *Client) enter() bool { return !c.closed.Load() && c.open.TryRLock() }

func (c *Client) leave() { c.open.RUnlock() }

// keys holds buffers for keys, to save allocations.
var keys = sync.Pool{New: func() any { return new(make([]byte, 0, 512)) }}

// Authorize asks one question. The error is one of [ErrUnavailable], [ErrInvalid],
// [ErrUnknownRevision], [ErrWrongServer], [ErrUnauthenticated], [ErrPermissionDenied], [ErrPrincipalToken], [ErrNoToken] and [ErrClosed], or that of
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
	if err = cmp.Or(err, check.PrincipalToken.check(&check)); err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	*buf = key[:0]
	if check.FullyConsistent {
		bounded, cancel := c.bound(ctx)
		defer cancel()
		return c.ask(ctx, bounded, check, c.keep(string(key)))
	}
	// A lookup in the cache does not keep the key, so the buffer need not be copied.
	if r, ok := c.reuse(unsafe.String(unsafe.SliceData(key), len(key)), check.AtLeastAsFresh); ok { //nolint:gosec // see above
		return r, nil
	}
	return c.miss(ctx, check, string(key))
}

// reuse returns a kept answer, if there is one that may be used now. The use is counted
// before the answer is returned.
func (c *Client) reuse(key, fresh string) (Result, bool) {
	e, now := c.cache.get(key, fresh)
	if e == nil || !c.reports.use(e, now) {
		return Result{}, false
	}
	c.counts.reused.Add(1)
	return Result{e.response, reused}, true
}

// miss asks a question whose answer is not kept. If many calls ask the same question at
// once, one of them sends it and the others wait for its answer. If it fails, the next
// one sends it, so that a service in trouble does not get all of them at once. If it
// succeeds but the answer may not be reused, each of the others sends the question too.
//
// [golang.org/x/sync/singleflight] does not fit: it gives one result, also an error, to
// all callers. Here each use of an answer is checked against AtLeastAsFresh and counted,
// and an error is only that of the caller that sent the question.
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
		// Callers with short deadlines, one after another, must not hold this call back.
		if f.answered || gaveUp == maxGaveUp {
			return c.ask(ctx, bounded, check, keep)
		}
	}
}

// lead sends the question of a flight for all calls that wait for it.
func (c *Client) lead(ctx, bounded context.Context, check Check, key string, f *flight) (Result, error) {
	defer c.flights.end(key, f)
	// The flight before this one may have ended after this call looked for an answer.
	if r, ok := c.reuse(key, check.AtLeastAsFresh); ok {
		return r, nil
	}
	r, err := c.ask(ctx, bounded, check, c.keep(key))
	f.answered, f.gaveUp = err == nil && r.source == decided, over(ctx)
	return r, err
}

// keep returns a function that puts the answer to a question into the cache.
func (c *Client) keep(key string) func(*cedarpostv1.AuthorizeResponse, instant) {
	return func(res *cedarpostv1.AuthorizeResponse, sent instant) { c.cache.put(key, res, sent) }
}

// ask asks the service within bounded, and passes the answer to keep unless that is nil.
// ctx is the caller's context.
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

// send sends one question, alone or in a batch.
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

// consistently calls fn with the consistency that an answer needs: it must be at least as
// new as each revision that the caller named, and as the newest revision that this client
// has seen. If the service lost the latter in a failover or a restore, the client forgets
// it and asks again without it. fn returns the revision of its answer. It may be called
// several times, and its last answer is the one to use.
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

// newest returns the newest revision that this client knows of, or "".
func (c *Client) newest() string {
	token := ""
	if seen := c.seen.Load(); seen != nil {
		token = *seen
	}
	if c.cache != nil {
		// If the two are of different histories, that of the watch counts.
		token = newer(token, c.cache.reached())
	}
	return token
}

// newer returns the newer of two tokens, and the second if they do not compare.
func newer(a, b string) string {
	ta, okA := readToken(a)
	tb, okB := readToken(b)
	if okA && (b == "" || okB && ta.history == tb.history && ta.number > tb.number) {
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

// seen holds the token of the newest revision that an answer had, and the tokens that are
// known to be of the same history.
type seen struct {
	atomic.Pointer[string]
	tokens atomic.Pointer[tokens]
}

// maxTrusted bounds the tokens that a client remembers as tokens of its history.
const maxTrusted = 1024

// tokens is a set of tokens of one history. The service sent or accepted each of them.
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
// and add an accepted token to the set that it returned: if the history changes meanwhile,
// the token goes into the set of the old history.
func (s *seen) trusted() *tokens {
	if t := s.tokens.Load(); t != nil {
		return t
	}
	s.tokens.CompareAndSwap(nil, &tokens{set: map[string]struct{}{}})
	return s.trusted()
}

// forget drops all tokens, because the service is on another history.
func (s *seen) forget() {
	s.Store(nil)
	s.distrust()
}

// distrust makes the client ask the service about each token again.
func (s *seen) distrust() { s.tokens.Store(&tokens{set: map[string]struct{}{}}) }

// see takes the token of an answer, before the answer is used.
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

// beyond says whether an answer had a later revision than t in the same history.
func (s *seen) beyond(t revisionToken) bool {
	token := s.Load()
	if token == nil {
		return false
	}
	newest, ok := readToken(*token)
	return ok && newest.history == t.history && newest.number > t.number
}

// failed turns the error of a call within bounded into an error of this package, or lets
// the check through if it may fail open. ctx is the caller's context.
func (c *Client) failed(ctx, bounded context.Context, check *Check, err error) (Result, error) {
	if c.life.Err() != nil {
		c.cutOff.Add(1)
		c.counts.errors.Add(1)
		return Result{}, ErrClosed
	}
	code, gaveUp := connect.CodeOf(err), ctx.Err()
	if end, ok := ctx.Deadline(); ok && gaveUp == nil && away(err) {
		// The service knows the caller's deadline, and its error can arrive a moment earlier.
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
	case connect.CodeUnauthenticated:
		kind = ErrUnauthenticated
		if errors.Is(err, ErrNoToken) {
			kind = ErrNoToken
		}
	case connect.CodePermissionDenied:
		kind = ErrPermissionDenied
	}
	kind = cmp.Or(check.PrincipalToken.kind(err), kind)
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

// flights are the questions under way, by key.
type flights struct {
	mu    sync.Mutex
	under map[string]*flight
}

// flight is one question under way. Its outcome is set before done is closed.
type flight struct {
	done     chan struct{}
	answered bool
	gaveUp   bool // the context of the caller that sent it ended
}

// maxGaveUp is how many callers that gave up a call waits for, one after another, before
// it sends the question itself.
const maxGaveUp = 2

// join returns the flight of a question. If there is none yet, first is true, and the
// caller has to send the question and then call end.
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
