package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/server/engine"
)

// openShop is what lint finds in the shop with it.
const openShop = `
@id("open") permit (principal, action == Shop::Action::"ViewOrder", resource);
@id("again") permit (principal, action == Shop::Action::"ViewOrder", resource);
`

func TestLint(t *testing.T) {
	sh := newShell()
	shop := "../../policies/shop"
	open := shopCopy(t, map[string]string{"open.cedar": openShop})
	sh.exits(t, 0, says("shop: no warnings, 0 for information", "skipped empty-group: ", "skipped unused-policy: ", "give --server"), "lint", shop)
	sh.exits(t, 6, says("open.cedar:2:1: warning: policy open: does the same as again, at open.cedar:3 [duplicate]", "info: policy open: permits everybody", "shop: 1 warning, 2 for information"), "lint", open)
	sh.exits(t, 6, says(`<testcase name="duplicate"`, `<failure message="open.cedar:2:1: does the same as again`, `<skipped message=`), "lint", "-o", "junit", open)
	r := sh.exits(t, 6, nil, "lint", "-o", "json", open)
	var got struct {
		Bundle   string
		Valid    bool
		Findings []struct{ Rule, Severity, File, Policy string }
		Skipped  []struct{ Rule, Reason string }
	}
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || got.Bundle != "shop" || !got.Valid || len(got.Findings) != 3 || len(got.Skipped) != 2 ||
		got.Findings[0].Rule != engine.RulePermitsEverybody && got.Findings[0].Rule != engine.RuleDuplicate {
		t.Errorf("%+v, %v", got, err)
	}

	quiet := shopCopy(t, map[string]string{"open.cedar": strings.ReplaceAll(openShop, "@id", `@lint_ignore("duplicate") @id`), "bundle.yaml": "\nlint: {disable: [permits-everybody, empty-group]}\n"})
	if r := sh.exits(t, 0, says("shop: no warnings, 0 for information", "skipped unused-policy"), "lint", quiet); strings.Contains(r.out, "empty-group") {
		t.Errorf("%s", r.out)
	}
	sh.exits(t, 6, says(`bundle.yaml: warning: lint.disable names "shadows", and there is no such rule [unknown-rule]`), "lint", shopCopy(t, map[string]string{"bundle.yaml": "\nlint: {disable: [shadows]}\n"}))
	invalid := shopCopy(t, map[string]string{"new.cedar": "@id(\"typo\")\npermit (principal, action == Shop::Action::\"VeiwOrder\", resource);\n"})
	sh.exits(t, 3, says("new.cedar:2:30: error: policy typo: ", "shop: not valid"), "lint", invalid)
	sh.exits(t, 3, says("@lint_ignore has no value"), "lint", shopCopy(t, map[string]string{"open.cedar": `@id("x") @lint_ignore permit (principal, action, resource);`}))
	sh.exits(t, 1, says("no such file"), "lint", filepath.Join(t.TempDir(), "none"))
}

// Each rule has a chapter in the documentation, with its severity.
func TestLintRulesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/lint.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, rule := range engine.LintRules() {
		severity := "*Warning.*"
		if rule.Info {
			severity = "*Information.*"
		}
		if !strings.Contains(string(text), "## "+rule.ID+"\n\n"+severity) {
			t.Errorf("docs/lint.md has no chapter %s with %s", rule.ID, severity)
		}
	}
}

// testLint lints with what the server has stored: with all rights, and with few. It also proves against the
// live version.
func testLint(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		dir := shopCopy(t, map[string]string{"more.cedar": "@id(\"more\") permit (principal in Shop::Role::\"nobody\", action == Shop::Action::\"ViewOrder\", resource);\n"})
		r := sh.exits(t, 6, says(`more.cedar:1:34: warning: policy more: Shop::Role::"nobody" has no members [empty-group]`, "skipped unused-policy: decisions have been counted for ", "shop: 1 warning"), "lint", "--server", dir)
		if strings.Contains(r.out, "skipped empty-group") {
			t.Errorf("%s", r.out)
		}
		sh.exits(t, 6, says("policy manager-deletes: has determined no decision since 20", "[unused-policy]"), "lint", "--server", "--unused-since", "1ms", dir)
		sh.exits(t, 0, nil, "apply", "../../policies/shop") // other tests have published others
		sh.exits(t, 0, says("shop: proven that nobody can do more"), "check", "--prove", "../../policies/shop")
		fresh := notes(t, "fresh")
		write(t, fresh, "bundle.yaml", "name: fresh\n")
		sh.exits(t, 8, says("fresh: not proven: no version is live"), "check", "--prove", fresh)
		file := filepath.Join(t.TempDir(), "author.key")
		sh.exits(t, 0, nil, "keys", "create", "lint-author", "--role", "policy-author", "--bundle", "shop", "--out", file)
		r = sh.with("CEDARPOST_TOKEN=", "CEDARPOST_TOKEN_FILE="+file).exits(t, 0, says("skipped empty-group: ", "shop: no warnings"), "lint", "--server", dir)
		if strings.Contains(r.out, "nobody") {
			t.Errorf("%s", r.out)
		}
	}
}
