package main

import (
	"strings"
	"testing"
)

// testEntityWrites: entities are put, changed, moved and deleted from the command line.
func testEntityWrites(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		const dora = "Shop::User::dora"
		put := []string{"entities", "put", dora, "--attrs", `{"region": "eu", "suspended": false}`, "--parent", "Shop::Role::support"}
		r := sh.exits(t, 0, says("changed 1 entity", "revision", "token"), put...)
		token := r.out[strings.LastIndex(strings.TrimSpace(r.out), " ")+1:]
		sh.exits(t, 0, says("nothing changed"), put...)
		sh.exits(t, 1, says("it must not exist and does"), append(put, "--new")...)
		sh.exits(t, 2, says("cannot be given together"), append(put, "--new", "--if-revision", "x")...)

		sh.exits(t, 0, says("changed 1 entity"), "entities", "set", dora, "suspended=true", "region=us", "--if-revision", strings.TrimSpace(token))
		sh.exits(t, 1, says("changed"), "entities", "set", dora, "suspended=false", "--if-revision", strings.TrimSpace(token))
		sh.exits(t, 0, says(`"suspended":true`, `"region":"us"`, `Shop::Role::"support"`), "entities", "get", dora)
		sh.exits(t, 0, says(`"changed":1`), "entities", "set", dora, `region="a=b"`, "-o", "json")
		sh.exits(t, 0, says(`"region":"a=b"`), "entities", "get", dora)
		sh.exits(t, 1, says("invalid_argument", "suspended"), "entities", "set", dora, "suspended=maybe")
		sh.exits(t, 1, says("put it first"), "entities", "set", "Shop::User::nobody", "suspended=true")
		for _, args := range []string{"", "suspended", "=1", "region=a region=b", `region={"a":1`, `region="x`, `region="x","v":"y"`} {
			sh.exits(t, 2, nil, append([]string{"entities", "set", dora}, strings.Fields(args)...)...)
		}

		sh.exits(t, 0, says("changed 1 entity"), "entities", "move", dora, "--from", "Shop::Role::support", "--to", "Shop::Role::manager")
		r = sh.exits(t, 0, says(`Shop::Role::"manager"`), "entities", "get", dora)
		if strings.Contains(r.out, `Shop::Role::"support"`) {
			t.Errorf("still in support:\n%s", r.out)
		}
		sh.exits(t, 2, says("both in --from and in --to"), "entities", "move", dora, "--from", "Shop::Role::manager", "--to", "Shop::Role::manager")
		sh.exits(t, 0, nil, "entities", "set", dora, "region=@/etc/hostname") // no file is read
		sh.exits(t, 0, says(`"region":"@/etc/hostname"`), "entities", "get", dora)
		sh.exits(t, 2, says("--to, --from or both"), "entities", "move", dora)

		sh.exits(t, 0, nil, "entities", "put", "Shop::Role::temporary")
		sh.exits(t, 0, nil, "entities", "move", dora, "--to", "Shop::Role::temporary")
		sh.exits(t, 1, says("failed_precondition"), "entities", "delete", "Shop::Role::temporary", dora+"2")
		sh.exits(t, 0, says("changed 2 entities"), "entities", "delete", "Shop::Role::temporary", "--cascade")
		sh.exits(t, 0, says("changed 1 entity"), "entities", "delete", dora)
		sh.exits(t, 0, says("nothing changed"), "entities", "delete", dora)
		sh.exits(t, 1, says("not_found"), "entities", "get", dora)
	}
}
