package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	sh := newShell()
	shop := "../../policies/shop"
	invalid := shopCopy(t, map[string]string{"new.cedar": "@id(\"typo\")\npermit (principal, action == Shop::Action::\"VeiwOrder\", resource);\n"})
	failing := shopCopy(t, map[string]string{"tests.yaml": failingTest})
	unreadable := shopCopy(t, map[string]string{"bundle.yaml": "color: blue\n"})

	sh.exits(t, 0, says("shop: valid, ", " tests passed"), "check", shop)
	sh.exits(t, 3, says("new.cedar:2:30: error: policy typo: ", "VeiwOrder", "shop: not valid"), "check", invalid)
	sh.exits(t, 4, says("tests.yaml:", "test failed: bob sees the order of carol", "decision: expected allow, got deny", "shop: compiles, but 1 of "), "check", failing)
	sh.exits(t, 3, says("bundle.yaml:5:1: error: ", "color"), "check", unreadable)
	sh.exits(t, 1, says("no such file"), "check", filepath.Join(t.TempDir(), "none"))
	sh.exits(t, 2, says("are both the bundle"), "check", shop, failing)

	sh.exits(t, 0, says("bundle.yaml: warning: it is not published in its freeze window * * * * * for 1h, UTC (holidays), which is now and until ", "shop: valid, "), "check",
		shopCopy(t, map[string]string{"bundle.yaml": "freeze: [{at: '* * * * *', for: 1h, reason: holidays}]\n"}))
	before, now := notes(t, "p"), notes(t, "p")
	write(t, before, "schema.cedarschema", strings.Replace(file(t, now, "schema.cedarschema"), "action Read", "action Gone, Read", 1))
	sh.exits(t, 0, says(`schema.cedarschema: warning: breaks callers: action Notes::Action::"Gone": it is removed`, "notes: valid"), "check", now, "--before", before)
	if r := sh.exits(t, 0, says("notes: valid"), "check", before, "--before", now); strings.Contains(r.out, "breaks") {
		t.Errorf("more actions: %s", r.out)
	}
	sh.exits(t, 0, says("warning: what breaks callers is not known: the bundle in ", "VeiwOrder"), "check", shop, "--before", invalid)
	sh.exits(t, 1, says("color", "cannot be read as a bundle"), "check", shop, "--before", unreadable)
	sh.exits(t, 2, says(`is the bundle "notes", and no folder that is checked is`), "check", shop, "--before", now)

	for code, dir := range map[int]string{0: shop, 3: invalid, 4: failing} {
		r := sh.exits(t, code, nil, "check", "-o", "json", dir)
		var got struct {
			Bundle   string
			Valid    bool
			Findings []struct{ Severity, File, Message string }
			Tests    []struct {
				Name     string
				Passed   bool
				Failures []string
			}
		}
		if err := json.Unmarshal([]byte(r.out), &got); err != nil {
			t.Fatal(err)
		}
		if got.Bundle != "shop" || got.Valid != (code != 3) || (len(got.Findings) > 0) != (code == 3) || (len(got.Tests) == 0) != (code == 3) {
			t.Errorf("exit code %d: %+v", code, got)
		}
	}
}

func TestCheckTogether(t *testing.T) {
	sh := newShell()
	org := filepath.Join(t.TempDir(), "org")
	app := filepath.Join(t.TempDir(), "app")
	for dir, files := range map[string][2]string{
		org: {`namespace Org { entity User; }`, `// it has users only`},
		app: {
			`namespace App { entity Doc; action Read appliesTo { principal: [Org::User], resource: [Doc], context: {} }; }`,
			`@id("all") permit (principal, action == App::Action::"Read", resource);`,
		},
	} {
		dir := shopless(t, dir)
		write(t, dir, "schema.cedarschema", files[0])
		write(t, dir, "policies.cedar", files[1])
	}
	sh.exits(t, 3, says("Org::User", "hint: if another bundle has the namespace Org, check its folder together with this one"), "check", app)
	sh.exits(t, 3, says("schema.cedarschema:1:", "uses the type Org::User of the bundle org, which does not export it: its bundle.yaml needs exports: [User]", "app: not valid", "org: valid"), "check", app, org)
	write(t, org, "bundle.yaml", "exports: [Usr]\n")
	sh.exits(t, 3, says("bundle.yaml:1:11: error: exports Usr", "did you mean User?", "org: not valid"), "check", app, org)
	write(t, org, "bundle.yaml", "exports: [User]\n")
	sh.exits(t, 0, says("app: valid", "org: valid", "policies.cedar: warning: holds no policy"), "check", app, org)
}

// If another folder is not valid, the output says how many tests were not run, and not that there are none.
func TestCheckTogetherWithInvalid(t *testing.T) {
	sh := newShell()
	shop := shopCopy(t, map[string]string{"tests.yaml": failingTest})
	other := shopless(t, filepath.Join(t.TempDir(), "app"))
	// The policy uses a type twice, which is one finding.
	write(t, other, "schema.cedarschema", `namespace App { entity Doc { a: Shop::User, b: Shop::User }; action A, B appliesTo { principal: [Shop::User], resource: [Doc] }; }`)
	r := sh.exits(t, 3, says("tests not run, because a folder that it is checked together with is not valid", "app: not valid"), "check", other, shop)
	seen := map[string]bool{}
	for line := range strings.Lines(r.out) {
		if seen[line] && !strings.HasPrefix(line, "  hint") {
			t.Errorf("twice: %s", line)
		}
		seen[line] = true
	}
	sh.exits(t, 3, says(`"valid":true`, `"tests":[],"testsNotRun":`), "check", "-o", "json", other, shop)
	sh.exits(t, 3, says(`<testcase name="bob sees the order of carol" classname="shop"`, `<skipped message="not run: `), "check", "-o", "junit", other, shop)
	write(t, other, "schema.cedarschema", `namespace App { entity Doc { a: Shop::Usr }; }`)
	if r := sh.exits(t, 3, says("Shop::Usr"), "check", other, shop); strings.Contains(r.out, "check its folder") {
		t.Errorf("the folder of the namespace is there: %s", r.out)
	}
}

// The rules of an organization are checked against the built-in schema of the callers, and do not join
// the tests of other bundles.
func TestCheckAdminLocal(t *testing.T) {
	sh := newShell()
	dir := shopless(t, filepath.Join(t.TempDir(), "admin-local"))
	write(t, dir, "schema.cedarschema", "")
	write(t, dir, "policies.cedar", `@id("no-publish-by-people")
forbid (principal, action == Cedarpost::Action::"ApplyBundle", resource)
unless { principal == Cedarpost::Caller::"shop-pipeline" };`)
	r := sh.exits(t, 0, says("admin-local: valid"), "check", dir)
	if strings.Contains(r.out, "warning") {
		t.Error(r.out)
	}
	sh.exits(t, 0, says("admin: valid, ", " tests passed", "admin-local: valid"), "check", "../../policies/admin", dir)
	write(t, dir, "policies.cedar", `@id("all") permit (principal, action, resource);`)
	sh.exits(t, 3, says("error"), "check", dir)
}

func TestCheckForCI(t *testing.T) {
	sh := newShell()
	sh.exits(t, 0, says(`<testsuite name="shop"`, `failures="0"`), "check", "-o", "junit", "../../policies/shop")
	broken := shopCopy(t, map[string]string{"broken.cedar": `@id("x") permit (principal, action, resource) when { resource.ownr == principal };`})
	sh.exits(t, 3, says("<failure message=", "broken.cedar:1:"), "check", "-o", "junit", broken)
	sh.exits(t, 3, says("did you mean owner?"), "check", broken)
}

// shopless makes an empty folder for a bundle.
func shopless(t *testing.T, dir string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A proof needs no tools where each permit was there before. Otherwise it says that they are missing.
func TestCheckProve(t *testing.T) {
	sh := newShell("CEDARPOST_CEDAR=" + filepath.Join(t.TempDir(), "cedar"))
	shop := "../../policies/shop"
	less := shopCopy(t, map[string]string{"less.cedar": `@id("less") forbid (principal, action == Shop::Action::"ViewOrder", resource) when { context.mfa };`, "bundle.yaml": "\n"})
	more := shopCopy(t, map[string]string{"more.cedar": `@id("more") permit (principal == Shop::User::"zed", action == Shop::Action::"DeleteOrder", resource);`})
	sh.exits(t, 0, says("shop: proven that nobody can do more"), "check", "--prove", "--against", shop, shopCopy(t, nil))
	sh.exits(t, 4, says("shop: proven that nobody can do more"), "check", "--prove", "--against", shop, less) // its tests fail
	sh.exits(t, 8, says(`shop: Shop::Action::"DeleteOrder" on Shop::Order by Shop::User: not proven: the command line of Cedar is not installed`), "check", "--prove", "--against", shop, more)
	sh.exits(t, 8, says(`"proof":{"outcome":"unknown","cases":[{"action":"Shop::Action::\"DeleteOrder\""`), "check", "--prove", "-o", "json", "--against", shop, more)
	sh.exits(t, 8, says(`<testcase name="nobody can do more"`, "is not installed"), "check", "--prove", "-o", "junit", "--against", shop, more)
	sh.exits(t, 2, says("--against needs --prove"), "check", "--against", shop, more)
	sh.exits(t, 2, says(`--against has the bundle "admin"`), "check", "--prove", "--against", "../../policies/admin", more)
}

// With Cedar's tools: changes whose policies do not show it are proven, or have an example. `make prove` builds
// the tools, which takes minutes, and runs this test.
func TestCheckProveByTools(t *testing.T) {
	if os.Getenv("CEDARPOST_TEST_PROVE") == "" {
		t.Skip("make prove builds the tools and runs this test")
	}
	sh := newShell("CEDARPOST_CEDAR="+os.Getenv("CEDARPOST_CEDAR"), "CVC5="+os.Getenv("CVC5"))
	shop := "../../policies/shop"
	edit := func(old, text string) string {
		dir := shopCopy(t, nil)
		before := file(t, dir, "view.cedar")
		if !strings.Contains(before, old) {
			t.Fatalf("view.cedar has no %s", old)
		}
		write(t, dir, "view.cedar", strings.Replace(before, old, text, 1))
		return dir
	}
	const pii, mfa = `context.field in Shop::FieldGroup::"pii" };`, `unless { context.mfa || resource.owner == principal };`
	prove := func(code int, words []string, dir string) {
		t.Helper()
		sh.exits(t, code, words, "check", "--prove", "--against", shop, dir)
	}
	prove(0, says("shop: proven that nobody can do more"), edit(pii, `context.field in Shop::FieldGroup::"pii" || context.field in Shop::FieldGroup::"Order.basic" };`))
	prove(0, says("shop: proven that nobody can do more"), edit(mfa, `unless { context.mfa } unless { principal == resource.owner };`))
	prove(7, says(`Shop::Action::"ViewOrder.field" on Shop::Order by Shop::User: allows more than before, for example:`, `may do Shop::Action::"ViewOrder.field" on Shop::Order::`,
		"mfa: false}, if these are stored:", "total: "), edit(mfa, `unless { context.mfa || resource.owner == principal || resource.total < 100 };`))
	sh = sh.with("CVC5=" + filepath.Join(t.TempDir(), "cvc5"))
	prove(8, says("not proven: ", "CVC5 solver not found"), edit(mfa, `unless { context.mfa } unless { principal == resource.owner };`))
}
