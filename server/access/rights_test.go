package access

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cedar-policy/cedar-go"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

func mustDecider(t testing.TB, local string) *Decider {
	t.Helper()
	var src *engine.Source
	if local != "" {
		src = &engine.Source{Name: engine.AdminLocal, Policies: []engine.PolicyText{{File: "p.cedar", Text: local}}}
	}
	d, err := NewDecider(src)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// The rights of any grants are those of each grant that covers the target and has not ended, taken
// together, and a grant never takes a right away.
func TestRightsAreUnions(t *testing.T) {
	d := mustDecider(t, "")
	bundles := []string{AllBundles, "a", "b", engine.Guardrails, engine.AdminLocal}
	rapid.Check(t, func(t *rapid.T) {
		grant := rapid.Custom(func(t *rapid.T) store.Grant {
			g := store.Grant{Caller: "c", Role: rapid.SampledFrom(append(Roles(), "root")).Draw(t, "role"), Bundle: rapid.SampledFrom(bundles).Draw(t, "bundle")}
			if rapid.Bool().Draw(t, "narrowed") {
				g.Actions, g.EntityTypes = []string{`A::Action::"x"`}, []string{"A::T"}
			}
			g.ExpiresAt = rapid.SampledFrom([]*store.Grant{{}, {ExpiresAt: &past}, {ExpiresAt: &soon}, {ExpiresAt: &now}}).Draw(t, "end").ExpiresAt
			return g
		})
		grants := rapid.SliceOfN(grant, 0, 6).Draw(t, "grants")
		target := Target{
			Bundle: rapid.SampledFrom(append(bundles[1:], "", "other", engine.Admin)).Draw(t, "of"), Changes: rapid.Bool().Draw(t, "changes"),
			Action: rapid.SampledFrom([]cedar.EntityUID{{}, cedar.NewEntityUID("A::Action", "x"), cedar.NewEntityUID("A::Action", "y")}).Draw(t, "action"), EntityType: rapid.SampledFrom([]string{"", "A::T", "A::U", AllTypes}).Draw(t, "type"),
		}
		all := NewRights("c", grants, d, now)
		for _, action := range Actions() {
			want := action == "WhoAmI"
			for _, g := range grants {
				if g.Live(now) && covers(&g, target) {
					want = want || NewRights("c", []store.Grant{g}, d, now).May(action, target)
				}
			}
			if got := all.May(action, target); got != want {
				t.Fatalf("%s on %+v: %v, want %v", action, target, got, want)
			}
			if want && action != "WhoAmI" && target.Bundle == engine.Admin {
				t.Fatalf("%s on the built-in bundle", action)
			}
			if all.MayEverywhere(action) && target.Bundle != engine.Admin && !target.Changes && !all.May(action, target) {
				t.Fatalf("%s everywhere, and not on %+v", action, target)
			}
			if all.May(action, target) && !all.MaySomewhere(action) {
				t.Fatalf("%s on %+v, and nowhere", action, target)
			}
		}
	})
}

// Forbids of admin-local join, except where nobody could take them back.
func TestAdminLocalJoins(t *testing.T) {
	d := mustDecider(t, `@id("x") forbid (principal == Cedarpost::Caller::"eve", action, resource);
		@id("b") forbid (principal, action == Cedarpost::Action::"GetBundle", resource == Cedarpost::Bundle::"a");`)
	for caller, c := range map[string]struct{ may, not []string }{
		"eve": {[]string{"PutGrant", "WhoAmI"}, []string{"Authorize", "GetBundle", "ListKeys"}},
		"ann": {[]string{"PutGrant", "WhoAmI", "Authorize", "ListKeys"}, []string{"GetBundle"}},
	} {
		r := NewRights(caller, AllGrants(caller, "x"), d, now)
		for _, action := range c.may {
			if !r.May(action, Target{Bundle: "a"}) {
				t.Errorf("%s may not %s", caller, action)
			}
		}
		for _, action := range c.not {
			if r.May(action, Target{Bundle: "a"}) {
				t.Errorf("%s may %s", caller, action)
			}
		}
		if !r.May("ApplyBundle", Target{Bundle: engine.AdminLocal, Changes: true}) {
			t.Errorf("%s may not take the rules back", caller)
		}
	}
	// A refusal names the policy, if a role of the caller gives the right.
	for _, c := range []struct {
		caller, role, action, bundle, want string
	}{
		{"eve", Operator, "ListKeys", "", "[admin-local/x]"},
		{"ann", Auditor, "GetBundle", "a", "[admin-local/b]"},
		{"eve", Auditor, "GetBundle", "a", "[admin-local/b admin-local/x]"},
		{"eve", Auditor, "ListKeys", "", "[]"},
		{"eve", Operator, "WhoAmI", "", "[]"},
		{"ann", Operator, "ListKeys", "", "[]"},
	} {
		r := NewRights(c.caller, []store.Grant{{Caller: c.caller, Role: c.role, Bundle: AllBundles}}, d, now)
		if got := fmt.Sprint(r.Forbidden(c.action, Target{Bundle: c.bundle})); got != c.want {
			t.Errorf("%+v: forbidden by %s", c, got)
		}
	}
	if (&Rights{}).May("WhoAmI", Target{}) {
		t.Error("nobody may ask")
	}
	if r := NewRights("", AllGrants("", "x"), d, now); r.May("Authorize", Target{}) {
		t.Error("a caller without a name may ask")
	}
}

// The last operator counts by what has not ended.
func TestOperatorsLeft(t *testing.T) {
	key := func(name string, end *store.Key) store.Key {
		return store.Key{ID: name, Name: name, ExpiresAt: end.ExpiresAt}
	}
	never, young, old := &store.Key{}, &store.Key{ExpiresAt: &soon}, &store.Key{ExpiresAt: &past}
	op := store.Grant{Caller: "a", Role: Operator, Bundle: AllBundles}
	brief, other, own := op, op, op
	brief.ExpiresAt, other.Caller, own.Bundle = &soon, "b", "shop"
	for _, c := range []struct {
		keys   []store.Key
		grants []store.Grant
		want   int
	}{
		{[]store.Key{key("a", never)}, []store.Grant{op}, 2},
		{[]store.Key{key("a", young)}, []store.Grant{op}, 1},
		{[]store.Key{key("a", old)}, []store.Grant{op}, 0},
		{[]store.Key{key("a", never)}, []store.Grant{brief}, 1},
		{[]store.Key{key("a", never)}, []store.Grant{other, own}, 0},
		{[]store.Key{key("a", young), key("a", never)}, []store.Grant{brief, op}, 2},
		{nil, []store.Grant{op}, 0},
	} {
		if got := OperatorsLeft(c.keys, c.grants, now); got != c.want {
			t.Errorf("%+v, %+v: %d, want %d", c.keys, c.grants, got, c.want)
		}
	}
}

// A key has a checksum over all of it.
func TestKeyText(t *testing.T) {
	key, secret := NewKey("c", nil)
	if KeyID(secret) != key.ID || isTruncated(secret) || KeyID("cedarpost_x") != "" || KeyID("cdp_a_b_c") != "" {
		t.Errorf("%s is %+v", secret, key)
	}
	for i := range secret {
		other := []byte(secret)
		other[i] ^= 1
		if i > len(keyPrefix) && !isTruncated(string(other)) {
			t.Errorf("%s is taken for a key", other)
		}
		if i > len(keyPrefix) && !isTruncated(secret[:i]) {
			t.Errorf("%s is taken for a key", secret[:i])
		}
	}
	if _, again := NewKey("c", nil); again == secret {
		t.Error("two keys are the same")
	}
}

func FuzzKeyText(f *testing.F) {
	_, secret := NewKey("c", nil)
	for _, s := range []string{secret, "cdp_", "cdp__", "", "cedarpost_x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if id := KeyID(s); id != "" && len(id) != keyIDLength {
			t.Errorf("%q has id %q", s, id)
		}
		isTruncated(s)
	})
}

// What rights cost one question: all that the edge does with them.
func BenchmarkRights(b *testing.B) {
	d := mustDecider(b, "")
	grants := AllGrants("orders", "x")
	t := Target{Bundle: "shop", Action: cedar.NewEntityUID("Shop::Action", "ViewOrder")}
	b.ReportAllocs()
	for b.Loop() {
		r := NewRights("orders", grants, d, now)
		if !r.MaySomewhere("Authorize") || !r.May("Authorize", t) {
			b.Fatal("refused")
		}
	}
}

// The roles that grants can give are those that the policies know.
func TestRolesHavePolicies(t *testing.T) {
	d := mustDecider(t, "")
	for _, role := range Roles() {
		if got := NewRights("c", []store.Grant{{Caller: "c", Role: role, Bundle: AllBundles}}, d, now).Permitted(Target{}); len(got) < 2 || !slices.Contains(got, "WhoAmI") {
			t.Errorf("%s may %v", role, got)
		}
	}
	if got := NewRights("c", []store.Grant{{Caller: "c", Role: "root", Bundle: AllBundles}}, d, now).Permitted(Target{}); len(got) != 1 {
		t.Errorf("an unknown role may %v", got)
	}
}

// What a caller gives by its grants lasts as long as the last of them that gives the right.
func TestGivesUntil(t *testing.T) {
	d, err := NewDecider(nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	in := func(hours time.Duration) *time.Time { at := now.Add(hours * time.Hour); return &at }
	stored := func(role, bundle string, end *time.Time) store.Grant {
		return store.Grant{Caller: "c", Role: role, Bundle: bundle, ExpiresAt: end, Since: 7}
	}
	token := store.Grant{Caller: "c", Role: Operator, Bundle: AllBundles, ExpiresAt: in(1)} // no revision has stored it
	for name, c := range map[string]struct {
		grants         []store.Grant
		others, itself *time.Time
	}{
		"without an end":               {[]store.Grant{stored(Operator, "doc", nil)}, nil, nil},
		"with an end":                  {[]store.Grant{stored(Operator, "doc", in(2))}, in(2), in(2)},
		"with two ends":                {[]store.Grant{stored(Operator, "doc", in(2)), stored(Operator, "*", in(3))}, in(3), in(3)},
		"an end, and none for all":     {[]store.Grant{stored(Operator, "doc", in(2)), stored(Operator, "*", nil)}, nil, nil},
		"none, of another role":        {[]store.Grant{stored(Operator, "doc", in(2)), stored(Auditor, "doc", nil)}, in(2), in(2)},
		"none, for another bundle":     {[]store.Grant{stored(Operator, "doc", in(2)), stored(Operator, "other", nil)}, in(2), in(2)},
		"of a token":                   {[]store.Grant{token}, nil, in(1)},
		"of a token, and stored later": {[]store.Grant{token, stored(Operator, "doc", in(2))}, nil, in(2)},
	} {
		r := NewRights("c", c.grants, d, now)
		for itself, want := range map[bool]*time.Time{false: c.others, true: c.itself} {
			if got := r.GivesUntil("PutGrant", Target{Bundle: "doc"}, itself); (got == nil) != (want == nil) || got != nil && !got.Equal(*want) {
				t.Errorf("%s, for itself %v: %v, want %v", name, itself, got, want)
			}
		}
	}
}
