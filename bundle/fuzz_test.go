package bundle_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/bundle"
)

// fuzzFile fuzzes one file of a bundle. Whatever its content is, reading does not panic,
// two readings have the same result, and every problem has a place.
func fuzzFile(f *testing.F, name string, seeds ...string) {
	for _, s := range append(seeds, "", "a", "[]", "{}", "null", "? ? a", "- - a", "a: &a [*a]", "<<: {}", "---\n---\n", "!!x y", "\"\\xff\"") {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 1<<16 {
			t.Skip()
		}
		files := append(with(nil).list(), bundle.File{Path: name, Content: in})
		one, err := bundle.FromFiles("shop", files)
		two, err2 := bundle.FromFiles("shop", files)
		if !reflect.DeepEqual(one, two) || fmt.Sprint(err) != fmt.Sprint(err2) {
			t.Fatal("two readings differ")
		}
		if err == nil {
			checkSound(t, one)
			return
		}
		if one != nil {
			t.Fatal("a bundle beside an error")
		}
		problems, _ := errors.AsType[bundle.Problems](err)
		for _, p := range problems {
			if p.File != name || p.Message == "" || strings.ContainsRune(p.Message, '\n') && p.Line == 0 {
				t.Fatalf("%#v", p)
			}
		}
	})
}

// checkSound checks the properties of a bundle that was read without problems.
func checkSound(t *testing.T, b *bundle.Bundle) {
	if b.Name == "" || len(b.Schemas) == 0 || b.OnForbidError != bundle.Deny && b.OnForbidError != bundle.Skip {
		t.Fatalf("%+v", b)
	}
	for _, f := range b.Fields {
		if f.Type == "" || f.Path == "" || f.Groups == nil || f.Line == 0 {
			t.Fatalf("%+v", f)
		}
	}
	for i, p := range b.PrincipalTokens {
		if p.Issuer == "" || p.Type == "" || p.IDClaim == "" || p.Line == 0 {
			t.Fatalf("%+v", p)
		}
		for _, o := range b.PrincipalTokens[:i] {
			if p.Type == o.Type && (strings.HasPrefix(p.IDPrefix, o.IDPrefix) || strings.HasPrefix(o.IDPrefix, p.IDPrefix)) {
				t.Fatalf("%+v and %+v", p, o)
			}
		}
	}
	for _, e := range b.Exports {
		if e.Type == "" || e.Line == 0 || e.Type == bundle.AllTypes && len(b.Exports) > 1 {
			t.Fatalf("%+v", b.Exports)
		}
	}
	for _, f := range b.Files {
		if f.Path != bundle.ManifestName {
			continue
		}
		if list, err := bundle.ReadPrincipalTokens(f.Content); err != nil || !reflect.DeepEqual(list, b.PrincipalTokens) {
			t.Fatalf("%+v, %v, want %+v", list, err, b.PrincipalTokens)
		}
		if r := bundle.ReadRules(f.Content); !reflect.DeepEqual(r, b.Rules) || r.Approvals < 0 || r.Approvals > 100 || r.Expire() <= 0 || r.Unread != "" {
			t.Fatalf("%+v, want %+v", r, b.Rules)
		}
		for _, w := range b.Freeze {
			for _, at := range []time.Time{time.Date(2026, 3, 29, 1, 30, 0, 0, time.UTC), time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2400, 2, 29, 0, 0, 0, 0, time.UTC)} {
				if in, end, open, err := w.Holds(at); err != nil || in != end.After(at) || open && !in {
					t.Fatalf("%+v at %v: %v %v %v %v", w, at, in, end, open, err)
				}
			}
		}
		if list := bundle.ReadExports(f.Content); !reflect.DeepEqual(list, b.Exports) {
			t.Fatalf("%+v, want %+v", list, b.Exports)
		}
	}
	for _, c := range b.Tests {
		if c.Name == "" || c.Principal.Type == "" || c.Action.Type == "" || c.Resource.Type == "" || c.Expect.Decision == "" || c.Line == 0 {
			t.Fatalf("%+v", c)
		}
	}
}

func FuzzBundleYAML(f *testing.F) {
	fuzzFile(f, bundle.ManifestName, "name: shop\ndescription: d\nowners: [a, b]\napprovals: 0\non_forbid_error: deny\n", "name: 1\nname: 2\n", "approvals: 1e3\n", "approvals: 100\n", "approvals: -0\n",
		"approvals: 2\napprovals_expire: 7d\nfreeze:\n  - {at: 0 18 * * FRI, for: 62h, zone: Europe/Berlin, reason: weekend}\n  - {at: '*/7 0-23/2 1,15 feb-NOV 7', for: 90d}\n  - {at: 0 0 29 2 *, for: 1m, zone: Pacific/Apia}\n",
		"freeze: [{at: '* * * * *', for: 90d}]\n", "freeze: [{at: 59-1 23 31 12 SUN-MON, for: 1m}]\n",
		"exports: [User, A::B]\n", "exports: '*'\n", "exports: ['*', User]\n", "exports: [User, User, 1, a b]\n", "exports:\n",
		"principal_tokens: {a: {type: A::B, id: /a/b~0, id_prefix: 'a:', audience: [x, y], context: {x: y, z: /w}}, b: {type: A::B, id_prefix: 'b:'}}\n", "principal_tokens: {a: b, c: }\n")
}

func FuzzFields(f *testing.F) {
	fuzzFile(f, bundle.FieldsName, "Shop::Order:\n  id: [a, b]\n  customer.email: pii\nShop::FieldGroup:\n  pii: [personal]\n", "A: {x: [x, x]}\n", "FieldGroup: {a: b, b: a}\n")
}

func FuzzTests(f *testing.F) {
	fuzzFile(f, bundle.TestsName, `checks:
  - name: n
    principal: Shop::User::"bob"
    action: {type: Shop::Action, id: ViewOrder}
    resource: {type: Shop::Order, id: 42}
    context: {mfa: true, n: 1, l: [a, {b: c}]}
    fields: all
    require_all: true
    entities: [{uid: {type: A, id: b}, attrs: {}, parents: []}]
    expect: deny
    permitted: []
    denied: [id]
    denied_at: field
    determining: [p]
    obligations: o
    advice: []
`, "checks: [{}]", "checks: [{context: {a: 1.5, b: ~, c: 0o7}}]")
}
