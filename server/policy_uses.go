package server

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
)

// oneDay is the precision of times for callers that may not list decisions.
const oneDay = 24 * time.Hour

// addUses adds to policies, which are in order of bundle, when they last determined a decision. A policy
// can be about a single person, so a caller that may not list decisions must not learn to the minute when
// this person was active: it gets days.
func (s *policyService) addUses(ctx context.Context, list []*cedarpostv1.Policy) error {
	for len(list) > 0 {
		bundle, n := list[0].Bundle, 0
		var ids []string
		for ; n < len(list) && list[n].Bundle == bundle; n++ {
			ids = append(ids, list[n].Id)
		}
		if bundle != engine.AdminLocal && bundle != engine.Admin { // their decisions are not recorded
			uses, err := s.db.PolicyUses(ctx, bundle, ids)
			if err != nil {
				return err
			}
			exact := seesTimes(ctx, bundle)
			for _, p := range list[:n] {
				u, ok := uses[p.Id]
				if !ok {
					continue
				}
				p.CountedSince = timestamppb.New(u.Since)
				switch {
				case u.At.IsZero():
				case exact:
					p.LastDetermined = timestamppb.New(u.At)
				default:
					p.LastDetermined = timestamppb.New(u.At.UTC().Truncate(oneDay))
				}
			}
		}
		list = list[n:]
	}
	return nil
}

func seesTimes(ctx context.Context, bundle string) bool {
	return access.RightsFrom(ctx).MayAll(readDecisions, decisionsOf(bundle))
}

// unusedSince reports whether a policy, with its uses, has determined no decision since a time; without
// a time, that is of no interest, and true. It is not known if the policy has been counted for a shorter
// time.
func unusedSince(ctx context.Context, p *cedarpostv1.Policy, asked *timestamppb.Timestamp) (unused, known bool) {
	if asked == nil {
		return true, true
	}
	since := asked.AsTime()
	if !seesTimes(ctx, p.Bundle) {
		since = since.UTC().Truncate(oneDay)
	}
	switch {
	case p.CountedSince == nil, p.LastDetermined != nil && !p.LastDetermined.AsTime().Before(since):
		return false, true
	case p.CountedSince.AsTime().After(asked.AsTime()):
		return false, false
	}
	return true, true
}
