package bundle_test

import (
	"errors"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/bundle"
)

// docs/bundles.md describes the files and keys that a bundle may have, and no others.
func TestDocumentedKeys(t *testing.T) {
	text, err := os.ReadFile("../docs/bundles.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string][]string{} // title of a table → keys
	for _, table := range regexp.MustCompile(`(?m)^\| key of (.+?) \|.*\n\|[-|]+\n((?:\|.*\n)+)`).FindAllStringSubmatch(string(text), -1) {
		for row := range strings.Lines(table[2]) {
			cells := strings.Split(row, "|")
			if len(cells) != 6 {
				t.Errorf("%d cells: %s", len(cells), row)
			}
			documented[table[1]] = append(documented[table[1]], strings.Trim(cells[1], " `"))
		}
	}
	for _, heading := range regexp.MustCompile("(?m)^## `(.+)`$").FindAllStringSubmatch(string(text), -1) {
		documented["files"] = append(documented["files"], heading[1])
	}
	for title, in := range map[string]files{
		"files":               {"x.yaml": ""},
		"`bundle.yaml`":       {"bundle.yaml": "x: 1\n"},
		"`principal_tokens`":  {"bundle.yaml": "principal_tokens: {a: {x: 1}}\n"},
		"`tests.yaml`":        {"tests.yaml": "x: 1\n"},
		"a check":             {"tests.yaml": "checks: [{x: 1}]\n"},
		"an entity reference": {"tests.yaml": "checks: [{principal: {x: 1}}]\n"},
		"an entity":           {"tests.yaml": "checks: [{entities: [{x: 1}]}]\n"},
	} {
		_, err := bundle.FromFiles("shop", with(in).list())
		problems, _ := errors.AsType[bundle.Problems](err)
		i := slices.IndexFunc(problems, func(p bundle.Problem) bool { return strings.HasPrefix(p.Hint, "known are ") })
		if i < 0 {
			t.Fatalf("%s: %v", title, err)
		}
		known, got := strings.Split(strings.TrimPrefix(problems[i].Hint, "known are "), ", "), documented[title]
		slices.Sort(known)
		slices.Sort(got)
		if !slices.Equal(got, known) {
			t.Errorf("docs/bundles.md has %q under %s, and the program knows %q", got, title, known)
		}
		delete(documented, title)
	}
	if len(documented) > 0 {
		t.Errorf("docs/bundles.md has tables of unknown keys: %v", documented)
	}
}
