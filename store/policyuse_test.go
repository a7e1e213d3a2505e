package store_test

import (
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// The latest use of a policy is kept, whatever comes after it, and times within a minute are one.
func TestPolicyUses(t *testing.T) {
	db := storetest.Open(t)
	base := int64(0)
	for _, text := range []string{"first", "second"} {
		var err error
		base, _, err = publishBundle(t, db, store.Publish{Bundle: store.Bundle{
			Name: "shop", OnForbidError: "deny", Policies: []store.Policy{policy("one", text, 1), policy("two", "same", 2)},
		}, Caller: "ann", BaseRevision: base})
		if err != nil {
			t.Fatal(err)
		}
	}
	noon := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	for _, at := range []time.Time{noon, noon.Add(-time.Hour), noon.Add(time.Hour), noon.Add(time.Hour + 30*time.Second)} {
		if err := db.NotePolicyUses(t.Context(), map[string]time.Time{"shop/one": at, "shop/gone": noon}); err != nil {
			t.Fatal(err)
		}
	}
	uses, err := db.PolicyUses(t.Context(), "shop", []string{"one", "two", "gone"})
	if err != nil || len(uses) != 2 || !uses["one"].At.Equal(noon.Add(time.Hour)) || !uses["two"].At.IsZero() || time.Since(uses["two"].Since) > time.Hour {
		t.Errorf("%+v, %v", uses, err)
	}
}
