package main

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
)

type checkCmd struct {
	Output string   `short:"o" help:"text for people, json for programs, junit for CI (default ${default})." env:"CEDARPOST_OUTPUT" enum:"text,json,junit" default:"text" placeholder:"FORMAT"`
	Before []string `help:"A bundle folder as it was before, such as that of the main branch: what breaks callers since then is a warning; can be given several times." placeholder:"DIR" type:"path" sep:"none"`
	Dirs   []string `arg:"" name:"dir" help:"Bundle folders. They are checked together, as bundles of one server." type:"path"`
	proveFlags
	adminFlags
}

// Help is the long help of check.
func (*checkCmd) Help() string {
	return `Compiles and validates each folder as apply does on the server, and runs its tests.yaml on its entities.json. Needs no server and no database, except --prove.

--prove compares with the live version, or with the folder of --against, and proves that nobody can do more. If each permit was there before and each forbid stays, the policies show it. Otherwise the analysis of Cedar's own command line decides (--cedar), and gives an example where somebody can do more. docs/lint.md says what is proven.

With -o json, prints a line for each folder: {"bundle", "valid", "findings": [{"severity", "file", "line", "column", "policy", "message", "hint"}], "tests": [{"name", "line", "passed", "failures"}], "testsNotRun": their number, "ignored": [paths that are not part of the bundle]}. valid depends on the findings of the folder alone. No test is run if this folder, or one that is checked together with it, is not valid. With -o junit, prints JUnit XML with a suite for each folder.

Exits with 3 if a folder does not compile or validate, otherwise with 4 if a test failed, otherwise with --prove with 7 if somebody can do more, otherwise with 8 if that is not known.`
}

// checked is the result for one folder.
type checked struct {
	dir      string
	bundle   *bundle.Bundle // nil if it cannot be read
	Name     string         `json:"bundle"`
	Valid    bool           `json:"valid"`
	Findings []finding      `json:"findings"`
	Tests    []testOutcome  `json:"tests"`
	NotRun   int            `json:"testsNotRun,omitempty"` // tests of a bundle that does not compile, or not with the others
	Proof    *proof         `json:"proof,omitempty"`
	Ignored  []string       `json:"ignored"`
	compiled bool           // together with the others
}

type testOutcome struct {
	Name     string   `json:"name"`
	Line     int      `json:"line"`
	Passed   bool     `json:"passed"`
	Failures []string `json:"failures,omitempty"`
}

// Run checks and prints.
func (k *checkCmd) Run(ctx context.Context, c *console) error {
	list, err := readFolders(k.Dirs)
	if err != nil {
		return err
	}
	before, err := readFolders(k.Before)
	if err != nil {
		return err
	}
	for _, f := range before {
		if f.bundle == nil {
			f.print(c)
			return fmt.Errorf("--before %s cannot be read as a bundle", f.dir)
		}
		if !slices.ContainsFunc(list, func(o checked) bool { return o.Name == f.Name }) {
			return misuse("--before %s is the bundle %q, and no folder that is checked is", f.dir, f.Name)
		}
	}
	checkTogether(list, before)
	if k.Prove {
		if err := k.prove(ctx, list); err != nil {
			return err
		}
	} else if k.Against != "" {
		return misuse("--against needs --prove")
	}
	code := codeOK
	for i := range list {
		f := &list[i]
		f.Valid = severe(f.Findings) == codeOK
		worst := f.Proof.code()
		switch {
		case !f.Valid:
			worst = codeInvalid
		case f.failed() > 0:
			worst = codeTests
		}
		if code == codeOK || worst != codeOK && worst < code {
			code = worst
		}
		switch k.Output {
		case "json":
			if err := c.object(f); err != nil {
				return err
			}
		case "text":
			f.print(c)
		}
	}
	if k.Output == "junit" {
		if err := writeJUnit(c.out, list); err != nil {
			return err
		}
	}
	if code != codeOK {
		return exitWith(code)
	}
	return nil
}

// readFolders reads the folders. What cannot be read becomes a finding of its folder.
func readFolders(dirs []string) ([]checked, error) {
	var list []checked
	for _, dir := range dirs {
		f := checked{dir: relative(dir), Name: filepath.Base(dir), Findings: []finding{}, Tests: []testOutcome{}, Ignored: []string{}}
		b, err := readBundle(dir, "")
		if f.Findings = append(f.Findings, findingsFromError(err)...); err != nil && len(f.Findings) == 0 {
			return nil, err
		}
		if b != nil {
			f.Name, f.bundle, f.Ignored = b.Name, b, append(f.Ignored, b.Ignored...)
			if i := slices.IndexFunc(list, func(o checked) bool { return o.bundle != nil && o.Name == b.Name }); i >= 0 {
				return nil, misuse("%s and %s are both the bundle %q", list[i].dir, f.dir, b.Name)
			}
		}
		list = append(list, f)
	}
	return list, nil
}

// checkTogether checks each bundle together with the other ones. As in the server, admin-local is
// checked with the built-in bundle admin, and no other bundle is checked with it. before has earlier states
// of some of them.
func checkTogether(list, before []checked) {
	for i := range list {
		f := &list[i]
		if f.bundle == nil {
			continue
		}
		others := besides(list, i)
		report, set := offline.Check(f.bundle, others, nil)
		for _, found := range report.Findings {
			// The check of another bundle reports its own findings.
			if found.Bundle == "" || found.Bundle == f.Name {
				f.Findings = append(f.Findings, elsewhere(list, findingFromEngine(found)))
			}
		}
		f.Findings = distinct(f.Findings)
		f.compiled = set != nil
		f.NotRun = len(f.bundle.Tests) - len(report.Tests)
		f.Findings = append(f.Findings, freezeWarnings(f.bundle, time.Now())...)
		if i := slices.IndexFunc(before, func(o checked) bool { return o.Name == f.Name }); i >= 0 && set != nil {
			f.Findings = append(f.Findings, breaking(set, before[i], others)...)
		}
		for _, t := range report.Tests {
			f.Tests = append(f.Tests, testOutcome{t.Name, t.Line, len(t.Failures) == 0, t.Failures})
		}
	}
}

// undeclared matches a finding about an entity type that no schema declares, with its namespace.
var undeclared = regexp.MustCompile("(?:undefined (?:entity )?type \"|unrecognized entity type `)(" + namespaced + ")::[A-Za-z_0-9]+[\"`]")

const namespaced = `[A-Za-z_0-9]+(?:::[A-Za-z_0-9]+)*`

// elsewhere adds a hint to a finding about a type whose namespace is in none of the folders: another folder
// may declare it.
func elsewhere(list []checked, f finding) finding {
	m := undeclared.FindStringSubmatch(f.Message)
	if m == nil {
		return f
	}
	own := regexp.MustCompile(`(?:\bnamespace\s+|")` + regexp.QuoteMeta(m[1]) + `\b`)
	for i := range list {
		if b := list[i].bundle; b != nil && slices.ContainsFunc(b.Schemas, func(s bundle.File) bool { return own.Match(s.Content) }) {
			return f
		}
	}
	f.Hint = fmt.Sprintf("if another bundle has the namespace %s, check its folder together with this one: cedarpost check DIR DIR", m[1])
	return f
}

// besides returns the sources that a bundle of the list is compiled with.
func besides(list []checked, i int) (others []engine.Source) {
	if list[i].Name == engine.AdminLocal {
		return []engine.Source{access.AdminSource()}
	}
	for j := range list {
		if j != i && list[j].bundle != nil && list[j].Name != engine.AdminLocal {
			others = append(others, offline.Source(list[j].bundle))
		}
	}
	return others
}

// freezeWarnings warns of freeze windows of a bundle that hold at a moment: an apply would be refused.
func freezeWarnings(b *bundle.Bundle, at time.Time) (found []finding) {
	for _, w := range b.Freeze {
		if in, end, _, err := w.Holds(at); err == nil && in {
			found = append(found, finding{Severity: severityWarning, File: bundle.ManifestName, Message: fmt.Sprintf("it is not published in its freeze window %s, which is now and until %s", w.Text(), end.Format(time.RFC3339))})
		}
	}
	return found
}

// breaking returns a warning for each part of a compiled bundle that breaks callers who ask as they did
// before.
func breaking(set *engine.Set, before checked, others []engine.Source) (list []finding) {
	old, found := engine.Compile(append(slices.Clone(others), offline.Source(before.bundle)), nil)
	if old == nil {
		return []finding{findingFromEngine(engine.Finding{Warning: true, Message: fmt.Sprintf("what breaks callers is not known: the bundle in %s is not valid: %s", before.dir, found[0])})}
	}
	for _, b := range set.Breaks(old) {
		f := engine.Finding{Warning: true, File: b.File, Line: b.Line, Column: b.Column, Message: "breaks callers: " + b.Message, Hint: b.Hint}
		if b.Field {
			f.File = bundle.FieldsName
		}
		list = append(list, findingFromEngine(f))
	}
	return list
}

func (f *checked) failed() int {
	n := 0
	for _, t := range f.Tests {
		if !t.Passed {
			n++
		}
	}
	return n
}

// notRun says what was left out because the bundles do not compile together.
func (f *checked) notRun() string {
	if f.NotRun == 0 {
		return "not checked to the end"
	}
	return count(f.NotRun, "test", "tests") + " not run"
}

func (f *checked) print(c *console) {
	c.printFindings(c.out, f.dir, f.Findings)
	c.printIgnored(f.Name, f.Ignored)
	tests := filepath.Join(f.dir, bundle.TestsName)
	for _, t := range f.Tests {
		if t.Passed {
			continue
		}
		fmt.Fprintf(c.out, "%s:%d: %s: %s\n", clean(tests), t.Line, c.paint(red, "test failed"), clean(t.Name))
		for _, failure := range t.Failures {
			fmt.Fprintf(c.out, "  %s\n", clean(failure))
		}
	}
	switch {
	case !f.Valid:
		fmt.Fprintf(c.out, "%s: %s\n", clean(f.Name), c.paint(red, "not valid"))
	case f.failed() > 0:
		fmt.Fprintf(c.out, "%s: compiles, but %s\n", clean(f.Name), c.paint(red, fmt.Sprintf("%d of %d tests failed", f.failed(), len(f.Tests))))
	case f.bundle != nil && !f.compiled:
		fmt.Fprintf(c.out, "%s: valid, %s, because a folder that it is checked together with is not valid\n", clean(f.Name), c.paint(yellow, f.notRun()))
	case len(f.Tests) == 0:
		fmt.Fprintf(c.out, "%s: %s, no tests\n", clean(f.Name), c.paint(green, "valid"))
	default:
		fmt.Fprintf(c.out, "%s: %s, %s passed\n", clean(f.Name), c.paint(green, "valid"), count(len(f.Tests), "test", "tests"))
	}
	f.Proof.print(c, f.Name)
}

// relative returns the path relative to the current folder, if it is inside of that folder.
func relative(dir string) string {
	here, err := filepath.Abs(".")
	if err != nil {
		return dir
	}
	if r, err := filepath.Rel(here, dir); err == nil && filepath.IsLocal(r) {
		return r
	}
	return dir
}
