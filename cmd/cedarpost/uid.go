package main

import (
	"fmt"
	"strings"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// uid is the name of an entity on the command line: Cedar text, or the same without the quotes,
// because shells remove quotes.
type uid struct{ *cedarpostv1.EntityUid }

// UnmarshalText implements encoding.TextUnmarshaler.
func (u *uid) UnmarshalText(text []byte) error {
	s := string(text)
	if !strings.Contains(s, `"`) {
		i := strings.LastIndex(s, "::")
		if i < 0 || i+2 == len(s) {
			return fmt.Errorf(`%q is not an entity like Shop::User::bob or 'Shop::User::"bob"'`, s)
		}
		s = bundle.Ref{Type: s[:i], ID: s[i+2:]}.String()
	}
	typ, id, err := bundle.ParseUID(s)
	if err != nil {
		return err
	}
	u.EntityUid = &cedarpostv1.EntityUid{Type: typ, Id: id}
	return nil
}

// uidText returns the name of an entity as Cedar text.
func uidText(u *cedarpostv1.EntityUid) string {
	return bundle.Ref{Type: u.GetType(), ID: u.GetId()}.String()
}

func uidTexts(us []*cedarpostv1.EntityUid) string {
	texts := make([]string, len(us))
	for i, u := range us {
		texts[i] = uidText(u)
	}
	return strings.Join(texts, ", ")
}
