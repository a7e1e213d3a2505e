package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
)

type lintCmd struct {
	Output string   `short:"o" help:"text for people, json for programs, junit for CI (default ${default})." env:"CEDARPOST_OUTPUT" enum:"text,json,junit" default:"text" placeholder:"FORMAT"`
	Server bool     `help:"Also look at what a server has stored: groups that nobody is in, and policies that decide nothing."`
	Unused moment   `name:"unused-since" help:"With --server, report policies that have determined no decision since: 2006-01-02T15:04:05Z, or 12h, 30d ago (default ${default})." default:"30d" placeholder:"TIME"`
	Dirs   []string `arg:"" optional:"" name:"dir" help:"Bundle folders (default: this folder). They are read together, as bundles of one server." type:"path"`
	adminFlags
}

// Help is the long help of lint.
func (*lintCmd) Help() string {
	return `Looks for what check accepts and is probably a mistake. docs/lint.md has the rules. bundle.yaml can switch rules off, with lint: {disable: [unused-type]}, and so can the annotation @lint_ignore("shadowed") at one policy.

Without --server, two rules are skipped, and the output says so. With it, lint reads with your rights: entities, and policies of the bundles.

With -o json, prints a line for each folder: {"bundle", "valid", "findings": [{"rule", "severity", "file", "line", "column", "policy", "message", "hint"}], "skipped": [{"rule", "reason"}]}.

Exits with 3 if a folder does not compile or validate, otherwise with 6 if there are warnings. Findings with the severity info do not count.`
}

// linted is the result for one folder.
type linted struct {
	dir      string
	Name     string        `json:"bundle"`
	Valid    bool          `json:"valid"`
	Findings []finding     `json:"findings"`
	Skipped  []skippedRule `json:"skipped"`
}

// skippedRule is a rule that was not applied, or not to everything.
type skippedRule struct {
	Rule   string `json:"rule"`
	Reason string `json:"reason"`
}

// Run lints and prints.
func (l *lintCmd) Run(ctx context.Context, c *console) error {
	if len(l.Dirs) == 0 {
		l.Dirs = []string{"."}
	}
	list, err := readFolders(l.Dirs)
	if err != nil {
		return err
	}
	var admin *peer
	if l.Server {
		if admin, err = l.dial(); err != nil {
			return err
		}
	}
	var results []linted
	code := codeOK
	for i := range list {
		r, err := l.lint(ctx, admin, list, i)
		if err != nil {
			return err
		}
		results = append(results, r)
		switch {
		case !r.Valid:
			code = codeInvalid
		case code == codeOK && slices.ContainsFunc(r.Findings, func(f finding) bool { return f.Severity == severityWarning }):
			code = codeWarnings
		}
	}
	for _, r := range results {
		switch l.Output {
		case "json":
			err = c.object(r)
		case "text":
			r.print(c)
		}
		if err != nil {
			return err
		}
	}
	if l.Output == "junit" {
		if err := writeLintJUnit(c.out, results); err != nil {
			return err
		}
	}
	if code != codeOK {
		return exitWith(code)
	}
	return nil
}

// lint applies all rules to a folder of the list. A folder that is not valid has the findings of check.
func (l *lintCmd) lint(ctx context.Context, admin *peer, list []checked, i int) (linted, error) {
	f := &list[i]
	r := linted{dir: f.dir, Name: f.Name, Findings: f.Findings, Skipped: []skippedRule{}}
	if f.bundle == nil {
		return r, nil
	}
	others := besides(list, i)
	set, found := engine.Compile(append(slices.Clone(others), offline.Source(f.bundle)), nil)
	if set == nil {
		for _, one := range found {
			if !one.Warning && (one.Bundle == "" || one.Bundle == f.Name) {
				r.Findings = append(r.Findings, elsewhere(list, findingFromEngine(one)))
			}
		}
		if len(r.Findings) == 0 {
			r.Findings = append(r.Findings, finding{Severity: severityError, Message: "is compiled together with the other folders, and one of them is not valid"})
		}
		return r, nil
	}
	r.Valid = true
	results := offline.Lint(f.bundle, others, set)
	if admin == nil {
		for _, rule := range engine.LintRules() {
			if rule.Server {
				r.skip(f.bundle, rule.ID, "it looks at what a server has stored: give --server")
			}
		}
	} else {
		stored, err := l.askServer(ctx, admin, f.bundle, set, &r)
		if err != nil {
			return r, err
		}
		results = append(results, offline.Enabled(f.bundle, set.WithoutIgnored(f.Name, stored))...)
	}
	for _, one := range results {
		out := findingFromEngine(one.Finding)
		out.Rule, out.Severity = one.Rule, severityInfo
		if one.Warning {
			out.Severity = severityWarning
		}
		r.Findings = append(r.Findings, out)
	}
	return r, nil
}

// skip notes that a rule was not applied, unless the bundle switches it off.
func (r *linted) skip(b *bundle.Bundle, rule, reason string) {
	if !slices.Contains(b.LintDisabled, rule) {
		r.Skipped = append(r.Skipped, skippedRule{rule, reason})
	}
}

// askServer applies the rules about what is stored.
func (l *lintCmd) askServer(ctx context.Context, admin *peer, b *bundle.Bundle, set *engine.Set, r *linted) ([]engine.LintFinding, error) {
	var found []engine.LintFinding
	for rule, apply := range map[string]func() ([]engine.LintFinding, string, error){
		engine.RuleEmptyGroup:   func() ([]engine.LintFinding, string, error) { return emptyGroups(ctx, admin, set, b.Name) },
		engine.RuleUnusedPolicy: func() ([]engine.LintFinding, string, error) { return l.unusedPolicies(ctx, admin, set, b.Name) },
	} {
		if slices.Contains(b.LintDisabled, rule) {
			continue
		}
		list, rest, err := apply()
		if e := (*connect.Error)(nil); errors.As(err, &e) && (e.Code() == connect.CodePermissionDenied || e.Code() == connect.CodeInvalidArgument) {
			rest = e.Message() // a right is missing, or the server does not know this version of the schema
		} else if err != nil {
			return nil, admin.explain(err)
		}
		if found = append(found, list...); rest != "" {
			r.skip(b, rule, rest)
		}
	}
	slices.SortFunc(found, func(a, b engine.LintFinding) int { return strings.Compare(a.String(), b.String()) })
	slices.SortFunc(r.Skipped, func(a, b skippedRule) int { return strings.Compare(a.Rule, b.Rule) })
	return found, nil
}

// maxGroupReads bounds the calls that look for members of groups. The server records each in its log.
const maxGroupReads = 500

// emptyGroups finds the groups in policies that nobody is in. rest says what it did not look at.
func emptyGroups(ctx context.Context, admin *peer, set *engine.Set, name string) (found []engine.LintFinding, rest string, err error) {
	reads := 0
	groups := set.GroupMentions(name)
	for i, group := range groups {
		members := false
		for _, typ := range set.TypesBelow(group.UID.Type) {
			if reads++; reads > maxGroupReads {
				return found, fmt.Sprintf("the last %d of %d groups are not looked at: that would take more than %d reads", len(groups)-i, len(groups), maxGroupReads), nil
			}
			some, err := hasMembers(ctx, admin, group, typ)
			if err != nil {
				return found, "", err
			}
			if members = some; members {
				break
			}
		}
		if !members {
			found = append(found, group.Empty())
		}
	}
	return found, "", nil
}

func hasMembers(ctx context.Context, admin *peer, group engine.Mention, typ string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := admin.entities().ListEntities(ctx, &cedarpostv1.ListEntitiesRequest{
		Type: typ, Ancestor: &cedarpostv1.EntityUid{Type: string(group.UID.Type), Id: string(group.UID.ID)}, PageSize: 1,
	})
	return len(res.GetEntities()) > 0, err
}

// unusedPolicies finds the policies that are live with the same text and have determined no decision. rest
// says how many of them have been counted for too short a time.
func (l *lintCmd) unusedPolicies(ctx context.Context, admin *peer, set *engine.Set, name string) (found []engine.LintFinding, rest string, err error) {
	tooNew := 0
	req := &cedarpostv1.ListPoliciesRequest{Bundle: name, UnusedSince: l.Unused.timestamp(), PageSize: 1000}
	for {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		res, err := admin.policies().ListPolicies(ctx, req)
		cancel()
		if err != nil {
			return nil, "", err
		}
		for _, p := range res.GetPolicies() {
			if f, ok := set.Unused(name, p.GetId(), p.GetText(), l.Unused.UTC().Format(time.RFC3339)); ok {
				found = append(found, f)
			}
		}
		tooNew += int(res.GetTooNew())
		if req.PageToken = res.GetNextPageToken(); req.PageToken == "" {
			break
		}
	}
	if tooNew > 0 {
		rest = fmt.Sprintf("decisions have been counted for %s since a later time", count(tooNew, "policy", "policies"))
	}
	return found, rest, nil
}

func (r *linted) print(c *console) {
	c.printFindings(c.out, r.dir, r.Findings)
	warnings, infos := 0, 0
	for _, f := range r.Findings {
		switch f.Severity {
		case severityWarning:
			warnings++
		case severityInfo:
			infos++
		}
	}
	for _, s := range r.Skipped {
		fmt.Fprintf(c.out, "%s: skipped %s: %s\n", clean(r.Name), s.Rule, clean(s.Reason))
	}
	switch {
	case !r.Valid:
		fmt.Fprintf(c.out, "%s: %s\n", clean(r.Name), c.paint(red, "not valid"))
	case warnings > 0:
		fmt.Fprintf(c.out, "%s: %s, %d for information\n", clean(r.Name), c.paint(yellow, count(warnings, "warning", "warnings")), infos)
	default:
		fmt.Fprintf(c.out, "%s: %s, %d for information\n", clean(r.Name), c.paint(green, "no warnings"), infos)
	}
}
