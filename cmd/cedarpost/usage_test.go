package main

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestWrongUsageExits2(t *testing.T) {
	sh := newShell()
	for _, line := range []struct {
		args string
		says string
	}{
		{"", `try: cedarpost --help`},
		{"bogus", `unexpected argument bogus`},
		{"impact a --sample 2", `try: cedarpost impact --help`},
		{"impact", `try: cedarpost impact --help`},
		{"check ../../policies/shop/bundle.yaml", `try: cedarpost check --help`},
		{"bundles --admin-url localhost:8081", `try: cedarpost bundles list --help`},
		{"authorize", `missing flags: --action=UID, --principal=UID or --principal-token-file=FILE, --resource=UID`},
		{"authorize --principal bob --action A::b --resource C::d", `"bob" is not an entity`},
		{"authorize --principal A::b --principal-token-file x --action A::b --resource C::d", `can't be used together`},
		{"authorize --principal A::b --action A::b --resource C::d --context [1]", `--context: not a JSON object`},
		{`authorize --principal A::b --action A::b --resource C::d --context {"mfa":false,"mfa":true}`, `--context: not a JSON object like {"mfa": true}: member "mfa" is twice in an object, at /mfa`},
		{`entities list --type A --attr of={"type":"A","id":"b","id":"c"}`, `--attr of: not a JSON object like {"mfa": true}: member "id" is twice in an object, at /value/id`},
		{"authorize --principal A::b --action A::b --resource C::d --require-all", `--require-all needs --fields`},
		{"authorize --principal A::b --action A::b --resource C::d --fully-consistent --at-least-as-fresh x", `can't be used together`},
		{"check", `expected "<dir> ..."`},
		{"check ../../policies/shop/bundle.yaml", `bundle.yaml is a file: give the folder of the bundle, `},
		{"decisions --since yesterday", `neither a time like`},
		{"decisions --decision maybe", `must be one of`},
		{"decisions --policy owner-views", `is not bundle/id`},
		{"decisions -o xml", `must be one of`},
		{"decisions --follow --limit 20", `--limit cannot be given with --follow`},
		{"decisions list --limit=5 --follow", `--limit cannot be given with --follow`},
		{"serve", `no database: set CEDARPOST_DATABASE_URL`},
		{"serve --database-url a --database-url-file b", `give one`},
		{"serve --tls-cert x", `--tls-key`},
		{"serve --database-url postgres://localhost/x --drain-delay 1h", `--drain-delay must be at most 10m`},
		{"dev --max-staleness 0s", `--max-staleness must be at least 100ms`},
		{"bundles --admin-url localhost:8081", `is not a URL like`},
		{"bundles --admin-url http://bob:hunter2@localhost:8081", `(not shown, as it may have a password) has a user or a password`},
		{"bundles --admin-url http://localhost:99999", `has a port that is not between 1 and 65535`},
		{"help bogus", `unexpected argument bogus`},
		{"entities import a.csv", `a CSV file needs --map`},
		{"entities import a.json --map m.yaml", `--map is for CSV, and a.json is read as json`},
		{"entities import a.json --format xml", `must be one of`},
		{"entities import a.json --atomic --resume", `leave --import-id and --resume away`},
		{"entities import a.json --atomic --import-id x", `leave --import-id and --resume away`},
		{"keys create a --role enforcer --out f", `give --role and --bundle together`},
		{"keys create a", `missing flags: --out=FILE`},
		{"keys create a --out f --expires yesterday", `--expires: "yesterday" is neither a time like`},
		{"keys create a --out f --expires 0s", `"0s" is not in the future; leave it out for no end`},
		{"keys rotate a --out f --expires 2020-01-01", `"2020-01-01" is not in the future`},
		{"grants put a enforcer --bundle b --expires 0", `"0" is not in the future`},
		{"grants put a enforcer --bundle b --rate 0", `--rate must be at least 1; leave it out`},
		{"keys revoke", `give either the caller`},
		{"keys revoke a --id b", `give either the caller`},
		{"keys recover --caller a/b --out f", `letters, digits`},
		{"keys recover --out f", `no database: set CEDARPOST_DATABASE_URL`},
		{"grants put a enforcer", `missing flags: --bundle=BUNDLE`},
		{"entities import - --resume", `--resume needs --import-id`},
	} {
		t.Run(line.args, func(t *testing.T) {
			r := sh.exits(t, 2, says(line.says), strings.Fields(line.args)...)
			if r.out != "" || !strings.HasPrefix(r.err, "cedarpost: ") {
				t.Errorf("stdout %q, stderr %q", r.out, r.err)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	sh := newShell()
	sh.exits(t, 0, says("Exit codes", "CEDARPOST_CONFIG", "authorize"), "--help")
	for _, command := range []string{
		"serve", "dev", "migrate", "health", "check", "apply", "bundles", "bundles get", "authorize",
		"entities import", "entities get", "entities list", "decisions", "decisions list", "decisions get", "decisions replay", "version",
	} {
		sh.exits(t, 0, says("Usage: cedarpost "+command), append([]string{"help"}, strings.Fields(command)...)...)
	}
	r := sh.exits(t, 0, nil, "version", "-o", "json")
	var v map[string]string
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || v["engine"] == "" || v["go"] == "" {
		t.Errorf("version: %s %v", r.out, err)
	}
}
