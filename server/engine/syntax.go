package engine

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// This file turns the errors of cedar-go's parser into messages with the place of the wrong token
// and a hint. The parser names the token after the wrong one, because it has moved on.

var (
	parseErrorAt = regexp.MustCompile(`^(?:parser error: )?parse error at [^:]*:(\d+):(\d+) ("(?:[^"\\]|\\.)*"): (.*)$`)
	scanErrorAt  = regexp.MustCompile(`^(?:parser error: )?[^:]*:(\d+):(\d+): (.*)$`)
	outOfRange   = regexp.MustCompile(`parsing "([^"]*)": value out of range$`)
	wanted       = regexp.MustCompile(`^(exact )?got (.*) want (\S+)$`)
	badName      = regexp.MustCompile("^`([^`]*)` is (not a function|not a method|a method, not a function|a function, not a method)$")
)

// syntaxError explains an error of cedar-go's parser about a statement.
func syntaxError(st statement, err error) *textError {
	text := err.Error()
	if m := parseErrorAt.FindStringSubmatch(text); m != nil {
		line, _ := strconv.Atoi(m[1])
		column, _ := strconv.Atoi(m[2])
		if isSlot(st.text, line, column, m[3]) {
			te := &textError{msg: "templates are not supported: ?principal and ?resource have no value", hint: "write a policy for each principal or resource, or use a group"}
			return te.put(st, line, column-1)
		}
		s := scan(st.text)
		s.next = s.at(line, column)
		return s.explain(st, m[4])
	}
	if m := scanErrorAt.FindStringSubmatch(text); m != nil {
		line, _ := strconv.Atoi(m[1])
		column, _ := strconv.Atoi(m[2])
		te := &textError{msg: m[3]}
		switch m[3] {
		case "literal not terminated":
			te.msg, te.hint = "a text has no closing quote", `a text is in double quotes: "…"; a quote inside of it is written as \"`
		case "invalid char escape":
			te.msg, te.hint = "a text has an escape that Cedar does not know", `a backslash is written as \\`
		}
		return te.put(st, line, column)
	}
	te := &textError{line: st.line, column: st.column, msg: strings.TrimPrefix(text, "parser error: ")}
	if m := outOfRange.FindStringSubmatch(text); m != nil {
		te.msg = m[1] + " is too large for a Long"
		if s := scan(st.text); slices.Contains(s.words, m[1]) {
			te.put(st, s.lines[slices.Index(s.words, m[1])], s.columns[slices.Index(s.words, m[1])])
		}
	}
	return te
}

// put places an error at a line and column of a statement, from 1.
func (e *textError) put(st statement, line, column int) *textError {
	e.line, e.column = st.line+line-1, column
	if line == 1 {
		e.column += st.column - 1
	}
	return e
}

// tokens are the tokens of a statement with their places, from 1. The last one is empty and is the
// end of the text. next is the token that the parser would read next.
type tokens struct {
	words          []string
	lines, columns []int
	next           int
}

// twoSigns are the operators of two characters.
var twoSigns = []string{"::", "==", "!=", "<=", ">=", "&&", "||"}

// scan cuts a text into tokens. It has to be right only for text that cedar-go scans, too.
func scan(text string) *tokens {
	s := &tokens{}
	line, column := 1, 1
	for text != "" {
		n, skip := 1, false
		switch c := text[0]; {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			skip = true
		case strings.HasPrefix(text, "//"):
			skip = true
			if n = strings.IndexByte(text, '\n'); n < 0 {
				n = len(text)
			}
		case c == '"':
			for n < len(text) && text[n] != '"' {
				if text[n] == '\\' {
					n++
				}
				n++
			}
			n = min(n+1, len(text))
		case wordByte(c):
			for n < len(text) && wordByte(text[n]) {
				n++
			}
		case len(text) > 1 && slices.Contains(twoSigns, text[:2]):
			n = 2
		default:
			_, n = utf8.DecodeRuneInString(text)
		}
		if !skip {
			s.words, s.lines, s.columns = append(s.words, text[:n]), append(s.lines, line), append(s.columns, column)
		}
		for _, r := range text[:n] {
			if column++; r == '\n' {
				line, column = line+1, 1
			}
		}
		text = text[n:]
	}
	s.words, s.lines, s.columns = append(s.words, ""), append(s.lines, line), append(s.columns, column)
	return s
}

// at returns the index of the token at a place, or of the end.
func (s *tokens) at(line, column int) int {
	for i := range s.words {
		if s.lines[i] == line && s.columns[i] == column {
			return i
		}
	}
	return len(s.words) - 1
}

// word returns a token, or "" before the first one.
func (s *tokens) word(i int) string {
	if i < 0 || i >= len(s.words) {
		return ""
	}
	return s.words[i]
}

// read returns the index of the token that the parser read last. At the end of a text that does not
// end with ";" that is the end, because the parser does not move on from there.
func (s *tokens) read() int {
	if end := len(s.words) - 1; s.next == end && s.word(end-1) != ";" {
		return end
	}
	return max(s.next-1, 0)
}

// before returns the index of the last token before i that is one of words, or i.
func (s *tokens) before(i int, words ...string) int {
	for j := min(i, len(s.words)-1); j >= 0; j-- {
		if slices.Contains(words, s.words[j]) {
			return j
		}
	}
	return i
}

const scopeHint = "the scope is (principal, action, resource), in this order"

// explain returns the error for a message of the parser.
func (s *tokens) explain(st statement, msg string) *textError {
	wrong, te := s.read(), &textError{}
	expected := ""
	switch m := wanted.FindStringSubmatch(msg); {
	case m != nil:
		switch {
		case m[1] == "": // the parser has not moved on
			wrong = s.next
		case m[2] == "":
			wrong = len(s.words) - 1
		default:
			wrong = max(s.next-1, 0)
			if s.word(s.next) == m[2] && s.word(wrong) != m[2] {
				wrong = s.next
			}
		}
		expected = `"` + m[3] + `"`
		te.hint = s.hintFor(m[3], wrong)
	case msg == "invalid primary":
		expected = "a value"
		if b := s.word(wrong - 1); b == "{" && slices.Contains([]string{"when", "unless"}, s.word(wrong-2)) && s.word(wrong) == "}" {
			te.hint = "a condition must not be empty; to apply always, leave it out"
		}
	case msg == "expected ident" || msg == "expected ident after dot":
		expected = "a name"
		if s.word(wrong-1) == "." && number(s.word(wrong)) && number(s.word(wrong-2)) {
			te.hint = fmt.Sprintf(`numbers are whole; decimal("%s.%s") makes a fraction`, s.word(wrong-2), s.word(wrong))
		}
	case msg == "expected ident or string":
		expected = "the name of an attribute"
	case msg == "expected ident or reserved keyword":
		expected = "the name of an annotation"
	case msg == "expected string literal":
		expected, te.hint = "a pattern in quotes", `a pattern is written as like "a*"`
	case msg == "expected string":
		expected, te.hint = "a text in quotes", `an annotation is written as @id("…")`
	case strings.HasPrefix(msg, "unexpected effect"):
		expected, te.hint = `"permit" or "forbid"`, "a policy begins with permit or forbid, after its annotations"
		switch s.word(wrong) {
		case "allow":
			te.hint = "did you mean permit?"
		case "deny":
			te.hint = "did you mean forbid?"
		}
	case strings.HasPrefix(msg, "duplicate key: "):
		key := strings.TrimPrefix(msg, "duplicate key: ")
		te.msg, wrong = fmt.Sprintf("the key %s is in the record twice", quote(key)), s.before(wrong, key, strconv.Quote(key))
	case strings.HasPrefix(msg, "duplicate annotation: "):
		te.msg = strings.TrimPrefix(msg, "duplicate annotation: ") + " is given twice"
	default:
		if m := badName.FindStringSubmatch(msg); m != nil {
			te.msg, wrong = m[1]+" is "+m[2], s.before(s.next, m[1][strings.LastIndexByte(m[1], ':')+1:])
			break
		}
		te.msg = strings.ReplaceAll(msg, "`", "")
		if msg == "unexpected token" {
			expected = "the id of an entity in quotes"
		}
	}
	s.unquoted(te, &wrong)
	if hint := s.hintAt(wrong); hint != "" {
		te.hint = hint
	}
	if found := s.word(wrong); te.msg == "" || expected != "" && te.msg == "unexpected token" {
		switch {
		case found != "":
			te.msg = fmt.Sprintf("expected %s but found %s", expected, shown(found))
		case expected == `";"`:
			te.msg = "the policy has no end"
		default:
			te.msg = fmt.Sprintf("expected %s before the end of the policy", expected)
		}
	}
	return te.put(st, s.lines[wrong], s.columns[wrong])
}

// unquoted explains an entity whose id is not in quotes, and moves to the id.
func (s *tokens) unquoted(te *textError, wrong *int) {
	i := *wrong
	if s.word(i-2) != "::" || !name(s.word(i-1)) || !name(s.word(i-3)) || s.word(i) == "(" || s.word(i) == "::" {
		return
	}
	from := i - 3
	for s.word(from-1) == "::" && name(s.word(from-2)) {
		from -= 2
	}
	te.msg = "the id of an entity is in quotes"
	te.hint = fmt.Sprintf("did you mean %s%s?", strings.Join(s.words[from:i-1], ""), strconv.Quote(s.word(i-1)))
	*wrong = i - 1
}

// hintFor returns a hint for a token that the parser wants in place of the one at i.
func (s *tokens) hintFor(want string, i int) string {
	switch want {
	case ";":
		if s.word(i) == "where" || s.word(i) == "if" {
			return "a condition begins with when or unless"
		}
		return `a policy ends with ";"`
	case "{":
		return "a condition is in braces: when { … }"
	case "}":
		if w := s.word(i); w == ";" || w == "" {
			return `a "}" is missing`
		}
	case ")":
		if w := s.word(i); w == ";" || w == "" || w == "when" || w == "unless" || w == "{" {
			return `a ")" is missing`
		}
	case "principal", "action", "resource", "(":
		return scopeHint
	case ",":
		if s.word(i) == ")" {
			return scopeHint
		}
	case "::":
		return `an entity is written as Type::"id"`
	case "then", "else":
		return "write if … then … else …"
	}
	return ""
}

// hintAt returns a hint for a token that people write in the wrong place, or "".
func (s *tokens) hintAt(i int) string {
	switch w := s.word(i); w {
	case "=":
		return `did you mean "=="?`
	case ">":
		if s.word(i-1) == "<" {
			return `did you mean "!="?`
		}
	case "and", "AND", "&":
		return `did you mean "&&"?`
	case "or", "OR", "|":
		return `did you mean "||"?`
	case "not", "NOT":
		return `did you mean "!"?`
	case "'":
		return `a text is in double quotes: "…"`
	case "True", "TRUE", "False", "FALSE":
		return fmt.Sprintf("did you mean %s?", strings.ToLower(w))
	case "null", "nil", "None":
		return "there is no null; ask with has whether an attribute is there: principal has name"
	}
	return ""
}

// shown writes a token for a message.
func shown(token string) string {
	if strings.HasPrefix(token, `"`) {
		return shorten(token)
	}
	return `"` + token + `"`
}

func number(word string) bool { return word != "" && strings.Trim(word, "0123456789") == "" }

// name reports whether a token is an identifier.
func name(word string) bool {
	return word != "" && wordByte(word[0]) && !number(word[:1])
}

// undefinedName matches cedar-go's error about a type or an action that a schema names and no
// schema declares.
var undefinedName = regexp.MustCompile(`undefined [a-z ]+ "([^"]+)"$`)

// firstUse returns the place of the first use of a name in a schema, from 1, or zeros. A name
// before a colon is that of an attribute.
func firstUse(text, name string) (line, column int) {
	s, parts := scan(text), strings.Split(name, "::")
	for i := range s.words {
		end := i + 2*len(parts) - 1
		if end >= len(s.words) {
			break
		}
		if strings.Join(s.words[i:end], "") == name && !slices.Contains([]string{":", "?", "::"}, s.words[end]) && s.word(i-1) != "::" {
			return s.lines[i], s.columns[i]
		}
	}
	return 0, 0
}
