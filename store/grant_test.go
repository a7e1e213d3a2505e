package store_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// change commits a change of keys and grants, and returns what was stored before it.
func change(t *testing.T, db *store.DB, c store.AccessChange) (store.Access, store.Changes) {
	t.Helper()
	var before store.Access
	made, err := db.ChangeAccess(t.Context(), "ann", func(_ context.Context, now store.Access) (store.AccessChange, error) {
		before = now
		return c, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return before, made
}

// Grants and keys are stored together, each change once, and can be read back as they were.
func TestChangeAccess(t *testing.T) {
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), Event: storetest.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	end := time.Date(2030, 1, 2, 3, 4, 5, 678_000, time.UTC)
	writer := store.Grant{Caller: "shop", Role: "data-writer", Bundle: "shop", EntityTypes: []string{"Shop::Order"}, ExpiresAt: &end, GrantedBy: "ann"}
	all := store.Grant{Caller: "shop", Role: "enforcer", Bundle: "*", GrantedBy: "ann"}
	key := store.Key{ID: "k", Name: "shop", Hash: make([]byte, 32), ExpiresAt: &end}

	if before, made := change(t, db, store.AccessChange{Put: []store.Grant{writer, all}, Add: []store.Key{key}}); before.Granted || !made.Changed || made.Revision != 2 {
		t.Errorf("%+v, %+v", before, made)
	}
	now, made := change(t, db, store.AccessChange{Put: []store.Grant{all}})
	if made.Changed || made.Revision != 2 || !now.Granted {
		t.Errorf("a grant that is stored already: %+v", made)
	}
	if len(now.Grants) != 2 || len(now.Keys) != 1 || !now.Keys[0].ExpiresAt.Equal(end) || now.Keys[0].Live(end) || !now.Keys[0].Live(end.Add(-1)) {
		t.Fatalf("%+v", now)
	}
	got := now.Grants[0]
	if got.Since != 1 || got.Key() != writer.Key() || !slices.Equal(got.EntityTypes, writer.EntityTypes) || got.Actions != nil || !got.ExpiresAt.Equal(end) || got.Live(end) {
		t.Errorf("%+v", got)
	}

	// A grant is replaced, one is deleted, and a key is revoked: two revisions.
	writer.ExpiresAt = nil
	if _, made := change(t, db, store.AccessChange{Put: []store.Grant{writer}, Delete: []store.GrantKey{all.Key()}, Revoke: []store.Key{key}}); made.Revision != 4 {
		t.Errorf("%+v", made)
	}
	now, _ = change(t, db, store.AccessChange{})
	if len(now.Keys) != 0 || len(now.Grants) != 1 || now.Grants[0].ExpiresAt != nil || now.Grants[0].Since != 3 {
		t.Errorf("%+v", now)
	}

	// Listings of entities do not have the grants.
	if list, err := db.ListEntities(t.Context(), 4, store.EntityQuery{Limit: 10}); err != nil || len(list) > 0 {
		t.Errorf("%+v, %v", list, err)
	}
	if list, err := db.QueryEntityChanges(t.Context(), store.ChangeQuery{Limit: 10}); err != nil || len(list) > 0 {
		t.Errorf("%+v, %v", list, err)
	}

	// A row that is no grant gives no right, and does not keep the others from being read.
	mustRaw(t, url, `insert into entities (type, id, attrs, tags, parents, since)
		values ('Cedarpost::Grant', 'enforcer * eve', '{"caller": "eve", "role": "operator", "bundle": "*"}', '{}', '{}', 4),
		       ('Cedarpost::Grant', 'x', '{"caller": 7}', '{}', '{}', 4)`)
	if now, _ = change(t, db, store.AccessChange{}); len(now.Grants) != 1 {
		t.Errorf("%+v", now.Grants)
	}
}

// The last use of a key only moves forward.
func TestKeyUses(t *testing.T) {
	db := storetest.Open(t)
	noon := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	for _, at := range []time.Time{noon, noon.Add(-time.Hour), noon.Add(time.Hour)} {
		if err := db.NoteKeyUses(t.Context(), []store.KeyUse{{ID: "b", At: at}, {ID: "a", At: noon}}); err != nil {
			t.Fatal(err)
		}
	}
	uses, err := db.KeyUses(t.Context())
	if err != nil || len(uses) != 2 || !uses["a"].Equal(noon) || !uses["b"].Equal(noon.Add(time.Hour)) {
		t.Errorf("%v, %v", uses, err)
	}
}

// A login with the role of the owner changes keys and grants, and needs no other role. One that
// serves may not use that way.
func TestOpenOwner(t *testing.T) {
	t.Parallel()
	_, url := openURL(t)
	config := func(roles ...string) store.Config {
		return store.Config{DatabaseURL: secret.New(storetest.Login(t, url, roles...)), Server: "test", Event: storetest.Event}
	}
	if _, err := store.OpenOwner(t.Context(), config(serving...)); !errors.Is(err, store.ErrRoles) {
		t.Errorf("a login that serves: %v", err)
	}
	db, err := store.OpenOwner(t.Context(), config("cedarpost_owner"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	made, err := db.ChangeAccess(t.Context(), "recover", func(context.Context, store.Access) (c store.AccessChange, err error) {
		c.Put = []store.Grant{{Caller: "ann", Role: "operator", Bundle: "*", GrantedBy: "recover"}}
		c.Add = []store.Key{{ID: "k", Name: "ann", Hash: make([]byte, 32)}}
		return c, nil
	})
	if err != nil || !made.Changed || count(t, url, "select count(*) from events where kind = 'change'") != 2 {
		t.Errorf("%+v, %v", made, err)
	}
}
