package server

import (
	"context"
	"math"
	"strings"

	"github.com/google/uuid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

// uses sums up the reported uses of decisions, by the ids of these. Each report counts
// once, and only for decisions of the caller that sent it.
func (s *auditService) uses(ctx context.Context, decisions []store.Decision) (map[string]*cedarpostv1.DecisionUses, error) {
	if len(decisions) == 0 {
		return nil, nil
	}
	callers := map[string]string{} // of the decisions, by id
	q := store.UsesQuery{Limit: s.reports + 1, From: decisions[0].At, To: decisions[0].At}
	named := map[string]bool{}
	for _, d := range decisions {
		q.Decisions = append(q.Decisions, d.ID)
		callers[d.ID.String()] = d.Caller
		if !named[d.Caller] {
			named[d.Caller] = true
			q.Callers = append(q.Callers, d.Caller)
		}
		if d.At.Before(q.From) {
			q.From = d.At
		}
		if d.At.After(q.To) {
			q.To = d.At
		}
	}
	// On a server whose clock is behind, a report can be older than its decision.
	q.From, q.To = q.From.Add(-2*maxReportAhead), q.To.Add(maxReportAge+usesLeeway)

	out := map[string]*cedarpostv1.DecisionUses{}
	type reportKey struct{ caller, id string }
	counted := map[reportKey]bool{}
	var damaged []uuid.UUID // whose uses may be in a damaged report
	rows := 0
	err := s.db.EachUse(ctx, q, func(e store.Event) error {
		if rows++; rows > s.reports {
			return nil
		}
		rec := decisionlog.ReadEvent(e)
		if rec.Damaged != "" {
			damaged = append(damaged, e.Decisions...)
			return nil
		}
		report := rec.GetReuse()
		key := reportKey{e.Caller, strings.ToLower(report.GetReportId())} // older records have it as it came
		if counted[key] {
			return nil
		}
		counted[key] = true
		for _, r := range report.GetReuses() {
			if caller, asked := callers[r.DecisionId]; asked && caller == e.Caller {
				out[r.DecisionId] = addUses(out[r.DecisionId], r)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	incomplete := func(id string) {
		if out[id] == nil {
			out[id] = &cedarpostv1.DecisionUses{}
		}
		out[id].Incomplete = true
	}
	for _, id := range damaged {
		if _, asked := callers[id.String()]; asked {
			incomplete(id.String())
		}
	}
	if rows > s.reports {
		for id := range callers {
			incomplete(id)
		}
	}
	return out, nil
}

// addUses adds the uses of one report to a sum, which is nil at first.
func addUses(sum *cedarpostv1.DecisionUses, r *cedarpostv1.Reuse) *cedarpostv1.DecisionUses {
	if sum == nil {
		return &cedarpostv1.DecisionUses{Hits: r.Hits, First: r.First, Last: r.Last}
	}
	sum.Hits += min(r.Hits, math.MaxInt64-sum.Hits)
	if r.First.AsTime().Before(sum.First.AsTime()) {
		sum.First = r.First
	}
	if r.Last.AsTime().After(sum.Last.AsTime()) {
		sum.Last = r.Last
	}
	return sum
}
