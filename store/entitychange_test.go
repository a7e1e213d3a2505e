package store_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// compareChanges compares the changes after a revision with the differences of the
// model's states.
func compareChanges(rt *rapid.T, t *testing.T, db *store.DB, w world, oldest int64) {
	var want []store.EntityChange
	for n := w.newest(); n > oldest; n-- {
		for _, name := range ids {
			was, before := w[n-1][name]
			is, after := w[n][name]
			kind := store.EntityChanged
			switch {
			case !before && !after || before && after && sameModel(was, is):
				continue
			case !before:
				kind = store.EntityCreated
			case !after:
				kind = store.EntityDeleted
			}
			want = append(want, store.EntityChange{Revision: n, Caller: "test", UID: uid(name), Kind: kind})
		}
	}
	one := uid(rapid.SampledFrom(ids).Draw(rt, "of one"))
	limit := rapid.IntRange(1, 4).Draw(rt, "limit")
	for _, q := range []store.ChangeQuery{{}, {UID: &one}, {Type: "G"}} {
		q.Limit = limit
		var got []store.EntityChange
		for {
			page, err := db.QueryEntityChanges(t.Context(), q)
			if err != nil {
				rt.Fatal(err)
			}
			for _, c := range page {
				if time.Since(c.At) > 101*24*time.Hour {
					rt.Fatalf("%+v", c)
				}
				c.At = time.Time{}
				got = append(got, c)
				q.BeforeRevision, q.AfterUID = c.Revision, c.UID
			}
			if len(page) < limit {
				break
			}
		}
		fits := slices.DeleteFunc(slices.Clone(want), func(c store.EntityChange) bool {
			return q.UID != nil && c.UID != one || q.Type != "" && c.UID.Type != q.Type
		})
		if !slices.Equal(got, fits) {
			rt.Fatalf("after revision %d, %+v: changes %+v, want %+v", oldest, q, got, fits)
		}
	}
}

func TestChangesByCallerAndTime(t *testing.T) {
	db := storetest.Open(t)
	by := func(caller string, ops ...store.Op) time.Time {
		t.Helper()
		if _, err := db.WriteEntities(t.Context(), store.EntityWrite{Ops: ops, Caller: caller}); err != nil {
			t.Fatal(err)
		}
		changes, err := db.QueryEntityChanges(t.Context(), store.ChangeQuery{Limit: 1})
		if err != nil || len(changes) != 1 || time.Since(changes[0].At).Abs() > time.Minute {
			t.Fatalf("%+v, %v", changes, err)
		}
		return changes[0].At
	}
	by("ann", put("U a", `{}`), put("U b", `{}`))
	second := by("bob", put("U a", `{"n": 1}`), put("V a", `{}`))
	if err := db.CreateKey(t.Context(), store.Key{ID: "k", Name: "k", Hash: make([]byte, 32)}, "ann"); err != nil {
		t.Fatal(err)
	}
	last := by("ann", remove("U a"))
	by("bob", put("U b", `{"n": 1}`), put("U a", `{}`))
	a, v := uid("U a"), uid("V a")
	for _, c := range []struct {
		name string
		q    store.ChangeQuery
		want string
	}{
		{"all", store.ChangeQuery{}, "5 created U a, 5 changed U b, 4 deleted U a, 2 changed U a, 2 created V a, 1 created U a, 1 created U b"},
		{"by ann", store.ChangeQuery{Caller: "ann"}, "4 deleted U a, 1 created U a, 1 created U b"},
		{"by nobody", store.ChangeQuery{Caller: "nobody"}, ""},
		{"of type V", store.ChangeQuery{Type: "V"}, "2 created V a"},
		{"of U a", store.ChangeQuery{UID: &a}, "5 created U a, 4 deleted U a, 2 changed U a, 1 created U a"},
		{"of U a by bob", store.ChangeQuery{UID: &a, Caller: "bob"}, "5 created U a, 2 changed U a"},
		{"of U a that is a V", store.ChangeQuery{UID: &a, Type: "V"}, ""},
		{"of V a from the last on", store.ChangeQuery{UID: &v, From: last}, ""},
		{"from the second on", store.ChangeQuery{From: second}, "5 created U a, 5 changed U b, 4 deleted U a, 2 changed U a, 2 created V a"},
		{"before the last", store.ChangeQuery{To: last, Type: "U"}, "2 changed U a, 1 created U a, 1 created U b"},
		{"of U a before the last", store.ChangeQuery{To: last, UID: &a}, "2 changed U a, 1 created U a"},
		{"between", store.ChangeQuery{From: second, To: last}, "2 changed U a, 2 created V a"},
		{"of something else", store.ChangeQuery{UID: &store.UID{Type: "U", ID: "zzz"}}, ""},
	} {
		c.q.Limit = 100
		changes, err := db.QueryEntityChanges(t.Context(), c.q)
		if err != nil {
			t.Fatal(err)
		}
		if got := changeTexts(changes); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func changeTexts(changes []store.EntityChange) (text string) {
	for i, c := range changes {
		if i > 0 {
			text += ", "
		}
		kind := map[store.ChangeKind]string{store.EntityCreated: "created", store.EntityChanged: "changed", store.EntityDeleted: "deleted"}[c.Kind]
		text += fmt.Sprintf("%d %s %s %s", c.Revision, kind, c.UID.Type, c.UID.ID)
	}
	return text
}
