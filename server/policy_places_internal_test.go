package server

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

// A check that takes too long is refused. A check whose caller has left is given up.
func TestCheckIsBounded(t *testing.T) {
	t.Parallel() // it takes long
	times := defaultTimeouts
	times.check = time.Nanosecond
	s, db, _, _, _ := hurriedPlane(t, "admin", times)
	shop, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	p := newPolicyService(db, s.gate, s.recorder, s.noted, times)
	p.stillMay = anybodyMay
	for range 2 { // the place of a check is given back
		if _, err := p.publish(t.Context(), plainPublication(shop, false), nil); connect.CodeOf(err) != connect.CodeResourceExhausted {
			t.Errorf("got %v", err)
		}
	}
	p.times.check = time.Hour
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, err := p.publish(gone, plainPublication(shop, false), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := p.publish(t.Context(), plainPublication(shop, false), nil); err != nil {
		t.Errorf("got %v", err)
	}
	rows, err := db.QueryEvents(t.Context(), store.EventQuery{Kind: "change", Limit: 10})
	if err != nil || decisionlog.ReadEvent(rows[0]).GetChange().GetVersion() != 1 {
		t.Errorf("%v, %v", rows, err)
	}
}

// A question that costs too much to decide leaves an event.
func TestCostlyQuestionIsNoted(t *testing.T) {
	s, db, _, _, _ := hurriedPlane(t, "admin", defaultTimeouts)
	uid := func(typ, id string) *cedarpostv1.EntityUid { return &cedarpostv1.EntityUid{Type: typ, Id: id} }
	(&authorizationService{noted: s.noted, metric: newDecisionMetrics(prometheus.NewRegistry())}).noteUndecided(t.Context(), &cedarpostv1.AuthorizeRequest{
		Principal: uid("A::User", "u"), Action: uid("A::Action", "Read"), Resource: uid("A::Doc", "d"),
	}, fmt.Errorf("policy p: %w", engine.ErrTooCostly))
	for {
		rows, err := db.QueryEvents(t.Context(), store.EventQuery{Kind: "probing", Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		if len(rows) == 0 {
			time.Sleep(10 * time.Millisecond) // it is recorded in the background
			continue
		}
		p := decisionlog.ReadEvent(rows[0]).GetProbing()
		if len(rows) != 1 || p.GetReason() != "too_costly" || p.GetPrincipal() != `A::User::"u"` || p.GetExample() != `A::Action::"Read" on A::Doc::"d"` || p.GetCount() != 1 {
			t.Errorf("%d events, %v", len(rows), p)
		}
		return
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

// anybodyMay is for calls without a caller.
func anybodyMay(context.Context, string, ...need) error { return nil }

// plainPublication is that of ApplyBundle without rules.
func plainPublication(b *bundle.Bundle, dryRun bool) *publication {
	return &publication{bundle: b, procedure: cedarpostv1connect.PolicyServiceApplyBundleProcedure, need: need{applyBundle, access.Target{Bundle: b.Name, Changes: true}}, dryRun: dryRun,
		approvals: func(store.Bundle) int { return 0 },
		rules: func(store.Bundle, store.PolicyState) (w store.PolicyWrite, blocked []block, err error) {
			return w, nil, nil
		}}
}
