package server

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
)

// maxRefusalFindings bounds the findings in one error.
const maxRefusalFindings = 1000

// refusal returns an error with findings: in its text for people, and as a detail for
// programs. Errors are first, then failed tests, then warnings, so that none of the few that a
// reader sees, or an event records, is a warning while there is something worse.
func refusal(code connect.Code, msg string, findings []*cedarpostv1.Finding) error {
	slices.SortStableFunc(findings, func(a, b *cedarpostv1.Finding) int { return cmp.Compare(rank(a), rank(b)) })
	if len(findings) > maxRefusalFindings {
		rest := leftOut(findings[maxRefusalFindings:])
		findings = append(findings[:maxRefusalFindings:maxRefusalFindings], rest)
	}
	var b strings.Builder
	b.WriteString(msg)
	for i, f := range findings {
		if i == 5 {
			fmt.Fprintf(&b, "; and %d more", len(findings)-i)
			break
		}
		sep := ": "
		if i > 0 {
			sep = "; "
		}
		b.WriteString(sep + findingText(f))
	}
	err := connect.NewError(code, b.String())
	if d, derr := connectproto.NewErrorDetail(&cedarpostv1.BundleFindings{Findings: findings}); derr == nil {
		err = err.WithDetail(d)
	}
	return err
}

// rank orders findings by how much they matter: errors, failed tests, warnings.
func rank(f *cedarpostv1.Finding) int {
	switch {
	case f.GetSeverity() == cedarpostv1.Finding_WARNING:
		return 2
	case f.GetTest():
		return 1
	}
	return 0
}

// leftOut returns a finding that counts findings in place of them. It is as severe as the first
// one, which is the worst.
func leftOut(list []*cedarpostv1.Finding) *cedarpostv1.Finding {
	var n [3]int
	for _, f := range list {
		n[rank(f)]++
	}
	var parts []string
	for i, name := range [...][2]string{{"error", "errors"}, {"failure of a test", "failures of tests"}, {"warning", "warnings"}} {
		if n[i] == 1 {
			parts = append(parts, "1 more "+name[0])
		} else if n[i] > 1 {
			parts = append(parts, fmt.Sprintf("%d more %s", n[i], name[1]))
		}
	}
	return &cedarpostv1.Finding{
		Severity: list[0].GetSeverity(), Test: list[0].GetTest(),
		Message: "left out: " + strings.Join(parts, ", "),
	}
}

// findingTexts returns the findings in an error that refusal made.
func findingTexts(err *connect.Error) (texts []string) {
	for _, d := range err.Details() {
		m, derr := connectproto.UnmarshalErrorDetail(d)
		if list, ok := m.(*cedarpostv1.BundleFindings); ok && derr == nil {
			for _, f := range list.GetFindings() {
				texts = append(texts, findingText(f))
			}
		}
	}
	return texts
}

func findingText(f *cedarpostv1.Finding) string {
	return engine.Finding{
		File: f.File, Line: int(f.Line), Column: int(f.Column), Policy: f.Policy, Message: f.Message,
	}.String()
}

// hiddenBundle is the bundle of a finding about a bundle that the caller may not read.
const hiddenBundle = "?"

// hideFindings replaces the findings about other bundles that the caller may not read. One finding
// stands for all errors among them, and one for all warnings, except for those that have a text for such a
// caller. They do not name a bundle. Findings about the bundle itself do not name such a bundle either.
func hideFindings(r *offline.Report, name string, rights *access.Rights) {
	var hidden [2]bool // an error, a warning
	var nameless []engine.Finding
	readable := func(bundle string) bool {
		return bundle == "" || bundle == name || rights.May("GetBundle", access.Target{Bundle: bundle})
	}
	r.Findings = slices.DeleteFunc(r.Findings, func(f engine.Finding) bool {
		if readable(f.Bundle) {
			return false
		}
		switch {
		case f.Without != "":
			nameless = append(nameless, engine.Finding{Bundle: hiddenBundle, Warning: f.Warning, Message: f.Without, Hint: f.Hint})
		case f.Warning:
			hidden[1] = true
		default:
			hidden[0] = true
		}
		return true
	})
	for i := range r.Findings {
		if f := &r.Findings[i]; !readable(f.Other) {
			f.Message = f.Without
		}
	}
	r.Findings = append(r.Findings, nameless...)
	for i, found := range hidden {
		if found {
			r.Findings = append(r.Findings, engine.Finding{
				Bundle: hiddenBundle, Warning: i == 1, Message: "there are findings about another bundle, which this caller may not read",
				Hint: "somebody who may read all bundles sees them with a dry run",
			})
		}
	}
}

// reportRefusal returns the error of a bundle that failed its check. If findings are about
// another bundle, it says that the bundle would break that one.
func reportRefusal(name string, r *offline.Report) error {
	findings := findingsToProto(name, r.Findings)
	for _, t := range r.Tests {
		for _, f := range t.Failures {
			findings = append(findings, &cedarpostv1.Finding{
				Severity: cedarpostv1.Finding_ERROR, File: bundle.TestsName, Line: int32(t.Line), Test: true,
				Message: fmt.Sprintf("%s: %s", t.Name, f),
			})
		}
	}
	for _, f := range r.Findings {
		if !f.Warning && f.Bundle == hiddenBundle {
			return refusal(connect.CodeFailedPrecondition, "it would break another bundle", findings)
		}
		if !f.Warning && f.Bundle != "" && f.Bundle != name {
			return refusal(connect.CodeFailedPrecondition, fmt.Sprintf("it would break bundle %s", f.Bundle), findings)
		}
	}
	if r.Valid() {
		return refusal(connect.CodeInvalidArgument, fmt.Sprintf("%d of %d tests failed", r.Failed(), len(r.Tests)), findings)
	}
	return refusal(connect.CodeInvalidArgument, "the bundle is not valid", findings)
}

func findingsToProto(name string, list []engine.Finding) []*cedarpostv1.Finding {
	out := make([]*cedarpostv1.Finding, 0, len(list))
	for _, f := range list {
		severity := cedarpostv1.Finding_ERROR
		if f.Warning {
			severity = cedarpostv1.Finding_WARNING
		}
		pf := &cedarpostv1.Finding{
			Severity: severity, File: f.File, Line: int32(f.Line), Column: int32(f.Column),
			Policy: f.Policy, Message: f.Message, Hint: f.Hint,
		}
		if f.Bundle != name && f.Bundle != hiddenBundle {
			pf.Bundle = f.Bundle
		}
		out = append(out, pf)
	}
	return out
}

func problemsToProto(list bundle.Problems) []*cedarpostv1.Finding {
	out := make([]*cedarpostv1.Finding, 0, len(list))
	for _, p := range list {
		out = append(out, &cedarpostv1.Finding{
			Severity: cedarpostv1.Finding_ERROR, File: p.File, Line: int32(p.Line), Column: int32(p.Column),
			Message: p.Message, Hint: p.Hint,
		})
	}
	return out
}
