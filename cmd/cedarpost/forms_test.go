package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
)

// folder writes files into a new folder.
func folder(t *testing.T, name string, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	for file, text := range files {
		if err := os.MkdirAll(filepath.Join(dir, path.Dir(file)), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, dir, file, text)
	}
	return dir
}

// drawForms draws the files of a bundle: its schema and policies in any files and forms, and files that are
// not part of it.
func drawForms(t *testing.T, r *rand.Rand) (files, besides map[string]string) {
	t.Helper()
	files, besides = map[string]string{}, map[string]string{}
	asJSON := func(of interface{ MarshalJSON() ([]byte, error) }) string {
		b, err := of.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		var tree any
		if err := json.Unmarshal(b, &tree); err != nil {
			t.Fatal(err)
		}
		b, err = json.MarshalIndent(tree, "", strings.Repeat(" ", r.IntN(4)))
		if err != nil {
			t.Fatal(err)
		}
		return string(b) + strings.Repeat("\n", r.IntN(3))
	}
	where := func() string { return []string{"", "a/", "a/b/", "c d/"}[r.IntN(4)] }
	byFile := map[int][]string{}
	for _, declaration := range []string{
		"entity User in [Team] { age: Long };", "entity Team;", "entity Note { owner: User, words?: Set<String> };",
		"type Unused = { x: ipaddr };", "action Read, Write appliesTo { principal: [User], resource: [Note] };", "@audit(\"always\") action Delete appliesTo { principal: User, resource: Note };",
	} {
		file := r.IntN(3)
		byFile[file] = append(byFile[file], declaration)
	}
	for i, list := range byFile {
		text := "// file " + fmt.Sprint(i) + "\nnamespace Forms {\n  " + strings.Join(list, "\n  ") + "\n}\n"
		if r.IntN(2) == 0 {
			files[fmt.Sprintf("%s%d.cedarschema", where(), i)] = text
			continue
		}
		var sc schema.Schema
		if err := sc.UnmarshalCedar([]byte(text)); err != nil {
			t.Fatal(err)
		}
		files[fmt.Sprintf("%s%d.cedarschema.json", where(), i)] = asJSON(&sc)
	}
	set := map[string]json.RawMessage{}
	for i := range 1 + r.IntN(6) {
		text := fmt.Sprintf("@id(\"p%d\")\n%s (principal%s, action == Forms::Action::%q, resource)\nwhen { %s };\n", i, []string{"permit", "forbid"}[r.IntN(2)],
			[]string{"", " in Forms::Team::\"t\"", " is Forms::User"}[r.IntN(3)], []string{"Read", "Write", "Delete"}[r.IntN(3)],
			[]string{"resource.owner == principal", "principal.age > -1 && (resource.owner.age < 3 || resource has words)", "resource has words && resource.words.containsAny([\"é\", \"\\n\"])"}[r.IntN(3)])
		var p cedar.Policy
		if err := p.UnmarshalCedar([]byte(text)); err != nil {
			t.Fatal(err)
		}
		switch r.IntN(3) {
		case 0:
			files[fmt.Sprintf("%sp%d.cedar", where(), i)] = text
		case 1:
			files[fmt.Sprintf("%sp%d.cedar.json", where(), i)] = asJSON(&p)
		default:
			set[[]string{fmt.Sprintf("p%d", i), fmt.Sprintf("policy%d", i)}[r.IntN(2)]] = json.RawMessage(asJSON(&p))
		}
	}
	if len(set) > 0 {
		b, err := json.Marshal(map[string]any{"staticPolicies": set, "templates": map[string]any{}, "templateLinks": []any{}})
		if err != nil {
			t.Fatal(err)
		}
		files[where()+"set.cedar.json"] = string(b)
	}
	for name, text := range map[string]string{"LICENSE": "all rights", "CODEOWNERS": "* @team", ".github/ci.yml": "on: push", "a/notes.txt": "for people", "README.md": "# forms"} {
		if r.IntN(2) == 0 {
			besides[name] = text
		}
	}
	return files, besides
}

// testForms publishes bundles in all forms. What is pulled is what was published, byte for byte, and
// publishing it again changes nothing.
func testForms(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 1))
		for range 5 {
			files, besides := drawForms(t, r)
			all := maps.Clone(files)
			maps.Copy(all, besides)
			dir := folder(t, "forms", all)
			var left []string
			for _, name := range slices.Sorted(maps.Keys(besides)) {
				if top, _, below := strings.Cut(name, "/"); below && strings.HasPrefix(top, ".") {
					name = top + "/"
				}
				left = append(left, name)
			}
			slices.Sort(left)
			want := ""
			if len(left) > 0 {
				want = "forms: not part of the bundle: " + strings.Join(left, ", ") + "\n"
			}
			sh.exits(t, 0, says("forms: valid", want), "check", dir)
			sh.exits(t, 0, says("forms: published", want), "apply", dir)
			pulled := filepath.Join(t.TempDir(), "forms")
			sh.exits(t, 0, says(fmt.Sprintf("%d written", len(files))), "pull", "forms", pulled)
			got := map[string]string{}
			if err := filepath.WalkDir(pulled, func(name string, d os.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				text, err := os.ReadFile(name)
				rel, _ := filepath.Rel(pulled, name)
				got[filepath.ToSlash(rel)] = string(text)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			if !maps.Equal(got, files) {
				t.Errorf("%q was published, and %q pulled", files, got)
			}
			sh.exits(t, 0, says("forms: nothing changed, the same is published already"), "apply", pulled)
			if out := sh.exits(t, 0, nil, "diff", "--exit-code", pulled).out; out != "" {
				t.Errorf("a difference to what was published: %s", out)
			}
			if out := sh.exits(t, 0, says("0 written"), "pull", "forms", dir).out; t.Failed() {
				t.Fatal(out)
			}
		}
		refused := folder(t, "forms", map[string]string{"s.cedarschema": "", "a.cedar.json": "{\n \"effect\": \"permit\", \"effect\": \"permit\"\n}", "b.cedar.bak": ""})
		sh.exits(t, 3, says("b.cedar.bak: error: would not be read", "begin its name with a dot"), "check", refused)
		if err := os.Remove(filepath.Join(refused, "b.cedar.bak")); err != nil {
			t.Fatal(err)
		}
		sh.exits(t, 3, says(`a.cedar.json:2:`, `error: member "effect" stands twice`), "check", refused)
		if out := sh.exits(t, 0, nil, "check", "-o", "json", folder(t, "forms", map[string]string{"s.cedarschema": "", "LICENSE": "x"})).out; !strings.Contains(out, `"ignored":["LICENSE"]`) {
			t.Error(out)
		}
	}
}
