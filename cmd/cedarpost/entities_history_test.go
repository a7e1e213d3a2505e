package main

import (
	"encoding/json"
	"strings"
	"testing"
)

func testEntityHistory(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		file := func(region string) string {
			return write(t, t.TempDir(), "e.json", `[{"uid": {"type": "Shop::User", "id": "hal"},
				"attrs": {"region": "`+region+`", "suspended": false}, "parents": [{"type": "Shop::Role", "id": "support"}]}]`)
		}
		sh.exits(t, 0, nil, "entities", "import", file("mars"))
		sh.exits(t, 0, nil, "entities", "import", file("venus"))

		r := sh.exits(t, 0, says("TIME", "CHANGE", "BY", "TOKEN", `changed  Shop::User::"hal"  bootstrap`, `created  Shop::User::"hal"  bootstrap`),
			"entities", "history", "Shop::User::hal")
		rows := lines(r.out)
		if len(rows) != 3 {
			t.Fatalf("two changes:\n%s", r.out)
		}
		made := rows[2][strings.LastIndex(rows[2], " ")+1:]
		sh.exits(t, 0, says(`"region":"mars"`), "entities", "get", "Shop::User::hal", "--at", made)
		r = sh.exits(t, 0, nil, "entities", "history", "--type=Shop::User", "--by=bootstrap", "--since=1h", "--limit=1", "-o", "json")
		var change struct {
			Kind, Caller string
			UID          struct{ ID string }
		}
		if err := json.Unmarshal([]byte(r.out), &change); err != nil || change.Kind != "CHANGED" || change.UID.ID != "hal" || change.Caller != "bootstrap" {
			t.Errorf("%s %v", r.out, err)
		}
		sh.exits(t, 0, says("no changes"), "entities", "history", "--by=nobody")
		sh.exits(t, 0, says("no changes"), "entities", "history", "Shop::User::hal", "--until=2020-01-01T00:00:00Z")
		if r = sh.exits(t, 0, nil, "entities", "history", "--limit=0"); len(lines(r.out)) < 500 {
			t.Errorf("%d lines of all changes", len(lines(r.out)))
		}

		listed := func(want int, args ...string) {
			t.Helper()
			r := sh.exits(t, 0, says("ENTITY"), append([]string{"entities", "list"}, args...)...)
			if n := len(lines(r.out)) - 1; n != want {
				t.Errorf("entities list %s: %d, want %d\n%s", strings.Join(args, " "), n, want, r.out)
			}
		}
		hal := []string{"--type=Shop::User", "--ancestor=Shop::Role::support", "--attr=suspended=false"}
		listed(1, append(hal, "--attr=region=venus")...)
		listed(0, append(hal, "--attr=region=mars")...)
		listed(1, append(hal, `--attr=region="mars"`, "--at="+made)...)
		listed(2, "--type=Shop::Order", `--attr=owner={"type": "Shop::User", "id": "bob"}`, "--limit=2")
		sh.exits(t, 1, says("invalid_argument", `has no attribute "color"`), "entities", "list", "--type=Shop::User", "--attr=color=red")
		sh.exits(t, 2, says("--attr", "NAME=VALUE"), "entities", "list", "--type=Shop::User", "--attr=color")
		sh.exits(t, 2, says("--limit"), "entities", "history", "--limit=-1")
	}
}
