package server

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/store"
)

// operatorOf returns the rights of an operator.
func operatorOf(t *testing.T, bundle string) *access.Rights {
	t.Helper()
	d, err := access.NewDecider(nil)
	if err != nil {
		t.Fatal(err)
	}
	return access.NewRights("op", []store.Grant{{Caller: "op", Role: access.Operator, Bundle: bundle}}, d, time.Now())
}

// The last grant and the last key below a limit are stored, and no more. Changes that add nothing
// are made even beyond a limit, as in a database from before there was one. Operators of one bundle
// get half.
func TestBoundsOfKeysAndGrants(t *testing.T) {
	all, one := operatorOf(t, access.AllBundles), operatorOf(t, "doc")
	grants := func(n int) (list []store.Grant) {
		for i := range n {
			list = append(list, store.Grant{Caller: fmt.Sprint("c", i/maxCallerGrants), Role: access.Enforcer, Bundle: fmt.Sprint("b", i%maxCallerGrants)})
		}
		return list
	}
	keys := func(n int) []store.Key { return make([]store.Key, n) }
	full := store.Access{Grants: grants(maxGrants), Keys: keys(maxKeys)}
	newGrant, newKey := []store.Grant{{Caller: "new", Role: access.Enforcer, Bundle: "doc"}}, []store.Key{{Name: "new"}}
	for _, c := range []struct {
		name   string
		rights *access.Rights
		now    store.Access
		change store.AccessChange
		want   string
	}{
		{"the last grant", all, store.Access{Grants: full.Grants[:maxGrants-1]}, store.AccessChange{Put: newGrant}, ""},
		{"one grant too many", all, full, store.AccessChange{Put: newGrant}, "the limit is 50000"},
		{"the last grant of operators of one bundle", one, store.Access{Grants: full.Grants[:maxGrants/2-1]}, store.AccessChange{Put: newGrant}, ""},
		{"one too many of theirs", one, store.Access{Grants: full.Grants[:maxGrants/2]}, store.AccessChange{Put: newGrant}, "the limit for operators of single bundles is 25000"},
		{"a grant that is stored already", one, full, store.AccessChange{Put: full.Grants[:1]}, ""},
		{"a grant less", one, full, store.AccessChange{Delete: []store.GrantKey{full.Grants[0].Key()}}, ""},
		{"the last grant of a caller", all, store.Access{Grants: grants(maxCallerGrants - 1)}, store.AccessChange{Put: []store.Grant{{Caller: "c0"}}}, ""},
		{"one too many of a caller", all, store.Access{Grants: grants(maxCallerGrants)}, store.AccessChange{Put: []store.Grant{{Caller: "c0"}}}, `caller "c0" has 200 grants`},
		{"too many of a caller at once", all, store.Access{}, store.AccessChange{Put: append(grants(maxCallerGrants), store.Grant{Caller: "c0"})}, `caller "c0" has 200 grants`},
		{"the last key", all, store.Access{Keys: keys(maxKeys - 1)}, store.AccessChange{Add: newKey}, ""},
		{"one key too many", all, full, store.AccessChange{Add: newKey}, "there are 10000 API keys that are not revoked, and the limit is 10000"},
		{"the last key of operators of one bundle", one, store.Access{Keys: keys(maxKeys/2 - 1)}, store.AccessChange{Add: newKey}, ""},
		{"one too many of theirs", one, store.Access{Keys: keys(maxKeys / 2)}, store.AccessChange{Add: newKey}, "the limit for operators of single bundles is 5000"},
		{"a key less", one, full, store.AccessChange{Revoke: full.Keys[:1]}, ""},
	} {
		err := withinBounds(c.rights, c.now, c.change)
		if c.want == "" && err != nil || c.want != "" && (connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
