package snapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/server/engine"
)

// endsAfter is a context that ends after some calls of Err.
type endsAfter struct {
	context.Context
	looks *int
}

func (c endsAfter) Err() error {
	if *c.looks--; *c.looks < 0 {
		return context.DeadlineExceeded
	}
	return nil
}

// If all entities of a slice are in the cache, each one is looked up once, and the walk ends
// with the context.
func TestLoadFromTheCache(t *testing.T) {
	const long = 6000
	set, findings := engine.Compile([]engine.Source{{
		Name:     "b",
		Schema:   `entity Role in [Role]; entity User in [Role]; entity Doc; action view appliesTo { principal: User, resource: Doc };`,
		Policies: []engine.PolicyText{{Text: `@id("a") permit (principal in Role::"6000", action, resource);`}},
	}}, nil)
	if set == nil {
		t.Fatal(findings)
	}
	uid := func(typ, id string) cedar.EntityUID {
		return cedar.NewEntityUID(cedar.EntityType(typ), cedar.String(id))
	}
	role := func(i int) cedar.EntityUID { return uid("Role", fmt.Sprint(i)) }
	cache := newEntityCache(100 << 20)
	snap := &Snapshot{Set: set, schema: cache.reset(0)}
	list := []loaded{
		{uid("User", "u"), &engine.Entity{UID: uid("User", "u"), Parents: []cedar.EntityUID{role(0)}}, 0},
		{uid: uid("Doc", "d")},
	}
	for i := range long {
		list = append(list, loaded{role(i), &engine.Entity{UID: role(i), Parents: []cedar.EntityUID{role(i + 1)}}, 0})
	}
	list = append(list, loaded{uid: role(long)})
	cache.keep(snap, list)
	metrics := prometheus.NewRegistry()
	l := newLoader(nil, cache, metrics) // without a store, so all entities must be in the cache

	prepare := func(ctx context.Context, questions int) ([]engine.Evaluation, error) {
		ask := engine.Ask{Principal: uid("User", "u"), Action: uid("Action", "view"), Resource: uid("Doc", "d")}
		list, _, err := l.prepare(ctx, snap, slices.Repeat([]engine.Ask{ask}, questions), func(string, int64) error { return ctx.Err() })
		return list, err
	}
	hits := func() int { return hits(t, metrics) }
	for range 3 {
		before := hits()
		evaluations, err := prepare(t.Context(), 2)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := hits()-before, len(list); got != want {
			t.Errorf("%d entities were looked up, want %d", got, want)
		}
		if res, err := evaluations[1].Decide(); err != nil || !res.Allowed {
			t.Errorf("decided %+v, %v", res, err)
		}
	}

	looks := 0
	for _, after := range []int{0, 1, 10, 1000, long} {
		before := hits()
		looks = after
		if _, err := prepare(endsAfter{t.Context(), &looks}, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("context ended after %d looks: %v", after, err)
		}
		if got := hits() - before; got > after {
			t.Errorf("context ended after %d looks, and %d more entities were looked up", after, got-after)
		}
	}
	// The slices of later questions are walked in the pool, without the cache.
	looks = len(list) + 3
	if _, err := prepare(endsAfter{t.Context(), &looks}, 50); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("context ended between questions: %v", err)
	}
}
