package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// outputFlags choose between output for people and for programs.
type outputFlags struct {
	Output string `short:"o" help:"text for people, json for programs: one object on a line (default ${default})." env:"CEDARPOST_OUTPUT" enum:"text,json" default:"text" placeholder:"FORMAT"`
}

func (o outputFlags) json() bool { return o.Output == "json" }

// console is where a command reads and writes.
type console struct {
	in       io.Reader
	out, err io.Writer
	color    bool // out is a terminal that shows colors
	live     bool // err is a terminal, where a line can be overwritten
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
	text, err := protoText(m)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.out, text)
	return err
}

// protoText is a message as JSON without spaces: protojson varies them on
// purpose, and programs compare lines.
func protoText(m proto.Message) (string, error) {
	text, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return "", err
	}
	var line bytes.Buffer
	err = json.Compact(&line, text)
	return line.String(), err
}

// object prints a value of ours as JSON, on one line.
func (c *console) object(v any) error {
	e := json.NewEncoder(c.out)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// table prints rows in columns as wide as need be, the first row as the head.
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

// pair prints a label and what belongs to it, aligned with its neighbors. What
// is empty is left out.
func (c *console) pair(label, value string) {
	if value != "" {
		fmt.Fprintf(c.out, "  %-12s %s\n", label, clean(value))
	}
}

// clean shows what a terminal would obey: ids and messages come from anywhere.
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

// count is "1 policy" or "3 policies".
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

// reasons is what an answer and a record both say.
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

// printRevision prints the number for people, and the token for
// --at-least-as-fresh and --at.
func (c *console) printRevision(r *cedarpostv1.Revision) {
	c.pair("revision", fmt.Sprint(r.GetNumber()))
	c.pair("token", r.GetToken())
}
