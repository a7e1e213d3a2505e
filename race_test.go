package cedarpost

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The packages that the Makefile tests without the race detector start no goroutines, and import
// neither sync nor sync/atomic.
func TestRaceDetector(t *testing.T) {
	text, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	list := regexp.MustCompile(`(?m)^WITHOUT_RACE := ((?:.*\\\n)*.*)$`).FindSubmatch(text)
	if list == nil {
		t.Fatal("the Makefile has no list WITHOUT_RACE")
	}
	files := 0
	for _, pattern := range strings.Fields(strings.ReplaceAll(string(list[1]), "\\\n", " ")) {
		folder, below := strings.CutSuffix(pattern, "/...")
		folders := []string{folder}
		if below {
			more, err := filepath.Glob(folder + "/*/")
			if err != nil {
				t.Fatal(err)
			}
			folders = append(folders, more...)
		}
		for _, folder := range folders {
			found, err := filepath.Glob(filepath.Join(folder, "*.go"))
			if err != nil {
				t.Fatal(err)
			}
			if folder == strings.TrimSuffix(pattern, "/...") && len(found) == 0 {
				t.Errorf("%s has no Go files", folder)
			}
			found = slices.DeleteFunc(found, func(name string) bool { return strings.HasSuffix(name, "_test.go") })
			for _, name := range found {
				files++
				lookForConcurrency(t, name)
			}
		}
	}
	if files < 50 {
		t.Errorf("only %d files were looked at", files)
	}
}

func lookForConcurrency(t *testing.T, name string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range file.Imports {
		if spec.Path.Value == `"sync"` || spec.Path.Value == `"sync/atomic"` {
			t.Errorf("%s imports %s: test its package with the race detector", name, spec.Path.Value)
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if _, ok := n.(*ast.GoStmt); ok {
			t.Errorf("%s starts a goroutine: test its package with the race detector", name)
		}
		return true
	})
}
