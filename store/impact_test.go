package store_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// Reports do not pile up: those that a change names stay, a complete one is never replaced, and of the others
// the old ones are removed.
func TestImpactReportsDoNotPileUp(t *testing.T) {
	t.Parallel()
	db := storetest.Open(t)
	put := func(id, change string, complete bool, age time.Duration) error {
		return db.PutImpactReport(t.Context(), store.ImpactReport{ID: id, Bundle: "doc", Change: change, Complete: complete, CreatedAt: time.Now().Add(-age), Report: []byte(id)})
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := db.ChangePolicies(t.Context(), "ann", "doc", "", func(store.PolicyState) (store.PolicyWrite, error) {
		return store.PolicyWrite{Change: &store.BundleChange{ID: "doc-1", Bundle: "doc", Number: 1, State: store.ChangeOpen, Reports: []store.ReportRef{{ID: "named"}}, Shadow: &store.Shadow{Report: "shadow"}}}, nil
	})
	must(err)
	const days = 24 * time.Hour
	for _, id := range []string{"named", "unnamed", "shadow"} {
		must(put(id, "doc-1", true, 2*days))
	}
	must(put("of no change", "doc-9", true, 2*days))
	must(put("new", "doc-1", true, 0))
	for i := range 60 {
		must(put(fmt.Sprint("loose", i), "", i%2 == 0, time.Duration(60-i)*days))
	}
	if err := put("named", "doc-1", false, 0); !errors.Is(err, store.ErrReportComplete) {
		t.Errorf("a complete report was replaced: %v", err)
	}
	for id, stays := range map[string]bool{"named": true, "shadow": true, "new": true, "unnamed": false, "of no change": false, "loose59": true, "loose10": true, "loose9": false} {
		if _, err := db.ImpactReport(t.Context(), id); (err == nil) != stays {
			t.Errorf("%s: %v, want that it stays: %v", id, err, stays)
		}
	}
}
