package server

import (
	"context"
	"errors"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/policies"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

// A check that takes too long is refused. A check whose caller has
// left is given up.
func TestCheckIsBounded(t *testing.T) {
	t.Parallel() // it takes long
	times := defaultTimeouts
	times.check = time.Nanosecond
	s, db, _, _, _ := hurriedPlane(t, "admin", times)
	shop, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	p := newPolicyService(db, s.follower, s.noted, times)
	for range 2 { // the place of a check is given back
		if _, err := p.publish(t.Context(), shop, false); connect.CodeOf(err) != connect.CodeResourceExhausted {
			t.Errorf("got %v", err)
		}
	}
	p.times.check = time.Hour
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, err := p.publish(gone, shop, false); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := p.publish(t.Context(), shop, false); err != nil {
		t.Errorf("got %v", err)
	}
	rows, err := db.QueryEvents(t.Context(), store.EventQuery{Kind: "change", Limit: 10})
	if err != nil || decisionlog.ReadEvent(rows[0]).GetChange().GetVersion() != 1 {
		t.Errorf("%v, %v", rows, err)
	}
}

// A caller has one place, and all callers together have a bounded number. All places are given
// back, and callers without uploads are forgotten.
func TestBundlePlaces(t *testing.T) {
	p := newBundlePlaces()
	gone, leave := context.WithCancel(t.Context())
	leave()
	full := func(caller string) bool {
		for range 50 { // both a free place and the end of the context may be chosen
			back, err := p.upload(gone, caller)
			if err == nil {
				back()
				return false
			}
		}
		return true
	}
	var back []func()
	for _, caller := range []string{"a", "b", "c", "d"} {
		b, err := p.upload(t.Context(), caller)
		if err != nil {
			t.Fatal(err)
		}
		if back = append(back, b); !full(caller) {
			t.Errorf("%s has a second place", caller)
		}
	}
	if !full("e") {
		t.Error("there is a fifth place")
	}
	back[0]()
	if full("a") || full("e") || !full("b") {
		t.Error("the place of a was not given back")
	}
	for _, b := range back[1:] {
		b()
	}
	if len(p.callers) != 0 || len(p.uploads) != 0 {
		t.Errorf("%d callers, %d uploads", len(p.callers), len(p.uploads))
	}
}
