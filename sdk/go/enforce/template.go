package enforce

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/cedarpost/cedarpost/internal/entityuid"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// Template makes the name of a resource from values of a request:
//
//	Shop::Order::"{id}"
//
// Values are part of the id only, and are not read as Cedar text: no value can end the id or
// change the type. A brace that belongs to the id is written "\u{7b}" or "\u{7d}".
type Template struct {
	typ   string
	parts []part
}

// part is the name of a value, or a constant text.
type part struct{ name, text string }

var nameForm = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`)

// ParseTemplate reads a template.
func ParseTemplate(text string) (Template, error) {
	typ, quoted, ok := strings.Cut(text, `::"`)
	id, closed := strings.CutSuffix(quoted, `"`)
	if !ok || !closed || !entityuid.ValidType(typ) {
		return Template{}, fmt.Errorf(`enforce: %q is not a template like Shop::Order::"{id}"`, text)
	}
	t := Template{typ: typ}
	for len(id) > 0 {
		if id[0] == '{' {
			name, rest, ok := strings.Cut(id[1:], "}")
			if !ok || !nameForm.MatchString(name) {
				return Template{}, fmt.Errorf("enforce: template %q: after { comes a name and }", text)
			}
			if n := len(t.parts); n > 0 && t.parts[n-1].name != "" {
				return Template{}, fmt.Errorf("enforce: template %q: nothing tells where {%s} begins", text, name)
			}
			t.parts = append(t.parts, part{name: name})
			id = rest
			continue
		}
		end := literal(id)
		if end < 0 {
			return Template{}, fmt.Errorf(`enforce: template %q: a brace of its own is written \u{7b} or \u{7d}`, text)
		}
		uid, err := cedarpost.ParseUID(`T::"` + id[:end] + `"`)
		if err != nil {
			return Template{}, fmt.Errorf("enforce: template %q: it has a bad escape or quote", text)
		}
		t.parts = append(t.parts, part{text: uid.ID})
		id = id[end:]
	}
	if len(t.Names()) == 0 {
		if _, err := t.Fill(nil); err != nil {
			return Template{}, fmt.Errorf("enforce: template %q: no such id", text)
		}
	}
	return t, nil
}

// literal returns the length of the constant text at the start of id, or -1 if there is a
// brace in it.
func literal(id string) int {
	for i := 0; i < len(id); i++ {
		switch id[i] {
		case '{':
			return i
		case '}':
			return -1
		case '\\':
			i++
			if strings.HasPrefix(id[i:], "u{") {
				n := strings.IndexByte(id[i:], '}')
				if n < 0 {
					return -1
				}
				i += n
			}
		}
	}
	return len(id)
}

// Names returns the names of the values, in order.
func (t Template) Names() []string {
	var out []string
	for _, p := range t.parts {
		if p.name != "" {
			out = append(out, p.name)
		}
	}
	return out
}

// Fill makes the resource's name. Its error is a mistake of the client: a value is missing,
// or cannot be in an id.
func (t Template) Fill(value func(name string) string) (cedarpost.EntityUID, error) {
	var id strings.Builder
	for i, p := range t.parts {
		if p.name == "" {
			id.WriteString(p.text)
			continue
		}
		v := value(p.name)
		if v == "" {
			return cedarpost.EntityUID{}, malformed(fmt.Errorf("no %s", p.name))
		}
		// A value before a constant text must not contain that text. Otherwise two pairs of
		// values could make one id: "a/b" with "c", and "a" with "b/c".
		if i+2 < len(t.parts) {
			if next := t.parts[i+1].text; strings.Index(v+next, next) != len(v) {
				return cedarpost.EntityUID{}, malformed(fmt.Errorf("%s has %q in it", p.name, next))
			}
		}
		id.WriteString(v)
	}
	uid := cedarpost.EntityUID{Type: t.typ, ID: id.String()}
	if uid.ID == "" || len(uid.ID) > cedarpost.MaxIDBytes || !plain(uid.ID) {
		return cedarpost.EntityUID{}, malformed(errors.New("no such id"))
	}
	return uid, nil
}

func malformed(err error) *Refusal { return &Refusal{Kind: Malformed, Err: err} }
