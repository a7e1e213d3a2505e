package main

import (
	"os"
	"path/filepath"
	"testing"
)

// testDeleteBundle deletes a bundle while entities are stored, and brings it back.
func testDeleteBundle(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "gone")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, dir, "schema.cedarschema", "namespace Gone { entity Note; action Read appliesTo { principal: [Note], resource: [Note] }; }\n")
		write(t, dir, "read.cedar", "@id(\"all\")\npermit (principal, action == Gone::Action::\"Read\", resource);\n")
		sh.exits(t, 0, says("version      1"), "apply", dir)
		entities := t.TempDir()
		write(t, entities, "notes.json", `[{"uid":{"type":"Gone::Note","id":"n"},"attrs":{},"parents":[]}]`)
		sh.exits(t, 0, nil, "entities", "import", filepath.Join(entities, "notes.json"))

		sh.exits(t, 1, says("failed_precondition", "entities of the bundle gone are stored: Gone::Note (1)", "--force"), "bundles", "delete", "gone")
		sh.exits(t, 1, says("aborted", "version 1 of the bundle gone is live, not 7"), "bundles", "delete", "gone", "--force", "--expect-version=7")
		sh.exits(t, 2, says("must not be negative"), "bundles", "delete", "gone", "--expect-version=-7")
		sh.exits(t, 0, says("gone: deleted, version 1 was live", "cedarpost rollback gone 1", "left behind  1 entity of the type Gone::Note", "revision"), "bundles", "delete", "gone", "--force", "--reason", "nobody reads it")
		sh.exits(t, 1, says("not_found"), "bundles", "delete", "gone")
		sh.exits(t, 1, says("Gone::"), "authorize", "--principal", `Gone::Note::"n"`, "--action", `Gone::Action::"Read"`, "--resource", `Gone::Note::"n"`)
		sh.exits(t, 0, says("1 deleted"), "versions", "gone")
		sh.exits(t, 0, says(`"deletedBy":"`), "versions", "gone", "-o", "json")
		sh.exits(t, 0, says("DeleteBundle, version 1: nobody reads it"), "events", "--kind", "change", "--subject", "gone")
		sh.exits(t, 0, says("gone: published version 2 with the files of version 1"), "rollback", "gone", "1", "--reason", "somebody does")
		if r := sh.exits(t, 0, nil, "diff", "gone", "1", "2"); r.out != "" {
			t.Errorf("a difference: %s", r.out)
		}
		sh.exits(t, 0, says("ALLOW"), "authorize", "--principal", `Gone::Note::"n"`, "--action", `Gone::Action::"Read"`, "--resource", `Gone::Note::"n"`)
		sh.exits(t, 1, says("the bundle gone is frozen"), "bundles", "delete", "gone", "--force")
		sh.exits(t, 0, nil, "unfreeze", "gone")
		sh.exits(t, 0, says(`"version":"2"`, `"left":[{"type":"Gone::Note","entities":"1"}]`), "bundles", "delete", "gone", "--force", "-o", "json")
	}
}
