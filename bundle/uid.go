package bundle

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ParseUID reads an entity reference in Cedar text, such as Shop::User::"bob".
// The type is a path of identifiers; the id is a Cedar string literal with the
// escapes \" \\ \' \n \t \r \0 \xHH and \u{H…}.
func ParseUID(s string) (typ, id string, err error) {
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
	if !validType(typ) {
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

// unquote reads a Cedar string literal whose opening quote is already gone, up
// to its closing quote, and returns what follows.
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

// unescape reads the escape that s begins with, and says how long it is.
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
		end := strings.IndexByte(s, '}')
		if len(s) < 3 || s[2] != '{' || end < 4 || end > 9 || !isHex(s[3:end]) {
			return 0, 0, errors.New(`\u takes one to six hex digits in braces`)
		}
		v, err := strconv.ParseUint(s[3:end], 16, 32)
		if err != nil || !utf8.ValidRune(rune(v)) {
			return 0, 0, fmt.Errorf(`\u{%s} is not a character`, s[3:end])
		}
		return rune(v), end + 1, nil
	}
	_, size := utf8.DecodeRuneInString(s[1:])
	return 0, 0, fmt.Errorf("unknown escape %s", s[:1+size])
}

// isHex reports whether s is hex digits only; strconv alone would take signs
// and underscores too.
func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdefABCDEF") == ""
}

// quote writes s as a Cedar string literal that ParseUID reads back.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
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

// reserved are the words that Cedar keeps for itself.
var reserved = map[string]bool{
	"true": true, "false": true, "if": true, "then": true, "else": true,
	"in": true, "is": true, "like": true, "has": true, "__cedar": true,
}

// validType reports whether s is a Cedar type name: identifiers joined by ::.
func validType(s string) bool {
	if len(s) > maxTypeBytes {
		return false
	}
	for seg := range strings.SplitSeq(s, "::") {
		if !validIdent(seg) || reserved[seg] {
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

// baseName is the last identifier of a type name.
func baseName(typ string) string {
	return typ[strings.LastIndexByte(typ, ':')+1:]
}
