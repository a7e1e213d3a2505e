package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
)

// finding is a problem in a bundle folder, as text and as JSON. File is relative to the folder.
type finding struct {
	Severity string `json:"severity"`
	File     string `json:"file,omitempty"`
	Line     int    `json:"line,omitempty"`
	Column   int    `json:"column,omitempty"`
	Policy   string `json:"policy,omitempty"`
	Message  string `json:"message"`
	Hint     string `json:"hint,omitempty"`
	Bundle   string `json:"bundle,omitempty"` // if the finding is in another bundle
	Rule     string `json:"rule,omitempty"`   // of lint
	test     bool   // a failed test
}

const (
	severityError   = "error"
	severityWarning = "warning"
	severityInfo    = "info"
)

func findingFromEngine(f engine.Finding) finding {
	out := finding{Severity: severityError, File: f.File, Line: f.Line, Column: f.Column, Policy: f.Policy, Message: f.Message, Hint: f.Hint}
	if f.Warning {
		out.Severity = severityWarning
	}
	return out
}

func findingsFromProto(list []*cedarpostv1.Finding) []finding {
	out := make([]finding, len(list))
	for i, f := range list {
		out[i] = finding{
			Severity: severityError, File: f.GetFile(), Line: int(f.GetLine()), Column: int(f.GetColumn()),
			Policy: f.GetPolicy(), Message: f.GetMessage(), Hint: f.GetHint(), Bundle: f.GetBundle(), test: f.GetTest(),
		}
		if f.GetSeverity() == cedarpostv1.Finding_WARNING {
			out[i].Severity = severityWarning
		}
	}
	return out
}

// findingsFromError returns the problems that reading a folder found. Other errors are not
// findings.
func findingsFromError(err error) []finding {
	var out []finding
	problems, _ := errors.AsType[bundle.Problems](err)
	for _, p := range problems {
		out = append(out, finding{Severity: severityError, File: p.File, Line: p.Line, Column: p.Column, Message: p.Message, Hint: p.Hint})
	}
	return out
}

// distinct leaves out repeated findings, such as those about a type that a declaration uses twice.
func distinct(list []finding) []finding {
	seen := map[finding]bool{}
	out := []finding{}
	for _, f := range list {
		if !seen[f] {
			seen[f] = true
			out = append(out, f)
		}
	}
	return out
}

// printFindings prints findings in the form of compiler errors, whose paths editors can open.
func (c *console) printFindings(w io.Writer, dir string, list []finding) {
	for _, f := range distinct(list) {
		where := filepath.Join(dir, f.File)
		if f.Bundle != "" {
			where = strings.TrimSuffix("bundle "+f.Bundle+": "+f.File, ": ")
		}
		if f.Line > 0 {
			where += fmt.Sprintf(":%d", f.Line)
			if f.Column > 0 {
				where += fmt.Sprintf(":%d", f.Column)
			}
		}
		severity := c.paint(red, f.Severity)
		switch f.Severity {
		case severityWarning:
			severity = c.paint(yellow, f.Severity)
		case severityInfo:
			severity = f.Severity
		}
		policy := ""
		if f.Policy != "" {
			policy = "policy " + f.Policy + ": "
		}
		rule := ""
		if f.Rule != "" {
			rule = " [" + f.Rule + "]"
		}
		fmt.Fprintf(w, "%s: %s: %s\n", clean(where), severity, clean(policy+f.Message+rule))
		if f.Hint != "" {
			fmt.Fprintf(w, "  hint: %s\n", clean(f.Hint))
		}
	}
}

// maxIgnored bounds the paths that a line names.
const maxIgnored = 10

// printIgnored names the paths in a folder that are not part of the bundle.
func (c *console) printIgnored(name string, paths []string) {
	if len(paths) == 0 {
		return
	}
	more := ""
	if n := len(paths) - maxIgnored; n > 0 {
		paths, more = paths[:maxIgnored], fmt.Sprintf(" and %d more", n)
	}
	fmt.Fprintf(c.out, "%s: not part of the bundle: %s%s\n", clean(name), clean(strings.Join(paths, ", ")), more)
}

// severe returns the exit code for findings. It is codeOK if all are warnings.
func severe(list []finding) int {
	code := codeOK
	for _, f := range list {
		switch {
		case f.Severity != severityError:
		case !f.test:
			return codeInvalid
		default:
			code = codeTests
		}
	}
	return code
}

// refusedFolder returns the error of a command whose folder cannot be read. What is wrong in its files is
// printed, as JSON also on stdout, in the form of a refusal by the server.
func (c *console) refusedFolder(dir string, err error, asJSON bool) error {
	found := findingsFromError(err)
	if len(found) == 0 {
		return err
	}
	if asJSON {
		refused := &cedarpostv1.BundleFindings{}
		for _, f := range found {
			refused.Findings = append(refused.Findings, &cedarpostv1.Finding{Severity: cedarpostv1.Finding_ERROR, File: f.File, Line: int32(f.Line), Column: int32(f.Column), Message: f.Message, Hint: f.Hint})
		}
		if err := c.message(refused); err != nil {
			return err
		}
	}
	c.printFindings(c.err, relative(dir), found)
	return &exitError{codeInvalid, errors.New("the folder cannot be read as a bundle; nothing was sent")}
}

// readBundle reads a folder. A name replaces the name of the folder, unless it is empty. It is an error if
// bundle.yaml has another name.
func readBundle(dir, name string) (*bundle.Bundle, error) {
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return nil, misuse("%s is a file: give the folder of the bundle, %s", relative(dir), relative(filepath.Dir(dir)))
	}
	if name == "" {
		return bundle.ReadDir(dir)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	defer root.Close()
	b, err := bundle.Read(root.FS(), name)
	if err == nil && b.Name != name {
		return nil, fmt.Errorf("%s names the bundle %s, and --name says %s", filepath.Join(relative(dir), bundle.ManifestName), b.Name, name)
	}
	return b, err
}
