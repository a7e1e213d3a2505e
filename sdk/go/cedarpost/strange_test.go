package cedarpost

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

// strange is a service that behaves as its functions say. Calls without a function are
// unimplemented.
type strange struct {
	authorize func(context.Context, *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error)
	batch     func(context.Context, *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error)
	revision  func() (*cedarpostv1.GetRevisionResponse, error)
	watch     func(context.Context, func(*cedarpostv1.WatchResponse) error) error
	report    func(*cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error)
}

var errNoSuch = connect.NewError(connect.CodeUnimplemented, "no such thing here")

func (s *strange) Authorize(ctx context.Context, req *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
	if s.authorize == nil {
		return nil, errNoSuch
	}
	return s.authorize(ctx, req)
}

func (s *strange) AuthorizeBatch(ctx context.Context, req *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
	if s.batch == nil {
		return nil, errNoSuch
	}
	return s.batch(ctx, req)
}

func (s *strange) GetRevision(context.Context, *cedarpostv1.GetRevisionRequest) (*cedarpostv1.GetRevisionResponse, error) {
	if s.revision == nil {
		return nil, errNoSuch
	}
	return s.revision()
}

func (s *strange) Watch(ctx context.Context, _ *cedarpostv1.WatchRequest, stream cedarpostv1connect.AuthorizationServiceWatchServerStream) error {
	if s.watch == nil {
		return errNoSuch
	}
	return s.watch(ctx, stream.Send)
}

func (s *strange) ReportReuse(_ context.Context, req *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
	if s.report == nil {
		return nil, errNoSuch
	}
	return s.report(req)
}

// serve serves it over the network, and returns a client of it.
func (s *strange) serve(t *testing.T, opts ...func(*Config)) *Client {
	t.Helper()
	server := connect.NewServer()
	cedarpostv1connect.RegisterAuthorizationServiceHandler(server, s)
	mux := http.NewServeMux()
	connecthttp.Mount(mux, server)
	hs := httptest.NewUnstartedServer(mux)
	hs.Config.Protocols = new(http.Protocols)
	hs.Config.Protocols.SetUnencryptedHTTP2(true)
	hs.Start()
	// On a busy machine, pings can be late too.
	patient := &http.Transport{Protocols: hs.Config.Protocols}
	t.Cleanup(patient.CloseIdleConnections)
	cfg := Config{
		Servers: []string{hs.URL}, HTTPClient: &http.Client{Transport: patient}, Timeout: time.Minute, ReportInterval: 10 * time.Second,
	}
	for _, o := range opts {
		o(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		_ = c.Close(ctx)
		hs.CloseClientConnections()
		hs.Close()
	})
	return c
}

func at(number int64) *cedarpostv1.Revision {
	return &cedarpostv1.Revision{Token: modelToken(1, number), Number: number}
}

func allow(number int64) *cedarpostv1.AuthorizeResponse {
	return &cedarpostv1.AuthorizeResponse{
		Decision: cedarpostv1.Decision_ALLOW, Revision: at(number), DecisionId: fmt.Sprint(number),
		CacheHint: &cedarpostv1.CacheHint{MaxAge: durationpb.New(time.Hour), Tags: []uint64{tagOf(0)}},
	}
}

func always(res *cedarpostv1.AuthorizeResponse) func(context.Context, *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
	return func(context.Context, *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
		return res, nil
	}
}

// untilDone is a call without an answer.
func untilDone(ctx context.Context, _ *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
	<-ctx.Done()
	return nil, connect.NewError(connect.CodeDeadlineExceeded, "too slow")
}

func uncached(cfg *Config) { cfg.CacheBytes = -1 }

// Callers with very short deadlines do not prevent answers to the others.
func TestHurriedCallersHarmNobody(t *testing.T) {
	slow := func(ctx context.Context, req *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
		select {
		case <-time.After(20 * time.Millisecond):
			return allow(1), nil
		case <-ctx.Done():
			return untilDone(ctx, req)
		}
	}
	c := (&strange{authorize: slow}).serve(t, uncached)
	for range 4 * breakAfter {
		for _, leave := range []time.Duration{-time.Second, 2 * time.Millisecond} {
			ctx, cancel := context.WithTimeout(t.Context(), leave)
			if _, err := c.Authorize(ctx, hitCheck); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("in %v: %v", leave, err)
			}
			cancel()
		}
	}
	if r, err := c.Authorize(t.Context(), hitCheck); err != nil || !r.Allowed() {
		t.Errorf("with time: %v", err)
	}
}

// A service that is too slow for all callers is not asked for a while.
func TestSilentServiceIsLeftAlone(t *testing.T) {
	var asked atomic.Int64
	c := (&strange{authorize: func(ctx context.Context, req *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
		asked.Add(1)
		return untilDone(ctx, req)
	}}).serve(t, uncached, func(cfg *Config) { cfg.Timeout = 30 * time.Millisecond })
	began := time.Now()
	for range 3 * breakAfter {
		if _, err := c.Authorize(t.Context(), hitCheck); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
	}
	// Once a second, one question is let through to see whether the service is back.
	if n, most := asked.Load(), int64(breakAfter+1+time.Since(began)/breakFor); n > most {
		t.Errorf("asked %d times, want %d at most", n, most)
	}
}

// The service knows the deadline of its caller, and can return the error for it a
// moment earlier. Such an error makes no check fail open.
func TestCallerWhoGivesUpDoesNotOpen(t *testing.T) {
	c := (&strange{authorize: func(ctx context.Context, _ *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
		return nil, connect.NewError(connect.CodeDeadlineExceeded, "too slow for you")
	}}).serve(t, uncached)
	open := hitCheck
	open.FailOpen = "reads may go on"
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if r, err := c.Authorize(ctx, open); !errors.Is(err, context.DeadlineExceeded) || r.Allowed() {
		t.Errorf("allowed %v, %v", r.Allowed(), err)
	}
	if a := c.AuthorizeBatch(ctx, []Check{open}); a[0].Err == nil || a[0].Allowed() {
		t.Errorf("in a batch: allowed %v, %v", a[0].Allowed(), a[0].Err)
	}
	if r, err := c.Authorize(t.Context(), open); err != nil || !r.FailedOpen() {
		t.Errorf("the client's own patience: %v", err)
	}
}

// A token can come from a user too.
func TestTokenThatCannotBeSent(t *testing.T) {
	for _, opt := range []func(*Config){uncached, func(*Config) {}} {
		c := (&strange{authorize: always(allow(1))}).serve(t, opt)
		open := hitCheck
		open.FailOpen, open.AtLeastAsFresh = "reads may go on", "\xff"
		if r, err := c.Authorize(t.Context(), open); !errors.Is(err, ErrInvalid) || r.Allowed() {
			t.Errorf("allowed %v, %v", r.Allowed(), err)
		}
	}
}

// A question that the service always refuses is not let through while the service is
// away.
func TestWhatIsNeverTakenDoesNotFailOpen(t *testing.T) {
	c := (&strange{authorize: func(context.Context, *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
		return nil, connect.NewError(connect.CodeResourceExhausted, "away")
	}}).serve(t, uncached)
	for name, change := range map[string]func(*Check){
		"no type":           func(c *Check) { c.Resource.Type = "" },
		"NUL":               func(c *Check) { c.Resource.ID = "4\x002" },
		"a long id":         func(c *Check) { c.Resource.ID = strings.Repeat("x", MaxIDBytes+1) },
		"a long type":       func(c *Check) { c.Principal.Type = strings.Repeat("x", maxType+1) },
		"a long request id": func(c *Check) { c.RequestID = strings.Repeat("x", maxRequestID+1) },
		"a long field":      func(c *Check) { c.AllFields, c.Fields = false, []string{strings.Repeat("x", MaxFieldBytes+1)} },
		"many fields":       func(c *Check) { c.AllFields, c.Fields = false, strings.Split(strings.Repeat("x,", MaxFields), ",") },
		"some and all":      func(c *Check) { c.Fields = []string{"id"} },
		"all of none":       func(c *Check) { c.AllFields, c.RequireAllFields = false, true },
		"many entities":     func(c *Check) { c.Entities = make([]Entity, maxEntities+1) },
	} {
		check := hitCheck
		check.FailOpen = "reads may go on"
		change(&check)
		if r, err := c.Authorize(t.Context(), check); !errors.Is(err, ErrInvalid) || r.Allowed() {
			t.Errorf("%s: allowed %v, %v", name, r.Allowed(), err)
		}
	}
}

// One refused question does no harm to the others in its batch.
func TestRefusedQuestionOfABatch(t *testing.T) {
	c := (&strange{batch: func(_ context.Context, req *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
		res := &cedarpostv1.AuthorizeBatchResponse{}
		for _, q := range req.GetChecks() {
			if q.GetResource().GetId() == "poison" {
				return nil, connect.NewError(connect.CodeInvalidArgument, "a poisoned batch")
			}
			res.Results = append(res.Results, &cedarpostv1.AuthorizeBatchResult{Result: &cedarpostv1.AuthorizeBatchResult_Response{Response: allow(1)}})
		}
		time.Sleep(10 * time.Millisecond)
		return res, nil
	}}).serve(t, uncached, func(cfg *Config) { cfg.Coalesce = true })
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			check := hitCheck
			if check.Resource.ID = fmt.Sprint(i); i%50 == 7 {
				check.Resource.ID = "poison"
			}
			_, err := c.Authorize(t.Context(), check)
			if bad := i%50 == 7; bad != errors.Is(err, ErrInvalid) || !bad && err != nil {
				t.Errorf("%s: %v", check.Resource.ID, err)
			}
		})
	}
	all.Wait()
}

// A service that is too slow does not get the questions of callers that gave up.
func TestNobodyWaitsBehindThoseWhoGaveUp(t *testing.T) {
	var asked atomic.Int64
	stuck := make(chan struct{})
	c := (&strange{batch: func(_ context.Context, req *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
		asked.Add(int64(len(req.GetChecks())))
		<-stuck
		res := &cedarpostv1.AuthorizeBatchResponse{}
		for range req.GetChecks() {
			res.Results = append(res.Results, &cedarpostv1.AuthorizeBatchResult{Result: &cedarpostv1.AuthorizeBatchResult_Response{Response: allow(1)}})
		}
		return res, nil
	}}).serve(t, uncached, func(cfg *Config) { cfg.Coalesce = true })
	const callers = 3000
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			check := hitCheck
			check.Resource.ID = fmt.Sprint(i)
			if _, err := c.Authorize(ctx, check); !errors.Is(err, context.Canceled) {
				t.Errorf("caller %d: %v", i, err)
			}
		})
	}
	for there := 0; there < callers; time.Sleep(time.Millisecond) {
		c.batches.mu.Lock()
		there = int(asked.Load()) + len(c.batches.waiting)
		c.batches.mu.Unlock()
	}
	under := asked.Load()
	giveUp()
	all.Wait()
	close(stuck)
	if r, err := c.Authorize(t.Context(), hitCheck); err != nil || !r.Allowed() {
		t.Errorf("who comes later: %v", err)
	}
	if n := asked.Load(); under > callers/2 || n != under+1 {
		t.Errorf("%d were asked of %d, and %d of them when all had given up", n, callers, n-under-1)
	}
}

// A watch that breaks again and again, for example behind a proxy without streams, does
// not disturb questions.
func TestBrokenWatchHarmsNoQuestion(t *testing.T) {
	var watches atomic.Int64
	c := (&strange{authorize: always(allow(1)), watch: func(context.Context, func(*cedarpostv1.WatchResponse) error) error {
		watches.Add(1)
		return connect.NewError(connect.CodeUnavailable, "no streams here")
	}}).serve(t)
	for watches.Load() < breakAfter {
		time.Sleep(time.Millisecond)
	}
	for range 50 {
		if _, err := c.Authorize(t.Context(), hitCheck); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
}

// A silent watch does not keep a server out that had failed and answers again.
func TestSilentWatchHarmsNoQuestion(t *testing.T) {
	var away atomic.Bool
	away.Store(true)
	c := (&strange{
		authorize: func(context.Context, *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
			if away.Load() {
				return nil, connect.NewError(connect.CodeUnavailable, "away")
			}
			return allow(1), nil
		},
		watch: func(ctx context.Context, _ func(*cedarpostv1.WatchResponse) error) error {
			if away.Load() {
				return connect.NewError(connect.CodeUnavailable, "away")
			}
			<-ctx.Done()
			return ctx.Err()
		},
	}).serve(t, func(cfg *Config) { cfg.MaxStaleness = time.Hour }) // so that the client asks nothing else
	for range breakAfter {
		_, _ = c.Authorize(t.Context(), hitCheck)
	}
	away.Store(false)
	time.Sleep(2*breakFor + 500*time.Millisecond)
	if _, err := c.Authorize(t.Context(), hitCheck); err != nil {
		t.Error(err)
	}
}

// The client does not begin a new watch all the time at a server that is behind.
func TestWatchOfAServerBehind(t *testing.T) {
	var watches, asked atomic.Int64
	(&strange{
		revision: func() (*cedarpostv1.GetRevisionResponse, error) {
			asked.Add(1)
			return &cedarpostv1.GetRevisionResponse{Revision: at(10)}, nil
		},
		watch: func(ctx context.Context, send func(*cedarpostv1.WatchResponse) error) error {
			watches.Add(1)
			_ = send(&cedarpostv1.WatchResponse{After: 5, Revision: at(5)})
			<-ctx.Done()
			return ctx.Err()
		},
	}).serve(t, func(cfg *Config) { cfg.MaxStaleness = 300 * time.Millisecond })
	began := time.Now()
	for time.Since(began) < 3*time.Second || watches.Load() < 2 {
		time.Sleep(10 * time.Millisecond)
	}
	seconds := int64(1 + time.Since(began)/time.Second)
	if n, m := watches.Load(), asked.Load(); n > 5*seconds || m > 20*seconds {
		t.Errorf("watched %d times, asked %d times in %d s", n, m, seconds)
	}
}

// Of two servers, one is behind: the watch moves to the other.
func TestWatchLeavesAServerBehind(t *testing.T) {
	serving := func(number int64) *strange {
		return &strange{
			revision: func() (*cedarpostv1.GetRevisionResponse, error) {
				return &cedarpostv1.GetRevisionResponse{Revision: at(10)}, nil
			},
			watch: func(ctx context.Context, send func(*cedarpostv1.WatchResponse) error) error {
				_ = send(&cedarpostv1.WatchResponse{After: number, Revision: at(number)})
				<-ctx.Done()
				return ctx.Err()
			},
		}
	}
	good := serving(10).serve(t, uncached)
	for range 4 { // because it begins with a random one
		c := serving(5).serve(t, func(cfg *Config) {
			cfg.Servers = append(cfg.Servers, good.cfg.Servers...)
			cfg.MaxStaleness = 300 * time.Millisecond
		})
		for deadline := time.Now().Add(time.Minute); !c.Stats().Leased; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("no lease")
			}
		}
	}
}

// A server without Watch and ReportReuse is asked as without a cache.
func TestServerWithoutWatch(t *testing.T) {
	c := (&strange{authorize: always(allow(1))}).serve(t)
	for range 100 {
		if r, err := c.Authorize(t.Context(), hitCheck); err != nil || !r.Allowed() || r.Reused() {
			t.Fatal(r, err)
		}
	}
}

// Answers without content deny.
func TestStrangeAnswersDeny(t *testing.T) {
	ask := func(res *cedarpostv1.AuthorizeResponse) {
		t.Helper()
		c := (&strange{authorize: always(res)}).serve(t)
		if r, _ := c.Authorize(t.Context(), hitCheck); r.Allowed() || len(r.Fields().Permitted()) > 0 {
			t.Errorf("%v is an allow", res)
		}
	}
	ask(&cedarpostv1.AuthorizeResponse{})
	ask(&cedarpostv1.AuthorizeResponse{Decision: 7})
	for _, results := range [][]*cedarpostv1.AuthorizeBatchResult{
		nil, {}, {{}}, {{}, {}}, {{}, {}, {}},
		{{Result: &cedarpostv1.AuthorizeBatchResult_Error{}}, {Result: &cedarpostv1.AuthorizeBatchResult_Response{}}},
		{{Result: &cedarpostv1.AuthorizeBatchResult_Error{Error: &cedarpostv1.BatchError{Code: "code_99"}}}, {}},
	} {
		c := (&strange{batch: func(context.Context, *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
			return &cedarpostv1.AuthorizeBatchResponse{Results: results}, nil
		}}).serve(t)
		open := hitCheck
		open.FailOpen = "reads may go on"
		for i, a := range c.AuthorizeBatch(t.Context(), []Check{open, open}) {
			if a.Allowed() {
				t.Errorf("%v: %d is an allow", results, i)
			}
		}
	}
}

// A second call of Close waits for the first.
func TestCloseTwice(t *testing.T) {
	var taken atomic.Bool
	c := (&strange{report: func(*cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
		time.Sleep(200 * time.Millisecond)
		taken.Store(true)
		return &cedarpostv1.ReportReuseResponse{}, nil
	}}).serve(t, uncached)
	c.reports.use(entryOf(allow(1)), realClock())
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			if err := c.Close(t.Context()); err != nil || !taken.Load() {
				t.Errorf("closed before the report: %v", err)
			}
		})
	}
	all.Wait()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Close(ended); err != nil {
		t.Error(err)
	}
}

// After Close nothing goes on to run.
func TestCloseEndsBatches(t *testing.T) {
	c := (&strange{batch: func(ctx context.Context, _ *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}}).serve(t, uncached, func(cfg *Config) { cfg.Coalesce, cfg.Timeout = true, time.Hour })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Authorize(ctx, hitCheck); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if n := c.batches.under; n != 0 {
		t.Errorf("%d batches are under way still", n)
	}
}

func TestNoServers(t *testing.T) {
	t.Setenv("CEDARPOST_API_URL", " , ")
	if c, err := New(Config{}); err == nil {
		t.Error("a client of nothing")
		_ = c.Close(t.Context())
	}
}

// Two times beyond the range of milliseconds make no question, so they cannot share a
// key.
func TestTimesFarOut(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	for _, far := range []time.Time{time.Unix(now.Unix()+1<<61, 0), time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC)} {
		a, b := hitCheck, hitCheck
		a.Context, b.Context = map[string]any{"at": now}, map[string]any{"at": far}
		judge(t, a, b)
		if _, err := appendKey(nil, &b); err == nil {
			t.Error("it has a key")
		}
	}
}
