package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// namedNotes is the bundle of notes in a folder with another name, and with a namespace of its own.
func namedNotes(t *testing.T, folder, namespace string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), folder)
	if err := os.Rename(notes(t, "owners"), dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"schema.cedarschema", "read.cedar"} {
		write(t, dir, name, strings.ReplaceAll(file(t, dir, name), "Notes", namespace))
	}
	return dir
}

// testMistakes names bundles, folders, files and changes that are not meant or that do not exist. The bundle
// gone was deleted before.
func testMistakes(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		t.Run("a name that bundle.yaml does not have", func(t *testing.T) {
			shop := shopCopy(t, nil)
			for _, args := range [][]string{{"diff", shop}, {"impact", shop}, {"change", "create", shop, "--title", "x"}, {"apply", shop}} {
				sh.exits(t, 1, says("bundle.yaml names the bundle shop, and --name says lab"), append(args, "--name", "lab")...)
			}
			sh.exits(t, 0, nil, "diff", shop, "--name", "shop")
		})
		t.Run("the folder of another bundle", func(t *testing.T) {
			newbie, other := namedNotes(t, "newbie", "Newbie"), namedNotes(t, "lagb", "Lagb")
			id := changeID(t, sh, newbie)
			sh.exits(t, 1, says("the folder has the bundle lagb, and the change is of newbie", "--name"), "change", "edit", id, other)
			sh.exits(t, 2, says("give the folder, too"), "change", "edit", id, "--name", "newbie", "--title", "x")
			if r := sh.exits(t, 0, nil, "change", "show", id); strings.Contains(r.out, "Lagb") {
				t.Error(r.out)
			}
			sh.exits(t, 0, nil, "change", "edit", id, newbie)
			sh.exits(t, 0, nil, "change", "edit", id, other, "--name", "newbie")
			sh.exits(t, 0, says("Lagb"), "change", "show", id)

			sh.exits(t, 1, says("the change "+id+" does not edit the file nofile"), "change", "edit", id, "--revert", "nofile")
			sh.exits(t, 0, nil, "change", "edit", id, "--revert", "read.cedar")
			sh.exits(t, 0, says(id), "change", "list", "--bundle", "newbie")
			sh.exits(t, 0, nil, "change", "discard", id)
			sh.exits(t, 0, says("CHANGE  STATE"), "change", "list", "--bundle", "newbie") // has none that is open
		})
		t.Run("a bundle that does not exist", func(t *testing.T) {
			for _, args := range [][]string{{"policies", "list", "--bundle", "nope"}, {"change", "list", "--bundle", "nope"}, {"unfreeze", "nope"}, {"unfreeze", "nope", "-o", "json"}} {
				if r := sh.exits(t, 1, says("not_found", `"nope"`), args...); r.out != "" {
					t.Errorf("%v: %s", args, r.out)
				}
			}
			sh.exits(t, 0, says("POLICY"), "policies", "list", "--bundle", "gone")
			sh.exits(t, 0, says("CHANGE"), "change", "list", "--bundle", "shop", "--state", "discarded")
		})
		t.Run("a bundle that is deleted", func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "gone")
			sh.exits(t, 1, says("not_found", "the bundle gone is deleted", "--version 2"), "pull", "gone", dir)
			if _, err := os.Stat(dir); !os.IsNotExist(err) {
				t.Errorf("the folder of a refused pull: %v", err)
			}
			sh.exits(t, 0, says("gone: version 2"), "pull", "gone", dir, "--version", "2")
		})
		t.Run("titles and reasons of spaces", func(t *testing.T) {
			sh.exits(t, 2, says("--title must say", "try: cedarpost change create --help"), "change", "create", notes(t, "x"), "--title", " ")
			sh.exits(t, 2, says("--title must say"), "change", "edit", "notes-1", "--title", "")
			sh.exits(t, 2, says("--reason must say why", "try: cedarpost rollback --help"), "rollback", "notes", "1", "--reason", "")
		})
		t.Run("folders that are not valid", testInvalidFolders(sh))
		t.Run("an approval without a report", testApprovalWithoutReport(sh))
	}
}

// changeID makes a change of a folder and returns its id.
func changeID(t *testing.T, sh *shell, dir string) string {
	t.Helper()
	r := sh.exits(t, 0, nil, "change", "create", dir, "--title", "try", "-o", "json")
	var made struct{ ID string }
	if err := json.Unmarshal([]byte(r.out), &made); err != nil {
		t.Fatalf("%v: %s", err, r.out)
	}
	return made.ID
}

// testInvalidFolders reads the findings of a folder that is refused here, and of one that the server refuses,
// as JSON.
func testInvalidFolders(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		unreadable := shopCopy(t, map[string]string{"bundle.yaml": "color: blue\n"})
		refused := shopCopy(t, map[string]string{"new.cedar": "permit (principal"})
		for _, args := range [][]string{
			{"apply", unreadable}, {"diff", unreadable}, {"impact", unreadable}, {"change", "create", unreadable, "--title", "x"},
			{"apply", refused}, {"impact", refused},
		} {
			r := sh.exits(t, 3, nil, append(args, "-o", "json")...)
			var got struct {
				Findings []struct{ Severity, File, Message string }
			}
			if err := json.Unmarshal([]byte(r.out), &got); err != nil || len(got.Findings) == 0 || got.Findings[0].Severity != "ERROR" || got.Findings[0].File == "" {
				t.Errorf("%v: %v: %s", args, err, r.out)
			}
		}
		sh.exits(t, 0, says("Exits with 3"), "impact", "--help")
		sh.exits(t, 0, says("Exits with 3"), "change", "edit", "--help")
	}
}

// testApprovalWithoutReport approves a change whose bundle needs a report, without one: the command says that
// this does not count.
func testApprovalWithoutReport(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		dir := namedNotes(t, "reports", "Reports")
		write(t, dir, "bundle.yaml", "approvals: 1\nimpact: required\n")
		sh.exits(t, 0, nil, "apply", dir, "--break-glass", "the first version")
		write(t, dir, "more.cedar", "@id(\"more\")\nforbid (principal, action == Reports::Action::\"Read\", resource);\n")
		id := changeID(t, sh, dir)
		key := filepath.Join(t.TempDir(), "approver.key")
		sh.exits(t, 0, nil, "keys", "create", "report-approver", "--role", "policy-approver", "--bundle", "reports", "--out", key)
		approver := sh.with("CEDARPOST_TOKEN=", "CEDARPOST_TOKEN_FILE="+key)
		approver.exits(t, 0, says("approved     report-approver", "blocked ", "report"), "change", "approve", id)
		r := sh.exits(t, 0, nil, "impact", "--change", id, "-o", "json")
		var report struct{ ID string }
		if err := json.Unmarshal([]byte(r.out), &report); err != nil {
			t.Fatal(err)
		}
		if r := approver.exits(t, 0, says("has seen "+report.ID), "change", "approve", id, "--report", report.ID); strings.Contains(r.out, "blocked") {
			t.Error(r.out)
		}
		approver.exits(t, 0, says("has seen "+report.ID), "change", "show", id)
	}
}
