package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The first hour of an operator: keys with roles, a narrowed grant, rotation, the end of a key, and
// a recovered operator.
func testKeys(sh *shell, dir string) func(*testing.T) {
	return func(t *testing.T) {
		file := func(name string) string { return filepath.Join(dir, name) }
		sh.exits(t, 0, says("key ", " of orders is in ", "it ends: never"), "keys", "create", "orders", "--role=enforcer", "--bundle=shop", "--out="+file("orders.key"))
		if info, err := os.Stat(file("orders.key")); err != nil || info.Mode() != 0o600 {
			t.Errorf("%v, %v, want mode 0600", info, err)
		}
		// The file of a key is not replaced, and no key is made for it.
		sh.exits(t, 1, says("exists already"), "keys", "rotate", "orders", "--out="+file("orders.key"))
		secret, err := os.ReadFile(file("orders.key"))
		if err != nil {
			t.Fatal(err)
		}
		orders := sh.with("CEDARPOST_TOKEN=" + strings.TrimSpace(string(secret)))
		orders.exits(t, 0, says("ALLOW"), ask("ViewOrder", "42")...)
		sh.exits(t, 0, says("orders has the role enforcer for shop"), "grants", "put", "orders", "enforcer", "--bundle=shop", `--action=Shop::Action::ListOrders`, "--expires=1h")
		sh.exits(t, 0, says("warning: no bundle shpo is published"), "grants", "put", "orders", "auditor", "--bundle=shpo")
		sh.exits(t, 0, says("no more"), "grants", "delete", "orders", "auditor", "--bundle=shpo")
		sh.exits(t, 0, says("ENDS", `Shop::Action::"ListOrders"`, "bootstrap"), "grants", "list", "orders")
		orders.exits(t, 1, says("permission_denied", `Authorize for Shop::Action::"ViewOrder"`, "cedarpost whoami"), ask("ViewOrder", "42")...)
		orders.exits(t, 1, says("permission_denied", "ListEntities"), "entities", "list")
		orders.exits(t, 0, says("orders", "api key", `enforcer for shop, only Shop::Action::"ListOrders", until`, "Authorize, AuthorizeBatch, GetRevision"), "whoami")
		var me struct {
			Caller, Kind string
			Grants       []struct{ Role string }
		}
		if err := json.Unmarshal([]byte(orders.exits(t, 0, nil, "whoami", "-o", "json").out), &me); err != nil || me.Caller != "orders" || me.Kind != "api_key" || len(me.Grants) != 1 {
			t.Errorf("%+v, %v", me, err)
		}
		sh.exits(t, 0, says("cedarpost keys revoke --id "), "keys", "rotate", "orders", "--out="+file("new.key"))
		if got := lines(sh.exits(t, 0, nil, "keys", "list", "orders", "-o", "json").out); len(got) != 2 {
			t.Errorf("%d keys", len(got))
		}
		sh.exits(t, 0, says("revoked key"), "keys", "revoke", "orders")
		orders.exits(t, 1, says("unauthenticated"), "whoami")
		sh.exits(t, 1, says("the last API key with the role operator"), "keys", "revoke", "bootstrap")
		sh.exits(t, 0, says("orders has the role enforcer for shop"), "grants", "put", "orders", "enforcer", "--bundle=shop", "--rate=250")
		sh.exits(t, 0, says("RATE", "250/s"), "grants", "list", "orders")
		sh.exits(t, 0, says("no more"), "grants", "delete", "orders", "enforcer", "--bundle=shop")
		sh.exits(t, 1, says("not_found"), "grants", "delete", "orders", "enforcer", "--bundle=shop")

		sh.exits(t, 0, says("an operator of all bundles"), "keys", "recover", "--out="+file("recovered.key"))
		sh.exits(t, 0, says("recovered", "operator for *"), "whoami", "--token-file="+file("recovered.key"))
		sh.exits(t, 0, says("RevokeKey", "recover", "PutGrant"), "events", "--kind=change", "--limit=20")
		sh.exits(t, 0, says("/cedarpost.v1.EntityService/ListEntities"), "events", "--kind=refused_right")
	}
}
