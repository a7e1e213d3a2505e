package store_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func policy(id, text string, line int) store.Policy {
	return store.Policy{ID: id, File: "p.cedar", Line: line, Text: text}
}

// ids lists id@since of the policies of the only bundle.
func policiesAt(t *testing.T, db *store.DB, revision int64) (list []string) {
	t.Helper()
	bundles, err := db.Bundles(t.Context(), revision)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range bundles {
		for _, p := range b.Policies {
			list = append(list, fmt.Sprintf("%s@%d", p.ID, p.Since))
		}
	}
	return list
}

func TestPublish(t *testing.T) {
	db, url := openURL(t)
	bundle := store.Bundle{
		Name: "shop", Digest: "d1", Description: "A shop", Owners: []string{"team"}, OnForbidError: "deny",
		Namespaces: []string{"Shop", ""}, Schema: "entity User;", Fields: "f: {}",
		Policies: []store.Policy{policy("b", "permit b", 3), policy("a", "permit a", 1), policy("Z", "permit Z", 5)},
	}
	files := []store.File{{Path: "bundle.yaml", Content: []byte("x")}, {Path: "an empty one"}}
	first, version, err := publishBundle(t, db, store.Publish{Bundle: bundle, Files: files, Caller: "alice"})
	if err != nil || version != 1 || first != 1 {
		t.Fatalf("revision %d, version %d, %v", first, version, err)
	}
	bundles, err := db.Bundles(t.Context(), first)
	if err != nil || len(bundles) != 1 {
		t.Fatalf("%+v, %v", bundles, err)
	}
	b := bundles[0]
	if b.Name != "shop" || b.Version != 1 || b.Digest != "d1" || b.PolicyCount != 3 || b.PublishedBy != "alice" ||
		time.Since(b.PublishedAt) > time.Minute || b.Since != first || !slices.Equal(b.Namespaces, bundle.Namespaces) ||
		b.Policies[1] != (store.Policy{Bundle: "shop", ID: "a", File: "p.cedar", Line: 1, Text: "permit a", Since: first}) {
		t.Errorf("%+v", b)
	}

	// The text of b changes, Z is removed, and c is new. a and the empty file keep their
	// rows.
	bundle.Policies = []store.Policy{policy("a", "permit a", 1), policy("b", "permit b2", 3), policy("c", "permit c", 9)}
	files = []store.File{{Path: "bundle.yaml", Content: []byte("y")}, {Path: "an empty one"}}
	publish := store.Publish{Bundle: bundle, Files: files, Caller: "bob"}
	if _, _, err := publishBundle(t, db, publish); !errors.Is(err, store.ErrPolicyChanged) {
		t.Errorf("published on top of what it had not seen: %v", err)
	}
	publish.BaseRevision = first
	second, version, err := publishBundle(t, db, publish)
	if err != nil || version != 2 || second != 2 {
		t.Fatalf("revision %d, version %d, %v", second, version, err)
	}
	if got := policiesAt(t, db, second); !slices.Equal(got, []string{"a@1", "b@2", "c@2"}) {
		t.Errorf("now %v", got)
	}
	if got := policiesAt(t, db, first); !slices.Equal(got, []string{"Z@1", "a@1", "b@1"}) {
		t.Errorf("then %v", got)
	}
	for revision, want := range map[int64]string{first: "x", second: "y"} {
		got, err := db.BundleFiles(t.Context(), revision, "shop")
		if err != nil || len(got) != 2 || got[0] != (store.FileSize{Path: "an empty one"}) || got[1].Bytes != len(want) {
			t.Fatalf("%+v, %v", got, err)
		}
		content, err := db.ReadBundleFile(t.Context(), revision, "shop", got[1].Path, 0, 10)
		if past, _ := db.ReadBundleFile(t.Context(), revision, "shop", got[1].Path, len(want), 10); err != nil || string(content) != want || len(past) != 0 {
			t.Errorf("%q and then %q, %v", content, past, err)
		}
		if bundles, err := db.Bundles(t.Context(), revision); err != nil || string(bundles[0].Manifest) != want {
			t.Errorf("bundle.yaml at revision %d: %q, %v, want %q", revision, bundles[0].Manifest, err, want)
		}
		if _, err := db.ReadBundleFile(t.Context(), revision, "shop", "none", 0, 10); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("a file that is not there: %v", err)
		}
	}
	if err := raw(t, url, "do $$ begin assert (select count(*) from bundle_files) = 3; end $$"); err != nil {
		t.Errorf("an unchanged file has a new row: %v", err)
	}
	// A policy that moved to another line is changed.
	bundle.Policies[0].Line = 2
	publish.BaseRevision = second
	if third, _, err := publishBundle(t, db, publish); err != nil ||
		!slices.Equal(policiesAt(t, db, third), []string{"a@3", "b@2", "c@2"}) {
		t.Errorf("%v", err)
	}

	// Another bundle does not change it.
	other := store.Publish{Bundle: store.Bundle{Name: "org", Policies: []store.Policy{policy("a", "permit", 1)}}, BaseRevision: 3}
	if _, version, err := publishBundle(t, db, other); err != nil || version != 1 {
		t.Errorf("version %d, %v", version, err)
	}
	if bundles, err := db.Bundles(t.Context(), 4); err != nil || bundles[0].Name != "org" || bundles[0].Manifest != nil {
		t.Errorf("a bundle without a bundle.yaml: %+v, %v", bundles, err)
	}
	if got := policiesAt(t, db, 4); !slices.Equal(got, []string{"a@4", "a@3", "b@2", "c@2"}) {
		t.Errorf("now %v", got)
	}
	if list := changes(t, db, 3, 10); len(list) != 1 || list[0] != (store.Change{Revision: 4, Kind: store.KindBundle, ID: "org"}) {
		t.Errorf("%+v", list)
	}
}

func TestPolicyRevisionAndRecheck(t *testing.T) {
	db := storetest.Open(t)
	write(t, db, put("User a", `{}`), put("User b", `{}`))
	seen := current(t, db)
	write(t, db, put("User a", `{"n": 1}`), remove("User b"), put("User c", `{}`))

	no := errors.New("does not fit")
	var rechecked []string
	publish := store.Publish{Bundle: store.Bundle{Name: "shop"}, EntitiesRevision: seen, Recheck: func(changed []store.Entity) error {
		for _, e := range changed {
			rechecked = append(rechecked, e.ID+describe(e))
		}
		return no
	}}
	if _, _, err := publishBundle(t, db, publish); !errors.Is(err, no) {
		t.Errorf("got %v", err)
	}
	slices.Sort(rechecked)
	if !slices.Equal(rechecked, []string{`a{"n": 1} []`, `c{} []`}) {
		t.Errorf("rechecked %q", rechecked)
	}
	publish.Recheck = nil
	published, _, err := publishBundle(t, db, publish)
	if err != nil || published != 3 {
		t.Fatalf("revision %d, %v", published, err)
	}
	for revision, want := range map[int64]int64{0: 0, 2: 0, 3: 3, 99: 3} {
		if n, err := db.PolicyRevision(t.Context(), revision); err != nil || n != want {
			t.Errorf("at %d: %d, %v", revision, n, err)
		}
	}
}

func TestPublishMany(t *testing.T) {
	db := storetest.Open(t)
	const many = 66_000 // more than a statement can have parameters
	policies := make([]store.Policy, many)
	for i := range policies {
		policies[i] = policy(fmt.Sprintf("p%06d", i), fmt.Sprintf("permit (principal, action, resource) when { context.n == %d };", i), i+1)
	}
	start := time.Now()
	first, _, err := publishBundle(t, db, store.Publish{Bundle: store.Bundle{Name: "big", Policies: policies}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d new policies: %v", many, time.Since(start))
	start = time.Now()
	policies[7].Text = "forbid (principal, action, resource);"
	second, _, err := publishBundle(t, db, store.Publish{Bundle: store.Bundle{Name: "big", Policies: policies}, BaseRevision: first})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("one of them changed: %v", time.Since(start))
	start = time.Now()
	bundles, err := db.Bundles(t.Context(), second)
	if err != nil || len(bundles[0].Policies) != many || bundles[0].Policies[7].Since != second || bundles[0].Policies[8].Since != first {
		t.Fatalf("%d, %v", len(bundles[0].Policies), err)
	}
	t.Logf("read: %v", time.Since(start))
}
