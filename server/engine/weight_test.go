package engine

import (
	"errors"
	"fmt"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// heavyRoles makes users in roles that weigh so much each. The weight of a user is small.
func heavyRoles(users, roles int, each int64) map[cedar.EntityUID]*Entity {
	stored := map[cedar.EntityUID]*Entity{}
	for u := range users {
		uid := cedar.NewEntityUID("User", cedar.String(fmt.Sprint(u)))
		stored[uid] = &Entity{UID: uid}
		for r := range roles {
			id := role(u*roles + r)
			stored[uid].Parents = append(stored[uid].Parents, id)
			stored[id] = &Entity{UID: id, Weight: each}
		}
	}
	return stored
}

func askOf(user int) Ask {
	return Ask{
		Principal: cedar.NewEntityUID("User", cedar.String(fmt.Sprint(user))), Action: cedar.NewEntityUID("Action", "view"), Resource: cedar.NewEntityUID("Doc", "d"),
		Context: map[string]any{"roles": []any{}},
	}
}

func lookIn(pool *Pool, stored map[cedar.EntityUID]*Entity) Loader {
	return func(missing []cedar.EntityUID) error {
		for _, uid := range missing {
			pool.Put(uid, stored[uid])
		}
		return nil
	}
}

// A question may weigh MaxSliceWeight, and no more, also if all its entities are known. A replay
// has no bound.
func TestSliceWeight(t *testing.T) {
	set := sliceSet(t, `@id("a") permit (principal in Role::"0", action, resource);`)
	const own = 2 * (entityWeight + parentWeight) // what the user and its parents count for
	for _, c := range []struct {
		each      int64
		unbounded bool
		decided   bool
	}{
		{(MaxSliceWeight - own) / 2, false, true},
		{MaxSliceWeight/2 + 1, false, false},
		{MaxSliceWeight/2 + 1, true, true},
	} {
		pool := NewPool()
		if c.unbounded {
			pool.SetUnbounded()
		}
		e, err := set.Prepare(askOf(0), pool, lookIn(pool, heavyRoles(1, 2, c.each)))
		if !c.decided {
			if !errors.Is(err, ErrTooLarge) {
				t.Errorf("two roles of %d bytes: %v", c.each, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("two roles of %d bytes: %v", c.each, err)
			continue
		}
		if res, err := e.Decide(); err != nil || !res.Allowed {
			t.Errorf("two roles of %d bytes: %+v, %v", c.each, res, err)
		}
	}
}

// In a batch, a question that is too large is refused alone. When all questions together weigh too
// much, those that weigh little are decided all the same.
func TestBatchWeight(t *testing.T) {
	set := sliceSet(t, `@id("a") permit (principal, action, resource);`)
	const large = MaxSliceWeight - 10_000
	const fit = MaxBatchWeight / MaxSliceWeight
	stored := heavyRoles(fit+3, 1, large)
	stored[role(1)].Weight = MaxSliceWeight   // user 1 is too large by its own weight
	stored[role(fit+2)].Weight = entityWeight // the last user weighs little
	var asks []Ask
	for u := range fit + 3 {
		asks = append(asks, askOf(u))
	}
	pool := NewPool()
	list, err := set.PrepareBatch(asks, pool, lookIn(pool, stored))
	if err != nil {
		t.Fatal(err)
	}
	for u := range list {
		_, err := list[u].Decide()
		var refused *TooLargeError
		switch want := u != 1 && u != fit && u != fit+1; {
		case want && err != nil, !want && !errors.As(err, &refused):
			t.Errorf("question %d: %v", u, err)
		case !want && refused.Batch != (u != 1):
			t.Errorf("question %d is refused for its batch: %v", u, refused.Batch)
		}
	}
}

// If the load of a batch is too large, each question is loaded alone, and only those that are too
// large alone are refused.
func TestBatchIsLoadedApart(t *testing.T) {
	set := sliceSet(t, `@id("a") permit (principal, action, resource);`)
	stored := heavyRoles(5, 1, entityWeight)
	pool := NewPool()
	look := lookIn(pool, stored)
	loads := 0
	load := func(missing []cedar.EntityUID) error {
		loads++
		if len(missing) > 3 || missing[0].ID == "2" {
			return &TooLargeError{}
		}
		return look(missing)
	}
	list, err := set.PrepareBatch([]Ask{askOf(0), askOf(1), askOf(2), askOf(3), askOf(4)}, pool, load)
	if err != nil {
		t.Fatal(err)
	}
	for u := range list {
		if _, err := list[u].Decide(); errors.Is(err, ErrTooLarge) != (u == 2) || err != nil && u != 2 {
			t.Errorf("question %d: %v", u, err)
		}
	}
	if loads < 6 {
		t.Errorf("%d loads", loads)
	}
}
