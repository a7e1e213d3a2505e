package store_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// emptied removes everything from a database, which is faster than making a new one.
func emptied(t testing.TB, conn *pgx.Conn) {
	t.Helper()
	mustExec(t, conn, `truncate entities, revisions, revision_entries;
		update revision set n = 0; update history set oldest = 0`)
}

// TestListing lists the entities below an ancestor at a revision, page by page during
// other writes, and compares them with a model.
func TestListing(t *testing.T) {
	db, url := openURL(t)
	conn := session(t, url)
	storetest.Check(t, 50, func(rt *rapid.T) {
		emptied(t, conn)
		w := newWorld()
		w.write(rt, t, db, put("G a", `{"n": 0}`, "G b"), put("G b", `{"n": 1}`, "G c"), put("U d", `{"n": 0}`, "G a"), put("U e", `{"n": 0}`, "G b"))
		for range rapid.IntRange(0, 5).Draw(rt, "writes") {
			w.draw(rt, t, db)
		}
		revision := rapid.Int64Range(0, w.newest()).Draw(rt, "revision")
		q := store.EntityQuery{
			Type:        rapid.SampledFrom([]string{"", "G", "U"}).Draw(rt, "type"),
			ParentTypes: []string{"G", "U"},
			Limit:       rapid.IntRange(1, 3).Draw(rt, "limit"),
		}
		ancestor := rapid.SampledFrom(append([]string{""}, ids...)).Draw(rt, "ancestor")
		if ancestor != "" {
			u := uid(ancestor)
			q.Ancestor = &u
		}
		attrs := ""
		if rapid.Bool().Draw(rt, "by attributes") {
			attrs = fmt.Sprintf(`{"n": %d}`, rapid.IntRange(0, 2).Draw(rt, "n"))
			q.Attrs = []byte(attrs)
		}

		want := []string{}
		for name, e := range w[revision] {
			if strings.HasPrefix(name, q.Type) && (attrs == "" || e.attrs == attrs) &&
				(ancestor == "" || w[revision].ancestors(name)[ancestor]) {
				want = append(want, name)
			}
		}
		slices.Sort(want)
		got := []string{}
		for {
			page, err := db.ListEntities(t.Context(), revision, q)
			if err != nil {
				rt.Fatal(err)
			}
			for _, e := range page {
				name := e.Type + " " + e.ID
				if describe(e) != w[revision][name].describe(name) {
					rt.Fatalf("%s is %s", name, describe(e))
				}
				got, q.After = append(got, name), e.UID
			}
			if len(page) < q.Limit {
				break
			}
			w.draw(rt, t, db)
		}
		if !slices.Equal(got, want) {
			rt.Fatalf("revision %d, %+v: listed %v, want %v", revision, q, got, want)
		}
	})
}

// The members of a large group are listed in order. A member of many groups is listed
// once.
func TestListingOfManyMembers(t *testing.T) {
	db, url := openURL(t)
	write(t, db, put("G top", `{}`))
	mustRaw(t, url, `insert into entities (type, id, attrs, tags, parents, since)
		select 'G', 's' || n, '{}', '{}', array['G top'], 1 from generate_series(1, $1::int) n`, store.MaxGroups-1)
	mustRaw(t, url, `insert into entities (type, id, attrs, tags, parents, since)
		select 'U', lpad(n::text, 5, '0'), '{}', '{}', array['G s' || n, 'G s' || n + 1, 'G all'], 1
		from generate_series(1, 9000) n`)
	write(t, db, put("U late", `{}`, "G s1"), put("U 00007", `{}`))
	list := func(revision int64, q store.EntityQuery) (ids []string, err error) {
		q.ParentTypes = []string{"G"}
		for q.Limit = 5000; ; {
			page, err := db.ListEntities(t.Context(), revision, q)
			for _, e := range page {
				ids, q.After = append(ids, e.ID), e.UID
			}
			if err != nil || len(page) < q.Limit {
				return ids, err
			}
		}
	}
	top, all := uid("G top"), uid("G all")
	for _, c := range []struct {
		name     string
		revision int64
		query    store.EntityQuery
		want     int
	}{
		{"users below many groups", 1, store.EntityQuery{Type: "U", Ancestor: &top}, 9000},
		{"users and groups below many groups", 1, store.EntityQuery{Ancestor: &top}, 9000 + store.MaxGroups - 1},
		{"members of one group", 1, store.EntityQuery{Ancestor: &all}, 9000},
	} {
		ids, err := list(c.revision, c.query)
		if err != nil || len(ids) != c.want || len(slices.Compact(slices.Sorted(slices.Values(ids)))) != c.want {
			t.Errorf("%s: %d listed, want %d, %v", c.name, len(ids), c.want, err)
		}
	}
	write(t, db, put("G one too many", `{}`, "G top"))
	if _, err := list(current(t, db), store.EntityQuery{Ancestor: &top}); !errors.Is(err, store.ErrTooManyGroups) {
		t.Errorf("got %v", err)
	}
	// The groups of that revision are counted.
	if _, err := list(1, store.EntityQuery{Ancestor: &top, Type: "none"}); err != nil {
		t.Error(err)
	}
}

// An attribute must be equal to the value. It is not enough that it contains the value.
func TestListingByAttributes(t *testing.T) {
	db, _ := openURL(t)
	at := write(t, db,
		put("U a", `{"n": 1, "list": [1, 2], "in": {"x": 1}, "s": "1"}`),
		put("U b", `{"n": 1, "list": [1], "in": {"x": 1, "y": 2}}`),
		put("U c", `{"n": 2, "list": [], "in": {}, "b": false}`)).Revision
	for attrs, want := range map[string]string{
		`{"n": 1}`:                   "a b",
		`{"n": 1, "list": [1]}`:      "b",
		`{"list": [1, 2]}`:           "a",
		`{"list": []}`:               "c",
		`{"in": {"x": 1}}`:           "a",
		`{"in": {}}`:                 "c",
		`{"in": {}, "list": [1]}`:    "",
		`{"s": "1"}`:                 "a",
		`{"s": 1}`:                   "",
		`{"b": false}`:               "c",
		`{"b": false, "missing": 1}`: "",
	} {
		list, err := db.ListEntities(t.Context(), at, store.EntityQuery{Type: "U", Attrs: []byte(attrs), Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, e := range list {
			ids = append(ids, e.ID)
		}
		if got := strings.Join(ids, " "); got != want {
			t.Errorf("%s: %q, want %q", attrs, got, want)
		}
	}
}
