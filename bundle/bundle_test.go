package bundle_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/cedarpost/cedarpost/bundle"
	"pgregory.net/rapid"
)

// files are the files of a bundle: path → content.
type files map[string]string

func (f files) list() []bundle.File {
	var out []bundle.File
	for _, p := range slices.Sorted(maps.Keys(f)) {
		out = append(out, bundle.File{Path: p, Content: []byte(f[p])})
	}
	return out
}

// with returns a valid bundle with the given files.
func with(more files) files {
	f := files{"schema.cedarschema": "namespace Shop {}\n"}
	maps.Copy(f, more)
	return f
}

func mustRead(t *testing.T, f files) *bundle.Bundle {
	t.Helper()
	b, err := bundle.FromFiles("shop", f.list())
	if err != nil {
		t.Fatalf("FromFiles:\n%v", err)
	}
	return b
}

// wantProblems compares problems by their text, in any order.
func wantProblems(t *testing.T, err error, want ...string) {
	t.Helper()
	probs, ok := errors.AsType[bundle.Problems](err)
	if !ok {
		t.Fatalf("error is %v, want Problems", err)
	}
	var got []string
	for _, p := range probs {
		got = append(got, p.String())
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("problems:\n  %s\nwant:\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func TestWholeBundle(t *testing.T) {
	b := mustRead(t, files{
		"schema.cedarschema":    "namespace Shop {}\n",
		"views.cedar":           "permit (principal, action, resource);\n",
		"a/deep/er.cedar":       "forbid (principal, action, resource);\n",
		"README.md":             "for people\n",
		"notes.txt":             "for people\n",
		".github/workflow.yaml": "not ours\n",
		"entities.json":         "[]\n",
		"bundle.yaml":           "name: web-shop\ndescription: The shop.\nowners: [ann, ben]\napprovals: 2\non_forbid_error: skip\n",
		"fields.yaml": `
Shop::Order:
  total: money
  customer.email: [pii, Order.visible]
  id: []
Shop::FieldGroup:
  pii: [personal]
`,
	})
	if b.Name != "web-shop" || b.Description != "The shop." || b.OnForbidError != bundle.Skip || b.Approvals != 2 ||
		!slices.Equal(b.Owners, []string{"ann", "ben"}) {
		t.Errorf("manifest: %+v", b)
	}
	var policies, all []string
	for _, f := range b.Policies {
		policies = append(policies, f.Path)
	}
	for _, f := range b.Files {
		all = append(all, f.Path)
	}
	if want := []string{"a/deep/er.cedar", "views.cedar"}; !slices.Equal(policies, want) {
		t.Errorf("policies %q, want %q", policies, want)
	}
	if want := []string{"a/deep/er.cedar", "bundle.yaml", "entities.json", "fields.yaml", "schema.cedarschema", "views.cedar"}; !slices.Equal(all, want) {
		t.Errorf("files %q, want %q", all, want)
	}
	want := []bundle.Field{
		{Type: "Shop::FieldGroup", Path: "pii", Groups: []string{"personal"}, Line: 7, Column: 3},
		{Type: "Shop::Order", Path: "customer.email", Groups: []string{"pii", "Order.visible"}, Line: 4, Column: 3},
		{Type: "Shop::Order", Path: "id", Groups: []string{}, Line: 5, Column: 3},
		{Type: "Shop::Order", Path: "total", Groups: []string{"money"}, Line: 3, Column: 3},
	}
	if !reflect.DeepEqual(b.Fields, want) {
		t.Errorf("fields\n%+v\nwant\n%+v", b.Fields, want)
	}
	if !b.Fields[0].IsGroup() || b.Fields[1].IsGroup() {
		t.Error("only FieldGroup entries nest groups")
	}
	if string(b.Entities) != "[]\n" || len(b.Schemas) != 1 || b.Schemas[0].Path != "schema.cedarschema" {
		t.Errorf("entities %q, schemas %v", b.Entities, b.Schemas)
	}
	if want := []string{".github/workflow.yaml", "README.md", "notes.txt"}; !slices.Equal(b.Ignored, want) {
		t.Errorf("ignored %q, want %q", b.Ignored, want)
	}
}

// Digests are in approvals and in the log, so that of a bundle never changes, whatever else is in the folder.
func TestDigestStays(t *testing.T) {
	b := mustRead(t, with(files{"b/a.cedar": "permit (principal, action, resource);\n", "bundle.yaml": "name: shop\n", "LICENSE": "x", "sub/x.yaml": "y", "sub/z.json": "{}", "notes.txt": "z"}))
	if want := "a5dcc81ff93620038d1cd46ce80a9266275c79e413942236716255f8a7c7b828"; b.Digest() != want {
		t.Errorf("digest %s, want %s", b.Digest(), want)
	}
}

func TestDefaults(t *testing.T) {
	b := mustRead(t, with(files{"bundle.yaml": "# nothing yet\n", "fields.yaml": "", "tests.yaml": "---\n"}))
	if b.Name != "shop" || b.OnForbidError != bundle.Deny || b.Entities != nil || b.Fields != nil || b.Tests != nil {
		t.Errorf("%+v", b)
	}
}

func TestPrincipalTokens(t *testing.T) {
	const manifest = `name: shop
principal_tokens:
  staff: {type: Shop::User, id: /ids/a~1b, id_prefix: "staff:", audience: shop-api}
  customers:
    type: Shop::User
    id_prefix: "customers:"
    context:
      scope: scope
      acr: acr
`
	want := []bundle.PrincipalToken{
		{Issuer: "customers", Type: "Shop::User", IDClaim: "sub", IDPrefix: "customers:", Context: []bundle.ClaimAttribute{
			{Name: "acr", Claim: "acr", Line: 9, Column: 7}, {Name: "scope", Claim: "scope", Line: 8, Column: 7}}, Line: 4, Column: 3},
		{Issuer: "staff", Type: "Shop::User", IDClaim: "/ids/a~1b", IDPrefix: "staff:", Audiences: []string{"shop-api"}, Line: 3, Column: 3},
	}
	b := mustRead(t, with(files{"bundle.yaml": manifest}))
	if !reflect.DeepEqual(b.PrincipalTokens, want) {
		t.Errorf("%+v\nwant\n%+v", b.PrincipalTokens, want)
	}
	// What was published is read the same, whatever else the file has.
	stored, err := bundle.ReadPrincipalTokens([]byte(manifest + "later: {setting: 1}\n"))
	if err != nil || !reflect.DeepEqual(stored, want) {
		t.Errorf("stored: %+v, %v", stored, err)
	}
	if stored, err := bundle.ReadPrincipalTokens(nil); err != nil || stored != nil {
		t.Errorf("no file: %+v, %v", stored, err)
	}
	if _, err := bundle.ReadPrincipalTokens([]byte(manifest + "  later: {type: T, rule: x}\n")); err == nil {
		t.Error("a setting of tokens that this version does not know")
	}
}

func TestChecks(t *testing.T) {
	b := mustRead(t, with(files{"tests.yaml": `checks:
  - name: everything given
    principal: Shop::User::"bob"
    action: {type: Shop::Action, id: EditOrder}
    resource: {type: "Shop::Order", id: 42}
    context: {mfa: true, tries: 3, when: 2026-01-02, list: [a, {b: -1}]}
    fields: [id, customer.email]
    require_all: true
    entities:
      - uid: {type: Shop::Order, id: "42"}
        attrs: {owner: {__entity: {type: Shop::User, id: bob}}}
        parents: []
    expect: Deny
    permitted: []
    denied: [id]
    denied_at: field
    determining: [a]
    obligations: notify
    advice: []
  - name: little given
    principal: 'Shop::User::"bo\"b"'
    action: Shop::Action::"ViewOrder"
    resource: Shop::Order::"42"
    fields: all
    expect: allow
`}))
	want := []bundle.Test{
		{
			Name: "everything given", Line: 2,
			Principal: bundle.Ref{Type: "Shop::User", ID: "bob"},
			Action:    bundle.Ref{Type: "Shop::Action", ID: "EditOrder"},
			Resource:  bundle.Ref{Type: "Shop::Order", ID: "42"},
			Context: map[string]any{"mfa": true, "tries": int64(3), "when": "2026-01-02",
				"list": []any{"a", map[string]any{"b": int64(-1)}}},
			Entities: []any{map[string]any{
				"uid":     map[string]any{"type": "Shop::Order", "id": "42"},
				"attrs":   map[string]any{"owner": map[string]any{"__entity": map[string]any{"type": "Shop::User", "id": "bob"}}},
				"parents": []any{},
			}},
			Fields: []string{"id", "customer.email"}, RequireAll: true,
			Expect: bundle.Expect{Decision: "deny", DeniedAt: "FIELD", Permitted: []string{}, Denied: []string{"id"},
				Determining: []string{"a"}, Obligations: []string{"notify"}, Advice: []string{}},
		},
		{
			Name: "little given", Line: 20,
			Principal: bundle.Ref{Type: "Shop::User", ID: `bo"b`},
			Action:    bundle.Ref{Type: "Shop::Action", ID: "ViewOrder"},
			Resource:  bundle.Ref{Type: "Shop::Order", ID: "42"},
			AllFields: true,
			Expect:    bundle.Expect{Decision: "allow"},
		},
	}
	for i := range want {
		if !reflect.DeepEqual(b.Tests[i], want[i]) {
			t.Errorf("check %d\n%+v\nwant\n%+v", i, b.Tests[i], want[i])
		}
	}
}

func TestProblems(t *testing.T) {
	check := func(more string) files {
		return with(files{"tests.yaml": "checks:\n" +
			"  - name: n\n    principal: U::\"u\"\n    action: Action::\"a\"\n    resource: R::\"r\"\n" + more})
	}
	for _, tt := range []struct {
		name string
		in   files
		want []string
	}{
		{"no schema", files{"a.cedar": "x"}, []string{"schema.cedarschema: is missing"}},
		{"typo in a name", with(files{"field.yaml": ""}), []string{"field.yaml: a bundle knows no file of this name"}},
		{"yml", with(files{"fields.yml": ""}), []string{"fields.yml: a bundle knows no file of this name"}},
		{"unknown json", with(files{"data.json": ""}), []string{"data.json: a bundle knows no file of this name"}},
		{"catalogue too deep", with(files{"sub/fields.yaml": ""}), []string{"sub/fields.yaml: fields.yaml belongs at the top of the bundle"}},
		{"policy in capitals", with(files{"sub/a.CEDAR": ""}), []string{"sub/a.CEDAR: would not be read"}},
		{"policies for people to read", with(files{"README.CEDAR": "", "Readme.Cedar": ""}), []string{"README.CEDAR: would not be read", "Readme.Cedar: would not be read"}},
		{"a space or a dot at the end", with(files{"a.cedar" + " ": "", "b.cedar.": ""}), []string{"a.cedar : would not be read", "b.cedar.: would not be read"}},
		{"hidden policies", with(files{".cedar": "", "a/.old/b.cedar": "", ".git/config": ""}), []string{".cedar: would not be read", "a/.old/b.cedar: would not be read"}},
		{"no policy at all", with(files{"a.cedar": " \n"}), []string{"a.cedar: is empty"}},
		{"names that differ in case", with(files{"a/B.cedar": "x", "A/b.cedar": "x"}), []string{"a/B.cedar: differs from A/b.cedar in upper and lower case only"}},
		{"a folder in the place of a file", with(files{"a.Cedar/b.cedar": "x", "fields.yaml/x.txt": ""}), []string{
			"a.Cedar: is a folder, and its name is that of a file", "fields.yaml: is a folder, and its name is that of a file"}},
		{"policy in JSON in other letters", with(files{"sub/a.cedar.JSON": "", "b.Cedar.json": ""}), []string{"sub/a.cedar.JSON: would not be read", "b.Cedar.json: would not be read"}},
		{"policies and schemas with something behind", with(files{"a.cedar.txt": "", "sub/a.cedar.bak": "", "a.cedar~": "", "#a.cedar#": "", "a.cedar_old": "", "s.cedarschema.orig": "", "s.CEDARSCHEMA": "", "s.cedarschema.json.1": ""}), []string{
			"a.cedar.txt: would not be read", "sub/a.cedar.bak: would not be read", "a.cedar~: would not be read", "#a.cedar#: would not be read", "a.cedar_old: would not be read",
			"s.cedarschema.orig: would not be read", "s.CEDARSCHEMA: would not be read", "s.cedarschema.json.1: would not be read"}},
		{"policies and schemas in other formats", with(files{"policies.json": "", "sub/Policy.json": "", "schema.json": "", "sub/schema.yaml": "", "policy-set.json": "", "cedar_policies.txt": "", "template-links.json": ""}), []string{
			"policies.json: would not be read", "sub/Policy.json: would not be read", "schema.json: would not be read", "sub/schema.yaml: would not be read", "policy-set.json: would not be read",
			"cedar_policies.txt: would not be read", "template-links.json: would not be read"}},
		{"a hidden policy in JSON", with(files{".a.cedar.json": ""}), []string{".a.cedar.json: would not be read"}},
		{"an empty policy in JSON", with(files{"a.cedar.json": "\n"}), []string{"a.cedar.json: is empty"}},
		{"not UTF-8", with(files{"a.cedar": "x\ny\xffz"}), []string{"a.cedar:2:2: is not UTF-8"}},
		{"NUL", with(files{"bundle.yaml": "name: a\x00"}), []string{"bundle.yaml:1:8: holds a NUL byte"}},
		{"byte order mark", with(files{"a.cedar": "\ufeffpermit"}), []string{"a.cedar:1:1: starts with a byte order mark"}},

		{"rules of lint", with(files{"bundle.yaml": "name: a\nlint: {disable: [unused-type, Shadowed], enable: x}\n"}), []string{
			`bundle.yaml:2:17: "Shadowed" is not the id of a rule`, `bundle.yaml:2:42: unknown key "enable"`}},
		{"unknown key", with(files{"bundle.yaml": "name: a\nowner: b\n"}), []string{`bundle.yaml:2:1: unknown key "owner"`}},
		{"bad name", with(files{"bundle.yaml": "name: Shop\n"}), []string{`bundle.yaml:1:7: "Shop" cannot be a bundle's name`}},
		{"number for a name", with(files{"bundle.yaml": "name: 12\n"}), []string{`bundle.yaml:1:7: name must be text, not a number`}},
		{"bad values", with(files{"bundle.yaml": "approvals: -1\non_forbid_error: maybe\nowners: {a: b}\ndescription: [x]\n"}), []string{
			"bundle.yaml:1:12: approvals must be a whole number from 0 to 100",
			"bundle.yaml:2:18: on_forbid_error must be deny or skip",
			"bundle.yaml:3:9: owners must be a list of texts, not a mapping",
			"bundle.yaml:4:14: description must be text, not a list"}},
		{"an impact in other words", with(files{"bundle.yaml": "approvals: 2\nimpact: maybe\n"}), []string{"bundle.yaml:2:9: impact must be required, or left out"}},
		{"windows of a freeze", with(files{"bundle.yaml": "freeze:\n  - {at: 0 18 * * FRI, for: 62h, zone: Mars/Phobos}\n  - {at: 0 18 * *, for: 1s}\n  - {at: 0 0 30 2 *, for: 91d, zone: Local, reason: [x]}\n  - {at: '@daily', from: 3}\n  - {for: 90s}\n  - 0 18 * * FRI\n  - {at: TZ=UTC * * * * *, for: 1h}\n  - {at: 0 18 * * H, for: 1h, zone: ''}\n  - {at: 0 18 L * FOO, for: 4}\n"}), []string{
			`bundle.yaml:2:40: zone: there is no time zone "Mars/Phobos"`,
			`bundle.yaml:3:10: at: "0 18 * *" does not have five fields`, "bundle.yaml:3:25: for must be a duration from 1m to 90d, such as 4h or 7d",
			`bundle.yaml:4:10: at: "0 0 30 2 *" never comes`, "bundle.yaml:4:27: for must be a duration from 1m to 90d, such as 4h or 7d", `bundle.yaml:4:38: zone: there is no time zone "Local"`, "bundle.yaml:4:53: reason must be text, not a list",
			`bundle.yaml:5:10: at: "@daily" does not have five fields`, `bundle.yaml:5:20: unknown key "from"`,
			"bundle.yaml:6:11: for must be in whole minutes",
			"bundle.yaml:7:5: a window of freeze must be a mapping, not text",
			`bundle.yaml:8:10: at: "TZ=UTC * * * * *" does not have five fields`,
			`bundle.yaml:9:10: at: "H" is neither a month nor a day of the week`, `bundle.yaml:9:37: zone: there is no time zone ""`,
			`bundle.yaml:10:10: at: "L" is neither a month nor a day of the week`, "bundle.yaml:10:29: for must be a duration from 1m to 90d, such as 4h or 7d"}},
		{"a freeze without windows, and too short a time for approvals", with(files{"bundle.yaml": "freeze: {at: 0 18 * * FRI}\napprovals_expire: 59m\n"}), []string{
			"bundle.yaml:1:9: freeze must be a list, not a mapping", "bundle.yaml:2:19: approvals_expire must be a duration from 1h to 365d, such as 4h or 7d"}},
		{"an incomplete window", with(files{"bundle.yaml": "freeze: [{at: 0 18 * * FRI}]\n"}), []string{"bundle.yaml:1:10: a window of freeze needs at and for"}},
		{"very many windows", with(files{"bundle.yaml": "freeze: [" + strings.Repeat("{at: 0 18 * * FRI, for: 1h}, ", 21) + "]\n"}), []string{"bundle.yaml:1:9: freeze must have at most 20 windows"}},
		{"exports that are not types", with(files{"bundle.yaml": "exports: [User, 'a b', User, 1, '*']\n"}), []string{
			`bundle.yaml:1:17: "a b" is not an entity type`, `bundle.yaml:1:24: "User" is listed twice`,
			"bundle.yaml:1:30: each of exports must be text, not a number", `bundle.yaml:1:33: "*" exports all types`}},
		{"exports of nothing", with(files{"bundle.yaml": "exports:\n"}), []string{"bundle.yaml:1:9: exports must be a list of entity types, not nothing"}},
		{"approvals in other words", with(files{"bundle.yaml": "approvals: 00\n"}), []string{"bundle.yaml:1:12: approvals must be a whole number from 0 to 100"}},
		{"approvals as text", with(files{"bundle.yaml": "approvals: '2'\n"}), []string{"bundle.yaml:1:12: approvals must be a whole number from 0 to 100"}},
		{"very many approvals", with(files{"bundle.yaml": "approvals: 101\n"}), []string{"bundle.yaml:1:12: approvals must be a whole number from 0 to 100"}},
		{"approvals as a fraction", with(files{"bundle.yaml": "approvals: 1e1\n"}), []string{"bundle.yaml:1:12: approvals must be a whole number from 0 to 100"}},
		{"tokens that are not valid", with(files{"bundle.yaml": "principal_tokens:\n  a: {type: A, id: '', context: [x]}\n  b: {type: a-b, id: /x~2, id_prefix: \"\\n\", claims: {}}\n  Cc: {type: T, context: {x: 1, '': y}}\n  d: {audience: []}\n  e: x\n  g: {type: G, audience: ['']}\n"}), []string{
			"bundle.yaml:2:20: id must be a claim, with 1 to 256 bytes", "bundle.yaml:2:33: context must be a mapping, not a list",
			`bundle.yaml:3:13: "a-b" is not an entity type`, `bundle.yaml:3:22: id: "/x~2" is not a JSON pointer`,
			"bundle.yaml:3:39: id_prefix must have at most 128 bytes, and only visible characters", `bundle.yaml:3:45: unknown key "claims"`,
			`bundle.yaml:4:3: "Cc" cannot be the name of an issuer`, "bundle.yaml:4:30: the claim of x must be text, not a number", "bundle.yaml:4:33: the name of an attribute has 1 to 256 bytes",
			`bundle.yaml:5:3: the tokens of "d" have no type`, "bundle.yaml:5:17: audience must be a text, or a list of 1 to 100 texts", "bundle.yaml:7:26: audience must be a text, or a list of 1 to 100 texts", "bundle.yaml:6:6: the tokens of e must be a mapping, not text"}},
		{"users of two issuers with one id", with(files{"bundle.yaml": "principal_tokens:\n  a: {type: A}\n  b: {type: B}\n  c: {type: A, id_prefix: 'c:'}\n  d: {type: B, id_prefix: ''}\n  e: {type: C, id_prefix: 'e:'}\n  f: {type: C, id_prefix: 'f:'}\n"}), []string{
			"bundle.yaml:4:3: a user of the issuer c could get the id of a user of the issuer a: both are of type A",
			"bundle.yaml:5:3: a user of the issuer d could get the id of a user of the issuer b: both are of type B"}},
		{"list for a mapping", with(files{"bundle.yaml": "- a\n"}), []string{"bundle.yaml:1:1: bundle.yaml must be a mapping, not a list"}},
		{"two documents", with(files{"bundle.yaml": "name: a\n---\nname: b\n"}), []string{"bundle.yaml:2:1: holds more than one YAML document"}},
		{"alias", with(files{"fields.yaml": "A:\n  x: &a [g]\n  y: *a\n"}), []string{
			"fields.yaml:2:6: anchors are not allowed", "fields.yaml:3:6: aliases are not allowed"}},
		{"tag", with(files{"bundle.yaml": "name: !!str a\n"}), []string{"bundle.yaml:1:7: tags are not allowed"}},
		{"merge", with(files{"bundle.yaml": "<<: {name: a}\n"}), []string{"bundle.yaml:1:1: merge keys are not allowed"}},
		{"bidi in a comment", with(files{"fields.yaml": "# a\n# b\u202e\n"}), []string{"fields.yaml:2:4: has the character U+202E, which changes the order in which text is shown"}},
		{"too large", with(files{"fields.yaml": strings.Repeat("#", bundle.MaxYAMLBytes+1)}), []string{"fields.yaml: is larger than 1024 KiB"}},

		{"bad type", with(files{"fields.yaml": "Shop.Order:\n  id: []\n"}), []string{`fields.yaml:1:1: "Shop.Order" is not an entity type`}},
		{"the Field type", with(files{"fields.yaml": "Shop::Field:\n  id: []\n"}), []string{"fields.yaml:1:1: Shop::Field is what the catalogue becomes"}},
		{"bad paths and groups", with(files{"fields.yaml": "A:\n  a..b: []\n  items[].x: []\n  ok: [\"a b\"]\n  no:\n  two: [g, g]\n" +
			"  " + strings.Repeat("x", 65) + ": []\n  " + strings.Repeat("x.", 16) + "x: []\n"}), []string{
			`fields.yaml:2:3: "a..b" is not a field path`,
			`fields.yaml:3:3: "items[].x" is not a field path`,
			`fields.yaml:4:7: "a b" is not a group's name`,
			`fields.yaml:5:6: groups must be a list of texts, not nothing`,
			`fields.yaml:6:12: "g" is listed twice`,
			fmt.Sprintf(`fields.yaml:7:3: %q is not a field path`, strings.Repeat("x", 65)),
			fmt.Sprintf(`fields.yaml:8:3: %q is not a field path`, strings.Repeat("x.", 16)+"x")}},
		{"group in itself", with(files{"fields.yaml": "FieldGroup:\n  a: [b]\n  b: [a]\n  c: c\n"}), []string{
			"fields.yaml:3:3: group a is inside itself, through b", "fields.yaml:4:3: group c is inside itself, through c"}},

		{"empty check", with(files{"tests.yaml": "checks:\n  - {}\n"}), []string{
			"tests.yaml:2:5: the check has no name", "tests.yaml:2:5: the check has no principal", "tests.yaml:2:5: the check has no action",
			"tests.yaml:2:5: the check has no resource", "tests.yaml:2:5: the check has no expect"}},
		{"tests without checks", with(files{"tests.yaml": "tests: []\n"}), []string{`tests.yaml:1:1: unknown key "tests"`}},
		{"bad references", with(files{"tests.yaml": "checks:\n  - {name: n, principal: bob, action: {type: A}, resource: {type: a-b, id: 1.5, x: y}, expect: allow}\n"}), []string{
			`tests.yaml:2:26: "bob": an entity reference looks like Type::"id"; the id in quotes is missing`,
			`tests.yaml:2:39: an entity reference has a type and an id`,
			`tests.yaml:2:67: "a-b" is not an entity type`,
			`tests.yaml:2:76: id must be text, not a number`,
			`tests.yaml:2:81: unknown key "x"`}},
		{"bad expectations", check("    expect: permit\n    denied_at: nowhere\n    require_all: yes\n    fields: [id, 'a b']\n"), []string{
			"tests.yaml:6:13: expect must be one of allow, deny",
			"tests.yaml:7:16: denied_at must be one of FUNCTION, OBJECT, FIELD",
			"tests.yaml:8:18: require_all must be true or false, not text",
			`tests.yaml:9:13: fields: "a b" is not a field path`}},
		{"can never hold", check("    expect: allow\n    denied_at: FIELD\n    permitted: [id]\n"), []string{
			"tests.yaml:7:16: a check that expects allow cannot have denied_at",
			"tests.yaml:7:16: only a check that requires all fields is denied at FIELD",
			"tests.yaml:8:16: permitted makes no sense in a check that asks for no fields"}},
		{"values Cedar lacks", check("    expect: allow\n    context: {a: 1.5, b: null, c: 0x10, d: 99999999999999999999}\n"), []string{
			"tests.yaml:7:18: Cedar has no floating-point numbers", "tests.yaml:7:26: Cedar has no null",
			`tests.yaml:7:35: "0x10" is not a plain number`, "tests.yaml:7:44: 99999999999999999999 does not fit in 64 bits"}},
		{"bad entities", check("    expect: allow\n    entities: [{attributes: {}}, 7]\n    context: []\n"), []string{
			`tests.yaml:7:17: unknown key "attributes"`, "tests.yaml:7:16: an entity has a uid",
			"tests.yaml:7:34: an entity must be a mapping, not a number", "tests.yaml:8:14: context must be a mapping, not a list"}},
		{"same name twice", check("    expect: allow\n  - {name: n, principal: 'U::\"u\"', action: 'Action::\"a\"', resource: 'R::\"r\"', expect: allow}\n"),
			[]string{`tests.yaml:7:5: check "n" is given twice, first on line 2`}},
		{"several files at once", files{"bundle.yaml": "x: 1\n", "fields.yaml": "y: 1\n", "field.yaml": ""}, []string{
			`bundle.yaml:1:1: unknown key "x"`, "fields.yaml:1:4: the fields of y must be a mapping, not a number",
			"field.yaml: a bundle knows no file of this name", "schema.cedarschema: is missing"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := bundle.FromFiles("shop", tt.in.list())
			wantProblems(t, err, tt.want...)
		})
	}
}

func TestYAMLErrorsHavePositions(t *testing.T) {
	for name, in := range map[string]string{
		"same key twice":     "name: a\nname: b\n",
		"not closed":         "owners: [a, b\nname: c\n",
		"tab":                "owners:\n\t- a\n",
		"nested flow":        "owners: " + strings.Repeat("[", 100_000),
		"nested blocks":      strings.Repeat("- ", 10_000) + "a\n",
		"same key, in a map": "owners: {a: b, a: c}\n",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := bundle.FromFiles("shop", with(files{"bundle.yaml": in}).list())
			probs, ok := errors.AsType[bundle.Problems](err)
			if !ok || probs[0].File != "bundle.yaml" || probs[0].Line == 0 || probs[0].Column == 0 {
				t.Errorf("%#v", err)
			}
			t.Log(err)
		})
	}
}

func TestManyProblemsAreCapped(t *testing.T) {
	_, err := bundle.FromFiles("shop", with(files{"bundle.yaml": manyKeys(5_000)}).list())
	probs, _ := errors.AsType[bundle.Problems](err)
	if n := len(probs); n != 201 {
		t.Errorf("%d problems", n)
	}
}

func manyKeys(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "k%d: v\n", i)
	}
	return b.String()
}

func TestTooManyFields(t *testing.T) {
	_, err := bundle.FromFiles("shop", with(files{"fields.yaml": "A: {" +
		strings.ReplaceAll(strings.ReplaceAll(manyKeys(bundle.MaxFields+2), ": v", ": []"), "\n", ", ") + "}\n"}).list())
	probs, _ := errors.AsType[bundle.Problems](err)
	if len(probs) != 1 || probs[0].Message != "the catalogue holds more than 10000 fields" {
		t.Error(err)
	}
}

func TestUploadPaths(t *testing.T) {
	for _, p := range []string{"", ".", "..", "../a.cedar", "a/../b.cedar", "/etc/a.cedar", `a\b.cedar`, "C:a.cedar", "a//b.cedar",
		"./a.cedar", "a/", "a\nb.cedar", "\xff.cedar", strings.Repeat("a", 600) + ".cedar"} {
		_, err := bundle.FromFiles("shop", with(files{p: ""}).list())
		probs, ok := errors.AsType[bundle.Problems](err)
		if !ok || len(probs) != 1 || probs[0].Message != "is not a path inside a bundle" {
			t.Errorf("path %q: %v", p, err)
		}
		if err := bundle.WriteDir(filepath.Join(t.TempDir(), "x"), []bundle.File{{Path: p}}); err == nil {
			t.Errorf("WriteDir took path %q", p)
		}
	}
	_, err := bundle.FromFiles("shop", append(with(nil).list(), with(nil).list()...))
	wantProblems(t, err, "schema.cedarschema: is given twice")
	_, err = bundle.FromFiles("shop", make([]bundle.File, bundle.MaxFiles+1))
	wantProblems(t, err, "the bundle holds more than 10000 files")
	_, err = bundle.FromFiles("The Shop", with(nil).list())
	wantProblems(t, err, `bundle.yaml: "The Shop" cannot be a bundle's name: it must be 1 to 64 of a-z, 0-9, dot, underscore and dash, and start with a letter or digit`)
}

func TestReadDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "shop")
	want := with(files{"orders/view.cedar": "permit (principal, action, resource);"})
	if err := bundle.WriteDir(dir, want.list()); err != nil {
		t.Fatal(err)
	}
	if err := bundle.WriteDir(dir, want.list()); err == nil {
		t.Error("WriteDir wrote over a bundle")
	}
	b, err := bundle.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if b.Name != "shop" || !reflect.DeepEqual(b.Files, want.list()) {
		t.Errorf("%+v", b)
	}
	if again := mustRead(t, want); again.Digest() != b.Digest() {
		t.Error("the same files have two digests")
	}

	// A link to a file in the folder is read: a mounted ConfigMap has such links.
	link := func(target, name string) {
		t.Helper()
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	link("orders/view.cedar", "again.cedar")
	if b, err := bundle.ReadDir(dir); err != nil || len(b.Policies) != 2 {
		t.Errorf("link inside: %v", err)
	}

	outside := filepath.Join(t.TempDir(), "out.cedar")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link(outside, "out.cedar")
	link("nowhere", "broken.cedar")
	link("orders", "folder")
	link("/", ".hidden")
	_, err = bundle.ReadDir(dir)
	wantProblems(t, err,
		"broken.cedar: is a link that cannot be followed inside the bundle: no such file or directory",
		"folder: is a link to a folder that is read at its own place",
		"out.cedar: is a link that cannot be followed inside the bundle: its target is an absolute path")

	if _, err := bundle.ReadDir(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing folder: %v", err)
	}
	if _, err := bundle.Read(fstest.MapFS{}, "shop"); err == nil {
		t.Error("an empty folder is a bundle")
	}
}

func TestDigestTellsFilesApart(t *testing.T) {
	a := mustRead(t, with(files{"a.cedar": "xy", "b.cedar": "z"}))
	b := mustRead(t, with(files{"a.cedar": "x", "b.cedar": "yz"}))
	c := mustRead(t, with(files{"a.cedar": "xy", "c.cedar": "z"}))
	if a.Digest() == b.Digest() || a.Digest() == c.Digest() || len(a.Digest()) != 64 {
		t.Errorf("%s %s %s", a.Digest(), b.Digest(), c.Digest())
	}
}

func TestDigestIsStable(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		more := rapid.MapOfN(rapid.StringMatching(`([a-z]{1,3}/){0,2}[a-z]{1,5}\.cedar`), rapid.String().Filter(func(s string) bool {
			return !strings.ContainsRune(s, 0) && !strings.HasPrefix(s, "\ufeff") && strings.TrimSpace(s) != ""
		}), 0, 8).Draw(rt, "files")
		in := with(more).list()
		one, err := bundle.FromFiles("shop", in)
		if err != nil {
			rt.Fatal(err)
		}
		rand.Shuffle(len(in), func(i, j int) { in[i], in[j] = in[j], in[i] })
		two, err := bundle.FromFiles("shop", in)
		if err != nil {
			rt.Fatal(err)
		}
		three, err := bundle.FromFiles("shop", one.Files)
		if err != nil {
			rt.Fatal(err)
		}
		if one.Digest() != two.Digest() || one.Digest() != three.Digest() || !reflect.DeepEqual(one, two) {
			rt.Fatal("the order of an upload shows")
		}
	})
}

// The rules of a published bundle.yaml are read alone. What was not understood when it was published still
// asks for an approval, and other rules that cannot be read are named.
func TestReadRules(t *testing.T) {
	for manifest, want := range map[string]bundle.Rules{
		"": {}, "name: a\n": {}, "[1]": {}, "approvals: 0": {}, "approvals: [": {},
		"approvals: 3\nlater: true\n": {Approvals: 3}, "approvals: two": {Approvals: 1}, "approvals: 1e3": {Approvals: 1}, "approvals: '0'": {Approvals: 1},
		"approvals_expire: 7d": {ApprovalsExpire: 7 * 24 * time.Hour},
		"approvals_expire: 7":  {Unread: "bundle.yaml:1:19: approvals_expire must be a duration from 1h to 365d, such as 4h or 7d"},
		"freeze: [{at: ' 0  18 * * FRI', for: 62h, zone: Europe/Berlin, reason: weekend}]": {Freeze: []bundle.FreezeWindow{{At: "0 18 * * FRI", For: 62 * time.Hour, Zone: "Europe/Berlin", Reason: "weekend"}}},
		"freeze: later\n": {Unread: "bundle.yaml:1:9: freeze must be a list, not text"},
	} {
		if got := bundle.ReadRules([]byte(manifest)); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, want %+v", manifest, got, want)
		}
	}
}

// The stricter one of two sets of rules is at least as strict as each of them, whatever the order is.
func TestStricter(t *testing.T) {
	window := func(at string) bundle.FreezeWindow { return bundle.FreezeWindow{At: at, For: time.Hour} }
	draw := rapid.Custom(func(rt *rapid.T) (r bundle.Rules) {
		r.Approvals = rapid.IntRange(0, 3).Draw(rt, "approvals")
		r.ApprovalsExpire = time.Duration(rapid.SampledFrom([]int{0, 1, 24 * 30, 24 * 90}).Draw(rt, "hours")) * time.Hour
		for _, hour := range rapid.SliceOfDistinct(rapid.IntRange(1, 4), rapid.ID[int]).Draw(rt, "windows") {
			r.Freeze = append(r.Freeze, window(fmt.Sprintf("0 %d * * *", hour)))
		}
		return r
	})
	rapid.Check(t, func(rt *rapid.T) {
		a, b := draw.Draw(rt, "a"), draw.Draw(rt, "b")
		both, other := a.Stricter(b), b.Stricter(a)
		for _, r := range []bundle.Rules{a, b} {
			if both.Approvals < r.Approvals || both.Expire() > r.Expire() {
				rt.Fatalf("%+v is laxer than %+v", both, r)
			}
			for _, w := range r.Freeze {
				if !slices.Contains(both.Freeze, w) || !slices.Contains(other.Freeze, w) {
					rt.Fatalf("%+v leaves out %+v", both, w)
				}
			}
		}
		if both.Approvals != other.Approvals || both.Expire() != other.Expire() || len(both.Freeze) != len(other.Freeze) || len(both.Freeze) > len(a.Freeze)+len(b.Freeze) {
			rt.Fatalf("%+v, the other way round %+v", both, other)
		}
	})
}
