package impact

import (
	"fmt"
	"slices"

	"github.com/cedar-policy/cedar-go"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/wire"
)

// warnings says why a complete report says less than it seems to: a report about nothing looks like one of a change
// that does nothing. The texts name no entity of a filter.
func (a *Analysis) warnings(r *cedarpostv1.ImpactReport) (list []string) {
	if r.GetDecisions() == 0 {
		list = a.nothingCompared(r)
	}
	if r.GetWhoPairs() == 0 && len(r.GetWhoLeftOut()) > 0 {
		list = append(list, "who gains and who loses: no pair of a principal and a resource was tried")
	}
	return list
}

// nothingCompared says why no decision was compared.
func (a *Analysis) nothingCompared(r *cedarpostv1.ImpactReport) (list []string) {
	actions := a.actions(r.GetBundle())
	if f := r.GetAction(); f != nil && !slices.Contains(actions, wire.UID(f)) {
		list = append(list, fmt.Sprintf("action: the bundle %s does not declare %s", r.GetBundle(), wire.UID(f)))
	}
	for _, f := range []struct {
		name string
		uid  *cedarpostv1.EntityUid
		of   func(principals, resources []cedar.EntityType) []cedar.EntityType
	}{
		{"principal", r.GetPrincipal(), func(principals, _ []cedar.EntityType) []cedar.EntityType { return principals }},
		{"resource", r.GetResource(), func(_, resources []cedar.EntityType) []cedar.EntityType { return resources }},
	} {
		takes := func(action cedar.EntityUID) bool {
			return slices.ContainsFunc(a.sides[:], func(s side) bool {
				return slices.Contains(f.of(s.set.Types(action)), cedar.EntityType(f.uid.GetType()))
			})
		}
		if f.uid != nil && !slices.ContainsFunc(actions, takes) {
			list = append(list, fmt.Sprintf("%s: no action of the bundle %s takes a %s of the type %s", f.name, r.GetBundle(), f.name, f.uid.GetType()))
		}
	}
	switch {
	case len(list) > 0 || r.GetLiveVersion() == 0: // nobody can have asked about a new bundle
	case a.Narrowed():
		list = append(list, "no recorded decision of this time is one that the filters ask for")
	default:
		list = append(list, "no decision about an action of the bundle is recorded in this time")
	}
	return list
}

// actions returns the actions whose decisions the policies of a bundle decide, live or proposed.
func (a *Analysis) actions(bundle string) (list []cedar.EntityUID) {
	for _, s := range a.sides {
		for _, uid := range s.set.Actions() {
			if bundle == engine.Guardrails || s.set.Owner(uid.Type) == bundle {
				list = append(list, uid)
			}
		}
	}
	return list
}
