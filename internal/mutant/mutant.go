// Package mutant shows that tests can fail: it removes one safeguard after another from
// a package, and each time a test has to fail.
package mutant

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Mutant is a package without one of its safeguards.
type Mutant struct {
	// Name says what is wrong with the mutant.
	Name  string
	Edits []Edit
	// Harmless says that no safeguard is missing, so the tests have to pass. Such a mutant
	// only makes the effect of a mistake more likely.
	Harmless bool
}

// Edit replaces a text that a file of the package contains exactly once.
type Edit struct{ File, Old, New string }

// AsItIs is the package with all of its safeguards. Its tests have to pass.
var AsItIs = Mutant{Name: "as it is", Harmless: true}

// Test runs, for each mutant, the tests that match a pattern in the package of the
// current folder. At least one test has to fail. extra are more arguments to go test.
func Test(t *testing.T, pattern string, mutants []Mutant, extra ...string) {
	for _, m := range mutants {
		t.Run(m.Name, func(t *testing.T) {
			out, err := m.run(t, pattern, extra)
			var exit *exec.ExitError
			switch {
			case m.Harmless && err != nil:
				t.Errorf("%v\n%s", err, out)
			case m.Harmless:
			case err == nil:
				t.Error("nothing failed")
			case !errors.As(err, &exit) || !strings.Contains(out, "--- FAIL: Test"):
				t.Errorf("no test failed, but the run did: %v\n%s", err, out)
			}
			for line := range strings.Lines(out) {
				if strings.HasPrefix(line, "--- ") {
					t.Log(strings.TrimSpace(line))
				}
			}
		})
	}
}

// Fit fails if an edit of a mutant no longer fits the source. It runs no test, so unlike
// [Test] it can be a part of every run.
func Fit(t *testing.T, mutants []Mutant) {
	for _, m := range mutants {
		t.Run(m.Name, func(t *testing.T) { m.edited(t) })
	}
}

// edited returns the text of each edited file.
func (m Mutant) edited(t *testing.T) map[string]string {
	texts := map[string]string{}
	for _, e := range m.Edits {
		if texts[e.File] == "" {
			source, err := os.ReadFile(e.File)
			if err != nil {
				t.Fatal(err)
			}
			texts[e.File] = string(source)
		}
		if n := strings.Count(texts[e.File], e.Old); n != 1 {
			t.Fatalf("this mutant is stale: %s contains %q %d times, not once", e.File, e.Old, n)
		}
		texts[e.File] = strings.Replace(texts[e.File], e.Old, e.New, 1)
	}
	return texts
}

// run tests the package with the edits in an overlay.
func (m Mutant) run(t *testing.T, pattern string, extra []string) (output string, err error) {
	texts := m.edited(t)
	dir := t.TempDir()
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for file, text := range texts {
		source, err := filepath.Abs(file)
		if err != nil {
			t.Fatal(err)
		}
		overlay.Replace[source] = filepath.Join(dir, filepath.Base(file))
		if err := os.WriteFile(overlay.Replace[source], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	list, err := json.Marshal(overlay)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, list, 0o600); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"test", "-overlay", file, "-count", "1", "-v", "-run", pattern, "."}, extra...)
	out, err := exec.CommandContext(t.Context(), "go", args...).CombinedOutput()
	return string(out), err
}
