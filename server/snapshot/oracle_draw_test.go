package snapshot

import (
	"fmt"
	"math/rand/v2"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/store"
)

// The world of the oracle has few entities, so that writes often concern questions.
var (
	groups = []string{"g0", "g1", "g2", "g3", "g4"}
	users  = []string{"u0", "u1", "u2", "u3", "u4"}
	docs   = []string{"d0", "d1", "d2", "d3", "d4"}
)

const worldSchema = `namespace W {
  entity Group in [Group] { lead?: User };
  entity User in [Group] { level: Long, team?: Group };
  entity Doc { owner: User, readers: Group, grade: %s, locked?: Bool%s };
  action Read appliesTo { principal: [User], resource: [Doc], context: {} };
}`

// worldPolicies depend on everything that writes change: memberships, attributes, and both of
// these for entities that attributes refer to, two and three steps away.
var worldPolicies = []string{
	`@id("readers") permit (principal, action, resource) when { principal in resource.readers };`,
	`@id("staff") permit (principal in W::Group::"g0", action, resource) when { resource.grade == %s };`,
	`@id("owner") permit (principal, action, resource) when { resource.owner == principal };`,
	`@id("teams") permit (principal, action, resource) when { resource.owner has team && principal in resource.owner.team };`,
	`@id("leads") permit (principal, action, resource)
	 when { resource.owner has team && resource.owner.team has lead && resource.owner.team.lead == principal };`,
	`@id("banned") forbid (principal, action, resource) when { resource.owner in W::Group::"g1" };`,
	`@id("locked") forbid (principal, action, resource) when { resource has locked && resource.locked } unless { principal.level > 1 };`,
}

// drawBundle draws a version of the bundle. The grade is stored as a string. The schema reads it
// as a string or as a decimal, so the version makes a difference for an entity. There may be one
// more attribute, which is never set, and one policy less.
func drawBundle(rnd *rand.Rand) []bundle.File {
	grade := pick(rnd, [2]string{"String", `"1.0"`}, [2]string{"decimal", `decimal("1.0")`})
	schema := fmt.Sprintf(worldSchema, grade[0], pick(rnd, "", "", ", note?: String"))
	policies := ""
	without := rnd.IntN(2 * len(worldPolicies))
	for i, text := range worldPolicies {
		if i == 1 {
			text = fmt.Sprintf(text, grade[1])
		}
		if i != without {
			policies += text + "\n"
		}
	}
	return []bundle.File{{Path: "schema.cedarschema", Content: []byte(schema)}, {Path: "p.cedar", Content: []byte(policies)}}
}

// first returns the operations that put all entities.
func (w *world) first() (ops []store.Op) {
	rnd := w.rand(8)
	for _, g := range groups {
		ops = append(ops, putGroup(rnd, g))
	}
	for _, u := range users {
		ops = append(ops, putUser(rnd, u))
	}
	for _, d := range docs {
		ops = append(ops, putDoc(rnd, d))
	}
	return ops
}

// drawWrite draws one write: mostly one operation, sometimes several, and sometimes a move from
// one group to another, of which no answer may see a half.
func drawWrite(rnd *rand.Rand) (ops []store.Op) {
	switch rnd.IntN(6) {
	case 0:
		member := store.UID{Type: "W::User", ID: pick(rnd, users...)}
		return []store.Op{
			{Kind: store.RemoveParents, Entity: store.Entity{UID: member, Parents: []store.UID{group(pick(rnd, groups...))}}},
			{Kind: store.AddParents, Entity: store.Entity{UID: member, Parents: []store.UID{group(pick(rnd, groups...))}}},
		}
	case 1:
		for range 2 + rnd.IntN(5) {
			ops = append(ops, drawOp(rnd))
		}
		return ops
	}
	return []store.Op{drawOp(rnd)}
}

func drawOp(rnd *rand.Rand) store.Op {
	g, u, d := pick(rnd, groups...), pick(rnd, users...), pick(rnd, docs...)
	switch rnd.IntN(12) {
	case 0:
		return putGroup(rnd, g)
	case 1:
		return putUser(rnd, u)
	case 2:
		return putDoc(rnd, d)
	case 3:
		uid := pick(rnd, group(g), store.UID{Type: "W::User", ID: u}, store.UID{Type: "W::Doc", ID: d})
		return store.Op{Kind: store.Delete, Cascade: true, Entity: store.Entity{UID: uid}}
	case 4, 5, 6, 7:
		kind := pick(rnd, store.AddParents, store.RemoveParents)
		if rnd.IntN(3) == 0 {
			return store.Op{Kind: kind, Entity: store.Entity{UID: group(g), Parents: above(rnd, g, 1)}}
		}
		return store.Op{Kind: kind, Entity: store.Entity{UID: store.UID{Type: "W::User", ID: u}, Parents: []store.UID{group(g)}}}
	case 8:
		return setAttr("W::Group", g, "lead", reference("W::User", u), rnd.IntN(3) == 0)
	case 9:
		return setAttr("W::User", u, "team", reference("W::Group", g), rnd.IntN(3) == 0)
	case 10:
		return setAttr("W::Doc", d, "locked", pick(rnd, "true", "false"), rnd.IntN(3) == 0)
	}
	name, value := "grade", pick(rnd, `"1.0"`, `"2.0"`)
	switch rnd.IntN(3) {
	case 0:
		name, value = "owner", reference("W::User", u)
	case 1:
		name, value = "readers", reference("W::Group", g)
	}
	return setAttr("W::Doc", d, name, value, false)
}

func putGroup(rnd *rand.Rand, id string) store.Op {
	return store.Op{Kind: store.Put, Entity: store.Entity{UID: group(id), Parents: above(rnd, id, rnd.IntN(2))}}
}

func putUser(rnd *rand.Rand, id string) store.Op {
	e := store.Entity{UID: store.UID{Type: "W::User", ID: id}, Attrs: fmt.Appendf(nil, `{"level": %d}`, rnd.IntN(4))}
	for range rnd.IntN(3) {
		e.Parents = append(e.Parents, group(pick(rnd, groups...)))
	}
	return store.Op{Kind: store.Put, Entity: e}
}

func putDoc(rnd *rand.Rand, id string) store.Op {
	attrs := fmt.Appendf(nil, `{"owner": %s, "readers": %s, "grade": %s}`, reference("W::User", pick(rnd, users...)),
		reference("W::Group", pick(rnd, groups...)), pick(rnd, `"1.0"`, `"2.0"`))
	return store.Op{Kind: store.Put, Entity: store.Entity{UID: store.UID{Type: "W::Doc", ID: id}, Attrs: attrs}}
}

func setAttr(typ, id, name, value string, remove bool) store.Op {
	op := store.Op{Kind: store.SetAttributes, Entity: store.Entity{UID: store.UID{Type: typ, ID: id}}}
	if remove {
		op.Remove = []string{name}
	} else {
		op.Entity.Attrs = fmt.Appendf(nil, `{%q: %s}`, name, value)
	}
	return op
}

func group(id string) store.UID { return store.UID{Type: "W::Group", ID: id} }

// above draws parents of a group. They have smaller numbers, so there is no cycle. g0 has none.
func above(rnd *rand.Rand, id string, n int) (parents []store.UID) {
	for i := range groups {
		if groups[i] == id && i > 0 {
			for range n {
				parents = append(parents, group(groups[rnd.IntN(i)]))
			}
		}
	}
	return parents
}

func reference(typ, id string) string {
	return fmt.Sprintf(`{"__entity": {"type": %q, "id": %q}}`, typ, id)
}

func pick[T any](rnd *rand.Rand, from ...T) T { return from[rnd.IntN(len(from))] }
