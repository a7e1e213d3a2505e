package engine

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// Three shapes of data that authorization engines are usually compared on: a
// shared drive, code repositories, and task lists. The schemas, policies and
// generators here are our own.

// shape is a bundle with a generator of data and one of requests.
type shape struct {
	name   string
	schema string
	// policies stand one after the other.
	policies string
	// data makes entities, n of each type.
	data func(g *generator, n int)
	// ask draws a request.
	ask func(g *generator, n int) Ask
}

// generator draws the same for the same seed.
type generator struct {
	*rand.Rand
	namespace string
	stored    map[cedar.EntityUID]Entity
}

func (g *generator) uid(typ string, id any) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType(g.namespace+"::"+typ), cedar.String(fmt.Sprint(id)))
}

func (g *generator) put(uid cedar.EntityUID, attrs cedar.RecordMap, parents ...cedar.EntityUID) {
	g.stored[uid] = Entity{UID: uid, Attrs: cedar.NewRecord(attrs), Parents: parents}
}

// some draws each of n entities of a type with a chance of one in odds.
func (g *generator) some(typ string, n, odds int) []cedar.EntityUID {
	var out []cedar.EntityUID
	for i := range n {
		if g.IntN(odds) == 0 {
			out = append(out, g.uid(typ, i))
		}
	}
	return out
}

func (g *generator) one(typ string, n int) cedar.EntityUID { return g.uid(typ, g.IntN(n)) }

// above draws groups of a type that come after the i-th: no circles.
func (g *generator) above(typ string, i, n, odds int) []cedar.EntityUID {
	return slices.DeleteFunc(g.some(typ, n, odds), func(u cedar.EntityUID) bool {
		id, _ := strconv.Atoi(string(u.ID))
		return id <= i
	})
}

func (g *generator) action(names ...string) cedar.EntityUID {
	return g.uid("Action", names[g.IntN(len(names))])
}

var shapes = []shape{
	{
		name: "drive",
		schema: `namespace Drive {
  entity Circle in [Circle];
  entity Person in [Circle];
  entity Folder in [Folder] { owner: Person, viewers: Circle };
  entity Document in [Folder] { owner: Person, viewers: Circle, folder: Folder, public: Bool };
  action Open, Rename, Share appliesTo { principal: [Person], resource: [Document, Folder], context: { signedIn: Bool } };
  action Comment appliesTo { principal: [Person], resource: [Document], context: { signedIn: Bool } };
}`,
		policies: `
@id("owner") permit (principal, action, resource) when { resource.owner == principal };
@id("viewer") permit (principal, action == Drive::Action::"Open", resource) when { principal in resource.viewers };
@id("viewer-of-folder") permit (principal, action in [Drive::Action::"Open", Drive::Action::"Comment"], resource is Drive::Document)
when { principal in resource.folder.viewers || resource.folder.owner == principal };
@id("public") permit (principal, action == Drive::Action::"Open", resource is Drive::Document) when { resource.public };
@id("signed-in") forbid (principal, action, resource) unless { context.signedIn };`,
		data: func(g *generator, n int) {
			for i := range n {
				g.put(g.uid("Circle", i), nil, g.above("Circle", i, n, n)...)
				g.put(g.uid("Person", i), nil, g.some("Circle", n, 5)...)
				g.put(g.uid("Folder", i), cedar.RecordMap{"owner": g.one("Person", n), "viewers": g.one("Circle", n)}, g.above("Folder", i, n, n)...)
				folder := g.one("Folder", n)
				g.put(g.uid("Document", i), cedar.RecordMap{"owner": g.one("Person", n), "viewers": g.one("Circle", n),
					"folder": folder, "public": cedar.Boolean(g.IntN(10) == 0)}, folder)
			}
		},
		ask: func(g *generator, n int) Ask {
			return Ask{Principal: g.one("Person", n), Action: g.action("Open", "Open", "Comment", "Rename", "Share"), Resource: g.one("Document", n),
				Context: map[string]any{"signedIn": g.IntN(8) > 0}}
		},
	},
	{
		name: "repositories",
		schema: `namespace Code {
  entity Team in [Team];
  entity Account in [Team];
  entity Organization { members: Team, owners: Team };
  entity Repository { organization: Organization, readers: Team, triagers: Team, writers: Team, maintainers: Team, admins: Team };
  entity Issue { repository: Repository, author: Account };
  action Clone, Fork, Push, Protect, AddReader, AddAdmin appliesTo { principal: [Account], resource: [Repository] };
  action Close, Label, Remove appliesTo { principal: [Account], resource: [Issue] };
}`,
		policies: `
@id("read") permit (principal, action in [Code::Action::"Clone", Code::Action::"Fork"], resource) when { principal in resource.readers };
@id("write") permit (principal, action == Code::Action::"Push", resource) when { principal in resource.writers };
@id("maintain") permit (principal, action == Code::Action::"Protect", resource) when { principal in resource.maintainers };
@id("administer") permit (principal, action in [Code::Action::"AddReader", Code::Action::"AddAdmin"], resource) when { principal in resource.admins };
@id("own") permit (principal, action, resource is Code::Repository) when { principal in resource.organization.owners };
@id("close-own") permit (principal, action == Code::Action::"Close", resource) when { resource.author == principal && principal in resource.repository.readers };
@id("triage") permit (principal, action in [Code::Action::"Close", Code::Action::"Label"], resource) when { principal in resource.repository.triagers };
@id("remove") permit (principal, action == Code::Action::"Remove", resource) when { principal in resource.repository.maintainers };`,
		data: func(g *generator, n int) {
			roles := []string{"admins", "maintainers", "writers", "triagers", "readers"}
			for i := range n {
				g.put(g.uid("Team", i), nil, g.above("Team", i, n, n)...)
				members, owners := g.uid("Team", fmt.Sprint("members of ", i)), g.uid("Team", fmt.Sprint("owners of ", i))
				g.put(members, nil)
				g.put(owners, nil, members)
				g.put(g.uid("Organization", i), cedar.RecordMap{"members": members, "owners": owners})
				// Each role of a repository has the rights of the next one too.
				organization := g.one("Organization", n)
				attrs := cedar.RecordMap{"organization": organization}
				for j, role := range roles {
					team := g.uid("Team", fmt.Sprint(role, " of ", i))
					attrs[cedar.String(role)] = team
					if j+1 < len(roles) {
						g.put(team, nil, g.uid("Team", fmt.Sprint(roles[j+1], " of ", i)))
					} else {
						g.put(team, nil)
					}
				}
				g.put(g.uid("Repository", i), attrs)
				g.put(g.uid("Issue", i), cedar.RecordMap{"repository": g.one("Repository", n), "author": g.one("Account", n)})
			}
			for i := range n {
				parents := g.some("Team", n, 5)
				for j := range n {
					if g.IntN(3) == 0 {
						parents = append(parents, g.uid("Team", fmt.Sprint(roles[g.IntN(len(roles))], " of ", j)))
					}
				}
				parents = append(parents, g.uid("Team", fmt.Sprint([]string{"members", "owners"}[g.IntN(2)], " of ", g.IntN(n))))
				g.put(g.uid("Account", i), nil, parents...)
			}
		},
		ask: func(g *generator, n int) Ask {
			a := Ask{Principal: g.one("Account", n)}
			if g.IntN(3) == 0 {
				a.Action, a.Resource = g.action("Close", "Label", "Remove"), g.one("Issue", n)
			} else {
				a.Action, a.Resource = g.action("Clone", "Fork", "Push", "Protect", "AddReader", "AddAdmin"), g.one("Repository", n)
			}
			return a
		},
	},
	{
		name: "tasks",
		schema: `namespace Tasks {
  entity App;
  entity Team in [Team, App];
  entity Member in [Team, App] { blocked: Bool };
  entity List in [App] { owner: Member, title: String, readers: Team, editors: Team, tasks: Set<{ done: Bool, title: String }> };
  action NewList, Lists appliesTo { principal: [Member], resource: [App] };
  action Read, EditTask, Invite, Drop appliesTo { principal: [Member], resource: [List] };
}`,
		policies: `
@id("anyone") permit (principal, action in [Tasks::Action::"NewList", Tasks::Action::"Lists"], resource == Tasks::App::"app");
@id("owner") permit (principal, action, resource is Tasks::List) when { resource.owner == principal };
@id("readers") permit (principal, action == Tasks::Action::"Read", resource) when { principal in resource.readers || principal in resource.editors };
@id("editors") permit (principal, action == Tasks::Action::"EditTask", resource) when { principal in resource.editors };
@id("lead") permit (principal in Tasks::Team::"0", action in [Tasks::Action::"Read", Tasks::Action::"Invite"], resource in Tasks::App::"app");
@id("blocked") forbid (principal, action, resource) when { principal.blocked };`,
		data: func(g *generator, n int) {
			app := g.uid("App", "app")
			g.put(app, nil)
			for i := range n {
				g.put(g.uid("Team", i), nil, append(g.above("Team", i, n, n), app)...)
				g.put(g.uid("Member", i), cedar.RecordMap{"blocked": cedar.Boolean(g.IntN(10) == 0)}, append(g.some("Team", n, 5), app)...)
				var tasks []cedar.Value
				for j := range 5 {
					tasks = append(tasks, cedar.NewRecord(cedar.RecordMap{"done": cedar.Boolean(g.IntN(2) == 0), "title": cedar.String(fmt.Sprint("task ", j))}))
				}
				g.put(g.uid("List", i), cedar.RecordMap{"owner": g.one("Member", n), "title": cedar.String(fmt.Sprint("list ", i)),
					"readers": g.one("Team", n), "editors": g.one("Team", n), "tasks": cedar.NewSet(tasks...)}, app)
			}
		},
		ask: func(g *generator, n int) Ask {
			a := Ask{Principal: g.one("Member", n)}
			if g.IntN(6) == 0 {
				a.Action, a.Resource = g.action("NewList", "Lists"), g.uid("App", "app")
			} else {
				a.Action, a.Resource = g.action("Read", "Read", "EditTask", "Invite", "Drop"), g.one("List", n)
			}
			return a
		},
	},
}

// BenchmarkShapes decides a fixed mix of random requests: "engine" is the whole
// decision in process, "cedar" is cedar.Authorize alone, with the request read
// and all policies and all entities at hand, as they are stored.
func BenchmarkShapes(b *testing.B) {
	const requests = 500
	for _, sh := range shapes {
		namespace, _, _ := strings.Cut(strings.TrimPrefix(sh.schema, "namespace "), " ")
		set := mustCompile(b, []Source{{Name: sh.name, Schema: sh.schema, Policies: []PolicyText{{File: "p.cedar", Text: sh.policies}}}}, nil)
		all := policies(set.bundles[sh.name].policies)
		for _, n := range []int{5, 20, 50} {
			g := &generator{rand.New(rand.NewPCG(1, uint64(n))), namespace, map[cedar.EntityUID]Entity{}}
			sh.data(g, n)
			pool, everything := poolOf(g.stored), full(set, g.stored)
			asks, read := make([]Ask, requests), make([]cedar.Request, requests)
			allowed := 0
			for i := range asks {
				asks[i] = sh.ask(g, n)
				q, err := set.read(asks[i])
				if err != nil {
					b.Fatal(err)
				}
				read[i] = q.request
				res := mustDecide(b, set, pool, asks[i])
				decision, diag := cedar.Authorize(metered{policies: all}, everything, q.request)
				if res.Allowed != bool(decision) || len(res.Policies) != len(diag.Reasons) || len(diag.Errors) > 0 {
					b.Fatalf("%v: %+v, and Cedar says %v %v", asks[i], res, decision, diag)
				}
				if res.Allowed {
					allowed++
				}
			}
			if allowed < requests/10 || allowed > requests*9/10 {
				b.Fatalf("%s %d: %d of %d requests are allowed, which is no mix", sh.name, n, allowed, requests)
			}
			i := 0
			next := func() int { i = (i + 1) % requests; return i }
			engine := func() { _, _ = decideOnce(set, pool, asks[next()]) }
			alone := func() { cedar.Authorize(metered{policies: all}, everything, read[next()]) }
			name := fmt.Sprintf("%s/each=%d", sh.name, n)
			b.Run(name+"/engine", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					engine()
				}
				b.ReportMetric(float64(allowed)*100/requests, "allow%")
			})
			b.Run(name+"/cedar", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					alone()
				}
			})
			b.Run(name+"/ratio", func(b *testing.B) {
				ns := alternate(b, engine, alone)
				b.ReportMetric(ns[0]/ns[1], "engine:cedar")
			})
		}
	}
}
