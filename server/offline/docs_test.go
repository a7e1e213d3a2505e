package offline_test

import (
	"os"
	"regexp"
	"testing"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/server/offline"
)

// The examples in docs/bundles.md are one bundle, which is valid and passes its tests.
func TestDocumentedBundle(t *testing.T) {
	text, err := os.ReadFile("../../docs/bundles.md")
	if err != nil {
		t.Fatal(err)
	}
	var files []bundle.File
	for _, m := range regexp.MustCompile("(?s)Example, `([^`]+)`:\n\n```[a-z]+\n(.*?)```\n").FindAllStringSubmatch(string(text), -1) {
		files = append(files, bundle.File{Path: m[1], Content: []byte(m[2])})
	}
	if len(files) != 8 {
		t.Fatalf("%d examples", len(files))
	}
	b, err := bundle.FromFiles("folder", files)
	if err != nil {
		t.Fatal(err)
	}
	if b.Name != "notes" || len(b.Schemas) != 2 || len(b.Policies) != 2 {
		t.Errorf("%+v", b)
	}
	report, set := offline.Check(b, nil, nil)
	if set == nil || len(report.Findings) > 0 || report.Failed() > 0 || len(report.Tests) != 3 {
		t.Errorf("%+v", report)
	}
	if got := len(set.Policies("notes")); got != 4 {
		t.Errorf("%d policies", got)
	}
}
