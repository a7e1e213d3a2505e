package engine

import (
	"fmt"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"pgregory.net/rapid"
)

const sliceSchema = `entity Role in [Role] { chief?: Role };
entity User in [Role] { chief?: Role };
entity Doc;
action view appliesTo { principal: User, resource: Doc, context: { roles: Set<Role> } };
`

func sliceSet(t interface {
	Helper()
	Fatalf(string, ...any)
}, policies string) *Set {
	t.Helper()
	set, findings := Compile([]Source{{Name: "b", Schema: sliceSchema, Policies: []PolicyText{{Text: policies}}}}, nil)
	if set == nil {
		t.Fatalf("%v", findings)
	}
	return set
}

func role(i int) cedar.EntityUID {
	return cedar.NewEntityUID("Role", cedar.String(fmt.Sprint(i)))
}

func askFor(t interface {
	Helper()
	Fatalf(string, ...any)
}, set *Set, roles ...int) *Question {
	t.Helper()
	refs := []any{}
	for _, i := range roles {
		refs = append(refs, map[string]any{"type": "Role", "id": fmt.Sprint(i)})
	}
	q, err := set.read(Ask{
		Principal: cedar.NewEntityUID("User", "u"), Action: cedar.NewEntityUID("Action", "view"), Resource: cedar.NewEntityUID("Doc", "d"),
		Context: map[string]any{"roles": refs},
	})
	if err != nil {
		t.Fatalf("%v", err)
	}
	return q
}

// fill completes a slice by bringing what it asks for, and nothing else, each time.
func fill(sl *Slice, pool *Pool, stored map[cedar.EntityUID]*Entity) (rounds int) {
	for m := sl.toLoad(); len(m) > 0; m = sl.toLoad() {
		rounds++
		for _, uid := range m {
			pool.Put(uid, stored[uid])
		}
	}
	return rounds
}

// graph makes a user in roles, and roles with parents.
func graph(user []int, parents map[int][]int) map[cedar.EntityUID]*Entity {
	uids := func(list []int) (out []cedar.EntityUID) {
		for _, i := range list {
			out = append(out, role(i))
		}
		return out
	}
	stored := map[cedar.EntityUID]*Entity{}
	u := cedar.NewEntityUID("User", "u")
	stored[u] = &Entity{UID: u, Parents: uids(user)}
	for i, list := range parents {
		stored[role(i)] = &Entity{UID: role(i), Parents: uids(list)}
	}
	return stored
}

// A slice whose entities come one level at a time follows each edge once, however
// many rounds that takes.
func TestSliceIsWalkedOnce(t *testing.T) {
	const long = 3000
	chain := map[int][]int{}
	for i := range long {
		chain[i] = []int{i + 1}
	}
	const width, layers = 20, 40 // a path goes through any of the entities of each layer
	diamonds := map[int][]int{}
	for l := range layers {
		for i := range width {
			for j := range width {
				diamonds[l*width+i] = append(diamonds[l*width+i], (l+1)*width+j)
			}
		}
	}
	for _, c := range []struct {
		name    string
		parents map[int][]int
		edges   int
	}{{"chain", chain, long}, {"diamonds", diamonds, layers * width * width}} {
		t.Run(c.name, func(t *testing.T) {
			set := sliceSet(t, `@id("a") permit (principal in Role::"none", action, resource);`)
			pool := NewPool()
			sl := set.newSlice(askFor(t, set), pool)
			rounds := fill(sl, pool, graph([]int{0}, c.parents))
			const asked = 3 // principal, resource, and the principal's one role
			if most := c.edges + asked; sl.steps > most {
				t.Errorf("%d steps in %d rounds, want at most %d", sl.steps, rounds, most)
			}
		})
	}
}

// Many entities that share many ancestors do not each get a list of them.
func TestSharedAncestorsAreNotMultiplied(t *testing.T) {
	const long, named = 4000, 500
	parents := map[int][]int{}
	for i := range long {
		parents[i] = []int{i + 1}
	}
	var user, roles []int
	for i := range named {
		user, roles = append(user, i), append(roles, i)
	}
	set := sliceSet(t, `@id("in") permit (principal, action, resource) when { principal in Role::"4000" };
@id("not in") permit (principal, action, resource) when { principal in Role::"none" };`)
	pool, q := NewPool(), askFor(t, set, roles...)
	sl := set.newSlice(q, pool)
	fill(sl, pool, graph(user, parents))
	e, err := sl.entities()
	if err != nil {
		t.Fatal(err)
	}
	v := set.evaluate(q.action.index.candidates(q.request.Principal, q.request.Resource, e), q.request, e)
	if len(v.reasons) != 1 || v.reasons[0].ref.ID != "in" {
		t.Errorf("reasons %v", refs(v.reasons))
	}
	sum := 0
	for _, v := range sl.visited.list {
		if v.made != nil {
			sum += v.made.Parents.Len()
		}
	}
	if most := 2*MaxAncestors + long + named; sum > most {
		t.Errorf("%d parents were given to Cedar, want at most %d", sum, most)
	}
}

// A slice holds the same entities, and the same memberships, however many entities come
// with each load and whichever parents are closed.
func TestSliceProperty(t *testing.T) {
	// Level 2: what the attributes of the principal and its chief name is read.
	set := sliceSet(t, `@id("a") permit (principal, action, resource) when { principal has chief && principal.chief has chief && principal.chief.chief in Role::"none" };`)
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 8).Draw(t, "roles")
		some := rapid.SliceOfN(rapid.IntRange(0, n), 0, 3)
		parents := map[int][]int{}
		for i := range n { // cycles too; role n is not stored
			parents[i] = some.Draw(t, "parents")
		}
		stored := graph(some.Draw(t, "user"), parents)
		for uid, e := range stored {
			if rapid.Bool().Draw(t, "has chief") {
				e.Attrs = cedar.NewRecord(cedar.RecordMap{"chief": role(rapid.IntRange(0, n).Draw(t, uid.String()))})
			}
		}
		q := askFor(t, set, some.Draw(t, "context")...)

		all := NewPool()
		all.SetSource(func(uid cedar.EntityUID) (*Entity, bool) { return stored[uid], true })
		whole := set.newSlice(q, all)
		if m := whole.toLoad(); len(m) > 0 {
			t.Fatalf("missing %v", m)
		}
		pool := NewPool()
		piecemeal := set.newSlice(q, pool)
		for m := piecemeal.toLoad(); len(m) > 0; m = piecemeal.toLoad() {
			come := 0
			for _, uid := range m {
				if come == 0 || rapid.Bool().Draw(t, "comes") {
					pool.Put(uid, stored[uid])
					come++
				}
			}
		}
		if len(whole.visited.list) != len(piecemeal.visited.list) {
			t.Fatalf("%v, piecemeal %v", whole.visited.list, piecemeal.visited.list)
		}
		for _, v := range whole.visited.list {
			if i := piecemeal.visited.find(v.uid); i < 0 || piecemeal.visited.list[i] != v {
				t.Fatalf("%v, piecemeal %v", v, piecemeal.visited.list)
			}
		}

		e, err := whole.entities()
		if err != nil {
			t.Fatal(err)
		}
		e.left = rapid.IntRange(-1, 6).Draw(t, "left")
		for _, v := range whole.visited.list {
			uid := v.uid
			if v.depth < 1 {
				continue
			}
			reach := map[cedar.EntityUID]bool{uid: true}
			todo := []cedar.EntityUID{uid}
			for ; len(todo) > 0; todo = todo[1:] {
				if s := stored[todo[0]]; s != nil {
					for _, p := range s.Parents {
						if !reach[p] {
							reach[p] = true
							todo = append(todo, p)
						}
					}
				}
			}
			for i := range n + 1 {
				text := fmt.Sprintf("permit (principal, action, resource) when { %s in %s };", uid, role(i))
				var p cedar.Policy
				if err := p.UnmarshalCedar([]byte(text)); err != nil {
					t.Fatal(err)
				}
				if got, _ := cedar.Authorize(single{&p}, e, q.request); bool(got) != reach[role(i)] {
					t.Fatalf("%s in %s: %v", uid, role(i), got)
				}
			}
		}
	})
}

// entitiesOf returns a complete slice of these entities, whose parents are all their ancestors.
func entitiesOf(set *Set, all map[cedar.EntityUID]cedar.Entity) *entities {
	sl := &Slice{set: set}
	for uid, e := range all {
		sl.visited.list[sl.visited.add(uid)].made = &e
	}
	return &entities{static: set.static, from: sl}
}
