package cedarpost

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

const (
	// maxBatch is how many checks the service accepts in one batch.
	maxBatch = 100
	// maxBatchBytes bounds the checks of one batch together. It is below the limit of the
	// service (server/wire), because encoding adds some bytes to each check.
	maxBatchBytes = 960 << 10
)

// fit returns how many of n questions go into one batch. The service refuses a batch that
// is too large as a whole.
func fit(n int, req func(int) *cedarpostv1.AuthorizeRequest) int {
	n = min(n, maxBatch)
	bytes := 0
	for i := range n {
		if bytes += proto.Size(req(i)) + 16; bytes > maxBatchBytes {
			return i
		}
	}
	return n
}

// Answer is the answer to one check of a batch: a result or an error.
type Answer struct {
	Result
	// Err is an error as [Client.Authorize] returns it. It means deny.
	Err error
}

// AuthorizeBatch asks many questions in as few calls as possible, and returns the answers
// in the same order. Questions that go to the service in one call, up to 100, are decided
// at one revision. FullyConsistent and AtLeastAsFresh of one check hold for all. The
// client's Timeout bounds each call. After a call that failed no more calls are made.
func (c *Client) AuthorizeBatch(ctx context.Context, checks []Check) []Answer {
	answers := make([]Answer, len(checks))
	if !c.enter() {
		for i := range answers {
			answers[i].Err = ErrClosed
		}
		return answers
	}
	defer c.leave()
	fresh, fully, err := together(checks)
	if err != nil {
		for i := range answers {
			answers[i].Err = err
		}
		return answers
	}
	var asked []question
	for i := range checks {
		q := question{check: &checks[i], answer: &answers[i]}
		key, err := appendKey(nil, q.check)
		if err = cmp.Or(err, q.check.PrincipalToken.check(q.check)); err == nil && c.cache != nil {
			q.key = string(key)
			if !fully {
				var ok bool
				if q.answer.Result, ok = c.reuseAll(q.key, fresh); ok {
					continue
				}
			}
		}
		if err == nil {
			q.req, err = request(q.check)
		}
		if err != nil {
			q.answer.Err = fmt.Errorf("%w: %w", ErrInvalid, err)
			continue
		}
		q.req.WantCacheHint = q.key != ""
		asked = append(asked, q)
	}
	for err = nil; len(asked) > 0; {
		n := fit(len(asked), func(i int) *cedarpostv1.AuthorizeRequest { return asked[i].req })
		err = c.askBatch(ctx, asked[:n], fresh, fully, err)
		asked = asked[n:]
	}
	return answers
}

// together joins what several checks ask of freshness.
func together(checks []Check) (fresh []string, fully bool, err error) {
	for i, check := range checks {
		fully = fully || check.FullyConsistent
		if check.AtLeastAsFresh == "" || slices.Contains(fresh, check.AtLeastAsFresh) {
			continue
		}
		t, ok := readToken(check.AtLeastAsFresh)
		if !ok {
			return nil, false, fmt.Errorf("%w: checks[%d].AtLeastAsFresh is no revision", ErrInvalid, i)
		}
		if len(fresh) > 0 {
			if before, _ := readToken(fresh[0]); t.history != before.history {
				return nil, false, fmt.Errorf("%w: checks[%d] has one of another history than that of a check before it", ErrUnknownRevision, i)
			}
		}
		fresh = append(fresh, check.AtLeastAsFresh)
	}
	return fresh, fully, nil
}

// reuseAll is reuse for an answer that must be at least as new as several revisions.
func (c *Client) reuseAll(key string, fresh []string) (Result, bool) {
	newest := ""
	for _, token := range fresh {
		if !c.seen.trusted().has(token) {
			return Result{}, false
		}
		newest = newer(token, newest)
	}
	return c.reuse(key, newest)
}

// question is one check of a batch that goes to the service.
type question struct {
	check  *Check
	req    *cedarpostv1.AuthorizeRequest
	key    string // "": the answer is not kept
	answer *Answer
}

// askBatch asks the questions of one batch, and returns the error of the call. err is the
// error of the call before: if there is one, no call is made and all questions fail with
// it, so that all batches together end in time.
func (c *Client) askBatch(ctx context.Context, list []question, fresh []string, fully bool, err error) error {
	ctx, span := c.tracer.Start(ctx, "cedarpost.AuthorizeBatch", trace.WithSpanKind(trace.SpanKindClient))
	defer span.End()
	bounded, cancel := c.bound(ctx)
	defer cancel()
	reqs := make([]*cedarpostv1.AuthorizeRequest, len(list))
	for i, q := range list {
		reqs[i] = q.req
	}
	sent := c.cfg.clock()
	var results []*cedarpostv1.AuthorizeBatchResult
	if err == nil {
		results, err = c.sendBatch(bounded, reqs, fresh, fully)
	}
	if err != nil {
		span.RecordError(err)
	}
	for i, q := range list {
		var res *cedarpostv1.AuthorizeResponse
		one := err
		if err == nil {
			res, one = unpack(results[i])
		}
		if one != nil {
			q.answer.Result, q.answer.Err = c.failed(ctx, bounded, q.check, one)
			continue
		}
		c.seen.see(res.GetRevision().GetToken())
		if q.key != "" {
			c.cache.put(q.key, res, sent)
		}
		c.counts.decided.Add(1)
		q.answer.Result = Result{res, decided}
	}
	return err
}

// sendBatch sends up to 100 questions and returns one result for each.
func (c *Client) sendBatch(ctx context.Context, checks []*cedarpostv1.AuthorizeRequest, fresh []string, fully bool) (results []*cedarpostv1.AuthorizeBatchResult, err error) {
	err = c.consistently(fresh, fully, func(consistency *cedarpostv1.Consistency) (revision string, err error) {
		err = c.servers.call(ctx, func(ctx context.Context, client cedarpostv1connect.AuthorizationServiceClient) error {
			res, err := client.AuthorizeBatch(ctx, &cedarpostv1.AuthorizeBatchRequest{Checks: checks, Consistency: consistency})
			if err == nil && len(res.GetResults()) != len(checks) {
				err = connect.NewError(connect.CodeInternal, "the numbers of results and questions of the batch differ").WithRemote()
			}
			results, revision = res.GetResults(), res.GetRevision().GetToken()
			return err
		})
		return revision, err
	})
	return results, err
}

// unpack returns the answer or the error of one check of a batch.
func unpack(r *cedarpostv1.AuthorizeBatchResult) (*cedarpostv1.AuthorizeResponse, error) {
	if r.GetResponse() != nil {
		return r.GetResponse(), nil
	}
	var code connect.Code
	if err := code.UnmarshalText([]byte(r.GetError().GetCode())); err != nil {
		code = connect.CodeUnknown
	}
	return nil, connect.NewError(code, r.GetError().GetMessage()).WithRemote()
}

// batcher sends questions together that are asked at the same time: questions gather while
// other batches are under way.
type batcher struct {
	send    func(context.Context, []*cedarpostv1.AuthorizeRequest, []string, bool) ([]*cedarpostv1.AuthorizeBatchResult, error)
	timeout time.Duration
	ctx     context.Context //nolint:containedctx // the client's: a batch belongs to no single caller
	start   func(func())

	mu      sync.Mutex
	waiting []*waiter
	under   int // batches under way
}

// maxUnder is how many batches may be under way at once. Further questions gather.
const maxUnder = 4

// waiter is a question that waits for its answer.
type waiter struct {
	ctx  context.Context //nolint:containedctx // shows whether its caller still waits
	req  *cedarpostv1.AuthorizeRequest
	done chan struct{}
	res  *cedarpostv1.AuthorizeResponse
	err  error
}

// do asks one question. It returns when ctx ends, but its batch goes on.
func (b *batcher) do(ctx context.Context, req *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
	w := &waiter{ctx: ctx, req: req, done: make(chan struct{})}
	b.mu.Lock()
	b.waiting = append(b.waiting, w)
	if b.under < maxUnder {
		b.under++
		b.start(b.run)
	}
	b.mu.Unlock()
	select {
	case <-w.done:
		return w.res, w.err
	case <-ctx.Done():
		return nil, connect.NewError(connect.CodeDeadlineExceeded, "no answer in time").WithCause(ctx.Err())
	}
}

// run sends batches until no question waits.
func (b *batcher) run() {
	for {
		b.mu.Lock()
		// Drop questions whose callers gave up. With a slow service, they would delay the
		// questions of callers that still wait.
		b.waiting = slices.DeleteFunc(b.waiting, func(w *waiter) bool { return w.ctx.Err() != nil })
		n := fit(len(b.waiting), func(i int) *cedarpostv1.AuthorizeRequest { return b.waiting[i].req })
		list := b.waiting[:n:n]
		if b.waiting = b.waiting[n:]; len(b.waiting) == 0 {
			b.waiting = nil // otherwise the array would keep the sent questions in memory
		}
		if n == 0 {
			b.under--
		}
		b.mu.Unlock()
		if n == 0 {
			return
		}
		b.answer(list)
	}
}

// answer sends a batch and hands out its results.
func (b *batcher) answer(list []*waiter) {
	ctx, cancel := context.WithTimeout(b.ctx, b.timeout)
	defer cancel()
	reqs := make([]*cedarpostv1.AuthorizeRequest, len(list))
	for i, w := range list {
		reqs[i] = w.req
	}
	results, err := b.send(ctx, reqs, nil, false)
	if half := len(list) / 2; half > 0 && connect.CodeOf(err) == connect.CodeInvalidArgument {
		// One question is invalid. The others are of other callers, so halve the batch until
		// it fails alone.
		b.answer(list[:half])
		b.answer(list[half:])
		return
	}
	for i, w := range list {
		if w.err = err; err == nil {
			w.res, w.err = unpack(results[i])
		}
		close(w.done)
	}
}
