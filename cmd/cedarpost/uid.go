package main

import (
	"fmt"
	"strings"

	"github.com/cedarpost/cedarpost/internal/entityuid"
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
		s = entityuid.Format(s[:i], s[i+2:])
	}
	typ, id, err := entityuid.Parse(s)
	if err != nil {
		return err
	}
	u.EntityUid = &cedarpostv1.EntityUid{Type: typ, Id: id}
	return nil
}

// uidText returns the name of an entity as Cedar text.
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
