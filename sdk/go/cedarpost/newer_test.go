package cedarpost

import (
	"context"
	"encoding/base64"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// Strange hints and tokens cause no answer to be kept for too long, and no panic.
func TestStrangeHints(t *testing.T) {
	for _, change := range []func(*cedarpostv1.AuthorizeResponse){
		func(r *cedarpostv1.AuthorizeResponse) { r.Revision = nil },
		func(r *cedarpostv1.AuthorizeResponse) { r.Revision.Token = "x" },
		func(r *cedarpostv1.AuthorizeResponse) { r.Revision.Token += "A" },
		func(r *cedarpostv1.AuthorizeResponse) { r.Revision.Token = r.Revision.Token[:historyChars] },
		func(r *cedarpostv1.AuthorizeResponse) { r.Revision.Token = strings.Repeat("\n", 40) },
		func(r *cedarpostv1.AuthorizeResponse) { r.Revision.Token = modelToken(2, 1) },
		func(r *cedarpostv1.AuthorizeResponse) { r.Revision.Token = modelToken(1, -1) },
		func(r *cedarpostv1.AuthorizeResponse) { r.Revision.Token = modelToken(1, 0) },
		func(r *cedarpostv1.AuthorizeResponse) { r.CacheHint = nil },
		func(r *cedarpostv1.AuthorizeResponse) { r.CacheHint.MaxAge = nil },
		func(r *cedarpostv1.AuthorizeResponse) { r.CacheHint.MaxAge = durationpb.New(-time.Hour) },
		func(r *cedarpostv1.AuthorizeResponse) { r.CacheHint.MaxAge = &durationpb.Duration{Seconds: -1 << 62} },
	} {
		c := warm(t, hitCheck, 1)
		res := allow(1)
		change(res)
		check := hitCheck
		check.Resource.ID = "another"
		key, err := appendKey(nil, &check)
		if err != nil {
			t.Fatal(err)
		}
		c.cache.put(string(key), res, c.cfg.clock())
		time.Sleep(time.Microsecond)
		if e, _ := c.cache.get(string(key), ""); e != nil {
			t.Errorf("%v is kept", res)
		}
		c.seen.see(res.GetRevision().GetToken())
		c.cache.apply(&cedarpostv1.WatchResponse{Revision: res.GetRevision()})
		c.cache.prove(res.GetRevision(), c.cfg.clock(), "")
	}
}

// A caller that has got an answer gets no older one while the watch is behind.
func TestNewerAnswerStays(t *testing.T) {
	c := warm(t, hitCheck, 1) // at revision 1
	bytes, err := appendKey(nil, &hitCheck)
	if err != nil {
		t.Fatal(err)
	}
	key := string(bytes)
	put := func(number int64, change func(*cedarpostv1.AuthorizeResponse)) {
		res := allow(number)
		if change != nil {
			change(res)
		}
		c.seen.see(res.GetRevision().GetToken())
		c.cache.put(key, res, c.cfg.clock())
	}
	has := func() int64 {
		if e, _ := c.cache.get(key, ""); e != nil {
			return e.number
		}
		return -1
	}
	put(3, nil)
	put(2, nil)
	if n := has(); n != 3 {
		t.Errorf("after the one of 3 comes that of %d", n)
	}
	put(4, func(r *cedarpostv1.AuthorizeResponse) { r.CacheHint = nil })
	if n := has(); n != -1 {
		t.Errorf("after one that is not kept comes that of %d", n)
	}
	put(5, nil)
	put(6, func(r *cedarpostv1.AuthorizeResponse) { r.Revision.Token = modelToken(2, 1) })
	if n := has(); n != -1 {
		t.Errorf("after one of another history comes that of %d", n)
	}
}

// An answer at the newest revision replaces the kept one.
func TestFullyConsistentAnswerIsKept(t *testing.T) {
	var number atomic.Int64
	number.Store(1)
	one := func() *cedarpostv1.AuthorizeResponse {
		res := allow(number.Load())
		if number.Load() > 1 {
			res.Decision = cedarpostv1.Decision_DENY
		}
		return res
	}
	c := (&strange{
		authorize: func(context.Context, *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
			return one(), nil
		},
		batch: func(context.Context, *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
			return &cedarpostv1.AuthorizeBatchResponse{Results: []*cedarpostv1.AuthorizeBatchResult{
				{Result: &cedarpostv1.AuthorizeBatchResult_Response{Response: one()}}}}, nil
		},
		revision: func() (*cedarpostv1.GetRevisionResponse, error) {
			return &cedarpostv1.GetRevisionResponse{Revision: at(1)}, nil
		},
		watch: func(ctx context.Context, send func(*cedarpostv1.WatchResponse) error) error {
			_ = send(&cedarpostv1.WatchResponse{After: 1, Revision: at(1)})
			<-ctx.Done()
			return ctx.Err()
		},
		report: func(*cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
			return &cedarpostv1.ReportReuseResponse{}, nil
		},
	}).serve(t)
	for !c.Stats().Leased {
		time.Sleep(time.Millisecond)
	}
	full := hitCheck
	full.FullyConsistent = true
	for name, ask := range map[string]func(Check) (Result, error){
		"alone": func(check Check) (Result, error) { return c.Authorize(t.Context(), check) },
		"in a batch": func(check Check) (Result, error) {
			a := c.AuthorizeBatch(t.Context(), []Check{check})[0]
			return a.Result, a.Err
		},
	} {
		c.cache.entries.InvalidateAll()
		number.Store(1)
		for range 2 {
			if r, err := ask(hitCheck); err != nil || !r.Allowed() {
				t.Fatal(name, err)
			}
		}
		number.Store(2)
		if r, err := ask(full); err != nil || r.Allowed() || r.Reused() {
			t.Errorf("%s: the newest: %v, %v", name, r.Allowed(), err)
		}
		if r, err := ask(hitCheck); err != nil || r.Allowed() {
			t.Errorf("%s: after that: %v, %v", name, r.Allowed(), err)
		}
	}
}

// otherToken is modelToken of a history that branched off before the number.
func otherToken(history int, number int64) string {
	b, err := base64.RawURLEncoding.DecodeString(modelToken(history, number))
	if err != nil {
		panic(err)
	}
	b[52] ^= 1
	return base64.RawURLEncoding.EncodeToString(b)
}

// The service was restored under its name. The client drops answers of lost revisions.
// It does not keep such answers if they arrive late, or from a server that has not
// noticed the restore.
func TestRestoredHistoryDropsAnswers(t *testing.T) {
	const applied = 100
	for name, restored := range map[string]func(c *Client){
		"the watch begins anew below":       breaks(60),
		"the watch begins anew at the same": breaks(applied),
		"the watch begins anew above":       breaks(applied + 20),
		"the newest revision is an older one": func(c *Client) {
			c.cache.prove(&cedarpostv1.Revision{Token: otherToken(1, 60)}, c.cfg.clock(), c.cache.reached())
		},
		"the newest revision has another mark": func(c *Client) {
			c.cache.prove(&cedarpostv1.Revision{Token: otherToken(1, applied)}, c.cfg.clock(), c.cache.reached())
		},
	} {
		t.Run(name, func(t *testing.T) {
			now := instant{1e12, 1e12}
			c := (&strange{}).serve(t)
			c.cache.clock = func() instant { return now }
			told := at(applied)
			c.cache.apply(&cedarpostv1.WatchResponse{After: applied, Revision: told})
			c.cache.prove(told, now, "")
			sent := now
			for _, number := range []int64{applied, applied + 50} { // ahead of the watch
				c.cache.put("q", allow(number), sent)
			}
			if e, _ := c.cache.get("q", ""); e == nil {
				t.Fatal("no answer before the restore")
			}
			now.mono, now.wall = now.mono+1e6, now.wall+1e6
			restored(c)
			gone := func(when string) {
				t.Helper()
				if ep := c.cache.epoch.Load(); ep != nil {
					ep.lease.Store(&now)
				}
				if e, _ := c.cache.get("q", ""); e != nil {
					t.Errorf("%s: an answer of revision %d", when, e.number)
				}
			}
			gone("after the restore")
			c.cache.put("q", allow(applied+50), sent)
			gone("a late answer")
			if name != "the watch begins anew above" {
				c.cache.put("q", allow(applied+50), now)
				gone("from a server that is behind")
			}
			if ep := c.cache.epoch.Load(); ep != nil {
				now.mono, now.wall = now.mono+int64(c.cache.bound), now.wall+int64(c.cache.bound)
				ep.lease.Store(&now)
				c.cache.put("q", allow(applied+60), now)
				if e, _ := c.cache.get("q", ""); e == nil {
					t.Error("no answer is kept any more")
				}
			}
		})
	}
}

// breaks is a watch that reports a revision of another history, and that it goes on
// from there.
func breaks(number int64) func(c *Client) {
	return func(c *Client) {
		c.cache.apply(&cedarpostv1.WatchResponse{After: 100, Revision: &cedarpostv1.Revision{Token: otherToken(1, number)}, Reset_: true})
	}
}
