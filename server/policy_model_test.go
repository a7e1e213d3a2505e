package server_test

import (
	"fmt"
	"slices"
	"testing"

	"connectrpc.com/connect/v2"
	"pgregory.net/rapid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// modelState is the content of a bundle in the model: the number in its rule, and the one in a policy.
type modelState struct{ rule, level int }

func (s modelState) files(name string) []string {
	return []string{"bundle.yaml", fmt.Sprintf("name: %s\napprovals: %d\n", name, s.rule), "schema.cedarschema", modelSchema(name), "p.cedar", fmt.Sprintf("@id(\"p\") permit (principal, action, resource) when { principal.level > %d };\n", s.level)}
}

func modelSchema(name string) string {
	return fmt.Sprintf("namespace %s { entity U { level: Long }; action A appliesTo { principal: [U], resource: [U] }; }", "N"+name[1:])
}

// edits returns the edits of a change from one state to another.
func (s modelState) edits(name string, to modelState) (list []*cedarpostv1.FileEdit) {
	files := to.files(name)
	if s.rule != to.rule {
		list = append(list, putFile(files[0], files[1]))
	}
	if s.level != to.level {
		list = append(list, putFile(files[4], files[5]))
	}
	return list
}

// modelChange is a change in the model.
type modelChange struct {
	id        string
	open      bool
	base      int // index of the version
	state     modelState
	authors   []string
	approvals []string
	declined  map[modelState]bool
}

// model is what a bundle should be.
type model struct {
	versions []modelState
	rules    []int // that the change after each version needs to keep
	frozen   bool
	changes  []*modelChange
}

func (m *model) live() modelState { return m.versions[len(m.versions)-1] }
func (m *model) needs() int       { return m.rules[len(m.rules)-1] }

func (m *model) add(s modelState, rule int) {
	m.versions, m.rules = append(m.versions, s), append(m.rules, rule)
}

// Random steps by several callers do what a small model says: a step succeeds or is refused, and the live
// version, the rule and the freeze are those of the model.
func TestLifecycleModel(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	callers := map[string]cedarpostv1connect.PolicyServiceClient{}
	for _, name := range []string{"ann", "bob", "eve"} {
		callers[name] = policiesOf(t, s, name, grant(access.PolicyAuthor, "*"), grant(access.PolicyApprover, "*"), grant(access.PolicyPublisher, "*"))
	}
	bundles, steps, succeeded := 0, 0, map[string]int{}
	storetest.Check(t, 4, func(rt *rapid.T) {
		bundles++
		name := fmt.Sprintf("b%d", bundles)
		m := &model{}
		draw := func() modelState {
			return modelState{rapid.SampledFrom([]int{0, 0, 0, 0, 1, 2}).Draw(rt, "rule"), rapid.IntRange(1, 3).Draw(rt, "level")}
		}
		first := draw()
		breakIn(t, s, name, first.files(name)...)
		m.add(first, first.rule)
		for range rapid.IntRange(25, 40).Draw(rt, "steps") {
			steps++
			who := rapid.SampledFrom([]string{"ann", "bob", "eve"}).Draw(rt, "who")
			by := callers[who]
			step := rapid.SampledFrom([]string{"create", "edit", "edit", "rebase", "approve", "approve", "approve", "decline", "publish", "publish", "publish", "apply", "rollback", "freeze", "unfreeze", "unfreeze"}).Draw(rt, "step")
			var c *modelChange
			if len(m.changes) > 0 {
				c = m.changes[rapid.IntRange(0, len(m.changes)-1).Draw(rt, "change")]
			} else if slices.Contains([]string{"edit", "rebase", "approve", "decline", "publish"}, step) {
				step = "create"
			}
			var err error
			var want bool
			digest := func() string {
				res, err := by.GetChange(t.Context(), &cedarpostv1.GetChangeRequest{Id: c.id})
				if err != nil {
					rt.Fatal(err)
				}
				return res.Change.Digest
			}
			switch step {
			case "create":
				to := draw()
				var res *cedarpostv1.CreateChangeResponse
				res, err = by.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: name, Title: "t", Edits: m.live().edits(name, to)})
				want = true
				m.changes = append(m.changes, &modelChange{id: res.GetChange().GetId(), open: true, base: len(m.versions) - 1, state: to, authors: []string{who}, declined: map[modelState]bool{}})
			case "edit":
				to := draw()
				_, err = by.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: c.id, Edits: c.state.edits(name, to)})
				if want = c.open; want {
					c.change(who, c.base, to)
				}
			case "rebase":
				_, err = by.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: c.id, Rebase: true})
				to, ok := rebased(m.versions[c.base], m.live(), c.state)
				if want = c.open && ok; want {
					c.change(who, len(m.versions)-1, to)
				}
			case "approve":
				_, err = by.ApproveChange(t.Context(), &cedarpostv1.ApproveChangeRequest{Id: c.id, Digest: digest()})
				if want = c.open && !slices.Contains(c.authors, who); want && !slices.Contains(c.approvals, who) {
					c.approvals = append(c.approvals, who)
				}
			case "decline":
				_, err = by.DeclineChange(t.Context(), &cedarpostv1.DeclineChangeRequest{Id: c.id, Digest: digest()})
				if want = c.open; want {
					c.declined[c.state] = true
				}
			case "publish":
				_, err = by.PublishChange(t.Context(), &cedarpostv1.PublishChangeRequest{Id: c.id, Digest: digest()})
				counted := slices.DeleteFunc(slices.Clone(c.approvals), func(name string) bool { return slices.Contains(c.authors, name) })
				want = c.open && !m.frozen && c.base == len(m.versions)-1 && c.state != m.live() && !c.declined[c.state] && len(counted) >= max(m.needs(), c.state.rule)
				if want {
					c.open = false
					m.add(c.state, c.state.rule)
				}
			case "apply":
				to := draw()
				one := *s
				one.Policies = by
				_, err = one.Apply(name, servertest.Files(to.files(name)...))
				if want = !m.frozen && (to == m.live() || max(m.needs(), to.rule) == 0); want && to != m.live() {
					m.add(to, to.rule)
				}
			case "rollback":
				to := rapid.IntRange(0, len(m.versions)-1).Draw(rt, "version")
				_, err = by.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: name, Version: int64(to + 1), Reason: "r"})
				if want = m.versions[to] != m.live(); want {
					m.add(m.versions[to], max(m.needs(), m.versions[to].rule))
					m.frozen = true
				}
			case "freeze":
				_, err = by.FreezeBundle(t.Context(), &cedarpostv1.FreezeBundleRequest{Bundle: name})
				want, m.frozen = true, true
			case "unfreeze":
				_, err = by.UnfreezeBundle(t.Context(), &cedarpostv1.UnfreezeBundleRequest{Bundle: name})
				want, m.frozen = true, false
			}
			if (err == nil) != want || err != nil && connect.CodeOf(err) != connect.CodeFailedPrecondition {
				rt.Fatalf("%s by %s: %v, want success: %v; %+v, change %+v", step, who, err, want, m, c)
			}
			if err == nil {
				succeeded[step]++
			}
			list, err := by.ListVersions(t.Context(), &cedarpostv1.ListVersionsRequest{Bundle: name, PageSize: 1})
			if err != nil {
				rt.Fatal(err)
			}
			if v := list.Versions[0]; v.Version != int64(len(m.versions)) || int(v.Approvals) != m.needs() {
				rt.Fatalf("after %s by %s: %v, want version %d that needs %d", step, who, v, len(m.versions), m.needs())
			}
		}
	})
	t.Logf("%d steps on %d bundles; succeeded: %v", steps, bundles, succeeded)
	mustVerify(t, s.URL)
}

// change edits a change in the model.
func (c *modelChange) change(who string, base int, to modelState) {
	if c.base == base && c.state == to {
		return
	}
	if c.state != to {
		c.approvals = nil
	}
	if c.base, c.state = base, to; !slices.Contains(c.authors, who) {
		c.authors = append(c.authors, who)
	}
}

// rebased merges two changes of a state, by file.
func rebased(base, live, mine modelState) (to modelState, ok bool) {
	merge := func(base, live, mine int) int {
		switch {
		case mine == base:
			return live
		case live != base && live != mine:
			return -1
		}
		return mine
	}
	to = modelState{merge(base.rule, live.rule, mine.rule), merge(base.level, live.level, mine.level)}
	return to, to.rule >= 0 && to.level >= 0
}
