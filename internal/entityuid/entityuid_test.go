package entityuid_test

import (
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/internal/entityuid"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// accepted are texts of entity UIDs with the parts that they name.
var accepted = map[string]cedarpost.EntityUID{
	`Shop::User::"bob"`:      {Type: "Shop::User", ID: "bob"},
	`User::""`:               {Type: "User", ID: ""},
	`A::B::C::"x::\"y\""`:    {Type: "A::B::C", ID: `x::"y"`},
	`_a1::"ü"`:               {Type: "_a1", ID: "ü"},
	`U::"\\ \n\t\r\0\' \""`:  {Type: "U", ID: "\\ \n\t\r\x00' \""},
	`U::"\x41\x7f\x00"`:      {Type: "U", ID: "A\x7f\x00"},
	`U::"\u{1F600}\u{e9}"`:   {Type: "U", ID: "\U0001F600é"},
	`U::"\u{000041}\u{1_0}"`: {Type: "U", ID: "A\x10"},
	`U::"\u{1__}\u{00_ff_}"`: {Type: "U", ID: "\x01ÿ"},
	"U::\"a\tb\rc\"":         {Type: "U", ID: "a\tb\rc"},
	`U::"*//"`:               {Type: "U", ID: "*//"},
}

// refused are texts that are no entity UID.
var refused = []string{
	``, `bob`, `User`, `User::bob`, `User"bob"`, `::"bob"`, `User::::"bob"`, `User:"bob"`, `1User::"bob"`, `User::'a'`,
	`in::"bob"`, `A::if::"b"`, `__cedar::A::"b"`, `Us-er::"bob"`, `Us er::"bob"`, `Ü::"bob"`,
	`User::"bob`, `User::"bob"x`, `User::"bob"::"x"`, `User::"a"b"`, `User::"a" || true`, `User::"\`, `User::"\"`,
	`User::"\q"`, `User::"\*"`, "User::\"a\\\n b\"", `User::"\x80"`, `User::"\x1"`, `User::"\x+1"`, `User::"\X41"`,
	`User::"\u{}"`, `User::"\u{_}"`, `User::"\u{_1}"`, `User::"\u{1234567}"`, `User::"\u{00000041}"`, `User::"\u{d800}"`,
	`User::"\u{110000}"`, `User::"\u1F"`, `User::"\u{+1}"`, `User::"\u{ 1}"`, `User::"\u{12"`, `User::"\u{`, `User::"\u`,
	`User::"\U{41}"`, "User::\"\xff\"", "\xff::\"a\"",
}

// The Go client and the tests of a bundle read what this package reads.
func TestParse(t *testing.T) {
	for text, want := range accepted {
		typ, id, err := entityuid.Parse(text)
		if err != nil || typ != want.Type || id != want.ID {
			t.Errorf("Parse(%s) = %q, %q, %v", text, typ, id, err)
		}
		if uid, err := cedarpost.ParseUID(text); err != nil || uid != want {
			t.Errorf("cedarpost.ParseUID(%s) = %q, %v", text, uid, err)
		}
		if uid, err := inBundle(text); err != nil || uid != (bundle.Ref{Type: want.Type, ID: want.ID}) {
			t.Errorf("tests.yaml with %s: %q, %v", text, uid, err)
		}
		if uid, ok := inPolicy(text); !ok || string(uid.Type) != want.Type || string(uid.ID) != want.ID {
			t.Errorf("a policy with %s: %q, %v", text, uid, ok)
		}
	}
	long := strings.Repeat("A", entityuid.MaxTypeBytes+1) + `::"a"`
	for _, text := range append(refused, long) {
		if typ, id, err := entityuid.Parse(text); err == nil {
			t.Errorf("Parse(%q) = %q, %q", text, typ, id)
		}
		if uid, err := cedarpost.ParseUID(text); err == nil {
			t.Errorf("cedarpost.ParseUID(%q) = %q", text, uid)
		}
		if uid, err := inBundle(text); err == nil {
			t.Errorf("tests.yaml with %q: %q", text, uid)
		}
		if uid, ok := inPolicy(text); ok && text != long {
			t.Errorf("a policy with %q: %q", text, uid)
		}
	}
	// A policy may have more around the parts. A name may not.
	for _, text := range []string{` User::"bob"`, `User::"bob" `, `User ::"bob"`, "User::\n\"bob\"", "User::\"bob\"//"} {
		if typ, id, err := entityuid.Parse(text); err == nil {
			t.Errorf("Parse(%q) = %q, %q", text, typ, id)
		}
	}
	// cedar-go reads neither of them in a policy. The reference implementation of Cedar
	// reads both.
	for text, want := range map[string]string{"U::\"a\nb\"": "a\nb", "U::\"a\x00b\"": "a\x00b"} {
		if _, id, err := entityuid.Parse(text); err != nil || id != want {
			t.Errorf("Parse(%q) = %q, %v", text, id, err)
		}
	}
}

// inPolicy reads the text as a policy does. ok is false if the policy does not parse, or
// if the text ends the policy.
func inPolicy(text string) (uid cedar.EntityUID, ok bool) {
	list, err := cedar.NewPolicyListFromBytes("", []byte("permit (principal == "+text+"\n, action, resource);"))
	if err != nil || len(list) != 1 {
		return uid, false
	}
	eq, ok := (*xast.Policy)(list[0].AST()).Principal.(xast.ScopeTypeEq)
	return eq.Entity, ok
}

// inBundle reads the text as the principal of a test in a bundle.
func inBundle(text string) (bundle.Ref, error) {
	quoted := `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\r", `\r`, "\t", `\t`).Replace(text) + `"`
	b, err := bundle.FromFiles("shop", []bundle.File{
		{Path: bundle.SchemaName, Content: []byte("entity User;")},
		{Path: bundle.TestsName, Content: []byte("checks:\n- {name: n, principal: " + quoted + `, action: 'Action::"a"', resource: 'R::"r"', expect: deny}`)},
	})
	if err != nil {
		return bundle.Ref{}, err
	}
	return b.Tests[0].Principal, nil
}

// piece draws a part of the text of an entity UID, of an escape or of something that is
// close to one. None has space or a comment outside of the id.
var piece = rapid.OneOf(
	rapid.SampledFrom([]string{`\n`, `\t`, `\r`, `\0`, `\'`, `\"`, `\\`, `\*`, `\`, `\x`, `\u{`, `\u`, `}`, `_`, `"`, `::`, `:`, `in`, `__cedar`, `{`, `+`}),
	rapid.StringMatching(`[A-Za-z_0-9]{1,3}`),
	rapid.StringMatching(`\\x[0-9a-gA-G]{0,3}`),
	rapid.StringMatching(`\\u\{[0-9a-f_]{0,9}\}`),
	rapid.StringMatching(`\\u\{(d7ff|d800|dfff|e000|10ffff|110000|0{0,4}[0-9a-fA-F]{1,6})\}`),
	rapid.StringMatching(`[^\s/"\\\x00]{1,2}`),
)

// Parse accepts what cedar-go accepts in a policy, and reads the same name.
func TestParseLikeAPolicy(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		typ := rapid.OneOf(
			rapid.StringMatching(`[A-Za-z_][a-z0-9_]{0,3}(::[A-Za-z_][a-z0-9_]{0,3}){0,2}`),
			rapid.Map(rapid.SliceOfN(piece, 0, 3), func(parts []string) string { return strings.Join(parts, "") }),
		).Draw(rt, "type")
		id := strings.Join(rapid.SliceOfN(piece, 0, 6).Draw(rt, "id"), "")
		text := typ + `::"` + id + `"`
		want, ok := inPolicy(text)
		typ, id, err := entityuid.Parse(text)
		if ok != (err == nil) || ok && (typ != string(want.Type) || id != string(want.ID)) {
			rt.Fatalf("%s is %q, %q, %v; in a policy %q, %v", text, typ, id, err, want, ok)
		}
	})
}

func TestFormat(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		typ := rapid.StringMatching(`[A-Z][a-z0-9_]{0,8}(::[A-Z_][A-Za-z0-9_]{0,8}){0,3}`).Draw(rt, "type")
		id := rapid.OneOf(rapid.String(), rapid.StringMatching(`[\x00-\x1f"\\'\x7f-\xa0]{0,5}`)).Draw(rt, "id")
		text := entityuid.Format(typ, id)
		typ2, id2, err := entityuid.Parse(text)
		if err != nil || typ2 != typ || id2 != id {
			rt.Fatalf("%q, %q is %s, which is %q, %q, %v", typ, id, text, typ2, id2, err)
		}
		if uid, ok := inPolicy(text); !ok || uid != cedar.NewEntityUID(cedar.EntityType(typ), cedar.String(id)) {
			rt.Fatalf("%s is %q in a policy, %v", text, uid, ok)
		}
		for _, other := range []string{cedarpost.UID(typ, id).String(), bundle.Ref{Type: typ, ID: id}.String()} {
			if other != text {
				rt.Fatalf("%s is written %s", text, other)
			}
		}
	})
}

// FuzzParse: a text that Parse accepts is the same name in a policy, and in the text
// that Format makes of it. A text that only cedar-go accepts has space, a comment or a
// long type.
func FuzzParse(f *testing.F) {
	for text := range accepted {
		f.Add(text)
	}
	for _, text := range refused {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		typ, id, err := entityuid.Parse(text)
		if err != nil {
			var uid cedar.EntityUID
			if uid.UnmarshalCedar([]byte(text)) != nil || len(uid.Type) > entityuid.MaxTypeBytes {
				return
			}
			first, last := strings.Index(text, `"`), strings.LastIndex(text, `"`)
			if !strings.ContainsAny(text[:first]+text[last:], " \t\r\n/") {
				t.Fatalf("%q: %v, and cedar-go reads %q", text, err, uid)
			}
			return
		}
		typ2, id2, err := entityuid.Parse(entityuid.Format(typ, id))
		if err != nil || typ2 != typ || id2 != id {
			t.Fatalf("%q: %q, %q came back as %q, %q, %v", text, typ, id, typ2, id2, err)
		}
		if strings.ContainsAny(text, "\n\x00") {
			return // cedar-go reads them in their escaped form only
		}
		if uid, ok := inPolicy(text); !ok || string(uid.Type) != typ || string(uid.ID) != id {
			t.Fatalf("%q: %q, %q, in a policy %q, %v", text, typ, id, uid, ok)
		}
	})
}
