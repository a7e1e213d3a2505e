package policies_test

import (
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	publicast "github.com/cedar-policy/cedar-go/ast"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/policies"
)

// shop evaluates the example bundle with cedar-go alone, in a simple and slow way, as a
// second opinion on the answers of the service.
type shop struct {
	bundle   *bundle.Bundle
	schema   *resolved.Schema
	policies policyList
	entities types.EntityMap
	leaves   []string // of Shop::Order
}

type policy struct {
	id string
	*cedar.Policy
}

func (p policy) ast() *ast.Policy { return (*ast.Policy)(p.AST()) }

// policyList is a PolicyIterator that keeps the order of the files.
type policyList []policy

func (l policyList) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for _, p := range l {
			if !yield(cedar.PolicyID(p.id), p.Policy) {
				return
			}
		}
	}
}

func loadShop(t *testing.T) *shop {
	t.Helper()
	b, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	s := &shop{bundle: b, entities: types.EntityMap{}}

	var sch schema.Schema
	if err := sch.UnmarshalCedar(b.Schemas[0].Content); err != nil {
		t.Fatal(err)
	}
	if s.schema, err = sch.Resolve(); err != nil {
		t.Fatal(err)
	}

	seen := map[string]bool{}
	for _, f := range b.Policies {
		list, err := cedar.NewPolicyListFromBytes(f.Path, f.Content)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range list {
			id := string(p.Annotations()["id"])
			if id == "" || seen[id] {
				t.Fatalf("%s:%d: a policy needs an @id of its own, this has %q", f.Path, p.Position().Line, id)
			}
			seen[id] = true
			s.policies = append(s.policies, policy{id, p})
		}
	}

	var stored []types.Entity
	if err := json.Unmarshal(b.Entities, &stored); err != nil {
		t.Fatal(err)
	}
	for _, e := range stored {
		if _, twice := s.entities[e.UID]; twice {
			t.Fatalf("%s is stored twice", e.UID)
		}
		s.entities[e.UID] = e
	}
	// Action groups are entities. Without them a forbid on a group would not apply.
	for _, a := range s.schema.Actions {
		s.entities[a.Entity.UID] = a.Entity
	}
	s.catalogue()
	return s
}

// catalogue adds the entities that fields.yaml becomes.
func (s *shop) catalogue() {
	add := func(uid types.EntityUID, parents ...types.EntityUID) {
		parents = slices.AppendSeq(parents, s.entities[uid].Parents.All())
		s.entities[uid] = types.Entity{UID: uid, Parents: types.NewEntityUIDSet(parents...)}
	}
	for _, f := range s.bundle.Fields {
		var groups []types.EntityUID
		for _, g := range f.Groups {
			uid := types.NewEntityUID("Shop::FieldGroup", types.String(g))
			groups = append(groups, uid)
			add(uid)
		}
		if f.IsGroup() {
			add(types.NewEntityUID("Shop::FieldGroup", types.String(f.Path)), groups...)
			continue
		}
		segs := strings.Split("Order."+f.Path, ".")
		for i := range segs {
			uid := types.NewEntityUID("Shop::Field", types.String(strings.Join(segs[:i+1], ".")))
			if i == 0 {
				add(uid)
			} else {
				add(uid, types.NewEntityUID("Shop::Field", types.String(strings.Join(segs[:i], "."))))
			}
			if i == len(segs)-1 {
				add(uid, groups...)
			}
		}
		s.leaves = append(s.leaves, f.Path)
	}
}

func TestShopIsValid(t *testing.T) {
	s := loadShop(t)
	v := validate.New(s.schema, validate.WithStrict())
	for _, p := range s.policies {
		if err := v.Policy(p.id, p.ast()); err != nil {
			t.Errorf("policy %s: %v", p.id, err)
		}
	}
	for _, e := range s.entities {
		if err := v.Entity(e); err != nil {
			t.Errorf("entity %s: %v", e.UID, err)
		}
	}
	for _, p := range s.policies {
		for uid := range literals(p.ast()) {
			if _, ok := s.entities[uid]; !ok {
				t.Errorf("policy %s names %s, which does not exist", p.id, uid)
			}
		}
	}
	for name, a := range s.schema.Actions {
		base, isField := strings.CutSuffix(string(name.ID), ".field")
		if !isField {
			continue
		}
		of, ok := s.schema.Actions[types.NewEntityUID(name.Type, types.String(base))]
		if !ok {
			t.Errorf("%s belongs to no action", name)
			continue
		}
		want := maps.Clone(of.AppliesTo.Context)
		want["field"] = resolved.Attribute{Type: resolved.EntityType("Shop::Field")}
		if fmt.Sprint(a.AppliesTo.Context) != fmt.Sprint(want) || !slices.Equal(a.AppliesTo.Principals, of.AppliesTo.Principals) ||
			!slices.Equal(a.AppliesTo.Resources, of.AppliesTo.Resources) {
			t.Errorf("%s does not match %s", name, of.Entity.UID)
		}
	}
	if users, orders := s.count("Shop::User"), s.count("Shop::Order"); users != 50 || orders != 500 {
		t.Errorf("%d users and %d orders", users, orders)
	}
}

func (s *shop) count(typ types.EntityType) (n int) {
	for uid := range s.entities {
		if uid.Type == typ {
			n++
		}
	}
	return n
}

// literals are the entities that a policy names.
func literals(p *ast.Policy) map[types.EntityUID]bool {
	out := map[types.EntityUID]bool{}
	for _, scope := range []any{p.Principal, p.Action, p.Resource} {
		switch sc := scope.(type) {
		case ast.ScopeTypeEq:
			out[sc.Entity] = true
		case ast.ScopeTypeIn:
			out[sc.Entity] = true
		case ast.ScopeTypeIsIn:
			out[sc.Entity] = true
		case ast.ScopeTypeInSet:
			for _, e := range sc.Entities {
				out[e] = true
			}
		}
	}
	for _, c := range p.Conditions {
		ast.Inspect(ast.NewNode(c.Body), func(n ast.IsNode) bool {
			if v, ok := n.(ast.NodeValue); ok {
				if uid, ok := v.Value.(types.EntityUID); ok {
					out[uid] = true
				}
			}
			return true
		})
	}
	return out
}

// TestShopStory evaluates every check of tests.yaml.
func TestShopStory(t *testing.T) {
	s := loadShop(t)
	if n := len(s.bundle.Tests); n < 35 {
		t.Errorf("only %d checks", n)
	}
	for _, c := range s.bundle.Tests {
		t.Run(c.Name, func(t *testing.T) {
			got := s.check(c)
			same := func(what string, got, want []string) {
				t.Helper()
				got, want = slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))
				if want != nil && !slices.Equal(got, want) {
					t.Errorf("tests.yaml:%d: %s is %q, want %q", c.Line, what, got, want)
				}
			}
			if got.decision != c.Expect.Decision {
				t.Errorf("tests.yaml:%d: %s, want %s", c.Line, got.decision, c.Expect.Decision)
			}
			if c.Expect.DeniedAt != "" && got.deniedAt != c.Expect.DeniedAt {
				t.Errorf("tests.yaml:%d: denied at %s, want %s", c.Line, got.deniedAt, c.Expect.DeniedAt)
			}
			if c.Expect.Permitted != nil {
				same("permitted", got.permitted, append([]string{}, c.Expect.Permitted...))
			}
			if c.Expect.Denied != nil {
				same("denied", got.denied, append([]string{}, c.Expect.Denied...))
			}
			if c.Expect.Determining != nil {
				same("determining", got.determining, append([]string{}, c.Expect.Determining...))
			}
			if c.Expect.Obligations != nil {
				same("obligations", got.obligations, append([]string{}, c.Expect.Obligations...))
			}
			if c.Expect.Advice != nil {
				same("advice", got.advice, append([]string{}, c.Expect.Advice...))
			}
		})
	}
}

// TestWhoSeesWhat shows in one table what each person sees of order 42.
func TestWhoSeesWhat(t *testing.T) {
	const (
		basic    = "id status items "
		pii      = "customer.name customer.email shipping.address "
		money    = "total internal.margin "
		all      = basic + pii + money + "internal.notes"
		nothing  = ""
		mfa      = true
		password = false
	)
	s := loadShop(t)
	for _, tt := range []struct {
		who    string
		mfa    bool
		sees   string
		denied string
	}{
		{"bob", password, basic + pii + "total", ""},
		{"bob", mfa, basic + pii + "total", ""},
		{"alice", password, basic, ""},
		{"alice", mfa, basic + pii, ""},
		{"erin", password, basic + money, ""},
		{"erin", mfa, basic + money, ""},
		{"dave", password, basic + money + "internal.notes", ""},
		{"dave", mfa, all, ""},
		{"carol", mfa, nothing, "OBJECT"},
		{"mallory", mfa, nothing, "FUNCTION"},
		{"nobody", mfa, nothing, "FUNCTION"},
	} {
		got := s.check(bundle.Test{
			Principal: bundle.Ref{Type: "Shop::User", ID: tt.who},
			Action:    bundle.Ref{Type: "Shop::Action", ID: "ViewOrder"},
			Resource:  bundle.Ref{Type: "Shop::Order", ID: "42"},
			Context:   map[string]any{"mfa": tt.mfa}, AllFields: true,
		})
		want := slices.Sorted(slices.Values(strings.Fields(tt.sees)))
		if !slices.Equal(slices.Sorted(slices.Values(got.permitted)), want) || got.deniedAt != tt.denied {
			t.Errorf("%s, mfa %t: sees %q, denied at %q; want %q, %q", tt.who, tt.mfa, got.permitted, got.deniedAt, want, tt.denied)
		}
	}
}

// outcome returns what the service would answer.
type outcome struct {
	decision, deniedAt                                  string
	permitted, denied, determining, obligations, advice []string
}

func (s *shop) check(c bundle.Test) (out outcome) {
	req := types.Request{Principal: uid(c.Principal), Action: uid(c.Action), Resource: uid(c.Resource), Context: record(c.Context)}
	allowed, by := s.authorize(req)
	out.decision = map[bool]string{true: "allow", false: "deny"}[allowed]
	for _, p := range by {
		out.determining = append(out.determining, p.id)
	}
	out.say(by)
	if !allowed {
		out.deniedAt = s.deniedAt(req)
	}
	for _, path := range s.asked(c) {
		ok := false
		if allowed && slices.Contains(s.leaves, path) {
			f := req
			f.Action.ID += ".field"
			f.Context = record(c.Context, "field", types.NewEntityUID("Shop::Field", types.String("Order."+path)))
			var by []policy
			ok, by = s.authorize(f)
			out.say(by)
		}
		if ok {
			out.permitted = append(out.permitted, path)
		} else {
			out.denied = append(out.denied, path)
		}
	}
	if allowed && c.RequireAll && len(out.denied) > 0 {
		out.decision, out.deniedAt = "deny", "FIELD"
	}
	return out
}

// say collects the obligations and advice of the determining policies.
func (o *outcome) say(by []policy) {
	add := func(to *[]string, text types.String) {
		if text != "" && !slices.Contains(*to, string(text)) {
			*to = append(*to, string(text))
		}
	}
	for _, p := range by {
		if p.Effect() == types.Permit {
			add(&o.obligations, p.Annotations()["obligation"])
		} else {
			add(&o.advice, p.Annotations()["advice"])
		}
	}
}

// asked returns the leaves that a check asks for, and paths that are not known.
func (s *shop) asked(c bundle.Test) (paths []string) {
	if c.AllFields {
		return s.leaves
	}
	for _, f := range c.Fields {
		n := len(paths)
		for _, l := range s.leaves {
			if l == f || strings.HasPrefix(l, f+".") {
				paths = append(paths, l)
			}
		}
		if len(paths) == n {
			paths = append(paths, f)
		}
	}
	return paths
}

// authorize returns the answer of Cedar, except that a forbid that fails to evaluate
// denies.
func (s *shop) authorize(req types.Request) (allowed bool, by []policy) {
	decision, diag := cedar.Authorize(s.policies, s.entities, req)
	var failed []policy
	for _, e := range diag.Errors {
		if p := s.policy(e.PolicyID); p.Effect() == types.Forbid {
			failed = append(failed, p)
		}
	}
	if decision == types.Deny || len(failed) == 0 {
		for _, r := range diag.Reasons {
			by = append(by, s.policy(r.PolicyID))
		}
	}
	return decision == types.Allow && len(failed) == 0, append(by, failed...)
}

func (s *shop) policy(id cedar.PolicyID) policy {
	return s.policies[slices.IndexFunc(s.policies, func(p policy) bool { return p.id == string(id) })]
}

// deniedAt returns which check denied a request: FUNCTION if no resource of this type
// could have been allowed, otherwise OBJECT.
func (s *shop) deniedAt(req types.Request) string {
	function := true
	for _, p := range s.policies {
		a := p.ast()
		scope := &ast.Policy{Effect: ast.EffectPermit, Principal: a.Principal, Action: a.Action, Resource: ast.Scope{}.All()}
		if !s.holds(scope, req) || !resourceFits(a.Resource, req.Resource.Type) || !s.applies(req) {
			continue
		}
		if a.Effect == ast.EffectForbid {
			_, all := a.Resource.(ast.ScopeTypeAll)
			if all && !slices.ContainsFunc(conjuncts(a), mentionsResource) && s.fires(a, req) {
				return "FUNCTION"
			}
			continue
		}
		could := true
		for _, c := range conjuncts(a) {
			could = could && (mentionsResource(c) || s.holds(when(c), req))
		}
		function = function && !could
	}
	if function {
		return "FUNCTION"
	}
	return "OBJECT"
}

// applies reports whether the schema lets the action be used on such a resource.
func (s *shop) applies(req types.Request) bool {
	to := s.schema.Actions[req.Action].AppliesTo
	return slices.Contains(to.Principals, req.Principal.Type) && slices.Contains(to.Resources, req.Resource.Type)
}

func (s *shop) holds(p *ast.Policy, req types.Request) bool {
	d, _ := cedar.Authorize(policyList{policyOf(p)}, s.entities, req)
	return d == types.Allow
}

// fires reports whether the conditions of a forbid are true or fail to evaluate.
func (s *shop) fires(p *ast.Policy, req types.Request) bool {
	_, diag := cedar.Authorize(policyList{policyOf(p)}, s.entities, req)
	return len(diag.Reasons)+len(diag.Errors) > 0
}

func policyOf(p *ast.Policy) policy {
	return policy{"probe", cedar.NewPolicyFromAST((*publicast.Policy)(p))}
}

func resourceFits(scope ast.IsResourceScopeNode, typ types.EntityType) bool {
	is, ok := scope.(ast.ScopeTypeIs)
	return !ok || is.Type == typ
}

func when(n ast.IsNode) *ast.Policy {
	p := ast.Permit()
	p.Conditions = []ast.ConditionType{{Condition: ast.ConditionWhen, Body: n}}
	return p
}

// conjuncts returns the parts of a policy's conditions, which must all be true.
func conjuncts(p *ast.Policy) (out []ast.IsNode) {
	var split func(n ast.IsNode, negated bool)
	split = func(n ast.IsNode, negated bool) {
		switch n := n.(type) {
		case ast.NodeTypeAnd:
			if !negated {
				split(n.Left, false)
				split(n.Right, false)
				return
			}
		case ast.NodeTypeOr:
			if negated {
				split(n.Left, true)
				split(n.Right, true)
				return
			}
		case ast.NodeTypeNot:
			split(n.Arg, !negated)
			return
		}
		if negated {
			n = ast.NodeTypeNot{UnaryNode: ast.UnaryNode{Arg: n}}
		}
		out = append(out, n)
	}
	for _, c := range p.Conditions {
		split(c.Body, c.Condition == ast.ConditionUnless)
	}
	return out
}

func mentionsResource(n ast.IsNode) (found bool) {
	ast.Inspect(ast.NewNode(n), func(n ast.IsNode) bool {
		v, ok := n.(ast.NodeTypeVariable)
		found = found || ok && v.Name == "resource"
		return true
	})
	return found
}

func uid(r bundle.Ref) types.EntityUID {
	return types.NewEntityUID(types.EntityType(r.Type), types.String(r.ID))
}

// record makes a context of bools, which are all that the shop has, and one more value.
func record(ctx map[string]any, more ...any) types.Record {
	m := types.RecordMap{}
	for k, v := range ctx {
		m[types.String(k)] = types.Boolean(v.(bool))
	}
	if len(more) == 2 {
		m[types.String(more[0].(string))] = more[1].(types.Value)
	}
	return types.NewRecord(m)
}
