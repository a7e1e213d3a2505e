package impact

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxSamples  = 10     // of each kind
	maxGroups   = 100    // that a report has, of each sort
	maxNamed    = 20     // policies that a sample names
	maxCounted  = 10_000 // groups of each sort that are counted apart
	otherGroups = "(others)"
)

// counts counts how outcomes differ.
type counts struct {
	total   cedarpostv1.ImpactReport // its counts
	reasons map[string]int32
	groups  [4]map[string]*cedarpostv1.ImpactGroup // as in groupsOf
	samples map[cedarpostv1.ImpactSample_Kind][]*cedarpostv1.ImpactSample
	// changed returns the policies about an action that only one side has.
	changed func(cedar.EntityUID) []engine.PolicyRef
	// decidesFields reports whether a policy of either side can decide about the fields of an action.
	decidesFields func(cedar.EntityUID, engine.PolicyRef) bool
}

// The sorts of groups.
const (
	byAction = iota
	byPolicy
	byCaller
	byField
)

func groupsOf(r *cedarpostv1.ImpactReport) [4]*[]*cedarpostv1.ImpactGroup {
	return [4]*[]*cedarpostv1.ImpactGroup{&r.ByAction, &r.ByPolicy, &r.ByCaller, &r.ByField}
}

// load takes up the counts of a stored report.
func (c *counts) load(r *cedarpostv1.ImpactReport) {
	copyCounts(&c.total, r)
	c.reasons = map[string]int32{}
	for _, u := range r.GetUnknownReasons() {
		c.reasons[u.GetReason()] = u.GetDecisions()
	}
	for sort, list := range groupsOf(r) {
		c.groups[sort] = map[string]*cedarpostv1.ImpactGroup{}
		for _, g := range *list {
			c.groups[sort][g.GetName()] = g
		}
	}
	c.samples = map[cedarpostv1.ImpactSample_Kind][]*cedarpostv1.ImpactSample{}
	for _, s := range r.GetSamples() {
		c.samples[s.GetKind()] = append(c.samples[s.GetKind()], s)
	}
}

func copyCounts(to, from *cedarpostv1.ImpactReport) {
	to.Decisions, to.AllowToDeny, to.DenyToAllow, to.FieldsGained, to.FieldsLost = from.GetDecisions(), from.GetAllowToDeny(), from.GetDenyToAllow(), from.GetFieldsGained(), from.GetFieldsLost()
	to.NewErrors, to.OtherChanges, to.Unchanged, to.Unknown = from.GetNewErrors(), from.GetOtherChanges(), from.GetUnchanged(), from.GetUnknown()
}

// save writes the counts into a report, and the groups and samples if it is full.
func (c *counts) save(r *cedarpostv1.ImpactReport, full bool) {
	copyCounts(r, &c.total)
	r.UnknownReasons, r.Samples = nil, nil
	for _, reason := range slices.Sorted(maps.Keys(c.reasons)) {
		r.UnknownReasons = append(r.UnknownReasons, &cedarpostv1.ImpactReason{Reason: reason, Decisions: c.reasons[reason]})
	}
	size := func(g *cedarpostv1.ImpactGroup) int32 {
		return g.GetAllowToDeny() + g.GetDenyToAllow() + g.GetFieldsGained() + g.GetFieldsLost() + g.GetNewErrors()
	}
	for sort, into := range groupsOf(r) {
		*into = nil
		if !full {
			continue
		}
		list := slices.SortedFunc(maps.Values(c.groups[sort]), func(a, b *cedarpostv1.ImpactGroup) int {
			// What is left of other groups comes last, so that it is counted together with those that are left now.
			left := func(g *cedarpostv1.ImpactGroup) int { return map[bool]int{true: 1}[g.GetName() == otherGroups] }
			return cmp.Or(cmp.Compare(left(a), left(b)), cmp.Compare(size(b), size(a)), cmp.Compare(a.GetName(), b.GetName()))
		})
		for _, g := range list[:min(len(list), maxGroups)] {
			*into = append(*into, proto.CloneOf(g))
		}
		if len(list) > maxGroups {
			rest := &cedarpostv1.ImpactGroup{Name: otherGroups}
			for _, g := range list[maxGroups:] {
				rest.AllowToDeny, rest.DenyToAllow = rest.GetAllowToDeny()+g.GetAllowToDeny(), rest.GetDenyToAllow()+g.GetDenyToAllow()
				rest.FieldsGained, rest.FieldsLost = rest.GetFieldsGained()+g.GetFieldsGained(), rest.GetFieldsLost()+g.GetFieldsLost()
				rest.NewErrors = rest.GetNewErrors() + g.GetNewErrors()
			}
			*into = append(*into, rest)
		}
	}
	if !full {
		return
	}
	for _, kind := range slices.Sorted(maps.Keys(c.samples)) {
		r.Samples = append(r.Samples, c.samples[kind]...)
	}
}

// unknown counts a decision that cannot be compared.
func (c *counts) unknown(reason string) {
	c.total.Decisions++
	c.total.Unknown++
	c.reasons[reason]++
}

// add compares the outcomes of a decision by the live policies and by the candidate.
func (c *counts) add(rec *cedarpostv1.DecisionRecord, live, candidate outcome) {
	switch {
	case live.err != nil:
		c.unknown(undecided(live.err))
		return
	case errors.Is(candidate.err, engine.ErrMasked), errors.Is(candidate.err, store.ErrSwept):
		c.unknown(undecided(candidate.err))
		return
	}
	c.total.Decisions++
	d := c.differences(rec, live.res, candidate)
	if len(d) == 0 {
		if otherwise(live, candidate) {
			c.total.OtherChanges++
			c.sample(cedarpostv1.ImpactSample_OTHER_CHANGES, rec, difference{}, live.res, candidate)
			return
		}
		c.total.Unchanged++
	}
	for kind, one := range d {
		*countOfKind(&c.total, kind)++
		c.sample(kind, rec, one, live.res, candidate)
		c.group(byAction, kind, wire.UID(rec.GetAction()).String())
		if candidate.err == nil {
			one.policies = c.because(kind, wire.UID(rec.GetAction()), one.policies, live.res, candidate.res)
		}
		c.group(byPolicy, kind, names(one.policies)...)
		c.group(byCaller, kind, rec.GetCaller())
		c.group(byField, kind, one.fields...)
	}
}

// because returns the policies that a difference is counted for: those that decide it, and if that does not tell them
// apart, those that differ between the sides and had a part in one of the two outcomes. A policy that neither matched nor
// failed is no reason, and one that is not about fields is none for a difference of fields.
func (c *counts) because(kind cedarpostv1.ImpactSample_Kind, action cedar.EntityUID, by []engine.PolicyRef, outcomes ...*engine.Result) []engine.PolicyRef {
	ofFields := kind == cedarpostv1.ImpactSample_FIELDS_GAINED || kind == cedarpostv1.ImpactSample_FIELDS_LOST
	if ofFields {
		by = slices.DeleteFunc(slices.Clone(by), func(p engine.PolicyRef) bool { return !c.decidesFields(action, p) })
	}
	if len(by) > 0 {
		return by
	}
	for _, p := range c.changed(action) {
		part := slices.ContainsFunc(outcomes, func(r *engine.Result) bool {
			return slices.Contains(r.Policies, p) || slices.Contains(r.FieldForbids, p.String()) ||
				slices.ContainsFunc(r.Errors, func(e engine.PolicyError) bool { return e.Policy == p })
		})
		if part && (!ofFields || c.decidesFields(action, p)) {
			by = append(by, p)
		}
	}
	return by
}

// difference is one kind of difference of a decision.
type difference struct {
	policies []engine.PolicyRef // that decide it
	fields   []string
}

// differences returns the differences of a decision by kind.
func (c *counts) differences(rec *cedarpostv1.DecisionRecord, live *engine.Result, candidate outcome) map[cedarpostv1.ImpactSample_Kind]difference {
	d := map[cedarpostv1.ImpactSample_Kind]difference{}
	if candidate.err != nil {
		d[cedarpostv1.ImpactSample_NEW_ERRORS] = difference{}
		return d
	}
	is := candidate.res
	switch {
	case live.Allowed && !is.Allowed:
		by := is.Policies // the forbids, or none
		if len(by) == 0 {
			by = live.Policies // the permits that are gone
		}
		d[cedarpostv1.ImpactSample_ALLOW_TO_DENY] = difference{policies: by}
	case !live.Allowed && is.Allowed:
		d[cedarpostv1.ImpactSample_DENY_TO_ALLOW] = difference{policies: is.Policies}
	case live.Allowed:
		if gained := without(is.Permitted, live.Permitted); len(gained) > 0 {
			d[cedarpostv1.ImpactSample_FIELDS_GAINED] = difference{without(is.Policies, live.Policies), gained}
		}
		if lost := without(live.Permitted, is.Permitted); len(lost) > 0 {
			d[cedarpostv1.ImpactSample_FIELDS_LOST] = difference{without(live.Policies, is.Policies), lost}
		}
	}
	var failing []engine.PolicyRef
	for _, e := range is.Errors {
		if !slices.ContainsFunc(live.Errors, func(l engine.PolicyError) bool { return l.Policy == e.Policy }) {
			failing = append(failing, e.Policy)
		}
	}
	if len(failing) > 0 {
		d[cedarpostv1.ImpactSample_NEW_ERRORS] = difference{policies: failing}
	}
	return d
}

// otherwise reports whether outcomes with the same decision and fields differ in what the caller sees.
func otherwise(live, candidate outcome) bool {
	a, b := live.res, candidate.res
	return a.DeniedAt != b.DeniedAt && !live.masked && !candidate.masked || len(a.Errors) != len(b.Errors) ||
		!slices.EqualFunc(a.Obligations, b.Obligations, func(a, b engine.Obligation) bool { return a.Text == b.Text }) ||
		!slices.EqualFunc(a.Advice, b.Advice, func(a, b engine.Advice) bool { return a.Text == b.Text && slices.Equal(a.Paths, b.Paths) })
}

func countOfKind(r *cedarpostv1.ImpactReport, kind cedarpostv1.ImpactSample_Kind) *int32 {
	switch kind {
	case cedarpostv1.ImpactSample_ALLOW_TO_DENY:
		return &r.AllowToDeny
	case cedarpostv1.ImpactSample_DENY_TO_ALLOW:
		return &r.DenyToAllow
	case cedarpostv1.ImpactSample_FIELDS_GAINED:
		return &r.FieldsGained
	case cedarpostv1.ImpactSample_FIELDS_LOST:
		return &r.FieldsLost
	case cedarpostv1.ImpactSample_NEW_ERRORS:
		return &r.NewErrors
	default:
		return &r.OtherChanges
	}
}

// group counts a kind of difference in groups of a sort.
func (c *counts) group(sort int, kind cedarpostv1.ImpactSample_Kind, list ...string) {
	for _, name := range list {
		g := c.groups[sort][name]
		if g == nil && len(c.groups[sort]) >= maxCounted {
			name = otherGroups
			g = c.groups[sort][name]
		}
		if g == nil {
			g = &cedarpostv1.ImpactGroup{Name: name}
			c.groups[sort][name] = g
		}
		switch kind {
		case cedarpostv1.ImpactSample_ALLOW_TO_DENY:
			g.AllowToDeny++
		case cedarpostv1.ImpactSample_DENY_TO_ALLOW:
			g.DenyToAllow++
		case cedarpostv1.ImpactSample_FIELDS_GAINED:
			g.FieldsGained++
		case cedarpostv1.ImpactSample_FIELDS_LOST:
			g.FieldsLost++
		default:
			g.NewErrors++
		}
	}
}

// sample keeps a decision as an example of a kind of difference.
func (c *counts) sample(kind cedarpostv1.ImpactSample_Kind, rec *cedarpostv1.DecisionRecord, d difference, live *engine.Result, candidate outcome) {
	if len(c.samples[kind]) >= maxSamples {
		return
	}
	s := &cedarpostv1.ImpactSample{
		Kind: kind, DecisionId: rec.GetDecisionId(), Time: timestamppb.New(rec.GetTime().AsTime()), Caller: rec.GetCaller(),
		Principal: rec.GetPrincipal(), Action: rec.GetAction(), Resource: rec.GetResource(), LivePolicies: fewNames(live.Policies),
	}
	if candidate.err != nil {
		s.Error = candidate.err.Error()
		if _, unfit := errors.AsType[*stored.UnfitError](candidate.err); unfit { // its text names what is stored
			s.Error = undecided(candidate.err)
		}
	} else {
		s.CandidatePolicies = fewNames(candidate.res.Policies)
		s.Gained, s.Lost = without(candidate.res.Permitted, live.Permitted), without(live.Permitted, candidate.res.Permitted)
		if kind == cedarpostv1.ImpactSample_NEW_ERRORS {
			for _, e := range candidate.res.Errors {
				if slices.Contains(d.policies, e.Policy) {
					s.Error = e.Policy.String() + ": " + e.Message
					break
				}
			}
		}
	}
	c.samples[kind] = append(c.samples[kind], s)
}

func names(refs []engine.PolicyRef) (list []string) {
	for _, r := range refs {
		list = append(list, r.String())
	}
	return list
}

// fewNames is names for a sample: thousands of policies can determine one decision.
func fewNames(refs []engine.PolicyRef) []string {
	if n := len(refs); n > maxNamed {
		return append(names(refs[:maxNamed]), fmt.Sprintf("and %d more", n-maxNamed))
	}
	return names(refs)
}

// without returns the elements of a list that are not in another one.
func without[T comparable](list, other []T) (out []T) {
	in := make(map[T]bool, len(other))
	for _, e := range other {
		in[e] = true
	}
	for _, e := range list {
		if !in[e] {
			out = append(out, e)
		}
	}
	return out
}
