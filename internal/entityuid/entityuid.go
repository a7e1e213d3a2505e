// Package entityuid reads and writes the name of an entity in Cedar text, such as
// Shop::User::"bob". It is the only parser of that text, so that bundles, the command
// line and the Go client accept the same names and read them as a policy does.
package entityuid

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// MaxTypeBytes is the largest length of an entity type.
const MaxTypeBytes = 512

// Parse reads an entity UID in Cedar text. The type is a path of identifiers; the id is
// a Cedar string literal with the escapes \" \\ \' \n \t \r \0 \xHH and \u{H…}. Unlike in
// a policy there is no space and no comment before, between or after the parts. A raw
// line break or NUL in the id stands for itself.
func Parse(s string) (typ, id string, err error) {
	if !utf8.ValidString(s) {
		return "", "", errors.New("an entity reference must be UTF-8")
	}
	typ, lit, ok := strings.Cut(s, `"`)
	if !ok {
		return "", "", errors.New(`an entity reference looks like Type::"id"; the id in quotes is missing`)
	}
	typ, ok = strings.CutSuffix(typ, "::")
	if !ok {
		return "", "", errors.New(`an entity reference looks like Type::"id"; :: is missing before the id`)
	}
	if !ValidType(typ) {
		return "", "", fmt.Errorf("%q is not an entity type", typ)
	}
	id, rest, err := unquote(lit)
	if err != nil {
		return "", "", err
	}
	if rest != "" {
		return "", "", errors.New("there is text after the closing quote of the id")
	}
	return typ, id, nil
}

// unquote reads a Cedar string literal whose opening quote has been read, up to its
// closing quote. It returns the value and the text after the closing quote.
func unquote(s string) (value, rest string, err error) {
	var b strings.Builder
	for {
		i := strings.IndexAny(s, `"\`)
		if i < 0 {
			return "", "", errors.New("the id has no closing quote")
		}
		b.WriteString(s[:i])
		if s[i] == '"' {
			return b.String(), s[i+1:], nil
		}
		r, n, err := unescape(s[i:])
		if err != nil {
			return "", "", err
		}
		b.WriteRune(r)
		s = s[i+n:]
	}
}

// unescape reads the escape at the start of s, and returns its character and its length.
func unescape(s string) (r rune, n int, err error) {
	if len(s) < 2 {
		return 0, 0, errors.New("the id has no closing quote")
	}
	switch s[1] {
	case '"', '\\', '\'':
		return rune(s[1]), 2, nil
	case 'n':
		return '\n', 2, nil
	case 't':
		return '\t', 2, nil
	case 'r':
		return '\r', 2, nil
	case '0':
		return 0, 2, nil
	case 'x':
		if len(s) < 4 || !isHex(s[2:4]) || s[2] > '7' {
			return 0, 0, errors.New(`\x takes two hex digits, at most 7F`)
		}
		v, err := strconv.ParseUint(s[2:4], 16, 8)
		return rune(v), 4, err
	case 'u':
		inner, ok := strings.CutPrefix(s[2:], "{")
		inner, _, closed := strings.Cut(inner, "}")
		// As in Rust, underscores may stand anywhere after the first digit.
		digits := strings.ReplaceAll(inner, "_", "")
		if !ok || !closed || inner[:min(1, len(inner))] == "_" || len(digits) > 6 || !isHex(digits) {
			return 0, 0, errors.New(`\u takes one to six hex digits in braces`)
		}
		v, err := strconv.ParseUint(digits, 16, 32)
		if err != nil || !utf8.ValidRune(rune(v)) {
			return 0, 0, fmt.Errorf(`\u{%s} is not a character`, inner)
		}
		return rune(v), len(`\u{}`) + len(inner), nil
	}
	_, size := utf8.DecodeRuneInString(s[1:])
	return 0, 0, fmt.Errorf("unknown escape %s", s[:1+size])
}

// isHex reports whether s is one or more hex digits. [strconv.ParseUint] alone would
// accept other text too.
func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdefABCDEF") == ""
}

// Format writes an entity UID as Cedar text, which [Parse] reads back if the type is
// valid and the id is UTF-8.
func Format(typ, id string) string {
	var b strings.Builder
	b.WriteString(typ)
	b.WriteString(`::"`)
	for _, r := range id {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == '\r':
			b.WriteString(`\r`)
		case r == 0:
			b.WriteString(`\0`)
		case !strconv.IsPrint(r):
			fmt.Fprintf(&b, `\u{%x}`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// reserved are Cedar's keywords, which no identifier can be.
var reserved = map[string]bool{
	"true": true, "false": true, "if": true, "then": true, "else": true,
	"in": true, "is": true, "like": true, "has": true, "__cedar": true,
}

// ValidType reports whether s is an entity type: identifiers joined by ::.
func ValidType(s string) bool {
	if len(s) > MaxTypeBytes {
		return false
	}
	for part := range strings.SplitSeq(s, "::") {
		if !validIdent(part) || reserved[part] {
			return false
		}
	}
	return true
}

func validIdent(s string) bool {
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '_':
		case '0' <= c && c <= '9' && i > 0:
		default:
			return false
		}
	}
	return s != ""
}
