package bundle_test

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/bundle"
)

func drawFiles(t *rapid.T, label string) []bundle.File {
	content := rapid.SliceOfN(rapid.SampledFrom([]string{"a\n", "b\n", "c", "\n"}), 0, 6)
	files := rapid.MapOfN(rapid.SampledFrom([]string{"a.cedar", "b.cedar", "d/c.cedar", "schema.cedarschema", "tests.yaml"}), content, 0, 5).Draw(t, label)
	var list []bundle.File
	for path, lines := range files {
		list = append(list, bundle.File{Path: path, Content: []byte(strings.Join(lines, ""))})
	}
	slices.SortFunc(list, func(a, b bundle.File) int { return strings.Compare(a.Path, b.Path) })
	return list
}

func sameFiles(a, b []bundle.File) bool {
	return slices.EqualFunc(a, b, func(a, b bundle.File) bool { return a.Path == b.Path && bytes.Equal(a.Content, b.Content) })
}

// patch applies a difference in the unified format to a text.
func patch(text, diff string) (string, error) {
	old, lines := strings.SplitAfter(text, "\n"), strings.SplitAfter(diff, "\n")
	var out strings.Builder
	at := 0
	for i := 2; i+1 < len(lines); i++ { // the first two name the files
		line := lines[i]
		if strings.HasPrefix(lines[i+1], `\`) {
			line = strings.TrimSuffix(line, "\n")
		}
		var from int
		switch line[0] {
		case '@':
			if _, err := fmt.Sscanf(line, "@@ -%d", &from); err != nil {
				return "", err
			}
			for ; at < from-1; at++ {
				out.WriteString(old[at])
			}
			continue
		case '\\':
			continue
		case '+':
			out.WriteString(line[1:])
			continue
		}
		if at >= len(old) || old[at] != line[1:] {
			return "", fmt.Errorf("line %d is not %q", at+1, line[1:])
		}
		if at++; line[0] == ' ' {
			out.WriteString(line[1:])
		}
	}
	return out.String() + strings.Join(old[at:], ""), nil
}

// The edits between two states make the second of the first, the text of each difference does, too, and
// a state differs from itself in nothing.
func TestEditsAndDiffs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		before, after := drawFiles(t, "before"), drawFiles(t, "after")
		edits := bundle.Edits(before, after)
		if got := bundle.Apply(before, edits); !sameFiles(got, after) {
			t.Fatalf("%v with %v is %v, want %v", before, edits, got, after)
		}
		if len(bundle.Diff(after, after))+len(bundle.Edits(after, after)) > 0 {
			t.Fatal("a state differs from itself")
		}
		if bundle.Digest(before) == bundle.Digest(after) != sameFiles(before, after) {
			t.Fatal("digests of other files are equal, or those of the same differ")
		}
		content := map[string]string{}
		for _, f := range before {
			content[f.Path] = string(f.Content)
		}
		diffs := bundle.Diff(before, after)
		if len(diffs) != len(edits) {
			t.Fatalf("%d differences for %d edits", len(diffs), len(edits))
		}
		for i, d := range diffs {
			patched, err := patch(content[d.Path], d.Text)
			if err != nil || d.Path != edits[i].Path || d.Removed != edits[i].Removed || patched != string(edits[i].Content) {
				t.Fatalf("%+v for %+v: %q, %v", d, edits[i], patched, err)
			}
		}
	})
}

// Edits apply to another state without a conflict if, and only if, no file was changed on both sides
// to something else. Then both changes are in the result.
func TestConflicts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base, mine, other := drawFiles(t, "base"), drawFiles(t, "mine"), drawFiles(t, "other")
		edits, theirs := bundle.Edits(base, mine), bundle.Edits(base, other)
		var want []string
		for _, e := range edits {
			for _, o := range theirs {
				if e.Path == o.Path && !reflect.DeepEqual(e, o) {
					want = append(want, e.Path)
				}
			}
		}
		if got := bundle.Conflicts(base, other, edits); !slices.Equal(got, want) {
			t.Fatalf("conflicts %v, want %v", got, want)
		}
		if len(want) > 0 {
			return
		}
		merged := bundle.Apply(other, edits)
		if again := bundle.Apply(mine, theirs); !sameFiles(merged, again) {
			t.Fatalf("the order of two changes matters: %v, %v", merged, again)
		}
	})
}

// The text of a difference is bounded: large files, and what comes after enough text, have none.
func TestDiffIsBounded(t *testing.T) {
	large := bytes.Repeat([]byte("0123456789abcde\n"), bundle.MaxDiffFile/16)
	files := []bundle.File{{Path: "0.cedar", Content: append(large, '\n')}}
	for i := range 8 {
		files = append(files, bundle.File{Path: fmt.Sprint(i+1, ".cedar"), Content: large})
	}
	total, omitted := 0, 0
	for i, d := range bundle.Diff(nil, files) {
		if total += len(d.Text); d.Omitted {
			omitted++
		}
		if d.Omitted != (d.Text == "") || i == 0 && !d.Omitted || i == 1 && d.Omitted || !d.Added {
			t.Errorf("file %d: omitted %v, %d bytes", i, d.Omitted, len(d.Text))
		}
	}
	if total > bundle.MaxDiffText || omitted != 6 {
		t.Errorf("%d bytes of text, %d files without", total, omitted)
	}
}

func TestCheckPath(t *testing.T) {
	for path, want := range map[string]string{
		"a.cedar": "part", "d/e.cedar": "part", "bundle.yaml": "part", "README.md": "", "notes.txt": "", ".git/config": "",
		"A.CEDAR": "would not be read", "../a.cedar": "is not a path", "/a.cedar": "is not a path", "d/bundle.yaml": "belongs at the top", "": "is not a path", "a:b.cedar": "is not a path",
	} {
		part, problem := bundle.CheckPath(path)
		if part != (want == "part") || (problem != nil) != (want != "" && want != "part") || problem != nil && !strings.Contains(problem.Message, want) {
			t.Errorf("%q: %v, %v; want %q", path, part, problem, want)
		}
	}
}
