package bundle_test

import (
	"testing"

	"github.com/cedarpost/cedarpost/bundle"
	"pgregory.net/rapid"
)

func TestParseUID(t *testing.T) {
	for _, tt := range []struct{ in, typ, id string }{
		{`Shop::User::"bob"`, "Shop::User", "bob"},
		{`User::""`, "User", ""},
		{`A::B::C::"x::\"y\""`, "A::B::C", `x::"y"`},
		{`U::"\\ \n\t\r\0\' \u{1F600}\u{e9}\x41"`, "U", "\\ \n\t\r\x00' \U0001F600éA"},
		{`_a1::"ü"`, "_a1", "ü"},
	} {
		typ, id, err := bundle.ParseUID(tt.in)
		if err != nil || typ != tt.typ || id != tt.id {
			t.Errorf("ParseUID(%s) = %q, %q, %v", tt.in, typ, id, err)
		}
	}
	for _, in := range []string{
		``, `bob`, `User::bob`, `User"bob"`, `::"bob"`, `User::::"bob"`, `User:"bob"`, `1User::"bob"`, `in::"bob"`, `A::if::"b"`,
		`User::"bob`, `User::"bob"x`, `User::"bob" `, ` User::"bob"`, `User ::"bob"`, `Us-er::"bob"`, `User::"\q"`, `User::"\`, `User::"\"`,
		`User::"\u{}"`, `User::"\u{1234567}"`, `User::"\u{d800}"`, `User::"\u{110000}"`, `User::"\u1F"`, `User::"\u{+1}"`, `User::"\u{1_0}"`,
		`User::"\u{12"`, `User::"\u`, `User::"\x80"`, `User::"\x1"`, "User::\"\xff\"",
	} {
		if typ, id, err := bundle.ParseUID(in); err == nil {
			t.Errorf("ParseUID(%q) = %q, %q", in, typ, id)
		}
	}
}

func TestRefRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		want := bundle.Ref{
			Type: rapid.StringMatching(`[A-Z][a-z0-9_]{0,8}(::[A-Z_][A-Za-z0-9_]{0,8}){0,3}`).Draw(rt, "type"),
			ID:   rapid.String().Draw(rt, "id"),
		}
		typ, id, err := bundle.ParseUID(want.String())
		if err != nil || typ != want.Type || id != want.ID {
			rt.Fatalf("%s came back as %q, %q, %v", want, typ, id, err)
		}
	})
}
