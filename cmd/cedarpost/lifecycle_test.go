package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// notes is a small bundle, whose policy has a name.
func notes(t *testing.T, policy string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "notes")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "schema.cedarschema", "namespace Notes { entity User; entity Note { owner: User };\n  action Read appliesTo { principal: [User], resource: [Note] };\n}\n")
	write(t, dir, "read.cedar", "@id(\""+policy+"\")\npermit (principal, action == Notes::Action::\"Read\", resource)\nwhen { resource.owner == principal };\n")
	write(t, dir, "README.md", "for people\n")
	return dir
}

// testVersions publishes a few versions, and takes the last one back.
func testVersions(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		one, two := notes(t, "owners"), notes(t, "people")
		sh.exits(t, 0, says("version      1"), "apply", one, "--message", "the first one", "--expect-version", "0")
		sh.exits(t, 1, says("aborted", "version 1 of the bundle notes is live, not 0"), "apply", two, "--expect-version", "0")
		sh.exits(t, 0, says("--- a/read.cedar\n+++ b/read.cedar\n", "-@id(\"owners\")\n", "+@id(\"people\")\n"), "diff", two)
		sh.exits(t, 1, says("+@id"), "diff", two, "--exit-code")
		sh.exits(t, 0, says("version      2"), "apply", two, "--message", "other words")
		if r := sh.exits(t, 0, nil, "diff", two, "--exit-code"); r.out != "" {
			t.Errorf("a difference to what was published: %s", r.out)
		}
		sh.exits(t, 0, says(`{"path":"read.cedar","kind":"CHANGED","text":"--- a/read.cedar`), "diff", "notes", "1", "2", "-o", "json")
		sh.exits(t, 2, says("is not the number of a version"), "diff", "notes", "1", "two")
		sh.exits(t, 2, says("give a folder"), "diff", "notes", "1")
		sh.exits(t, 1, says("not_found", "version 7"), "diff", "notes", "1", "7")

		sh.exits(t, 0, says("VERSION", "2 live", "1 of 1 server", "other words", "the first one"), "versions", "notes")
		r := sh.exits(t, 0, nil, "versions", "notes", "-o", "json")
		var list []map[string]any
		for line := range strings.Lines(r.out) {
			var v map[string]any
			if err := json.Unmarshal([]byte(line), &v); err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			list = append(list, v)
		}
		if len(list) != 2 || list[0]["live"] != true || list[0]["version"] != "2" || list[1]["message"] != "the first one" {
			t.Errorf("%v", list)
		}
		if r := sh.exits(t, 0, nil, "versions", "notes", "--limit=1", "-o", "json"); strings.Count(r.out, "\n") != 1 {
			t.Errorf("%s", r.out)
		}

		narrow := notes(t, "people")
		write(t, narrow, "schema.cedarschema", strings.Replace(file(t, two, "schema.cedarschema"), "resource: [Note] }", "resource: [Note], context: { mfa: Bool } }", 1))
		sh.exits(t, 3, says("refused, nothing changed: it breaks callers", `schema.cedarschema:2:10: error: action Notes::Action::"Read": the context requires the attribute "mfa" now`, "nobody asked in the last 7 days", "--allow-breaking"), "apply", narrow)
		sh.exits(t, 0, says("warning: breaks callers: action Notes", "dry run"), "apply", narrow, "--dry-run")

		copied := filepath.Join(t.TempDir(), "notes")
		sh.exits(t, 0, says("notes: version 2, 2 files in", "2 written"), "pull", "notes", copied)
		sh.exits(t, 0, says("2 files in", "0 written"), "pull", "notes", copied)
		write(t, copied, "more.cedar", "not ours")
		write(t, copied, "notes.txt", "not of a bundle")
		sh.exits(t, 1, says("has other files than the bundle, such as more.cedar", "--force"), "pull", "notes", copied, "--version=1")
		sh.exits(t, 0, says("version 1", "1 written, 1 removed", "removed "+filepath.Join(copied, "more.cedar")), "pull", "notes", copied, "--version=1", "--force")
		for name, want := range map[string]string{"more.cedar": "", "notes.txt": "not of a bundle", "read.cedar": file(t, one, "read.cedar"), "schema.cedarschema": file(t, one, "schema.cedarschema")} {
			if got := file(t, copied, name); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}

		sh.exits(t, 2, says("--reason"), "rollback", "notes", "1")
		sh.exits(t, 0, says("notes: published version 3 with the files of version 1, and frozen"), "rollback", "notes", "1", "--reason", "too many words")
		sh.exits(t, 1, says("failed_precondition", "the bundle notes is frozen", "too many words", "cedarpost unfreeze notes"), "apply", two)
		sh.exits(t, 0, says("it cannot be published now: the bundle notes is frozen", "dry run"), "apply", two, "--dry-run")
		sh.exits(t, 0, says("rollback to 1: too many words"), "versions", "notes")
		sh.exits(t, 0, says("frozen"), "bundles")
		sh.exits(t, 0, says("not frozen any more"), "unfreeze", "notes")
		sh.exits(t, 0, says("was not frozen"), "unfreeze", "notes")
		sh.exits(t, 0, says("notes: frozen", "holidays"), "freeze", "notes", "--reason", "holidays")
		sh.exits(t, 0, says("notes: was frozen already", "holidays"), "freeze", "notes", "--reason", "other holidays")
		sh.exits(t, 0, says(`"changed":true`), "unfreeze", "notes", "-o", "json")
		sh.exits(t, 0, says("RollbackVersion, version 3: too many words", "ApplyBundle, version 2: other words"), "events", "--kind", "change", "--subject", "notes")
	}
}

// file reads a file of a folder, "" if there is none.
func file(t *testing.T, dir, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}

// testPolicies lists and shows policies.
func testPolicies(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		sh.exits(t, 0, says("POLICY", "shop/support-fields", `in Shop::Role::"support"`, `== Shop::Action::"ViewOrder.field"`, "is Shop::Order", "when", "view.cedar:"), "policies", "--principal", "Shop::Role::support")
		if r := sh.exits(t, 0, nil, "policies", "list", "--effect", "forbid", "--action", "Shop::Action::ViewOrder.field", "--annotation", "advice=step_up_mfa", "-o", "json"); strings.Count(r.out, "\n") != 1 || !strings.Contains(r.out, `"id":"pii-needs-mfa"`) {
			t.Errorf("%s", r.out)
		}
		sh.exits(t, 0, says("LAST", "not since 20"), "policies", "list", "--bundle", "shop")
		if r := sh.exits(t, 0, says("not listed: ", "counted for since a later time"), "policies", "list", "--bundle", "shop", "--unused-since", "30d"); strings.Contains(r.out, "shop/") {
			t.Errorf("%s", r.out)
		}
		sh.exits(t, 0, says("shop/pii-needs-mfa: forbid", "file         view.cedar:", "since        revision ", "unless { context.mfa"), "policies", "show", "shop/pii-needs-mfa")
		sh.exits(t, 1, says("not_found"), "policies", "show", "shop/none")
		sh.exits(t, 2, says("name it as BUNDLE/ID"), "policies", "show", "none")
	}
}

// testChange proposes a change, and has it declined, edited, approved and published.
func testChange(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		key := func(name, role string) *shell {
			file := filepath.Join(t.TempDir(), name+".key")
			sh.exits(t, 0, nil, "keys", "create", name, "--role", role, "--bundle", "notes", "--out", file)
			return sh.with("CEDARPOST_TOKEN=", "CEDARPOST_TOKEN_FILE="+file)
		}
		author, approver := key("change-author", "policy-author"), key("change-approver", "policy-approver")
		strict, edited := notes(t, "owners"), notes(t, "people")
		for _, dir := range []string{strict, edited} {
			write(t, dir, "bundle.yaml", "name: notes\napprovals: 1\n")
		}
		sh.exits(t, 2, says("--break-glass needs a reason"), "apply", strict, "--break-glass", " ")
		sh.exits(t, 0, says("published", "break-glass  nobody else is here"), "apply", strict, "--break-glass", "nobody else is here")
		sh.exits(t, 0, says("BREAK-GLASS: nobody else is here\n"), "versions", "notes")
		sh.exits(t, 0, says("break_glass", "nobody else is here; past: changes of the bundle notes need 1 approval"), "events", "--kind", "break_glass")
		sh.exits(t, 0, says("nothing changed"), "apply", strict)
		sh.exits(t, 1, says("failed_precondition", "changes of the bundle notes need 1 approval", "cedarpost change create DIR"), "apply", edited, "--no-change")

		author.exits(t, 1, says("there is nothing to change"), "change", "create", strict, "--title", "nothing")
		r := author.exits(t, 0, nil, "change", "create", edited, "--title", "people is a better word", "--reason", "they are", "-o", "json")
		var made struct{ ID, Digest string }
		if err := json.Unmarshal([]byte(r.out), &made); err != nil || made.ID != "notes-1" {
			t.Fatalf("%v: %s", err, r.out)
		}
		id := made.ID
		approver.exits(t, 0, says("notes-1: open, people is a better word", "authors      change-author", "reason       they are", "needs        1 approval", "blocked      the change notes-1 needs 1 approval and has 0", `+@id("people")`), "change", "show", id)
		approver.exits(t, 0, says("notes-1: valid", "tests        0, 0 failed", "added        people (permit)", "removed      owners (permit)"), "change", "check", id)
		approver.exits(t, 0, says("declined     change-approver", "write a sentence"), "change", "decline", id, "--reason", "write a sentence")
		sh.exits(t, 1, says("was declined by change-approver: write a sentence"), "change", "publish", id)
		write(t, edited, "read.cedar", file(t, edited, "read.cedar")+"// People read their own notes.\n")
		author.exits(t, 0, says("notes-1: open"), "change", "edit", id, edited)
		approver.exits(t, 1, says("aborted", "was edited"), "change", "approve", id, "--digest", made.Digest)
		author.exits(t, 1, says("permission_denied"), "change", "approve", id)
		sh.exits(t, 1, says("needs 1 approval and has 0"), "change", "publish", id)
		approver.exits(t, 0, says("approved     change-approver"), "change", "approve", id)
		author.exits(t, 0, says("notes-1  open   ", "change-approver"), "change", "list")
		author.exits(t, 1, says("permission_denied"), "change", "publish", id)
		sh.exits(t, 0, says("notes: published", "version", "applied by 1 of 1 server"), "change", "publish", id, "--wait")
		author.exits(t, 0, says("  applied by 1 of 1 server\n"), "change", "show", id)
		author.exits(t, 0, says(`"servers":[{"name":`, `"applied":true`), "change", "show", id, "-o", "json")
		sh.exits(t, 0, says("change-approver", "notes-1: people is a better word"), "versions", "notes")
		sh.exits(t, 1, says("was published as version"), "change", "discard", id)

		// A change that is not valid, whose base moves, and which is discarded.
		broken := notes(t, "broken")
		write(t, broken, "read.cedar", "@id(\"broken\")\npermit (principal, action == Notes::Action::\"Wirte\", resource);\n")
		author.exits(t, 0, says("notes-2: open"), "change", "create", broken, "--title", "broken")
		author.exits(t, 3, says("read.cedar:2", "Wirte", "notes-2: not valid"), "change", "check", "notes-2")
		author.exits(t, 2, says("give a folder"), "change", "edit", "notes-2")
		author.exits(t, 0, says("notes-2: open, better"), "change", "edit", "notes-2", "--title", "better", "--revert", "read.cedar", "--rebase")
		author.exits(t, 0, says("notes-2: valid", "blocked      the change notes-2 needs 1 approval"), "change", "check", "notes-2")
		author.exits(t, 0, says("notes-2: discarded"), "change", "discard", "notes-2", "--reason", "a mistake")
		author.exits(t, 0, says("notes-2", "notes-1"), "change", "list", "--state", "all", "--bundle", "notes", "-o", "json")
		sh.exits(t, 0, says("DiscardChange", "a mistake"), "events", "--kind", "change", "--subject", `Cedarpost::Change::"notes-2"`, "-o", "json")
	}
}

// testApplyOpensChange applies a folder of a bundle that needs approvals: each run of a pipeline is about
// the same change.
func testApplyOpensChange(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		key := func(name string, roles ...string) *shell {
			file := filepath.Join(t.TempDir(), name+".key")
			args := []string{"keys", "create", name, "--bundle", "notes", "--out", file}
			for _, role := range roles {
				args = append(args, "--role", role)
			}
			sh.exits(t, 0, nil, args...)
			return sh.with("CEDARPOST_TOKEN=", "CEDARPOST_TOKEN_FILE="+file)
		}
		pipeline, publisher, approver := key("pipeline", "policy-author", "policy-publisher"), key("pipeline-publisher", "policy-publisher"), key("pipeline-approver", "policy-approver")
		dir := notes(t, "pipeline")
		write(t, dir, "bundle.yaml", "name: notes\napprovals: 1\n")
		change := func(by *shell, args ...string) (made struct {
			ID, Digest, Title, Source string
			Approvals                 []any
		}) {
			t.Helper()
			r := by.exits(t, 9, says("nothing is published yet: changes of the bundle notes need approvals"), append([]string{"apply", dir, "-o", "json"}, args...)...)
			if err := json.Unmarshal([]byte(r.out), &made); err != nil {
				t.Fatalf("%v: %s", err, r.out)
			}
			return made
		}
		first := change(pipeline, "--message", "a pipeline\nof mine")
		if first.Title != "a pipeline" || !strings.HasPrefix(first.Source, "apply ") {
			t.Errorf("%+v", first)
		}
		approver.exits(t, 0, nil, "change", "approve", first.ID)
		if again := change(pipeline); again.ID != first.ID || again.Digest != first.Digest || len(again.Approvals) != 1 {
			t.Errorf("the same folder again: %+v", again)
		}
		write(t, dir, "read.cedar", file(t, dir, "read.cedar")+"// More words.\n")
		edited := change(pipeline)
		if edited.ID != first.ID || edited.Digest == first.Digest || len(edited.Approvals) != 0 {
			t.Errorf("an edited folder: %+v", edited)
		}
		if other := change(sh); other.ID == first.ID || other.Digest != edited.Digest {
			t.Errorf("another caller: %+v", other)
		}
		write(t, dir, "read.cedar", file(t, dir, "read.cedar")+"permit (nobody);\n")
		pipeline.exits(t, 3, says("read.cedar:"), "apply", dir)
		write(t, dir, "read.cedar", strings.TrimSuffix(file(t, dir, "read.cedar"), "permit (nobody);\n"))
		publisher.exits(t, 1, says("permission_denied", "needs approvals, so a change of it has to be opened"), "apply", dir)
		pipeline.exits(t, 1, says("failed_precondition"), "apply", dir, "--no-change")
		sh.exits(t, 0, nil, "freeze", "notes", "--reason", "holidays")
		pipeline.exits(t, 1, says("the bundle notes is frozen", "holidays"), "apply", dir)
		sh.exits(t, 0, nil, "unfreeze", "notes")

		approver.exits(t, 0, nil, "change", "approve", first.ID)
		pipeline.exits(t, 0, says("1 of 1 pipeline-approver"), "change", "list")
		pipeline.exits(t, 0, says("notes: published"), "change", "publish", first.ID)
		pipeline.exits(t, 0, says("nothing changed"), "apply", dir)
	}
}
