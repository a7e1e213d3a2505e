package cedarpost

import (
	"fmt"
	"runtime"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// The cache counts about the memory that it takes.
func TestWeight(t *testing.T) {
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	for name, fields := range map[string]int{"no fields": 0, "10 fields": 10, "100 fields": 100} {
		const n = 2000
		measure := func() (took, counted int64) {
			c := warm(t, hitCheck, 8)
			before := heap()
			for i := range n {
				// As it is received, so that no parts of it are shared.
				r := &cedarpostv1.AuthorizeResponse{
					Decision: cedarpostv1.Decision_ALLOW, DecisionId: "019f6e2b-5c1e-7a54-9d6a-0c3f0e6b8a11",
					Revision:            &cedarpostv1.Revision{Token: modelToken(1, 1), Number: 1},
					DeterminingPolicies: []*cedarpostv1.PolicyRef{{Bundle: "shop", Id: "support-views"}, {Bundle: "shop", Id: "support-fields"}},
					CacheHint:           &cedarpostv1.CacheHint{MaxAge: durationpb.New(1 << 40), Tags: make([]uint64, 12)},
				}
				if fields > 0 {
					r.Fields = &cedarpostv1.Fields{}
					for f := range fields {
						r.Fields.Permitted = append(r.Fields.Permitted, fmt.Sprint("customer.address.", f))
					}
				}
				wire, err := proto.Marshal(r)
				if err != nil {
					t.Fatal(err)
				}
				own := &cedarpostv1.AuthorizeResponse{}
				if err := proto.Unmarshal(wire, own); err != nil {
					t.Fatal(err)
				}
				check := hitCheck
				check.Resource.ID = fmt.Sprint(i)
				key, err := appendKey(nil, &check)
				if err != nil {
					t.Fatal(err)
				}
				c.cache.put(string(key), own, c.cfg.clock())
			}
			c.cache.entries.CleanUp()
			took, counted = int64(heap()-before), int64(c.cache.entries.WeightedSize())
			if got := c.cache.entries.EstimatedSize(); got < n {
				t.Fatalf("%d of %d are kept", got, n)
			}
			runtime.KeepAlive(c)
			return took, counted
		}
		took, counted := measure()
		near := func() bool { return 10*took > 7*counted && 10*took < 13*counted }
		// Other memory may have been freed meanwhile, such as the cache of the test
		// before.
		for tries := 0; tries < 10 && !near(); tries++ {
			took, counted = measure()
		}
		t.Logf("%s: %d bytes each, counted as %d", name, took/n, counted/n)
		if !near() {
			t.Errorf("%s: it takes %.2f times what is counted", name, float64(took)/float64(counted))
		}
	}
}
