package main

import (
	"encoding/xml"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/server/engine"
)

// CI systems read test results as JUnit XML. Each folder is a suite, with a case for each test and
// one for the findings of the folder.
type (
	junitSuites struct {
		XMLName xml.Name     `xml:"testsuites"`
		Suites  []junitSuite `xml:"testsuite"`
	}
	junitSuite struct {
		Name     string      `xml:"name,attr"`
		Tests    int         `xml:"tests,attr"`
		Failures int         `xml:"failures,attr"`
		Cases    []junitCase `xml:"testcase"`
	}
	junitCase struct {
		Name     string         `xml:"name,attr"`
		Class    string         `xml:"classname,attr"`
		File     string         `xml:"file,attr"`
		Line     int            `xml:"line,attr,omitempty"`
		Failures []junitFailure `xml:"failure"`
		Skipped  *junitFailure  `xml:"skipped"`
	}
	junitFailure struct {
		Message string `xml:"message,attr"`
	}
)

// writeJUnit prints the results as JUnit XML.
func writeJUnit(w io.Writer, list []checked) error {
	var out junitSuites
	for i := range list {
		f := &list[i]
		compiles := junitCase{Name: "compiles and validates", Class: f.Name, File: f.dir}
		for _, found := range f.Findings {
			if found.Severity == severityError {
				compiles.Failures = append(compiles.Failures, junitFailure{fmt.Sprintf("%s:%d:%d: %s", found.File, found.Line, found.Column, found.Message)})
			}
		}
		suite := junitSuite{Name: f.Name, Cases: []junitCase{compiles}}
		for _, t := range f.Tests {
			one := junitCase{Name: t.Name, Class: f.Name, File: filepath.Join(f.dir, bundle.TestsName), Line: t.Line}
			for _, failure := range t.Failures {
				one.Failures = append(one.Failures, junitFailure{failure})
			}
			suite.Cases = append(suite.Cases, one)
		}
		if f.NotRun > 0 {
			for _, t := range f.bundle.Tests {
				suite.Cases = append(suite.Cases, junitCase{Name: t.Name, Class: f.Name, File: filepath.Join(f.dir, bundle.TestsName), Line: t.Line,
					Skipped: &junitFailure{"not run: this folder, or one that is checked together with it, is not valid"}})
			}
		}
		if p := f.Proof; p != nil {
			one := junitCase{Name: "nobody can do more", Class: f.Name, File: f.dir}
			if p.Reason != "" {
				one.Failures = append(one.Failures, junitFailure{"not proven: " + p.Reason})
			}
			for _, k := range p.Cases {
				one.Failures = append(one.Failures, junitFailure{fmt.Sprintf("%s on %s by %s: %s %s%s", k.Action, k.Resource, k.Principal, k.Outcome, k.Counterexample, k.Reason)})
			}
			suite.Cases = append(suite.Cases, one)
		}
		out.add(suite)
	}
	return out.write(w)
}

// writeLintJUnit prints the results of lint as JUnit XML, with a case for each rule and one for the findings
// of a folder that is not valid. Findings for information are no failures.
func writeLintJUnit(w io.Writer, list []linted) error {
	var out junitSuites
	for _, r := range list {
		cases := []junitCase{{Name: "compiles and validates", Class: r.Name, File: r.dir}}
		for _, rule := range engine.LintRules() {
			cases = append(cases, junitCase{Name: rule.ID, Class: r.Name, File: r.dir})
		}
		for _, f := range r.Findings {
			i := max(slices.IndexFunc(cases, func(k junitCase) bool { return k.Name == f.Rule }), 0)
			if f.Severity != severityInfo {
				cases[i].Failures = append(cases[i].Failures, junitFailure{fmt.Sprintf("%s:%d:%d: %s", f.File, f.Line, f.Column, f.Message)})
			}
		}
		for i := range cases {
			for _, s := range r.Skipped {
				if s.Rule == cases[i].Name && cases[i].Failures == nil {
					cases[i].Skipped = &junitFailure{s.Reason}
				}
			}
		}
		out.add(junitSuite{Name: r.Name, Cases: cases})
	}
	return out.write(w)
}

// add adds a suite, and counts its cases.
func (out *junitSuites) add(suite junitSuite) {
	for _, k := range suite.Cases {
		suite.Tests++
		if len(k.Failures) > 0 {
			suite.Failures++
		}
	}
	out.Suites = append(out.Suites, suite)
}

func (out *junitSuites) write(w io.Writer) error {
	if _, err := io.WriteString(w, xml.Header); err != nil {
		return err
	}
	e := xml.NewEncoder(w)
	e.Indent("", "  ")
	if err := e.Encode(out); err != nil {
		return err
	}
	_, err := io.WriteString(w, "\n")
	return err
}
