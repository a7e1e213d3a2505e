// Package corpustest reads the test corpus of the reference implementation of Cedar:
// policies, schemas, entities and requests with the correct answers. It reads the corpus
// from the module of cedar-go, so that nothing is copied into this repository and its
// version is that of the cedar-go in use.
package corpustest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// Case is one policy set with its requests.
type Case struct {
	Name                       string
	Schema, Policies, Entities string
	// Strict is true if the reference accepts the policies in strict mode.
	Strict bool
	// Requests, and Entities, are valid under the schema according to the reference.
	Requests []Request
}

// Request is one request with the answer of the reference. Policies are named policy0,
// policy1 and so on, in the order of the text.
type Request struct {
	Principal cedar.EntityUID `json:"principal"`
	Action    cedar.EntityUID `json:"action"`
	Resource  cedar.EntityUID `json:"resource"`
	// Context is in Cedar's JSON format.
	Context  json.RawMessage `json:"context"`
	Decision string          `json:"decision"` // allow or deny
	Reasons  []string        `json:"reason"`
	Errors   []string        `json:"errors"`
}

// Named returns the policies with an @id each, which a bundle needs.
func (c Case) Named() (string, error) {
	list, err := cedar.NewPolicyListFromBytes("", []byte(c.Policies))
	if err != nil {
		return "", err
	}
	text := c.Policies
	for i, p := range slices.Backward(list) {
		at := p.Position().Offset
		text = fmt.Sprintf("%s@id(\"policy%d\")\n%s", text[:at], i, text[at:])
	}
	return text, nil
}

// Load returns the whole corpus, by name.
func Load(t testing.TB) []Case {
	t.Helper()
	return Sample(t, 1, 0)
}

// Sample returns one case in so many of the corpus by name, beginning with the case from.
// The others are not parsed.
func Sample(t testing.TB, oneIn, from int) []Case {
	t.Helper()
	cases, err := load(t.Context(), all, oneIn, from)
	if err != nil {
		t.Fatalf("the reference corpus: %v", err)
	}
	return cases
}

func all(string) bool { return true }

// ByName returns the cases with these names.
func ByName(t testing.TB, names ...string) []Case {
	t.Helper()
	cases, err := load(t.Context(), func(name string) bool { return slices.Contains(names, name) }, 1, 0)
	if err != nil {
		t.Fatalf("the reference corpus: %v", err)
	}
	if len(cases) != len(names) {
		t.Fatalf("the reference corpus has %d of the cases %v", len(cases), names)
	}
	return cases
}

// load returns one in so many of the cases whose name is wanted.
func load(ctx context.Context, wanted func(name string) bool, oneIn, from int) ([]Case, error) {
	dir, err := moduleDir(ctx)
	if err != nil {
		return nil, err
	}
	files, err := untar(filepath.Join(dir, "corpus-tests.tar.gz"), wanted)
	if err != nil {
		return nil, err
	}
	verdicts, err := untar(filepath.Join(dir, "corpus-tests-validation.tar.gz"), wanted)
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range files {
		if base, isCase := strings.CutSuffix(path.Base(name), ".json"); isCase && !strings.HasSuffix(base, ".entities") {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return strings.Compare(path.Base(a), path.Base(b)) })
	var cases []Case
	for i := from; i < len(names); i += oneIn {
		name := names[i]
		base := strings.TrimSuffix(path.Base(name), ".json")
		var head struct {
			Schema, Policies, Entities string
			Requests                   []Request
		}
		if err := json.Unmarshal(files[name], &head); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		var verdict struct {
			PolicyValidation struct{ Strict *bool }
		}
		if err := json.Unmarshal(verdicts["corpus-tests-validation/"+base+".validation.json"], &verdict); err != nil {
			return nil, fmt.Errorf("%s: its validation: %w", name, err)
		}
		if verdict.PolicyValidation.Strict == nil {
			return nil, fmt.Errorf("%s: its validation is missing", name)
		}
		c := Case{
			Name: base, Requests: head.Requests, Strict: *verdict.PolicyValidation.Strict,
			Schema: string(files[head.Schema]), Policies: string(files[head.Policies]), Entities: string(files[head.Entities]),
		}
		cases = append(cases, c)
	}
	if len(cases) == 0 {
		return nil, errors.New("no cases in it")
	}
	return cases, nil
}

// moduleDir returns the folder of the module of cedar-go.
func moduleDir(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/cedar-policy/cedar-go").Output()
	if err != nil {
		return "", fmt.Errorf("go list: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// untar returns the files of the wanted cases.
func untar(name string, wanted func(name string) bool) (map[string][]byte, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	zr, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	out := map[string][]byte{}
	tr := tar.NewReader(zr)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if base, _, _ := strings.Cut(path.Base(h.Name), "."); h.Typeflag != tar.TypeReg || !wanted(base) {
			continue
		}
		if out[h.Name], err = io.ReadAll(tr); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
}

// Form is a policy set or a schema of the corpus, as text and as the reference writes it in JSON.
type Form struct {
	Name, Text, JSON string
}

// Forms returns one in so many of the policy sets and schemas of the corpus, by name, beginning with those
// at from.
func Forms(t testing.TB, oneIn, from int) (policies, schemas []Form) {
	t.Helper()
	dir, err := moduleDir(t.Context())
	if err != nil {
		t.Fatalf("the reference corpus: %v", err)
	}
	texts, err := untar(filepath.Join(dir, "corpus-tests.tar.gz"), all)
	if err != nil {
		t.Fatalf("the reference corpus: %v", err)
	}
	byName := make(map[string][]byte, len(texts))
	for name, content := range texts {
		byName[path.Base(name)] = content
	}
	read := func(archive string) (list []Form) {
		files, err := untar(filepath.Join(dir, archive), all)
		if err != nil {
			t.Fatalf("the reference corpus: %v", err)
		}
		names := slices.DeleteFunc(slices.Sorted(maps.Keys(files)), func(name string) bool { return strings.HasPrefix(path.Base(name), "._") }) // attributes of files
		for i := from; i < len(names); i += oneIn {
			base := strings.TrimSuffix(path.Base(names[i]), ".json")
			text, ok := byName[base]
			if !ok {
				t.Fatalf("the reference corpus has no text for %s", names[i])
			}
			list = append(list, Form{Name: base, Text: string(text), JSON: string(files[names[i]])})
		}
		return list
	}
	return read("corpus-tests-json-policies.tar.gz"), read("corpus-tests-json-schemas.tar.gz")
}
