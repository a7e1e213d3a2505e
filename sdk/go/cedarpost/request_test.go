package cedarpost_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
)

// Ids and paths come from users. One that cannot be sent must not look like a service
// that is away. Otherwise a user could make checks fail open.
func TestWhatCannotBeSentDoesNotFailOpen(t *testing.T) {
	svc := cedarposttest.New(t, "../../../policies/shop")
	var many []string
	for i := range 900 {
		many = append(many, fmt.Sprint(strings.Repeat("x", 100), i))
	}
	for name, change := range map[string]func(*cedarpost.Check){
		"principal":     func(c *cedarpost.Check) { c.Principal.ID = "\xff" },
		"action":        func(c *cedarpost.Check) { c.Action.ID = "\xff" },
		"resource":      func(c *cedarpost.Check) { c.Resource.ID = "\xff" },
		"type":          func(c *cedarpost.Check) { c.Resource.Type = "\xff" },
		"field":         func(c *cedarpost.Check) { c.Fields = []string{"\xff"} },
		"request id":    func(c *cedarpost.Check) { c.RequestID = "\xff" },
		"context":       func(c *cedarpost.Check) { c.Context = map[string]any{"mfa": "\xff"} },
		"attribute":     func(c *cedarpost.Check) { c.Context = map[string]any{"\xff": true} },
		"entity":        func(c *cedarpost.Check) { c.Entities = []cedarpost.Entity{{UID: cedarpost.UID("Shop::User", "\xff")}} },
		"large id":      func(c *cedarpost.Check) { c.Resource.ID = strings.Repeat("x", 64<<10) },
		"many fields":   func(c *cedarpost.Check) { c.Fields, c.RequireAllFields = many, true },
		"large context": func(c *cedarpost.Check) { c.Context = map[string]any{"mfa": strings.Repeat("x", 64<<10)} },
	} {
		for kind, client := range map[string]*cedarpost.Client{
			"plain": svc.Client(), "coalescing": svc.Client(func(c *cedarpost.Config) { c.Coalesce, c.CacheBytes = true, 0 }),
		} {
			check := cedarpost.Check{
				Principal: cedarpost.UID("Shop::User", "bob"), Action: cedarpost.UID("Shop::Action", "ViewOrder"),
				Resource: cedarpost.UID("Shop::Order", "42"), FailOpen: "the shop must go on",
			}
			change(&check)
			if r, err := client.Authorize(t.Context(), check); !errors.Is(err, cedarpost.ErrInvalid) || r.Allowed() {
				t.Errorf("%s, %s: allowed %v, %v", name, kind, r.Allowed(), err)
			}
			if a := client.AuthorizeBatch(t.Context(), []cedarpost.Check{check}); !errors.Is(a[0].Err, cedarpost.ErrInvalid) || a[0].Allowed() {
				t.Errorf("%s, %s, in a batch: allowed %v, %v", name, kind, a[0].Allowed(), a[0].Err)
			}
		}
	}
}

// Many large questions are together more than the service accepts in one call. They are
// sent in several.
func TestLargeBatches(t *testing.T) {
	svc := cedarposttest.New(t, "../../../policies/shop")
	var paths []string
	for i := range 450 {
		paths = append(paths, fmt.Sprint(strings.Repeat("x", 100), i))
	}
	check := cedarpost.Check{
		Principal: cedarpost.UID("Shop::User", "bob"), Action: cedarpost.UID("Shop::Action", "ViewOrder"), Resource: cedarpost.UID("Shop::Order", "42"),
		Context: map[string]any{"mfa": false}, Fields: paths,
	}
	patient := func(c *cedarpost.Config) { c.Timeout = time.Minute } // there is a lot to decide
	for i, a := range svc.Client(patient).AuthorizeBatch(t.Context(), slices.Repeat([]cedarpost.Check{check}, 30)) {
		if a.Err != nil || !a.Allowed() {
			t.Fatalf("check %d: %v, %v", i, a.Allowed(), a.Err)
		}
	}
	client := svc.Client(patient, func(c *cedarpost.Config) { c.Coalesce = true })
	var wait sync.WaitGroup
	for range 30 {
		wait.Go(func() {
			if r, err := client.Authorize(t.Context(), check); err != nil || !r.Allowed() {
				t.Errorf("alone: %v, %v", r.Allowed(), err)
			}
		})
	}
	wait.Wait()
}
