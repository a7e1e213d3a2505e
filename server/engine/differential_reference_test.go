package engine

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// installReference makes sure that the reference implementation is installed, at
// the version of the lock file, and returns its folder.
func installReference(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("differential")
	if err != nil {
		t.Fatal(err)
	}
	const wanted = "this test asks the reference implementation of Cedar, which runs on Node.js 20 or later with npm; scripts/install-node.sh installs it"
	version, err := exec.Command("node", "--version").Output()
	if err != nil {
		t.Fatalf("%s (%v)", wanted, err)
	}
	major, _, _ := strings.Cut(strings.TrimPrefix(string(version), "v"), ".")
	if n, err := strconv.Atoi(major); err != nil || n < 20 {
		t.Fatalf("%s (there is node %s)", wanted, strings.TrimSpace(string(version)))
	}
	if _, err := exec.LookPath("npm"); err != nil {
		t.Fatalf("%s (%v)", wanted, err)
	}
	// The copy of the lock file is written last.
	want, err := os.ReadFile(filepath.Join(dir, "package-lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	have, err := os.ReadFile(filepath.Join(dir, "node_modules", "from-package-lock.json"))
	if err == nil && string(have) == string(want) {
		return dir
	}
	cmd := exec.Command("npm", "ci", "--no-audit", "--no-fund")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("npm ci in %s: %v\n%s", dir, err, out)
	}
	if err := os.WriteFile(filepath.Join(dir, "node_modules", "from-package-lock.json"), want, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// errReference is a reference that does not answer any more.
var errReference = errors.New("the reference has ended")

// reference is one process that runs the reference implementation.
type reference struct {
	in  io.Writer
	out *bufio.Reader
}

func startReference(t *testing.T, dir string) *reference {
	t.Helper()
	cmd := exec.Command("node", "reference.mjs")
	cmd.Dir = dir
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the reference: %v", err)
		}
	})
	return &reference{in, bufio.NewReader(out)}
}

// refAnswer is what any of the reference's functions returns.
type refAnswer struct {
	Type   string // success or failure
	Errors []struct{ Message string }

	ValidationErrors, ValidationWarnings []refProblem

	Response struct {
		Decision    string
		Diagnostics struct {
			Reason []string
			Errors []refProblem
		}
	}
}

type refProblem struct {
	PolicyID string
	Error    struct{ Message string }
}

func (a refAnswer) ok() bool { return a.Type == "success" }

func (a refAnswer) String() string {
	var out []string
	for _, e := range a.Errors {
		out = append(out, e.Message)
	}
	return a.Type + ": " + strings.Join(out, "; ")
}

// refCall is one call: a function and its arguments, each a string or JSON.
type refCall [2]any

// String shows the JSON that the reference got.
func (c refCall) String() string {
	out := c[0].(string)
	for _, a := range c[1].([]any) {
		if m, ok := a.(map[string]string); ok {
			a = m["text"]
		}
		out += fmt.Sprintf(" %s", a)
	}
	return out
}

func call(function string, args ...any) refCall {
	for i, a := range args {
		if _, plain := a.(string); !plain {
			args[i] = map[string]string{"text": string(a.(json.RawMessage))}
		}
	}
	return refCall{function, args}
}

func (r *reference) ask(calls ...refCall) ([]refAnswer, error) {
	line, err := json.Marshal(calls)
	if err != nil {
		return nil, err
	}
	if _, err := r.in.Write(append(line, '\n')); err != nil {
		return nil, fmt.Errorf("%w: %w", errReference, err)
	}
	if line, err = r.out.ReadBytes('\n'); err != nil {
		return nil, fmt.Errorf("%w: %w", errReference, err)
	}
	var answers []refAnswer
	if err := json.Unmarshal(line, &answers); err != nil {
		return nil, fmt.Errorf("the reference: %w: %s", err, line)
	}
	if len(answers) != len(calls) {
		return nil, fmt.Errorf("the reference: %d answers to %d calls", len(answers), len(calls))
	}
	for i, a := range answers {
		if a.Type == "thrown" {
			return nil, fmt.Errorf("the reference: %v: %s", calls[i], a)
		}
	}
	return answers, nil
}
