package impact

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxWhoEntities = 1000   // principals, and resources, that are tried for one policy and one action
	maxWhoPairs    = 20_000 // that are tried in all
	maxWho         = 100    // principals in a report
	maxWhoNamed    = 5      // resources of a principal in a report
)

// mostPairs is maxWhoPairs, or fewer in a test.
var mostPairs = maxWhoPairs

// Who asks for which stored principals the outcome of actions changes. readable says whether the caller may
// list the entities of a type.
//
// goOn is called between pieces of work. If its error is [ErrEnd], the rest is left out.
func (a *Analysis) Who(ctx context.Context, actions []*cedarpostv1.EntityUid, context map[string]any, goOn func() error, readable func(cedar.EntityType) bool) error {
	w := &who{Analysis: a, context: context, goOn: goOn, readable: readable, tried: map[pair]bool{}, found: map[[2]cedar.EntityUID]*cedarpostv1.ImpactWho{}, left: map[string]bool{}}
	for _, uid := range actions {
		err := w.action(ctx, wire.UID(uid))
		if errors.Is(err, ErrEnd) {
			w.leave("who gains and who loses: the time was over before everything was tried")
			break
		}
		if err != nil {
			return err
		}
	}
	r := a.cfg.Report
	r.WhoPairs, r.WhoLeftOut, r.WhoChanged = w.decided, slices.Sorted(maps.Keys(w.left)), int32(len(w.found))
	size := func(x *cedarpostv1.ImpactWho) int32 { return x.GetGained() + x.GetLost() + x.GetFieldsChanged() }
	r.Who = slices.SortedFunc(maps.Values(w.found), func(x, y *cedarpostv1.ImpactWho) int {
		return cmp.Or(cmp.Compare(size(y), size(x)), cmp.Compare(wire.UID(x.GetPrincipal()).String(), wire.UID(y.GetPrincipal()).String()))
	})
	if n := len(r.GetWho()); n > maxWho {
		r.WhoLeftOut = append(r.GetWhoLeftOut(), fmt.Sprintf("%d principals whose outcome changes are not listed", n-maxWho))
		r.Who = r.GetWho()[:maxWho]
	}
	return nil
}

// ErrEnd ends a search for those who gain and lose before everything was tried.
var ErrEnd = errors.New("the time is over")

// errPairs ends a search that has tried enough.
var errPairs = errors.New("enough pairs were tried")

// who is the search for principals.
type who struct {
	*Analysis
	context  map[string]any
	goOn     func() error
	readable func(cedar.EntityType) bool
	tried    map[pair]bool
	decided  int32                                         // pairs that were decided by both sides
	found    map[[2]cedar.EntityUID]*cedarpostv1.ImpactWho // by principal and action
	left     map[string]bool                               // what was left out
}

type pair struct{ principal, action, resource cedar.EntityUID }

// action tries the pairs that the policies that differ can concern.
func (w *who) action(ctx context.Context, action cedar.EntityUID) error {
	live, proposed := w.sides[0].set, w.sides[1].set
	principals, resources := live.Types(action)
	if len(principals) == 0 {
		w.leave(fmt.Sprintf("%s: the live schema does not declare the action", action))
		return nil
	}
	for _, reach := range proposed.Differences(live, action) {
		if err := cmp.Or(w.goOn(), ctx.Err()); err != nil {
			return err
		}
		ps, err := w.entities(ctx, reach.Policy, "principals", reach.Principal, principals)
		if err != nil {
			return err
		}
		rs, err := w.entities(ctx, reach.Policy, "resources", reach.Resource, resources)
		if err != nil {
			return err
		}
		err = w.pairs(ctx, action, reach, ps, rs, principals)
		if errors.Is(err, errPairs) {
			w.leave(fmt.Sprintf("%s: pairs beyond the first %d of all", action, mostPairs))
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// entities returns the stored entities that a part of a reach can concern.
func (w *who) entities(ctx context.Context, policy engine.PolicyRef, what string, r engine.ReachOf, types []cedar.EntityType) (list []store.Entity, err error) {
	about := "everything"
	if policy.ID != "" {
		about = "policy " + policy.String()
	}
	for _, typ := range types {
		if r.Type != "" && r.Type != typ {
			continue
		}
		if !w.readable(typ) {
			w.leave(fmt.Sprintf("%s of the type %s, which the caller may not list", what, typ))
			continue
		}
		if w.sides[0].set.CheckStorable(cedar.NewEntityUID(typ, "")) != nil {
			w.leave(fmt.Sprintf("%s: %s of the type %s, which are never stored", about, what, typ))
			continue
		}
		if r.UID.Type != "" && !r.In {
			rows, err := w.cfg.DB.PastEntities(ctx, w.cfg.Revision, []store.UID{stored.UID(r.UID)}, store.LargeLoad)
			if err != nil && !errors.Is(err, store.ErrTooLarge) {
				return nil, err
			}
			for _, row := range rows { // with its ancestors
				if row.UID == stored.UID(r.UID) {
					list = append(list, row)
				}
			}
			if len(list) == 0 { // it is not stored, and can be asked about all the same
				list = append(list, store.Entity{UID: stored.UID(r.UID)})
			}
			return list, nil
		}
		if r.UID.Type == typ { // a group is in itself
			list = append(list, store.Entity{UID: stored.UID(r.UID)})
		}
		q := store.EntityQuery{Type: string(typ), Room: room(), Limit: maxWhoEntities - len(list) + 1}
		if r.UID.Type != "" {
			if q.ParentTypes, err = w.sides[0].set.GroupTypes(r.UID); err != nil {
				q.ParentTypes = nil // the live schema does not know the group
			}
			group := stored.UID(r.UID)
			q.Ancestor = &group
		}
		rows, err := w.cfg.DB.ListEntities(ctx, w.cfg.Revision, q)
		if errors.Is(err, store.ErrTooLarge) {
			w.leave(fmt.Sprintf("%s: %s, which are too large together", about, what))
			continue
		}
		if errors.Is(err, store.ErrTooManyGroups) {
			w.leave(fmt.Sprintf("%s: %s in %s, which has more than %d groups", about, what, r.UID, store.MaxGroups))
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, rows...)
		if len(list) > maxWhoEntities {
			w.leave(fmt.Sprintf("%s: more than the first %d %s", about, maxWhoEntities, what))
			return list[:maxWhoEntities], nil
		}
	}
	return list, nil
}

// pairs tries principals with resources. Where there are too many pairs, those come first whose resource
// refers to the principal, because policies often compare them. The error is errPairs if there is no room for
// all.
func (w *who) pairs(ctx context.Context, action cedar.EntityUID, reach engine.Reach, principals, resources []store.Entity, types []cedar.EntityType) error {
	among := map[cedar.EntityUID]bool{}
	for _, p := range principals {
		among[uidOf(p.UID)] = true
	}
	anybody := reach.Principal == engine.ReachOf{}
	var chunk []pair
	flush := func() error {
		err := w.try(ctx, chunk)
		chunk = chunk[:0]
		return err
	}
	add := func(p pair) error {
		if w.tried[p] {
			return nil
		}
		if len(w.tried) == mostPairs {
			return cmp.Or(flush(), errPairs)
		}
		w.tried[p] = true
		if chunk = append(chunk, p); len(chunk) == chunkRows {
			return flush()
		}
		return nil
	}
	for _, res := range resources {
		e, err := stored.ReadEntity(w.sides[0].set, res)
		if err != nil {
			continue
		}
		for _, v := range e.Attrs.All() {
			uid, is := v.(cedar.EntityUID)
			if is && slices.Contains(types, uid.Type) && w.readable(uid.Type) && (anybody || among[uid]) {
				if err := add(pair{uid, action, uidOf(res.UID)}); err != nil {
					return err
				}
			}
		}
	}
	for _, res := range resources {
		for _, p := range principals {
			if err := add(pair{uidOf(p.UID), action, uidOf(res.UID)}); err != nil {
				return err
			}
		}
	}
	return flush()
}

// maxWhoBytes bounds the entities that are read for one part of a policy.
const maxWhoBytes = 16 << 20

// room returns a bound of the bytes of a list.
func room() store.Room {
	left := maxWhoBytes
	return func(bytes int) error {
		if left -= bytes; left < 0 {
			return store.ErrTooLarge
		}
		return nil
	}
}

func uidOf(u store.UID) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType(u.Type), cedar.String(u.ID))
}

// try decides questions by both sides.
func (w *who) try(ctx context.Context, pairs []pair) error {
	if len(pairs) == 0 {
		return nil
	}
	if err := cmp.Or(w.goOn(), ctx.Err()); err != nil {
		return err
	}
	began := time.Now()
	asks := make([]engine.Ask, len(pairs))
	for i, p := range pairs {
		asks[i] = engine.Ask{Principal: p.principal, Action: p.action, Resource: p.resource, Context: w.context, NowMillis: began.UnixMilli()}
		asks[i].FieldsAsked, asks[i].All = w.sides[0].set.HasFields(p.action), true
	}
	var list [2][]outcome
	for i, side := range w.sides {
		var err error
		if list[i], err = w.outcomesNow(ctx, side, asks); err != nil {
			return err
		}
	}
	for i, p := range pairs {
		w.add(p, list[0][i], list[1][i])
	}
	return w.rest(ctx, time.Since(began))
}

// whyUntried says why a pair has no outcome. The text names no entity.
func whyUntried(err error) string {
	if bad, ok := errors.AsType[*engine.RequestError](err); ok && strings.HasPrefix(bad.Error(), "context") {
		return bad.Error() // of the context that the caller gave
	}
	return undecided(err)
}

// leave notes what is left out. What would make the list too long is not named.
func (w *who) leave(text string) {
	if len(w.left) >= maxWho {
		text = "more than is listed here"
	}
	w.left[text] = true
}

// add notes how the outcome of a pair changes.
func (w *who) add(p pair, live, proposed outcome) {
	for _, o := range []outcome{live, proposed} {
		if o.err != nil {
			w.leave(fmt.Sprintf("%s: %s", p.action, whyUntried(o.err)))
			return
		}
	}
	w.decided++
	a, b := live.res, proposed.res
	gained, lost := without(b.Permitted, a.Permitted), without(a.Permitted, b.Permitted)
	if a.Allowed == b.Allowed && len(gained)+len(lost) == 0 {
		return
	}
	key := [2]cedar.EntityUID{p.principal, p.action}
	one := w.found[key]
	if one == nil {
		one = &cedarpostv1.ImpactWho{Principal: stored.ToProto(stored.UID(p.principal)), Action: stored.ToProto(stored.UID(p.action))}
		w.found[key] = one
	}
	name := func(list *[]*cedarpostv1.EntityUid) {
		if len(*list) < maxWhoNamed {
			*list = append(*list, stored.ToProto(stored.UID(p.resource)))
		}
	}
	switch {
	case b.Allowed && !a.Allowed:
		one.Gained++
		name(&one.GainedResources)
	case a.Allowed && !b.Allowed:
		one.Lost++
		name(&one.LostResources)
	default:
		one.FieldsChanged++
	}
	one.FieldsGained = append(one.GetFieldsGained(), without(gained, one.GetFieldsGained())...)
	one.FieldsLost = append(one.GetFieldsLost(), without(lost, one.GetFieldsLost())...)
}
