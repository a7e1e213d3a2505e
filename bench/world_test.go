package bench

import (
	"fmt"
	"iter"
	"math/rand/v2"

	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

const schema = `namespace Files {
  entity Group in [Group];
  entity User in [Group] { level: Long, active: Bool, region: String };
  entity Doc { owner: User, readers: Group, status: String, size: Long };
  action Read appliesTo { principal: [User], resource: [Doc], context: {} };
}`

// The last one looks at the owner's attributes: two levels of dereference.
const policies = `
@id("owners") permit (principal, action == Files::Action::"Read", resource) when { resource.owner == principal };
@id("readers") permit (principal, action == Files::Action::"Read", resource) when { principal in resource.readers && resource.status != "draft" };
@id("inactive") forbid (principal, action == Files::Action::"Read", resource) when { !principal.active };
@id("left") forbid (principal, action == Files::Action::"Read", resource) when { !resource.owner.active };
`

// world is so many users in teams of nine, in departments of nine teams, all in one
// company, and documents that an owner's department may read. What is first in a
// large world is the same as in a small one.
type world struct{ users, teams, departments, docs int }

func worldOf(entities int) world {
	w := world{users: entities * 2 / 5}
	w.teams = w.users/9 + 1
	w.departments = w.teams/9 + 1
	w.docs = entities - w.users - w.teams - w.departments - 1
	return w
}

func (w world) total() int { return w.users + w.teams + w.departments + w.docs + 1 }

// numbers are of all entities.
func (w world) numbers() iter.Seq[int] {
	return func(yield func(int) bool) {
		for i := range w.total() {
			if !yield(i) {
				return
			}
		}
	}
}

func (w world) entity(i int) *cedarpostv1.Entity {
	if i < w.users {
		return w.user(i)
	}
	if i -= w.users; i < w.teams {
		return &cedarpostv1.Entity{Uid: team(i), Parents: []*cedarpostv1.EntityUid{department(i / 9)}}
	}
	if i -= w.teams; i < w.departments {
		return &cedarpostv1.Entity{Uid: department(i), Parents: []*cedarpostv1.EntityUid{uid("Group", "company", 0)}}
	}
	if i -= w.departments; i < w.docs {
		return w.doc(i)
	}
	return &cedarpostv1.Entity{Uid: uid("Group", "company", 0)}
}

func (w world) user(i int) *cedarpostv1.Entity {
	return &cedarpostv1.Entity{Uid: uid("User", "u", i), Parents: []*cedarpostv1.EntityUid{team(i / 9)}, Attrs: attrs(map[string]any{
		"level": i % 10, "active": i%100 != 99, "region": []string{"eu-central", "us-east", "ap-south"}[i%3],
	})}
}

func (w world) doc(i int) *cedarpostv1.Entity {
	return &cedarpostv1.Entity{Uid: uid("Doc", "d", i), Attrs: attrs(map[string]any{
		"owner": reference(uid("User", "u", w.owner(i))), "readers": reference(department(w.owner(i) / 81)),
		"status": []string{"published", "published", "draft"}[i%3], "size": i * 37 % 100_000,
	})}
}

// owner spreads the documents of every world evenly over its users.
func (w world) owner(doc int) int { return min(doc*8/11, w.users-1) }

func team(i int) *cedarpostv1.EntityUid       { return uid("Group", "team-", i) }
func department(i int) *cedarpostv1.EntityUid { return uid("Group", "department-", i) }

func uid(typ, name string, i int) *cedarpostv1.EntityUid {
	return &cedarpostv1.EntityUid{Type: "Files::" + typ, Id: fmt.Sprint(name, i)}
}

func reference(u *cedarpostv1.EntityUid) map[string]any {
	return map[string]any{"type": u.Type, "id": u.Id}
}

func attrs(m map[string]any) *structpb.Struct {
	s, err := structpb.NewStruct(m)
	if err != nil {
		panic(err)
	}
	return s
}

// draw makes up a question.
type draw func(*rand.Rand) *cedarpostv1.AuthorizeRequest

// uniform asks about any document alike.
func (w world) uniform() draw {
	return func(rnd *rand.Rand) *cedarpostv1.AuthorizeRequest { return w.question(rnd, rnd.IntN(w.docs)) }
}

// skewed asks about few documents often, by Zipf's law, wherever those are stored.
func (w world) skewed() draw {
	return func(rnd *rand.Rand) *cedarpostv1.AuthorizeRequest {
		rank := rand.NewZipf(rnd, 1.1, 1, uint64(w.docs-1)).Uint64()
		return w.question(rnd, int(rank*611_953%uint64(w.docs)))
	}
}

// question is of the owner, of somebody in the same department, or of somebody in
// another one.
func (w world) question(rnd *rand.Rand, doc int) *cedarpostv1.AuthorizeRequest {
	who := w.owner(doc)
	switch rnd.IntN(3) {
	case 0:
		who = min(who/81*81+rnd.IntN(81), w.users-1)
	case 1:
		who = (who + 81*7) % w.users
	}
	return &cedarpostv1.AuthorizeRequest{
		Principal: uid("User", "u", who), Resource: uid("Doc", "d", doc),
		Action: &cedarpostv1.EntityUid{Type: "Files::Action", Id: "Read"},
	}
}

// revoke takes a user's membership away, and on the next turn gives it back.
func revoke(user, turn int) *cedarpostv1.WriteEntitiesRequest {
	change := &cedarpostv1.ChangeParents{Uid: uid("User", "u", user), Parents: []*cedarpostv1.EntityUid{team(user / 9)}}
	op := &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_RemoveParents{RemoveParents: change}}
	if turn%2 == 1 {
		op.Operation = &cedarpostv1.EntityOperation_AddParents{AddParents: change}
	}
	return &cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{op}}
}
