package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/policies"
)

// testImpact asks what a forbid would have done to the decisions of the example.
func testImpact(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "shop")
		if err := os.CopyFS(dir, policies.Shop()); err != nil {
			t.Fatal(err)
		}
		if r := sh.exits(t, 0, says("allow to deny        0", "unchanged"), "impact", dir, "--exit-code"); r.out == "" {
			t.Error("no report")
		}
		for range 2 {
			sh.exits(t, 0, says("ALLOW"), "authorize", "--principal", "Shop::User::bob", "--action", "Shop::Action::ViewOrder", "--resource", "Shop::Order::42", "--context", `{"mfa": false}`)
		}
		write(t, dir, "night.cedar", "@id(\"night\")\nforbid (principal, action == Shop::Action::\"ViewOrder\", resource == Shop::Order::\"42\");\n")
		r := sh.exits(t, 1, nil, "impact", dir, "--principal", "Shop::User::bob", "--resource", "Shop::Order::42", "--exit-code", "-o", "json")
		var report struct {
			AllowToDeny, DenyToAllow, FieldsGained, FieldsLost, NewErrors, Unchanged, Unknown int
			Samples                                                                           []struct{ DecisionID string }
		}
		if err := json.Unmarshal([]byte(r.out), &report); err != nil || report.AllowToDeny < 2 || len(report.Samples) == 0 || report.Samples[0].DecisionID == "" {
			t.Errorf("%v: %s", err, r.out)
		}
		sh.exits(t, 0, says("ACTION", `Shop::Action::"ViewOrder"`, "shop/night", "report       shop-r"), "impact", dir)
		sh.exits(t, 0, says("### Impact on recorded decisions", "| allow to deny |", "| `shop/night` |", "<details>"), "impact", dir, "-o", "markdown")
		if r := sh.exits(t, 0, says("| allow to deny |", "| `shop/night` |"), "impact", dir, "-o", "markdown", "--no-samples"); strings.Contains(r.out, "bob") {
			t.Error(r.out)
		}
		sh.exits(t, 0, says("PRINCIPAL", "LOSES", "pairs of stored principals and resources tried", `Shop::User::"bob"`), "impact", dir, "--who", "Shop::Action::ViewOrder", "--context", `{"mfa": true}`)
		// The exit code is 1 also if the report leaves out who gains, and if a filter matches nothing.
		r = sh.exits(t, 1, says("with another outcome"), "impact", dir, "--since", "1s", "--caller", "nobody", "--no-samples", "--exit-code", "--who", "Shop::Action::ViewOrder", "--context", `{"mfa": true}`)
		if strings.Contains(r.out, " 0 principals and actions") || strings.Contains(r.out, "bob") {
			t.Error(r.out)
		}
		sh.exits(t, 1, says(`warning: action: the bundle shop does not declare Shop::Action::"Nope"`), "impact", dir, "--action", "Shop::Action::Nope", "--exit-code")
		c := sh.exits(t, 0, nil, "change", "create", dir, "--title", "night", "-o", "json")
		var made struct{ ID string }
		if err := json.Unmarshal([]byte(c.out), &made); err != nil {
			t.Fatal(err)
		}
		r = sh.exits(t, 0, nil, "impact", "--change", made.ID, "-o", "json")
		var kept struct{ ID string }
		if err := json.Unmarshal([]byte(r.out), &kept); err != nil {
			t.Fatal(err)
		}
		sh.exits(t, 0, says("the change "+made.ID+" against version", "shop/night"), "impact", "--report", kept.ID)
		sh.exits(t, 4, says(made.ID+": valid, but tests fail"), "change", "check", made.ID)
		sh.exits(t, 0, says("impact       "+kept.ID), "change", "show", made.ID)
		r = sh.exits(t, 0, nil, "change", "shadow", made.ID, "--for", "1h", "-o", "json")
		var shadowed struct{ Shadow struct{ Report string } }
		if err := json.Unmarshal([]byte(r.out), &shadowed); err != nil {
			t.Fatal(err)
		}
		sh.exits(t, 0, says("in shadow, which goes on"), "impact", "--report", shadowed.Shadow.Report)
		sh.exits(t, 0, says("shadow       "+shadowed.Shadow.Report), "change", "shadow", made.ID, "--end")
		sh.exits(t, 0, nil, "change", "discard", made.ID)
		sh.exits(t, 2, says("give one of a bundle folder, --change and --report"), "impact")
		sh.exits(t, 2, says("--sample"), "impact", dir, "--sample", "2")
		sh.exits(t, 2, says("--budget"), "impact", dir, "--budget", "2h")
		sh.exits(t, 1, says("not_found"), "impact", "--report", "shop-r0000000000000000")
		sh.exits(t, 1, says("the id of a report"), "impact", "--report", "shop")
		write(t, dir, "night.cedar", "forbid (")
		sh.exits(t, 3, says("night.cedar"), "impact", dir)
	}
}
