package server

import (
	"bytes"
	"cmp"
	"encoding/json"
	"slices"

	"github.com/cedar-policy/cedar-go"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

// policyParts are the parts of a policy in Cedar's JSON format
// (https://docs.cedarpolicy.com/policies/json-format.html).
var policyParts = []string{"effect", "principal", "action", "resource", "conditions", "annotations"}

// partsOf parses a policy into its parts. A policy that does not parse, because an earlier version of the
// service published it, has none.
func partsOf(text string) (parts map[string]json.RawMessage) {
	var p cedar.Policy
	if p.UnmarshalCedar([]byte(text)) != nil {
		return nil
	}
	if b, err := p.MarshalJSON(); err != nil || json.Unmarshal(b, &parts) != nil {
		return nil
	}
	return parts
}

// policyDiffs compares the policies of two states of a bundle, by id.
func policyDiffs(before []store.Policy, after []engine.PolicyInfo) (list []*cedarpostv1.PolicyDiff) {
	was := make(map[string]store.Policy, len(before))
	for _, p := range before {
		was[p.ID] = p
	}
	for _, p := range after {
		old, there := was[p.ID]
		delete(was, p.ID)
		if there && old.Text == p.Text && old.File == p.File {
			continue
		}
		is := partsOf(p.Text)
		d := &cedarpostv1.PolicyDiff{Id: p.ID, Kind: cedarpostv1.PolicyDiff_ADDED, Effect: effectOf(is)}
		if there {
			d.Kind = cedarpostv1.PolicyDiff_CHANGED
			oldParts := partsOf(old.Text)
			for _, part := range policyParts {
				if !bytes.Equal(oldParts[part], is[part]) {
					d.Parts = append(d.Parts, part)
				}
			}
		}
		list = append(list, d)
	}
	for id, p := range was {
		list = append(list, &cedarpostv1.PolicyDiff{Id: id, Kind: cedarpostv1.PolicyDiff_REMOVED, Effect: effectOf(partsOf(p.Text))})
	}
	slices.SortFunc(list, func(a, b *cedarpostv1.PolicyDiff) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return list
}

func effectOf(parts map[string]json.RawMessage) (effect string) {
	_ = json.Unmarshal(parts["effect"], &effect) // "" if there is none
	return effect
}

// fieldDiffs compares the catalogues of the live version and of a bundle.
func fieldDiffs(live store.Bundle, b *bundle.Bundle) (added, removed []string, err error) {
	was := map[string]bool{}
	if live.Fields != "" {
		var list []engine.Field
		if err := json.Unmarshal([]byte(live.Fields), &list); err != nil {
			return nil, nil, err
		}
		for _, f := range list {
			if !(bundle.Field{Type: f.Type}).IsGroup() {
				was[f.Type+" "+f.Path] = true
			}
		}
	}
	for _, f := range b.Fields {
		name := f.Type + " " + f.Path
		if !f.IsGroup() && !was[name] {
			added = append(added, name)
		}
		delete(was, name)
	}
	for name := range was {
		removed = append(removed, name)
	}
	slices.Sort(removed)
	return added, removed, nil
}
