package cedarpost_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/trace"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// Nothing that a user can put into a question, or into the trace of a request, makes a
// denied check pass or makes a server look as if it were away.
func TestUsersCannotMakeChecksFailOpen(t *testing.T) {
	s := startShop(t)
	denied := view("carol", "42")
	denied.FailOpen = "a test"
	for _, coalesce := range []bool{false, true} {
		c := dial(t, s, func(cfg *cedarpost.Config) { cfg.CacheBytes, cfg.Coalesce = -1, coalesce })
		ask := func(ctx context.Context, what string, check cedarpost.Check, want error) {
			t.Helper()
			for range 10 { // more often than it takes to open a breaker
				batch := c.AuthorizeBatch(ctx, []cedarpost.Check{check})[0]
				r, err := c.Authorize(ctx, check)
				for _, got := range []cedarpost.Answer{{Result: r, Err: err}, batch} {
					if got.Allowed() || got.FailedOpen() || !errors.Is(got.Err, want) {
						t.Fatalf("coalesce %v, %s: allowed %v, failed open %v, %v", coalesce, what, got.Allowed(), got.FailedOpen(), got.Err)
					}
				}
			}
			if r, err := c.Authorize(t.Context(), view("alice", "42")); err != nil || !r.Allowed() {
				t.Fatalf("coalesce %v, after %s: %v, %v", coalesce, what, r.Allowed(), err)
			}
		}
		for _, n := range []int{1, 70, 72, 51_200, 66_000, 1 << 20} {
			long := denied
			long.AtLeastAsFresh = strings.Repeat("A", n)
			ask(t.Context(), fmt.Sprintf("a token of %d bytes", n), long, cedarpost.ErrInvalid)
		}
		var members []string
		for i := range 32 { // as many members as W3C allows, each as long as allowed
			members = append(members, fmt.Sprintf("k%0255d=%s", i, strings.Repeat("v", 256)))
		}
		state, err := trace.ParseTraceState(strings.Join(members, ","))
		if err != nil {
			t.Fatal(err)
		}
		remote := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}, TraceState: state, Remote: true})
		ask(trace.ContextWithRemoteSpanContext(t.Context(), remote), "a long tracestate", denied, nil)
	}
}
