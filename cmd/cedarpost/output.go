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

	"github.com/cedarpost/cedarpost/internal/entityuid"
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

// uidText is an entity's name in Cedar text.
func uidText(u *cedarpostv1.EntityUid) string {
	return entityuid.Format(u.GetType(), u.GetId())
}

func uidTexts(us []*cedarpostv1.EntityUid) string {
	texts := make([]string, len(us))
	for i, u := range us {
		texts[i] = uidText(u)
	}
	return strings.Join(texts, ", ")
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
