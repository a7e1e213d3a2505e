package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/internal/keyfile"
)

// The exit codes, which scripts rely on.
const (
	codeOK        = 0
	codeFailed    = 1
	codeUsage     = 2
	codeInvalid   = 3 // does not compile or validate
	codeTests     = 4 // tests failed
	codeDenied    = 5
	codeWarnings  = 6 // doctor or lint found warnings, and no failure, or support-bundle lacks something
	codeMore      = 7 // somebody can do more than before
	codeNotProven = 8 // it is not known whether somebody can do more
	codeChange    = 9 // apply opened a change, because the bundle needs approvals
)

// exitError ends the command with a code. Without err, nothing more is printed.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// exitWith ends the command with a code and no message.
func exitWith(code int) error { return &exitError{code: code} }

// misuse is an error of wrong usage that kong cannot find.
func misuse(format string, args ...any) error {
	return &exitError{codeUsage, fmt.Errorf(format, args...)}
}

// usageError adds to an error of the command line where help is.
func usageError(err error) error {
	if err == nil {
		return nil
	}
	if m := negative.FindStringSubmatch(err.Error()); m != nil {
		err = wrongFlag{err, m[1] + " must not be negative"}
	}
	var command *kong.Node
	if parse, ok := errors.AsType[*kong.ParseError](err); ok && parse.Context != nil {
		command = parse.Context.Selected()
	}
	return withHelp(misuse("%w", err), command)
}

// withHelp adds to an error of wrong usage where the help of the command is. Other errors, and errors that
// say it already, stay as they are.
func withHelp(err error, command *kong.Node) error {
	usage, ok := errors.AsType[*exitError](err)
	if !ok || usage.code != codeUsage || usage.err == nil || strings.Contains(usage.err.Error(), "\ntry: cedarpost") {
		return err
	}
	path := ""
	if command != nil {
		path = " " + command.Path()
	}
	return misuse("%w\ntry: cedarpost%s --help", usage.err, path)
}

// negative matches kong's error about a flag whose value begins with a dash, as in --flag -1.
var negative = regexp.MustCompile(`^(--[a-z-]+): expected .* value but got "-\.?[0-9][^"]*"`)

// wrongFlag is an error with another text.
type wrongFlag struct {
	error
	text string
}

func (e wrongFlag) Error() string { return e.text }
func (e wrongFlag) Unwrap() error { return e.error }

// say prints an error, line by line.
func (c *console) say(err error) {
	for i, line := range strings.Split(err.Error(), "\n") {
		prefix := "cedarpost: "
		if i > 0 {
			prefix = "  "
		}
		fmt.Fprintf(c.err, "%s%s\n", prefix, clean(line))
	}
}

// readSecret reads a file that has a secret as its only line.
func readSecret(file string) (string, error) {
	b, err := keyfile.Read(file)
	if err != nil {
		return "", err
	}
	s := strings.TrimSpace(string(b))
	if s == "" || strings.ContainsAny(s, "\r\n") {
		return "", fmt.Errorf("%s does not hold exactly one line", file)
	}
	return s, nil
}
