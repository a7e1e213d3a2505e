package snapshot

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/policies"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// Policies of the past are compiled once for all calls that wait, and the last few sets are
// kept. The current policies are not compiled again, and a failure is not kept.
func TestPastPolicies(t *testing.T) {
	db := storetest.Open(t)
	f := NewFollower(Config{DB: db, MaxStaleness: time.Hour, Metrics: prometheus.NewRegistry()})
	shop, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	_, set := offline.Check(shop, nil, nil)
	publish := func(schema string) int64 {
		t.Helper()
		p, err := stored.Publication(shop, set)
		if err != nil {
			t.Fatal(err)
		}
		p.Bundle.Schema += schema
		p.Bundle.Digest = "digest of " + schema
		now, err := db.Current(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if p.BaseRevision, err = db.PolicyRevision(t.Context(), now.Number); err != nil {
			t.Fatal(err)
		}
		made, err := db.PublishBundle(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		return made.Revision
	}
	var revisions []int64
	for i := range pastSetsKept + 2 {
		revisions = append(revisions, publish(fmt.Sprintf("// %d\n", i)))
	}
	broken := publish("broken")
	last := publish("")
	if err := f.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}

	p := NewPast(f)
	at := func(revision int64) *engine.Set {
		set, err := p.Policies(t.Context(), revision)
		if err != nil {
			t.Error(err)
		}
		return set
	}
	if at(last) != f.snap.Load().Set || len(p.recent) != 0 {
		t.Error("the policies of now were compiled again")
	}
	var wg sync.WaitGroup
	got := make([]*engine.Set, 16)
	for i := range got {
		wg.Go(func() { got[i] = at(revisions[0]) })
	}
	wg.Wait()
	for _, set := range got {
		if set != got[0] || set == f.snap.Load().Set {
			t.Fatal("not compiled once for all who wait")
		}
	}
	for _, r := range revisions[1:pastSetsKept] {
		at(r)
	}
	if at(revisions[0]) != got[0] {
		t.Error("compiled again though it was among the last few")
	}
	for _, r := range revisions[pastSetsKept:] {
		at(r)
	}
	if len(p.recent) != pastSetsKept || at(revisions[0]) != got[0] {
		t.Errorf("%d sets are kept, want %d, the last used ones", len(p.recent), pastSetsKept)
	}
	if at(revisions[1]) == nil || len(p.recent) != pastSetsKept {
		t.Error("what was dropped does not come again")
	}
	for range 2 {
		if _, err := p.Policies(t.Context(), broken); !errors.Is(err, stored.ErrCompile) || len(p.recent) != pastSetsKept {
			t.Errorf("%v; %d sets are kept", err, len(p.recent))
		}
	}
	if _, err := p.Policies(t.Context(), last+1); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a revision that is not there: %v", err)
	}
}
