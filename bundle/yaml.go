package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// maxYAMLDepth bounds nesting. A bundle needs the deepest nesting for an entity with
// nested records in a check.
const maxYAMLDepth = 64

// depthLimit makes the parser refuse deep nesting.
type depthLimit struct{}

func (depthLimit) CheckDepth(depth int, _ *yaml.DepthContext) error {
	if depth > maxYAMLDepth {
		return fmt.Errorf("nested deeper than %d levels", maxYAMLDepth)
	}
	return nil
}

// CheckAlias accepts any number of aliases: loading does not expand them, and plain
// refuses every alias.
func (depthLimit) CheckAlias(int, int) error { return nil }

// A yamlFile reads one YAML file node by node, so that every problem has a line and a
// column, and one bad value does not hide the next.
type yamlFile struct {
	path  string
	probs *Problems
}

func (y yamlFile) fail(n *yaml.Node, hint, format string, args ...any) {
	y.probs.add(Problem{File: y.path, Line: n.Line, Column: n.Column,
		Message: fmt.Sprintf(format, args...), Hint: hint})
}

// load parses the file and applies the checks for all YAML files. It returns nil if the
// file is empty or cannot be read further.
func (y yamlFile) load(content []byte) *yaml.Node {
	if len(content) > MaxYAMLBytes {
		y.probs.add(Problem{File: y.path, Message: fmt.Sprintf("is larger than %d KiB", MaxYAMLBytes>>10)})
		return nil
	}
	if i := bytes.IndexFunc(content, func(r rune) bool { return unicode.Is(unicode.Bidi_Control, r) }); i >= 0 {
		r, _ := utf8.DecodeRune(content[i:])
		before := content[:i]
		y.probs.add(Problem{
			File: y.path, Line: bytes.Count(before, []byte("\n")) + 1, Column: utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:]) + 1,
			Message: fmt.Sprintf("has the character %U, which changes the order in which text is shown", r),
			Hint:    fmt.Sprintf(`people would read something else than the file says; in double quotes, write \u%04X`, r),
		})
	}
	l, err := yaml.NewLoader(bytes.NewReader(content), yaml.WithV4Defaults(), yaml.WithPlugin(depthLimit{}))
	if err != nil {
		y.syntax(err)
		return nil
	}
	var doc, more yaml.Node
	if err := l.Load(&doc); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		y.syntax(err)
		return nil
	}
	if err := l.Load(&more); err == nil {
		y.fail(&more, "", "holds more than one YAML document")
		return nil
	} else if !errors.Is(err, io.EOF) {
		y.syntax(err)
		return nil
	}
	root := &doc
	if root.Kind == yaml.DocumentNode {
		if len(root.Content) == 0 {
			return nil
		}
		root = root.Content[0]
	}
	if !y.plain(root) || isNull(root) {
		return nil
	}
	return root
}

// syntax adds an error of the parser to the problems.
func (y yamlFile) syntax(err error) {
	p := Problem{File: y.path, Message: err.Error()}
	if le, ok := errors.AsType[*yaml.LoadError](err); ok {
		p.Line, p.Column = le.Mark.Line, le.Mark.Column
		p.Message = le.Message
		if p.Line == 0 {
			p.Line, p.Column = le.ContextMark.Line, le.ContextMark.Column
		}
	}
	p.Message = "is not valid YAML: " + p.Message
	y.probs.add(p)
}

// plain refuses what makes YAML hard to read correctly, anywhere below n: anchors,
// aliases, merges, tags and keys that are given twice.
func (y yamlFile) plain(n *yaml.Node) bool {
	switch {
	case n.Kind == yaml.AliasNode:
		y.fail(n, "write the value out", "aliases are not allowed")
		return false
	case n.Anchor != "":
		y.fail(n, "write the value out where it is needed", "anchors are not allowed")
		return false
	case n.Style&yaml.TaggedStyle != 0:
		y.fail(n, "", "tags are not allowed")
		return false
	}
	ok := true
	keys := map[string]int{}
	for i, c := range n.Content {
		ok = y.plain(c) && ok
		if n.Kind != yaml.MappingNode || i%2 == 1 {
			continue
		}
		switch line, twice := keys[c.Value]; {
		case c.Kind != yaml.ScalarNode:
			y.fail(c, "", "a key must be plain text")
			ok = false
		case c.ShortTag() == "!!merge":
			y.fail(c, "write the values out", "merge keys are not allowed")
			ok = false
		case twice:
			y.fail(c, "", "key %.100q is given twice, first on line %d", c.Value, line)
			ok = false
		default:
			keys[c.Value] = c.Line
		}
	}
	return ok
}

// each calls f for every key of a mapping, in order.
func (y yamlFile) each(n *yaml.Node, what string, f func(key, value *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		y.fail(n, "", "%s must be a mapping, not %s", what, kindName(n))
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		f(n.Content[i], n.Content[i+1])
	}
}

// unknown adds a problem for a key that is not known.
func (y yamlFile) unknown(key *yaml.Node, known ...string) {
	y.fail(key, "known are "+strings.Join(known, ", "), "unknown key %.100q", key.Value)
}

// str reads text. It refuses a number or a bool.
func (y yamlFile) str(n *yaml.Node, what string) string {
	if !isText(n) {
		hint := ""
		if n.Kind == yaml.ScalarNode && !isNull(n) {
			hint = "put it in quotes"
		}
		y.fail(n, hint, "%s must be text, not %s", what, kindName(n))
		return ""
	}
	return n.Value
}

func (y yamlFile) boolean(n *yaml.Node, what string) bool {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" {
		y.fail(n, "", "%s must be true or false, not %s", what, kindName(n))
		return false
	}
	return strings.EqualFold(n.Value, "true")
}

// strs reads a list of texts, or one text as a list of one. It never returns nil, which
// stands for a value that was not given.
func (y yamlFile) strs(n *yaml.Node, what string) []string {
	out := []string{}
	if isText(n) {
		return append(out, n.Value)
	}
	if n.Kind != yaml.SequenceNode {
		y.fail(n, "", "%s must be a list of texts, not %s", what, kindName(n))
		return out
	}
	seen := make(map[string]bool, len(n.Content))
	for _, c := range n.Content {
		if !isText(c) {
			y.str(c, "each of "+what)
			continue
		}
		if seen[c.Value] {
			y.fail(c, "", "%.100q is listed twice", c.Value)
			continue
		}
		seen[c.Value] = true
		out = append(out, c.Value)
	}
	return out
}

var decimal = regexp.MustCompile(`^-?(0|[1-9][0-9]*)$`)

// value reads a Cedar value: a text, bool, whole number, list or record.
func (y yamlFile) value(n *yaml.Node) any {
	switch n.Kind {
	case yaml.SequenceNode:
		out := make([]any, 0, len(n.Content))
		for _, c := range n.Content {
			out = append(out, y.value(c))
		}
		return out
	case yaml.MappingNode:
		out := make(map[string]any, len(n.Content)/2)
		y.each(n, "a record", func(k, v *yaml.Node) { out[k.Value] = y.value(v) })
		return out
	}
	switch {
	case isText(n):
		return n.Value
	case n.ShortTag() == "!!bool":
		return strings.EqualFold(n.Value, "true")
	case n.ShortTag() == "!!int" || decimal.MatchString(n.Value): // YAML takes a long number for a float
		if !decimal.MatchString(n.Value) {
			y.fail(n, "write it in plain decimal, or in quotes if it is text", "%.100q is not a plain number", n.Value)
			return nil
		}
		v, err := strconv.ParseInt(n.Value, 10, 64)
		if err != nil {
			y.fail(n, "", "%.100s does not fit in 64 bits", n.Value)
			return nil
		}
		return v
	case n.ShortTag() == "!!float":
		y.fail(n, `write a decimal as {__extn: {fn: decimal, arg: "1.5"}}`, "Cedar has no floating-point numbers")
	case isNull(n):
		y.fail(n, "leave the key out", "Cedar has no null")
	default:
		y.fail(n, "", "a value must be text, a bool, a whole number, a list or a record")
	}
	return nil
}

// isText reports whether n is text. A date is text too.
func isText(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && (n.ShortTag() == "!!str" || n.ShortTag() == "!!timestamp")
}

func isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

func kindName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case "!!null":
		return "nothing"
	case "!!bool":
		return "a bool"
	case "!!int", "!!float":
		return "a number"
	}
	return "text"
}
