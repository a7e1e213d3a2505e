package cedarpost

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// EntityUID names an entity, such as a principal, an action or a resource, by its type with
// the namespace and its id.
type EntityUID struct{ Type, ID string }

// UID returns the name of an entity: UID("Shop::User", "bob") is Shop::User::"bob".
func UID(typ, id string) EntityUID { return EntityUID{typ, id} }

// String is the name as Cedar text: Shop::User::"bob".
func (u EntityUID) String() string {
	var b strings.Builder
	b.WriteString(u.Type)
	b.WriteString(`::"`)
	for _, r := range u.ID {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\u{%x}`, r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// ParseUID reads a name from Cedar text, with the escapes of Cedar's strings:
// Shop::User::"bob".
func ParseUID(text string) (EntityUID, error) {
	typ, quoted, ok := strings.Cut(text, `::"`)
	id, closed := strings.CutSuffix(quoted, `"`)
	if ok && closed && typ != "" {
		if id, err := unescape(id); err == nil {
			return EntityUID{typ, id}, nil
		}
	}
	return EntityUID{}, fmt.Errorf(`%q is not a name like Shop::User::"bob"`, text)
}

var escapes = map[byte]byte{'n': '\n', 'r': '\r', 't': '\t', '\\': '\\', '0': 0, '\'': '\'', '"': '"'}

// unescape reads what stands between the quotes of a Cedar string
// (https://docs.cedarpolicy.com/policies/syntax-datatypes.html#datatype-string).
func unescape(s string) (string, error) {
	var b strings.Builder
	for len(s) > 0 {
		c := s[0]
		switch {
		case c == '"':
			return "", strconv.ErrSyntax
		case c != '\\':
			b.WriteByte(c)
			s = s[1:]
		case strings.HasPrefix(s, `\u{`):
			hex, rest, ok := strings.Cut(s[3:], "}")
			r, err := strconv.ParseUint(hex, 16, 32)
			if !ok || err != nil || !utf8.ValidRune(rune(r)) {
				return "", strconv.ErrSyntax
			}
			b.WriteRune(rune(r))
			s = rest
		default:
			plain, ok := byte(0), false
			if len(s) > 1 {
				plain, ok = escapes[s[1]]
			}
			if !ok {
				return "", strconv.ErrSyntax
			}
			b.WriteByte(plain)
			s = s[2:]
		}
	}
	return b.String(), nil
}
