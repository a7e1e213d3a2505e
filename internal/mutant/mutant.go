// Package mutant shows that tests can fail: it removes one safeguard after another from a package,
// and requires that a test fails each time.
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
	// Name says what is wrong with the package.
	Name  string
	Edits []Edit
	// Harmless mutants have all safeguards, and must pass. Their edits only make it more likely
	// that a mistake shows.
	Harmless bool
}

// Edit replaces a text that a file of the package has exactly once.
type Edit struct{ File, Old, New string }

// AsItIs is the package without edits. It must pass.
var AsItIs = Mutant{Name: "as it is", Harmless: true}

// Test runs the tests that match a pattern, of the package in the current folder, on each mutant.
// At least one of them must fail. extra are further arguments to go test.
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

// run tests the package with the edits applied in an overlay.
func (m Mutant) run(t *testing.T, pattern string, extra []string) (output string, err error) {
	texts := m.texts(t)
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
	args := append([]string{"test", "-overlay", file, "-count", "1", "-vet=off", "-ldflags=-w", "-v", "-run", pattern, "."}, extra...)
	out, err := exec.CommandContext(t.Context(), "go", args...).CombinedOutput()
	return string(out), err
}

// Check fails for each mutant whose edits do not fit the package any more. It is quick, so
// that a change of the package shows at once which edits it has to change, too.
func Check(t *testing.T, mutants []Mutant) {
	for _, m := range mutants {
		t.Run(m.Name, func(t *testing.T) { m.texts(t) })
	}
}

// texts returns the edited files.
func (m Mutant) texts(t *testing.T) map[string]string {
	t.Helper()
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
			t.Fatalf("this mutant does not fit the code any more: %s has %q %d times, want 1", e.File, e.Old, n)
		}
		texts[e.File] = strings.Replace(texts[e.File], e.Old, e.New, 1)
	}
	return texts
}
