package cedarpost

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// closeSoon closes a client with a context that ends while calls hang.
func closeSoon(t *testing.T, c *Client) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	closed := make(chan error, 1)
	go func() { closed <- c.Close(ctx) }()
	select {
	case err := <-closed:
		return err
	case <-time.After(time.Minute):
		t.Fatal("Close does not return although its context has ended")
		return nil
	}
}

// Close does not wait for hanging calls after its context has ended: they are cut off
// and fail, also checks that may fail open. The error says what was lost, and nothing
// goes on to run.
func TestCloseCutsOffCallsThatHang(t *testing.T) {
	for name, opts := range map[string][]func(*Config){
		"alone":     {uncached},
		"coalesced": {uncached, func(cfg *Config) { cfg.Coalesce = true }},
		"cached":    {},
	} {
		t.Run(name, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			t.Run("client", func(t *testing.T) {
				release := make(chan struct{})
				var under atomic.Int64
				hang := func(checks int) {
					under.Add(int64(checks))
					<-release // whatever the outcome of the call is
				}
				s := &strange{
					authorize: func(context.Context, *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
						hang(1)
						return nil, errNoSuch
					},
					batch: func(_ context.Context, req *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
						hang(len(req.GetChecks()))
						return nil, errNoSuch
					},
					report: func(*cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
						<-release
						return nil, errNoSuch
					},
				}
				c := s.serve(t, append(opts, func(cfg *Config) { cfg.Timeout = time.Hour })...)
				t.Cleanup(func() { close(release) })
				for i := range 3 {
					c.reports.use(entryOf(allow(int64(i))), realClock())
				}
				check := hitCheck
				check.FailOpen = "reads may go on"
				var calls sync.WaitGroup
				for range 2 {
					calls.Go(func() {
						if r, err := c.Authorize(t.Context(), check); !errors.Is(err, ErrClosed) || r.Allowed() {
							t.Errorf("%v, %v", r.Allowed(), err)
						}
					})
				}
				calls.Go(func() {
					for _, a := range c.AuthorizeBatch(t.Context(), []Check{check, check}) {
						if !errors.Is(a.Err, ErrClosed) || a.Allowed() {
							t.Errorf("in a batch: %v, %v", a.Allowed(), a.Err)
						}
					}
				})
				for under.Load() < 4 {
					time.Sleep(time.Millisecond)
				}
				err := closeSoon(t, c)
				calls.Wait()
				if err == nil || !strings.Contains(err.Error(), "4 checks under way were cut off") || !strings.Contains(err.Error(), "3 uses") {
					t.Error(err)
				}
				if s := c.Stats(); s.Lost != 3 || s.FailedOpen != 0 {
					t.Errorf("%+v", s)
				}
				if _, err := c.Authorize(t.Context(), check); !errors.Is(err, ErrClosed) {
					t.Error(err)
				}
			})
			var left error
			for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
				if left = goleak.Find(before); left == nil {
					return
				}
			}
			t.Error(left)
		})
	}
}

type deaf struct{ release, begun chan struct{} }

// RoundTrip ignores the context of its request.
func (d deaf) RoundTrip(*http.Request) (*http.Response, error) {
	signal(d.begun)
	<-d.release
	return nil, errors.New("released")
}

// Close does not wait for a transport that ignores its context.
func TestCloseReturnsWhateverTheTransportDoes(t *testing.T) {
	d := deaf{make(chan struct{}), make(chan struct{}, 1)}
	c, err := New(Config{Servers: []string{"http://127.0.0.1:1"}, HTTPClient: &http.Client{Transport: d}, CacheBytes: -1, Timeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		_, err := c.Authorize(t.Context(), hitCheck)
		answered <- err
	}()
	<-d.begun
	if err := closeSoon(t, c); err == nil || !strings.Contains(err.Error(), "calls do not end") {
		t.Error(err)
	}
	close(d.release)
	if err := <-answered; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	<-c.done // nothing goes on to run
}

// With a context without a deadline, Close gives up after a while if the service does
// not accept the report, and says what is lost. With a context that has ended, it gives
// up at once.
func TestCloseGivesUp(t *testing.T) {
	for name, c := range map[string]struct {
		ctx   context.Context //nolint:containedctx // what Close is called with
		least time.Duration
	}{
		"without a deadline": {context.Background(), closeReports},
		"canceled":           {canceled(), 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, err := New(Config{Servers: []string{"http://127.0.0.1:1"}, CacheBytes: -1})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 3 {
				client.reports.use(entryOf(allow(int64(i))), realClock())
			}
			began := time.Now()
			closed := make(chan error, 1)
			go func() { closed <- client.Close(c.ctx) }()
			select {
			case err = <-closed:
			case <-time.After(c.least + time.Minute):
				t.Fatal("Close does not return")
			}
			if err == nil || !strings.Contains(err.Error(), "3 uses of answers") || client.Stats().Lost != 3 {
				t.Errorf("%v, %+v", err, client.Stats())
			}
			if c.least > 0 && (time.Since(began) < c.least || !strings.Contains(err.Error(), "refused")) {
				t.Errorf("after %v: %v", time.Since(began), err)
			}
		})
	}
}
