package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/logformat"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// outputFlags select output for people or for programs.
type outputFlags struct {
	Output string `short:"o" help:"text for people, or json for programs, with one object on each line (default ${default})." env:"CEDARPOST_OUTPUT" enum:"text,json" default:"text" placeholder:"FORMAT"`
}

func (o outputFlags) json() bool { return o.Output == "json" }

// console has the input and the outputs of a command.
type console struct {
	in       io.Reader
	out, err io.Writer
	color    bool // out is a terminal that shows colors
	live     bool // err is a terminal, so a line can be overwritten
}

func newConsole() *console {
	c := &console{in: os.Stdin, out: os.Stdout, err: os.Stderr}
	c.color = isTerminal(os.Stdout) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	c.live = isTerminal(os.Stderr)
	return c
}

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

const (
	red    = "31"
	green  = "32"
	yellow = "33"
	bold   = "1"
)

func (c *console) paint(color, s string) string {
	if !c.color {
		return s
	}
	return "\x1b[" + color + "m" + s + "\x1b[0m"
}

// message prints a message of the API as JSON, on one line.
func (c *console) message(m proto.Message) error {
	text, err := logformat.JSON(m)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.out, text)
	return err
}

// orMessage returns the error of a call, or prints its answer as JSON.
func orMessage(c *console, m proto.Message, err error) error {
	if err != nil {
		return err
	}
	return c.message(m)
}

// object prints a Go value as JSON, on one line.
func (c *console) object(v any) error {
	e := json.NewEncoder(c.out)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// table prints rows in aligned columns. The first row is the head.
func (c *console) table(rows [][]string) {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(clean(cell)))
		}
	}
	for n, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			text := clean(cell)
			pad := widths[i] - utf8.RuneCountInString(text)
			switch {
			case n == 0:
				text = c.paint(bold, text)
			case text == "ALLOW":
				text = c.paint(green, text)
			case text == "DENY":
				text = c.paint(red, text)
			}
			line.WriteString(text)
			if i < len(row)-1 {
				line.WriteString(strings.Repeat(" ", pad+2))
			}
		}
		fmt.Fprintln(c.out, strings.TrimRight(line.String(), " "))
	}
}

// more says on the error output that a list is not complete, and how to go on. token is that of the next
// page, or "" if there is none. times are the filters by time, in pairs of flag and value.
func (c *console) more(token string, times ...string) {
	if token == "" {
		return
	}
	again := "--after " + token
	for i := 0; i+1 < len(times); i += 2 {
		if times[i+1] != "" {
			again += " " + times[i] + " " + times[i+1]
		}
	}
	fmt.Fprintf(c.err, "there are more: --limit 0 lists all, and %s goes on here\n", again)
}

// pair prints a label and a value, aligned with other pairs. It prints nothing if the value is
// empty.
func (c *console) pair(label, value string) {
	if value != "" {
		fmt.Fprintf(c.out, "  %-12s %s\n", label, clean(value))
	}
}

// clean escapes control characters, because ids and messages come from clients, and a terminal
// would execute them.
func clean(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, `\u{%x}`, r)
		}
	}
	return b.String()
}

func policyText(p *cedarpostv1.PolicyRef) string { return p.GetBundle() + "/" + p.GetId() }

func policyTexts(ps []*cedarpostv1.PolicyRef) string {
	texts := make([]string, len(ps))
	for i, p := range ps {
		texts[i] = policyText(p)
	}
	return strings.Join(texts, ", ")
}

// count returns "1 policy" or "3 policies".
func count[N int | int32 | int64](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// printDecision prints the first line about a decision.
func (c *console) printDecision(d cedarpostv1.Decision, at *cedarpostv1.DeniedAt) {
	switch {
	case d == cedarpostv1.Decision_ALLOW:
		fmt.Fprintln(c.out, c.paint(green, "ALLOW"))
	case at != nil:
		fmt.Fprintln(c.out, c.paint(red, "DENY at "+at.String()))
	default:
		fmt.Fprintln(c.out, c.paint(red, d.String()))
	}
}

// reasons are the parts of a decision that an answer and a record both have.
type reasons interface {
	GetDecision() cedarpostv1.Decision
	GetFields() *cedarpostv1.Fields
	GetDeterminingPolicies() []*cedarpostv1.PolicyRef
	GetErrors() []*cedarpostv1.PolicyError
	GetObligations() []*cedarpostv1.Obligation
	GetAdvice() []*cedarpostv1.Advice
}

func (c *console) printReasons(r reasons) {
	if f := r.GetFields(); f != nil {
		permitted := strings.Join(f.GetPermitted(), ", ")
		if permitted == "" {
			permitted = "(none)"
		}
		c.pair("permitted", permitted)
		c.pair("denied", strings.Join(f.GetDenied(), ", "))
	}
	policies := policyTexts(r.GetDeterminingPolicies())
	if policies == "" && r.GetDecision() == cedarpostv1.Decision_DENY {
		policies = "(none permits it)"
	}
	c.pair("policies", policies)
	for _, o := range r.GetObligations() {
		c.pair("obligation", fmt.Sprintf("%s (%s)", o.GetText(), policyText(o.GetPolicy())))
	}
	for _, a := range r.GetAdvice() {
		text := fmt.Sprintf("%s (%s)", a.GetText(), policyText(a.GetPolicy()))
		if len(a.GetPaths()) > 0 {
			text += " for " + strings.Join(a.GetPaths(), ", ")
		}
		c.pair("advice", text)
	}
	for _, e := range r.GetErrors() {
		c.pair("error", policyText(e.GetPolicy())+": "+e.GetMessage())
	}
}

// printRevision prints the number of a revision, and its token for --at-least-as-fresh and --at.
func (c *console) printRevision(r *cedarpostv1.Revision) {
	c.pair("revision", fmt.Sprint(r.GetNumber()))
	c.pair("token", r.GetToken())
}
