package server

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
)

// With any number of warnings, a refusal begins with errors and failed tests, and its last
// finding says what was left out.
func TestRefusalHasTheWorstFirst(t *testing.T) {
	warnings := func(n int) (out []engine.Finding) {
		for i := range n {
			out = append(out, engine.Finding{Bundle: "doc", File: "a.cedar", Line: i + 1, Message: "applies to nothing", Warning: true})
		}
		return out
	}
	failed := func(n int) (out []offline.TestResult) {
		for i := range n {
			out = append(out, offline.TestResult{Name: fmt.Sprint("check ", i), Line: i + 1, Failures: []string{"expected allow, got deny"}})
		}
		return out
	}
	broken := engine.Finding{Bundle: "doc", File: "z.cedar", Line: 1, Message: "no such type"}
	for _, c := range []struct {
		name     string
		report   offline.Report
		text     string
		first    string
		last     string
		lastRank int
	}{
		{"a failed test", offline.Report{Findings: warnings(3000), Tests: failed(1)}, "1 of 1 tests failed: tests.yaml:1: check 0", "check 0", "left out: 2001 more warnings", 2},
		{"many failed tests", offline.Report{Findings: warnings(2), Tests: failed(1001)}, "1001 of 1001 tests failed", "check 0", "left out: 1 more failure of a test, 2 more warnings", 1},
		{"an error", offline.Report{Findings: append(warnings(1000), broken)}, "the bundle is not valid: z.cedar:1: no such type", "no such type", "left out: 1 more warning", 2},
	} {
		err, ok := errors.AsType[*connect.Error](reportRefusal("doc", &c.report))
		if !ok {
			t.Fatal(c.name)
		}
		if !strings.HasPrefix(err.Message(), c.text) {
			t.Errorf("%s: %s", c.name, err.Message())
		}
		m, derr := connectproto.UnmarshalErrorDetail(err.Details()[0])
		if derr != nil {
			t.Fatal(derr)
		}
		list := m.(*cedarpostv1.BundleFindings).GetFindings()
		first, last := list[0], list[len(list)-1]
		if !strings.Contains(first.GetMessage(), c.first) || last.GetMessage() != c.last || rank(last) != c.lastRank || len(list) != maxRefusalFindings+1 {
			t.Errorf("%s: %d findings from %q to %q", c.name, len(list), first.GetMessage(), last.GetMessage())
		}
		if texts := findingTexts(err); !strings.Contains(texts[0], c.first) {
			t.Errorf("%s: an event begins with %q", c.name, texts[0])
		}
	}
}
