package engine

import (
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

const tokenSchema = `namespace Shop {
  entity User, Order;
  entity Color enum ["red"];
  action View appliesTo { principal: [User], resource: [Order], context: { acr?: String, level: Long, mfa: Bool, scope: Set<String>, at?: datetime, now: datetime, ip: ipaddr, ids: Set<Long>, owner: User } };
  action "View.field" appliesTo { principal: [User], resource: [Order], context: { acr?: String, level: Long, mfa: Bool, scope: Set<String>, at?: datetime, now: datetime, ip: ipaddr, ids: Set<Long>, owner: User, field: Field } };
  action Edit appliesTo { principal: [User], resource: [Order], context: { now: String, late: Set<Set<String>> } };
  action All;
  entity Field;
}
`

// A bundle is refused whose tokens cannot become principals of its actions, or whose claims cannot fill
// the attributes.
func TestPrincipalTokensAreChecked(t *testing.T) {
	other := Source{Name: "other", Schema: `namespace Other { entity Robot; action Go appliesTo { principal: [Robot, Shop::User], resource: [Robot], context: { x: String } }; }`}
	for _, c := range []struct {
		typ, attribute, want string
	}{
		{"Shop::User", "acr", ""},
		{"Shop::User", "level", ""},
		{"Shop::User", "mfa", ""},
		{"Shop::User", "scope", ""},
		{"Shop::User", "at", ""},
		{"Shop::Usr", "acr", `bundle.yaml:2:3: type "Shop::Usr" is not declared by any schema`},
		{"Shop::Order", "acr", "bundle.yaml:2:3: no action of the bundle has principals of type Shop::Order"},
		{"Other::Robot", "acr", "bundle.yaml:2:3: no action of the bundle has principals of type Other::Robot"},
		{"Shop::Action", "acr", "bundle.yaml:2:3: no action of the bundle has principals of type Shop::Action"},
		{"Shop::User", "arc", `bundle.yaml:4:5: no action of the bundle declares the attribute "arc" in its context`},
		{"Shop::User", "x", `bundle.yaml:4:5: no action of the bundle declares the attribute "x" in its context`},
		{"Shop::User", "field", `bundle.yaml:4:5: no action of the bundle declares the attribute "field" in its context`},
		{"Shop::User", "now", `bundle.yaml:4:5: no claim can fill the attribute "now" of the context of Shop::Action::"View"`},
		{"Shop::User", "ip", `bundle.yaml:4:5: no claim can fill the attribute "ip" of the context of Shop::Action::"View"`},
		{"Shop::User", "ids", `bundle.yaml:4:5: no claim can fill the attribute "ids" of the context of Shop::Action::"View"`},
		{"Shop::User", "owner", `bundle.yaml:4:5: no claim can fill the attribute "owner" of the context of Shop::Action::"View"`},
		{"Shop::User", "late", `bundle.yaml:4:5: no claim can fill the attribute "late" of the context of Shop::Action::"Edit"`},
	} {
		src := Source{Name: "shop", Schema: tokenSchema, ManifestFile: "bundle.yaml", Exports: []Export{{Type: "User"}}, PrincipalTokens: []PrincipalToken{
			{Issuer: "users", Type: c.typ, IDClaim: "sub", Line: 2, Column: 3, Context: []ClaimAttribute{{Name: c.attribute, Claim: "c", Line: 4, Column: 5}}}}}
		set, findings := Compile([]Source{src, other}, nil)
		var got []string
		for _, f := range findings {
			got = append(got, f.String())
		}
		if strings.Join(got, "; ") != c.want || (set == nil) != (c.want != "") {
			t.Errorf("%s, %s: %q, want %q", c.typ, c.attribute, got, c.want)
		}
		// What was published before there was a rule is loaded.
		if set, findings := Load([]Source{src, other}, nil); set == nil {
			t.Errorf("%s, %s: %v", c.typ, c.attribute, findings)
		}
	}
}

// The mapping is that of the bundle that owns the action. The type of an attribute is that of the action.
func TestPrincipalTokenOfAnAction(t *testing.T) {
	mapping := []PrincipalToken{{Issuer: "users", Type: "Shop::User", IDClaim: "sub"}}
	other := Source{Name: "other", Schema: `namespace Other { action Go appliesTo { principal: [Shop::User], resource: [Shop::User] }; }`}
	set, findings := Compile([]Source{{Name: "shop", Schema: tokenSchema, PrincipalTokens: mapping, Exports: []Export{{Type: "*"}}}, other}, nil)
	if set == nil {
		t.Fatal(findings)
	}
	uid := func(typ, id string) cedar.EntityUID {
		return cedar.NewEntityUID(cedar.EntityType(typ), cedar.String(id))
	}
	for _, c := range []struct {
		action cedar.EntityUID
		issuer string
		want   string
	}{
		{uid("Shop::Action", "View"), "users", ""},
		{uid("Shop::Action", "View"), "staff", "the bundle shop takes no tokens of the issuer staff"},
		{uid("Other::Action", "Go"), "users", "the bundle other takes no tokens of the issuer users"},
		{uid("Shop::Action", "Viwe"), "users", `action Shop::Action::"Viwe" is not declared by any schema`},
	} {
		got, err := set.PrincipalToken(c.action, c.issuer)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) || err == nil && got.Type != "Shop::User" {
			t.Errorf("%s of %s: %+v, %v", c.action, c.issuer, got, err)
		}
	}
	for name, want := range map[string]ClaimType{"acr": ClaimString, "level": ClaimLong, "mfa": ClaimBool, "scope": ClaimStrings, "at": ClaimDatetime, "now": ClaimUnfit, "ip": ClaimUnfit, "ids": ClaimUnfit} {
		if got, declared := set.ClaimAttribute(uid("Shop::Action", "View"), name); got != want || !declared {
			t.Errorf("%s: %d, %v", name, got, declared)
		}
	}
	for _, action := range []string{"Edit", "All", "Viwe"} {
		if _, declared := set.ClaimAttribute(uid("Shop::Action", action), "acr"); declared {
			t.Errorf("%s declares acr", action)
		}
	}
	if got, declared := set.ClaimAttribute(uid("Shop::Action", "Edit"), "now"); got != ClaimString || !declared {
		t.Errorf("a text with the name now: %d, %v", got, declared)
	}
}
