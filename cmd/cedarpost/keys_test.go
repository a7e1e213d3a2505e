package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
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
		sh.exits(t, 0, says(`orders has the role enforcer for shop: only Shop::Action::"ListOrders", no rate of its own, until 2099-01-01T00:00:00`, "it replaces: all actions, no rate of its own, no end\n"),
			"grants", "put", "orders", "enforcer", "--bundle=shop", "--action=Shop::Action::ListOrders", "--expires=2099-01-01")
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
		sh.exits(t, 0, says("revoked key", "the grants of orders stay"), "keys", "revoke", "orders")
		var shown struct {
			Key    struct{ Caller string }
			Secret string
		}
		if err := json.Unmarshal([]byte(sh.exits(t, 0, says("has no grants"), "keys", "create", "bare", "--out=-", "-o", "json").out), &shown); err != nil || shown.Key.Caller != "bare" || shown.Secret == "" {
			t.Errorf("%+v, %v", shown.Key, err)
		}
		sh.exits(t, 1, says("no file can be made in /nonexistent: "), "keys", "create", "orders", "--out=/nonexistent/x.key")
		sh.exits(t, codeUsage, says("--grants needs the caller"), "keys", "revoke", "--id=x", "--grants")
		sh.exits(t, 0, nil, "grants", "put", "bare", "auditor", "--bundle=shop")
		sh.exits(t, 0, says("revoked key", "bare has the role auditor for shop no more"), "keys", "revoke", "bare", "--grants")
		sh.exits(t, 0, says("no keys of the caller orders\n"), "keys", "list", "orders")
		sh.exits(t, codeUsage, says(`no caller "craete" has keys`, "list, create, rotate"), "keys", "craete")
		sh.exits(t, codeUsage, says(`no caller "add" has grants`, "list, put and delete"), "grants", "add")
		orders.exits(t, 1, says("unauthenticated"), "whoami")
		sh.exits(t, 1, says("the last API key with the role operator"), "keys", "revoke", "bootstrap")
		sh.exits(t, 0, says("orders has the role enforcer for shop: all actions, 250/s, no end; since", `it replaces: only Shop::Action::"ListOrders", no rate of its own, until 2099-01-01`),
			"grants", "put", "orders", "enforcer", "--bundle=shop", "--rate=250")
		sh.exits(t, 0, says("nothing changed", "all actions, 250/s, no end\n"), "grants", "put", "orders", "enforcer", "--bundle=shop", "--rate=250")
		sh.exits(t, 0, says("RATE", "250/s"), "grants", "list", "orders")
		sh.exits(t, 0, says("no more"), "grants", "delete", "orders", "enforcer", "--bundle=shop")
		sh.exits(t, 0, says("no grants of the caller orders\n"), "grants", "list", "orders")
		// An auditor of one bundle has to say which time, in the flags of the command line.
		sh.exits(t, 0, says("it ends: 2099-06-1"), "keys", "create", "shop-auditor", "--role=auditor", "--bundle=shop", "--expires=2099-06-15T12:00:00+01:00", "--out="+file("auditor.key"))
		auditor := sh.with("CEDARPOST_TOKEN=", "CEDARPOST_TOKEN_FILE="+file("auditor.key"))
		auditor.exits(t, 2, says("a caller with a right to some bundles only has to read all decisions", "give --since"), "decisions", "--limit=2")
		auditor.exits(t, 0, says("ViewOrder"), "decisions", "--limit=2", "--since=1h")
		sh.exits(t, 1, says("cedarpost keys rotate"), "keys", "create", "shop-auditor", "--out="+file("again.key"))
		sh.exits(t, 1, says("not_found"), "grants", "delete", "orders", "enforcer", "--bundle=shop")

		sh.exits(t, 2, says("--caller: ", "take another name"), "keys", "recover", "--caller=recover", "--out="+file("recovered.key"))
		sh.exits(t, 0, says("an operator of all bundles", "other operators of all bundles have keys"), "keys", "recover", "--out="+file("recovered.key"))
		sh.exits(t, 0, says("recovered", "operator for *"), "whoami", "--token-file="+file("recovered.key"))
		sh.exits(t, 1, says(`"recovered" has keys or grants already`, "another name with --caller"), "keys", "recover", "--out="+file("again.key"))
		sh.exits(t, 0, says("RevokeKey", "recover", "PutGrant"), "events", "--kind=change", "--limit=20")
		sh.exits(t, 0, says("/cedarpost.v1.EntityService/ListEntities"), "events", "--kind=refused_right")
	}
}

// An end is in the future, and a text says the same end again if it is written as a time.
func FuzzEnd(f *testing.F) {
	for _, seed := range []string{"90d", "1ns", "0s", "0", "2099-01-01", "2099-02-30", "2000-01-01", "2099-01-01T00:00:00Z", "2099-01-01T12:00:00+12:00", "-1h", "tomorrow", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var e, again end
		before := time.Now()
		if err := e.UnmarshalText([]byte(text)); err != nil {
			if !e.IsZero() || !strings.Contains(err.Error(), strconv.Quote(text)) {
				t.Fatalf("%q: %v, %v", text, e, err)
			}
			return
		}
		if !e.After(before) {
			t.Fatalf("%q is %v", text, e)
		}
		if e.Sub(before) > time.Hour { // so that it is not past by now
			if err := again.UnmarshalText([]byte(e.Format(time.RFC3339Nano))); err != nil || !again.Equal(e.Time) {
				t.Fatalf("%q is %v, and written as a time %v, %v", text, e, again, err)
			}
		}
	})
}

// A grant that has ended is marked, in a list and where another one replaces it.
func TestEndedGrantsAreMarked(t *testing.T) {
	var out strings.Builder
	past := timestamppb.New(time.Now().Add(-time.Hour))
	grants := []*cedarpostv1.Grant{
		{Caller: "a", Role: "data-writer", Bundle: "shop", ExpiresAt: past}, {Caller: "b", Role: "auditor", Bundle: "*", ExpiresAt: timestamppb.New(time.Now().Add(time.Hour))},
	}
	if err := (&console{out: &out}).grants(outputFlags{}, grants); err != nil {
		t.Fatal(err)
	}
	if rows := lines(out.String()); len(rows) != 3 || !strings.Contains(rows[1], " (ended)") || strings.Contains(rows[2], "(ended)") {
		t.Errorf("%s", out.String())
	}
	if got := extent(grants[0]); !strings.HasPrefix(got, "all entity types, until ") || !strings.HasSuffix(got, " (ended)") {
		t.Error(got)
	}
}
