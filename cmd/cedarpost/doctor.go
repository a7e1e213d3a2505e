package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

type doctorCmd struct {
	serveCmd     `set:"loglevel=info"`
	WitnessState string `help:"File of audit witness --state, or a copy of it: doctor compares its newest checkpoint with the log." env:"CEDARPOST_WITNESS_STATE" type:"path" placeholder:"FILE"`
	outputFlags
}

// Help is the long help of doctor.
func (*doctorCmd) Help() string {
	return `Takes the settings of serve, in the same flags, variables and file, and checks each one, the database, the certificates, the files with secrets, the clock and the signing of the log. It changes nothing, except that it makes the checkpoint file if it is missing and signs a meaningless text to try the audit keys. Servers may run meanwhile.

Prints for each check pass, warn or fail with the reason and what to do. Exits with 0 if all pass, with 6 if there are warnings, with 1 if a check fails, and with 2 if a setting has a value that it cannot have. serve starts with warnings, and refuses most of what fails.`
}

// The results of a check, from the best to the worst.
const (
	statusPass = "pass"
	statusWarn = "warn"
	statusFail = "fail"
)

// diagnosis is the result of one check.
type diagnosis struct {
	// Check is what was checked: the name of a setting, or of another subject.
	Check  string `json:"check"`
	Status string `json:"status"`
	// Detail is the reason, or the value that passed. Mend is what to do, if the check did not pass.
	Detail string `json:"detail"`
	Mend   string `json:"mend,omitempty"`
}

func pass(check, format string, args ...any) diagnosis {
	return diagnosis{check, statusPass, fmt.Sprintf(format, args...), ""}
}

func warn(check, mend, format string, args ...any) diagnosis {
	return diagnosis{check, statusWarn, fmt.Sprintf(format, args...), mend}
}

func fail(check, mend string, err error) diagnosis {
	return diagnosis{check, statusFail, err.Error(), mend}
}

// Run checks.
func (d *doctorCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	found := d.checkSettings(k)
	found = append(found, d.checkFiles()...)
	found = append(found, d.checkDatabase(ctx, k)...)
	// A setting without a check of its own has a valid value, or the command line was refused.
	values := settingsOf(k)
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if !slices.ContainsFunc(found, func(f diagnosis) bool { return f.Check == name }) {
			found = append(found, pass(name, "%s", cmpText(values[name], "(not set)")))
		}
	}
	worst := statusPass
	for _, f := range found {
		if f.Status == statusFail || f.Status == statusWarn && worst == statusPass {
			worst = f.Status
		}
	}
	if d.json() {
		if err := c.object(map[string]any{"status": worst, "checks": found}); err != nil {
			return err
		}
	} else {
		c.printChecks(found)
	}
	switch worst {
	case statusFail:
		return exitWith(codeFailed)
	case statusWarn:
		return exitWith(codeWarnings)
	}
	return nil
}

// cmpText returns a text, or another one if it is empty.
func cmpText(text, other string) string {
	if text == "" {
		return other
	}
	return text
}

// printChecks prints the checks, the worst ones last, where they are seen.
func (c *console) printChecks(found []diagnosis) {
	counts := map[string]int{}
	for _, status := range []string{statusPass, statusWarn, statusFail} {
		color := map[string]string{statusPass: green, statusWarn: yellow, statusFail: red}[status]
		for _, f := range found {
			if f.Status != status {
				continue
			}
			counts[status]++
			first, rest, _ := strings.Cut(f.Detail, "\n")
			fmt.Fprintf(c.out, "%s  %s: %s\n", c.paint(color, status), clean(f.Check), clean(first))
			for line := range strings.SplitSeq(rest, "\n") {
				if line != "" {
					fmt.Fprintf(c.out, "      %s\n", clean(line))
				}
			}
			if f.Mend != "" {
				fmt.Fprintf(c.out, "      mend: %s\n", clean(f.Mend))
			}
		}
	}
	fmt.Fprintf(c.out, "%d passed, %d warned, %d failed\n", counts[statusPass], counts[statusWarn], counts[statusFail])
}
