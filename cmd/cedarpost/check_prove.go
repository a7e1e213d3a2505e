package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
)

// proveFlags say what a folder is compared with, and by which program.
type proveFlags struct {
	Prove     bool   `help:"Prove that nobody can do more than by the live version."`
	Against   string `help:"With --prove: compare with this folder, and not with the live version." type:"path" placeholder:"DIR"`
	Cedar     string `help:"The command line of Cedar, built with its analysis, for --prove (default ${default}). docs/lint.md says how to install it." env:"CEDARPOST_CEDAR" default:"cedar" placeholder:"PROGRAM"`
	ProveTime span   `name:"prove-timeout" help:"How long --prove may take (default ${default})." default:"5m" placeholder:"DURATION"`
}

// The outcomes of a proof.
const (
	proven    = "proven"
	allowMore = "more"
	notProven = "unknown"
)

// proof says whether a folder lets nobody do more.
type proof struct {
	Outcome string `json:"outcome"`
	// Reason says why nothing is proven about the bundle at all.
	Reason string      `json:"reason,omitempty"`
	Cases  []proofCase `json:"cases"`
}

// proofCase is a combination of action, principal type and resource type that is not proven.
type proofCase struct {
	Action         string `json:"action"`
	Principal      string `json:"principal"`
	Resource       string `json:"resource"`
	Outcome        string `json:"outcome"`
	Counterexample string `json:"counterexample,omitempty"`
	Reason         string `json:"reason,omitempty"`
}

// prove compares each valid folder with the live version, or one with --against.
func (k *checkCmd) prove(ctx context.Context, list []checked) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(k.ProveTime))
	defer cancel()
	var against *bundle.Bundle
	if k.Against != "" {
		var err error
		if against, err = readBundle(k.Against, ""); err != nil {
			return fmt.Errorf("--against: %w", err)
		}
		if !slices.ContainsFunc(list, func(f checked) bool { return f.Name == against.Name }) {
			return misuse("--against has the bundle %q, and none of the folders has", against.Name)
		}
	}
	for i := range list {
		f := &list[i]
		if severe(f.Findings) != codeOK || f.bundle == nil || against != nil && f.Name != against.Name {
			continue
		}
		f.Proof = &proof{Outcome: notProven, Cases: []proofCase{}}
		before := against
		if before == nil {
			admin, err := k.dial()
			if err != nil {
				return err
			}
			_, files, err := liveBundle(ctx, admin, f.Name)
			if connect.CodeOf(err) == connect.CodeNotFound {
				f.Proof.Reason = "no version is live, so there is nothing to compare with"
				continue
			}
			if err != nil {
				return admin.explain(err)
			}
			if before, err = bundle.FromFiles(f.Name, files); err != nil {
				f.Proof.Reason = "this program cannot read the live version: " + err.Error()
				continue
			}
		}
		k.proveOne(ctx, f, before, besides(list, i))
	}
	return nil
}

// proveOne compares one folder with an earlier state.
func (k *checkCmd) proveOne(ctx context.Context, f *checked, before *bundle.Bundle, others []engine.Source) {
	if f.Name == engine.Guardrails || f.Name == engine.AdminLocal {
		f.Proof.Reason = "its forbids join the decisions of other bundles"
		return
	}
	old, _ := engine.Load(append(slices.Clone(others), offline.Source(before)), nil)
	sources := append(slices.Clone(others), offline.Source(f.bundle))
	now, _ := engine.Load(sources, nil)
	if old == nil || now == nil {
		f.Proof.Reason = "the earlier version does not compile together with the folders"
		return
	}
	f.Proof.Outcome = proven
	open := engine.Widenings(old, now, f.Name)
	for i, w := range open {
		c := proofCase{Action: w.Action.String(), Principal: string(w.Principal), Resource: string(w.Resource), Outcome: notProven, Reason: w.Unprovable}
		if c.Reason == "" {
			c.Outcome, c.Counterexample, c.Reason = k.ask(ctx, sources, w)
		}
		switch {
		case c.Outcome == proven:
			continue
		case c.Outcome == allowMore || f.Proof.Outcome == proven:
			f.Proof.Outcome = c.Outcome
		}
		f.Proof.Cases = append(f.Proof.Cases, c)
		if left := len(open) - i - 1; left > 0 && (ctx.Err() != nil || c.Reason == k.notInstalled()) {
			f.Proof.Reason = fmt.Sprintf("%d more combinations of action, principal type and resource type are not looked at", left)
			return
		}
	}
}

// notInstalled is the reason if the command line of Cedar is missing.
func (k *checkCmd) notInstalled() string {
	return fmt.Sprintf("the command line of Cedar is not installed (%s; --cedar names another program)", k.Cedar)
}

// ask has the analysis tools decide about one combination.
func (k *checkCmd) ask(ctx context.Context, sources []engine.Source, w engine.Widening) (outcome, counterexample, reason string) {
	dir, err := os.MkdirTemp("", "cedarpost-prove-")
	if err != nil {
		return notProven, "", err.Error()
	}
	defer os.RemoveAll(dir)
	write := func(name string, texts []string) string {
		file := filepath.Join(dir, name)
		if err == nil {
			err = os.WriteFile(file, []byte(strings.Join(texts, "\n")+"\n"), 0o600)
		}
		return file
	}
	var schemas []string
	for _, s := range sources {
		schemas = append(schemas, s.Schema)
	}
	schema := write("schema.cedarschema", schemas)
	run := func(question ...string) (outcome, counterexample, reason string) {
		if err != nil {
			return notProven, "", err.Error()
		}
		args := append([]string{
			"symcc", "--principal-type", string(w.Principal), "--action", w.Action.String(), "--resource-type", string(w.Resource), "--schema", schema,
		}, question...)
		return k.runCedar(ctx, args)
	}
	for i, text := range w.Failing {
		file := write(fmt.Sprintf("failing%d.cedar", i), []string{text})
		switch outcome, _, reason := run("never-errors", "--policies", file); outcome {
		case allowMore:
			return notProven, "", "a forbid of the earlier version can fail, and then it denies, which the tools do not look at:\n" + text
		case notProven:
			return notProven, "", reason
		}
	}
	return run("implies", "--policies1", write("after.cedar", w.After), "--policies2", write("before.cedar", w.Before))
}

// runCedar runs the command line of Cedar, and reads its answer: VERIFIED, or DOES NOT HOLD and a
// counterexample. See command/symcc.rs of the crate cedar-policy-cli.
func (k *checkCmd) runCedar(ctx context.Context, args []string) (outcome, counterexample, reason string) {
	cmd := exec.CommandContext(ctx, k.Cedar, args...)
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	text := out.String()
	switch {
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, os.ErrNotExist):
		return notProven, "", k.notInstalled()
	case ctx.Err() != nil:
		return notProven, "", "it took longer than --prove-timeout"
	case err != nil:
		return notProven, "", fmt.Sprintf("%s: %v: %s", k.Cedar, err, firstLines(errs.String(), 4))
	case strings.Contains(text, ": VERIFIED"):
		return proven, "", ""
	case strings.Contains(text, ": DOES NOT HOLD"):
		_, example, _ := strings.Cut(text, "Counterexample found:\n")
		return allowMore, inWords(strings.TrimSpace(example)), ""
	}
	return notProven, "", fmt.Sprintf("%s answered neither yes nor no: %s", k.Cedar, firstLines(text, 4))
}

var exampleQuestion = regexp.MustCompile(`^principal: (.*), action: (.*), resource: (.*)\ncontext: (.*)(?:\nentities: \[\n((?s:.*)))?$`)

// inWords rewrites a counterexample of Cedar's command line, and leaves out actions and entities without
// attributes and groups, which say nothing. A text of another form stays as it is.
func inWords(example string) string {
	m := exampleQuestion.FindStringSubmatch(example)
	if m == nil {
		return example
	}
	out := fmt.Sprintf("%s may do %s on %s with the context %s", m[1], m[2], m[3], m[4])
	var entities []string
	item := ""
	for line := range strings.Lines(m[5]) {
		item += line
		if !strings.HasPrefix(line, "  ") || strings.HasPrefix(line, "   ") || !strings.HasSuffix(line, ",\n") {
			continue // an entity is indented by two, its attributes by four
		}
		name, _, _ := strings.Cut(strings.TrimSpace(item), `::"`)
		if name != "Action" && !strings.HasSuffix(name, "::Action") && (strings.Contains(item, " in [") || strings.Contains(item, " {\n")) {
			entities = append(entities, strings.TrimSuffix(item, ",\n"))
		}
		item = ""
	}
	slices.Sort(entities)
	if len(entities) > 0 {
		out += ", if these are stored:\n" + strings.Join(entities, "\n")
	}
	return out
}

// firstLines returns the first lines of a text that are not empty, on one line.
func firstLines(text string, n int) string {
	var lines []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && len(lines) < n {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, " ")
}

// code is the exit code of a proof.
func (p *proof) code() int {
	switch {
	case p == nil || p.Outcome == proven:
		return codeOK
	case p.Outcome == allowMore:
		return codeMore
	}
	return codeNotProven
}

func (p *proof) print(c *console, name string) {
	switch {
	case p == nil:
		return
	case p.Outcome == proven:
		fmt.Fprintf(c.out, "%s: %s that nobody can do more\n", clean(name), c.paint(green, "proven"))
	case p.Reason != "":
		fmt.Fprintf(c.out, "%s: %s: %s\n", clean(name), c.paint(yellow, "not proven"), clean(p.Reason))
	}
	for _, k := range p.Cases {
		where := fmt.Sprintf("%s: %s on %s by %s", name, k.Action, k.Resource, k.Principal)
		if k.Outcome == allowMore {
			fmt.Fprintf(c.out, "%s: %s than before, for example:\n", clean(where), c.paint(red, "allows more"))
			for line := range strings.Lines(k.Counterexample) {
				fmt.Fprintf(c.out, "    %s\n", clean(strings.TrimRight(line, "\n")))
			}
			continue
		}
		fmt.Fprintf(c.out, "%s: %s: %s\n", clean(where), c.paint(yellow, "not proven"), clean(strings.ReplaceAll(k.Reason, "\n", " ")))
	}
}
