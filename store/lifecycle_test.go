package store_test

import (
	"errors"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store"
)

// The database refuses to publish past a freeze or the approvals of a bundle, because a server of an
// earlier version knows neither.
func TestPublishWithoutRules(t *testing.T) {
	db, _ := openURL(t)
	version := int64(0)
	var rules func(store.PolicyState) (store.PolicyWrite, error)
	publish := func(b store.Bundle) error {
		b.Name = "shop"
		base, err := db.PolicyRevision(t.Context(), 1<<40)
		if err != nil {
			t.Fatal(err)
		}
		_, n, err := publishBundle(t, db, store.Publish{Bundle: b, Caller: "ann", BaseRevision: base, Rules: rules})
		if err == nil {
			version = n
		}
		return err
	}
	write := func(w store.PolicyWrite) {
		t.Helper()
		if _, err := db.ChangePolicies(t.Context(), "ann", "shop", "", func(store.PolicyState) (store.PolicyWrite, error) { return w, nil }); err != nil {
			t.Fatal(err)
		}
	}
	allowed := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused := func(what string, err error) {
		t.Helper()
		if got := state(err); got != "23001" { // restrict_violation
			t.Errorf("%s: %v", what, err)
		}
	}
	allowed("a new bundle", publish(store.Bundle{Digest: "1"}))
	write(store.PolicyWrite{Freeze: &store.BundleFreeze{Caller: "ann", Reason: "r", At: time.Now()}})
	refused("a frozen bundle", publish(store.Bundle{Digest: "2"}))
	refused("a change of a frozen bundle", publish(store.Bundle{Digest: "2", Change: "shop-1"}))
	refused("break-glass that no rule knows of", publish(store.Bundle{Digest: "2", BreakGlass: "now"}))
	allowed("a rollback of a frozen bundle", publish(store.Bundle{Digest: "2", RollbackOf: 1, Approvals: 2}))
	write(store.PolicyWrite{Unfreeze: true})
	refused("no change, and approvals are needed", publish(store.Bundle{Digest: "3"}))
	allowed("a change", publish(store.Bundle{Digest: "3", Change: "shop-1"}))
	allowed("no approvals are needed any more", publish(store.Bundle{Digest: "4"}))
	// A server that knows the rules has asked them.
	write(store.PolicyWrite{Freeze: &store.BundleFreeze{Caller: "ann", Reason: "r", At: time.Now()}})
	rules = func(store.PolicyState) (store.PolicyWrite, error) {
		return store.PolicyWrite{BreakGlass: &store.BreakGlass{Reason: "now", Rules: []string{"it is frozen"}}}, nil
	}
	allowed("break-glass", publish(store.Bundle{Digest: "5"}))
	if v, err := db.BundleVersion(t.Context(), "shop", 5); err != nil || version != 5 || v.BreakGlass != "now" {
		t.Errorf("version %d, %+v, %v", version, v, err)
	}
}

// A write of changes and freezes is decided on what is stored, makes one revision, and none if it changes
// nothing.
func TestChangePolicies(t *testing.T) {
	db, _ := openURL(t)
	write := func(bundle, change string, fn func(store.PolicyState) store.PolicyWrite) (store.PolicyState, store.Changes) {
		t.Helper()
		var before store.PolicyState
		made, err := db.ChangePolicies(t.Context(), "ann", bundle, change, func(now store.PolicyState) (store.PolicyWrite, error) {
			before = now
			return fn(now), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return before, made
	}
	at := time.Date(2030, 1, 2, 3, 4, 5, 678_000, time.UTC)
	c := store.BundleChange{ID: "a-1-1", Bundle: "a-1", Number: 1, Title: "t", State: store.ChangeOpen, Digest: "d", Authors: []string{"ann"}, CreatedAt: at, UpdatedAt: at}
	put := func(edits ...store.ChangeEdit) func(store.PolicyState) store.PolicyWrite {
		return func(store.PolicyState) store.PolicyWrite { return store.PolicyWrite{Change: &c, Edits: edits} }
	}
	before, made := write("a-1", "", put(store.ChangeEdit{Path: "b", Content: []byte("two")}, store.ChangeEdit{Path: "a", Removed: true}, store.ChangeEdit{Path: "c"}))
	if before.NextChange != 1 || before.OpenChanges != 0 || before.Change != nil || before.Freeze != nil || made.Revision != 1 || !made.Changed {
		t.Errorf("%+v, %+v", before, made)
	}
	got, edits, err := db.ChangeEdits(t.Context(), c.ID, 2, 100)
	if err != nil || got.Since != 1 || !got.CreatedAt.Equal(at) || got.ID != c.ID || len(edits) != 3 {
		t.Fatalf("%+v, %+v, %v", got, edits, err)
	}
	if a, b, empty := edits[0], edits[1], edits[2]; !a.Removed || a.Content != nil || b.Removed || b.Content != nil || b.Bytes != 3 || empty.Removed || empty.Content == nil || empty.Bytes != 0 {
		t.Errorf("%+v", edits)
	}
	// Only the edits change: the revision stays.
	if before, made = write("a-1", c.ID, put(store.ChangeEdit{Path: "b", Content: []byte("2")})); made.Revision != 1 || before.Change == nil || before.NextChange != 2 || before.OpenChanges != 1 {
		t.Errorf("%+v, %+v", before, made)
	}
	if before, made = write("a", c.ID, func(store.PolicyState) store.PolicyWrite { return store.PolicyWrite{Unfreeze: true} }); made.Changed || made.Revision != 1 || before.NextChange != 1 {
		t.Errorf("%+v, %+v", before, made)
	}
	c.State = store.ChangeDiscarded
	_, made = write("a-1", c.ID, func(store.PolicyState) store.PolicyWrite {
		return store.PolicyWrite{Change: &c, Unedited: []string{"a", "c"}, Freeze: &store.BundleFreeze{Caller: "ann", At: at}}
	})
	if before, _ = write("a-1", "none-1", func(store.PolicyState) store.PolicyWrite { return store.PolicyWrite{} }); made.Revision != 2 || before.OpenChanges != 0 || before.NextChange != 2 || before.Freeze == nil || !before.Freeze.At.Equal(at) {
		t.Errorf("%+v, %+v", before, made)
	}
	if _, edits, err = db.ChangeEdits(t.Context(), c.ID, 100, 100); err != nil || len(edits) != 1 || string(edits[0].Content) != "2" {
		t.Errorf("%+v, %v", edits, err)
	}
	if _, _, err = db.ChangeEdits(t.Context(), "none-1", 1, 1); !errors.Is(err, store.ErrNotFound) {
		t.Error(err)
	}
	failed := errors.New("failed")
	if _, err = db.ChangePolicies(t.Context(), "ann", "a-1", c.ID, func(store.PolicyState) (store.PolicyWrite, error) { return store.PolicyWrite{Unfreeze: true}, failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
	if freezes, err := db.BundleFreezes(t.Context()); err != nil || len(freezes) != 1 {
		t.Errorf("%v, %v", freezes, err)
	}
}
