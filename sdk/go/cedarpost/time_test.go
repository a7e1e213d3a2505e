package cedarpost_test

import (
	"context"
	"errors"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
)

// in runs a test with a clock of its own, a service, and a client that keeps answers.
func in(t *testing.T, fn func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client), opts ...func(*cedarpost.Config)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		svc := cedarposttest.New(t, "../../../policies/shop")
		c := svc.Client(append(opts, func(cfg *cedarpost.Config) { cfg.CacheBytes = 1 << 20 })...)
		synctest.Wait()
		if !c.Stats().Leased {
			t.Fatal("no lease")
		}
		fn(t, svc, c)
	})
}

var support = cedarpost.UID("Shop::Role", "support")

// With the service away, a revoked right can be used for at most the bound.
func TestLongestStaleAnswer(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		mustAsk(t, c, view("alice", "42"))
		svc.Away(true)
		svc.RemoveParents(user("alice"), support)
		revoked, last := time.Now(), time.Duration(0)
		for time.Since(revoked) < time.Minute {
			if r, err := c.Authorize(t.Context(), view("alice", "42")); err == nil && r.Allowed() {
				last = time.Since(revoked)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if last > 5*time.Second || last == 0 {
			t.Errorf("used %v after it was revoked", last)
		}
		t.Logf("used %v after it was revoked", last)
		svc.Away(false)
		time.Sleep(10 * time.Second)
		if r := mustAsk(t, c, view("alice", "42")); r.Allowed() {
			t.Error("alice may still")
		}
		if r := mustAsk(t, c, view("alice", "42")); !r.Reused() {
			t.Error("nothing is kept any more")
		}
	})
}

// The clock jumps by an hour, as on a machine that was suspended: no answer is reused
// before the service has been asked.
func TestClockJumps(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		mustAsk(t, c, view("alice", "42"))
		for range 3 {
			svc.Away(true)
			time.Sleep(time.Hour)
			if r, err := c.Authorize(t.Context(), view("alice", "42")); !errors.Is(err, cedarpost.ErrUnavailable) || r.Allowed() {
				t.Fatalf("after an hour: %v, %v", r.Allowed(), err)
			}
			svc.Away(false)
			time.Sleep(10 * time.Second)
			before := len(svc.Decisions())
			if r := mustAsk(t, c, view("alice", "42")); !r.Allowed() || r.Reused() || len(svc.Decisions()) != before+1 {
				t.Error("an old answer was given")
			}
			if r := mustAsk(t, c, view("alice", "42")); !r.Reused() {
				t.Error("nothing is kept any more")
			}
		}
	})
}

// An answer is kept no longer than client and service allow, however often it is used.
func TestMaxAge(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		for range 100 {
			mustAsk(t, c, view("alice", "42"))
			time.Sleep(time.Second)
		}
		if n := len(svc.Decisions()); n != 10 {
			t.Errorf("%d questions in 100 s, with answers that are kept for 10 s", n)
		}
	}, func(cfg *cedarpost.Config) { cfg.MaxAge = 10*time.Second - time.Millisecond })
}

// Uses are in the log within the interval.
func TestReportsInTime(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		for range 1000 {
			mustAsk(t, c, view("alice", "42"))
		}
		time.Sleep(5*time.Second + time.Millisecond)
		synctest.Wait()
		if d := svc.Decisions(); len(d) != 1 || d[0].Uses != 999 {
			t.Errorf("%+v", d)
		}
	})
}

// While the service is away, uses wait. They are in the log once it is back.
func TestReportsWait(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		for range 10 {
			mustAsk(t, c, view("alice", "42"))
		}
		svc.Away(true)
		time.Sleep(time.Hour)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if st := c.Stats(); st.Reported != 0 || st.Lost != 0 {
			t.Errorf("%+v", st)
		}
		svc.Away(false)
		if err := c.Close(ctx); err != nil {
			t.Error(err)
		}
		if d := svc.Decisions(); len(d) != 1 || d[0].Uses != 9 {
			t.Errorf("%+v", d)
		}
	})
}

// Close says what cannot be reported.
func TestCloseTellsWhatIsLost(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		for range 10 {
			mustAsk(t, c, view("alice", "42"))
		}
		svc.Away(true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Close(ctx); err == nil {
			t.Error("all is well")
		}
		if st := c.Stats(); st.Lost != 9 {
			t.Errorf("%+v", st)
		}
	})
}

// A check fails open only if the service cannot be asked, and never because of the
// effect of a question on the service.
func TestWhatFailsOpen(t *testing.T) {
	open := view("alice", "42")
	open.FailOpen = "reads may go on"
	for _, way := range []func(*cedarpost.Config){
		func(cfg *cedarpost.Config) { cfg.CacheBytes = -1 },
		func(cfg *cedarpost.Config) { cfg.CacheBytes, cfg.Coalesce = -1, true },
	} {
		svc := cedarposttest.New(t, "../../../policies/shop")
		for code, opens := range map[connect.Code]bool{
			connect.CodeUnavailable: true, connect.CodeResourceExhausted: true, connect.CodeDeadlineExceeded: true,
			connect.CodeInternal: false, connect.CodeUnknown: false, connect.CodeUnimplemented: false, connect.CodeDataLoss: false,
			connect.CodeInvalidArgument: false, connect.CodeFailedPrecondition: false, connect.CodeUnauthenticated: false, connect.CodePermissionDenied: false,
		} {
			svc.Fail(nil)
			c := svc.Client(way)
			svc.Fail(connect.NewError(code, "the test says so"))
			r, err := c.Authorize(t.Context(), open)
			if r.FailedOpen() != opens || r.Allowed() != opens || (err == nil) != opens {
				t.Errorf("%s: allowed %v, %v", code, r.Allowed(), err)
			}
			for _, a := range c.AuthorizeBatch(t.Context(), []cedarpost.Check{open, view("alice", "42")}) {
				if a.Allowed() != (opens && a.FailedOpen()) {
					t.Errorf("%s, in a batch: allowed %v, %v", code, a.Allowed(), a.Err)
				}
			}
		}
	}
}

// A broken connection counts as a service that is away, for every kind of call.
func TestBrokenConnection(t *testing.T) {
	for _, coalesce := range []bool{false, true} {
		in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
			svc.Fail(connect.NewError(connect.CodeCanceled, "a connection that broke"))
			open := view("alice", "42")
			open.FailOpen = "reads may go on"
			if r, err := c.Authorize(t.Context(), open); err != nil || !r.FailedOpen() {
				t.Errorf("%v, %v", r, err)
			}
			if r, err := c.Authorize(t.Context(), view("alice", "42")); !errors.Is(err, cedarpost.ErrUnavailable) || r.Allowed() {
				t.Errorf("%v, %v", r, err)
			}
		}, func(cfg *cedarpost.Config) { cfg.Coalesce = coalesce })
	}
}

// AuthorizeBatch makes no more calls after the first that gets no answer.
func TestBatchEndsWithTheFirstFailure(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		svc.Fail(connect.NewError(connect.CodeDeadlineExceeded, "too slow"))
		var checks []cedarpost.Check
		for i := range 1000 {
			checks = append(checks, view("bob", strconv.Itoa(i)))
		}
		for i, a := range c.AuthorizeBatch(t.Context(), checks) {
			if !errors.Is(a.Err, cedarpost.ErrUnavailable) || a.Allowed() {
				t.Fatalf("%d: %v, %v", i, a.Allowed(), a.Err)
			}
		}
		svc.Fail(nil)
		if st := c.Stats(); st.Errors != 1000 || st.Decided != 0 {
			t.Errorf("%+v", st)
		}
		for _, a := range c.AuthorizeBatch(t.Context(), checks) {
			if a.Err != nil {
				t.Fatal(a.Err)
			}
		}
	})
}

// Close does not wait for reports that will never be accepted.
func TestCloseWithARevokedKey(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		mustAsk(t, c, view("alice", "42"))
		mustAsk(t, c, view("alice", "42"))
		svc.Fail(connect.NewError(connect.CodeUnauthenticated, "unknown key"))
		if err := c.Close(context.Background()); err == nil || c.Stats().Lost != 1 {
			t.Errorf("%v, %+v", err, c.Stats())
		}
	})
}

// If a question fails that many calls wait for, only one of them asks it again.
func TestOneAsksAgain(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		const waiting = 100
		svc.Fail(connect.NewError(connect.CodeUnavailable, "busy"))
		ctx, cancel := context.WithCancel(t.Context())
		first := make(chan error, 1)
		go func() {
			_, err := c.Authorize(ctx, view("alice", "42"))
			first <- err
		}()
		synctest.Wait() // the call waits for its next attempt
		errs := make(chan error, waiting)
		for range waiting {
			go func() {
				r, err := c.Authorize(t.Context(), view("alice", "42"))
				if err == nil && !r.Allowed() {
					err = errors.New("denied")
				}
				errs <- err
			}()
		}
		synctest.Wait() // the others wait for its answer
		svc.Fail(nil)
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		for range waiting {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if n := len(svc.Decisions()); n != 1 {
			t.Errorf("%d of %d calls asked the service", n, waiting)
		}
	})
}

// Callers that give up do not hold back another caller with the same question, so they
// cannot make its check fail open.
func TestImpatientCallersHoldNobodyBack(t *testing.T) {
	in(t, func(t *testing.T, svc *cedarposttest.Service, c *cedarpost.Client) {
		check := view("carol", "42") // carol is denied
		check.FailOpen = "a test"
		giveUp := cedarpost.Impatient(c, check)
		got := make(chan cedarpost.Result, 1)
		go func() {
			r, err := c.Authorize(t.Context(), check)
			if err != nil {
				t.Error(err)
			}
			got <- r
		}()
		for range 10 {
			synctest.Wait()
			giveUp()
		}
		synctest.Wait()
		select {
		case r := <-got:
			if r.Allowed() || r.FailedOpen() {
				t.Errorf("allowed %v, failed open %v", r.Allowed(), r.FailedOpen())
			}
		default:
			t.Error("still waits, though nobody else sends the question")
			<-got
		}
	})
}
