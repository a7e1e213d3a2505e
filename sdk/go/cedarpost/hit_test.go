package cedarpost

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// warm makes a client whose cache has a lease and the answer to a check, with a number
// of tags.
func warm(t testing.TB, check Check, tags int) *Client {
	t.Helper()
	c, err := New(Config{Servers: []string{"http://127.0.0.1:1"}, MaxStaleness: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.stop() })
	revision := &cedarpostv1.Revision{Token: modelToken(1, 1)}
	c.cache.apply(&cedarpostv1.WatchResponse{After: 1, Revision: revision})
	c.cache.prove(revision, c.cfg.clock(), "")
	key, err := appendKey(nil, &check)
	if err != nil {
		t.Fatal(err)
	}
	hint := &cedarpostv1.CacheHint{MaxAge: durationpb.New(time.Hour)}
	for i := range tags {
		hint.Tags = append(hint.Tags, tagOf(i))
	}
	c.cache.put(string(key), &cedarpostv1.AuthorizeResponse{
		Decision: cedarpostv1.Decision_ALLOW, Revision: revision, CacheHint: hint,
		DecisionId: "019f6e2b-5c1e-7a54-9d6a-0c3f0e6b8a11", Fields: &cedarpostv1.Fields{Permitted: []string{"id", "status"}},
	}, c.cfg.clock())
	return c
}

var hitCheck = Check{
	Principal: UID("Shop::User", "bob"), Action: UID("Shop::Action", "ViewOrder"), Resource: UID("Shop::Order", "42"),
	Context: map[string]any{"mfa": true}, AllFields: true,
}

// The cost of a hit: `go test -bench Hit -benchmem ./sdk/go/cedarpost`.
func BenchmarkHit(b *testing.B) {
	c := warm(b, hitCheck, 8)
	b.ReportAllocs()
	for b.Loop() {
		if r, err := c.Authorize(b.Context(), hitCheck); err != nil || !r.Reused() {
			b.Fatal(r, err)
		}
	}
}

func BenchmarkHitParallel(b *testing.B) {
	c := warm(b, hitCheck, 8)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if r, err := c.Authorize(b.Context(), hitCheck); err != nil || !r.Reused() {
				b.Error(r, err)
			}
		}
	})
}

// A hit allocates nothing.
func TestHitAllocatesNothing(t *testing.T) {
	c := warm(t, hitCheck, 8)
	ctx := t.Context()
	n := testing.AllocsPerRun(1000, func() {
		if r, err := c.Authorize(ctx, hitCheck); err != nil || !r.Reused() || !r.Allowed() || !r.Fields().Permits("id") {
			t.Error(r, err)
		}
	})
	if n >= 1 {
		t.Errorf("%v allocations", n)
	}
}
