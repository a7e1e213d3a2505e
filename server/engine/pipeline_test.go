package engine

import (
	"errors"
	"reflect"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"pgregory.net/rapid"
)

// Questions that are prepared together are decided as each of them alone, and no entity
// is loaded twice. One that is refused does not disturb the others.
func TestBatchEqualsEachAlone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, stored := world(t), worldEntities(t)
		asks := rapid.SliceOfN(rapid.Custom(worldAsk), 1, 6).Draw(t, "asks")
		refused := rapid.IntRange(-1, len(asks)-1).Draw(t, "refused")
		if refused >= 0 {
			asks[refused].Action = uid("Action", "Unheard")
		}
		pool, loaded := NewPool(), map[cedar.EntityUID]bool{}
		list, err := set.PrepareBatch(asks, pool, func(missing []cedar.EntityUID) error {
			for _, u := range missing {
				if loaded[u] {
					t.Fatalf("%s is loaded twice", u)
				}
				loaded[u] = true
			}
			pool.Add(missing, withAncestors(stored, missing))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for i := range list {
			res, err := list[i].Decide()
			if i == refused {
				var bad *RequestError
				if !errors.As(err, &bad) || res != nil {
					t.Fatalf("refused question: %v, %v", res, err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if alone := decideWith(t, set, stored, asks[i]); !reflect.DeepEqual(res, alone) {
				t.Fatalf("question %d\n together %+v\n alone    %+v", i, res, alone)
			}
		}
	})
}

// Preparing ends with the first error of a load, and of the pool's owner.
func TestPrepareEnds(t *testing.T) {
	set := sliceSet(t, `@id("a") permit (principal, action, resource);`)
	ask := Ask{Principal: cedar.NewEntityUID("User", "u"), Action: cedar.NewEntityUID("Action", "view"), Resource: cedar.NewEntityUID("Doc", "d"),
		Context: map[string]any{"roles": []any{}}}
	away := errors.New("away")
	calls := 0
	load := func([]cedar.EntityUID) error { calls++; return away }
	if _, err := set.Prepare(ask, NewPool(), load); !errors.Is(err, away) || calls != 1 {
		t.Errorf("%d loads, then %v", calls, err)
	}
	pool := NewPool()
	pool.SetPause(func(string, int64) error { return away })
	if _, err := set.PrepareBatch([]Ask{ask, ask}, pool, load); !errors.Is(err, away) || calls != 1 {
		t.Errorf("%d loads, then %v", calls, err)
	}
}
