package server

import (
	"context"

	"github.com/cedar-policy/cedar-go"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/store"
)

// CountDecisions implements cedarpost.v1.AuditService.
func (s *auditService) CountDecisions(ctx context.Context, req *cedarpostv1.CountDecisionsRequest) (*cedarpostv1.CountDecisionsResponse, error) {
	q, shown, err := s.filter(ctx, req.GetFilter(), "CountDecisions")
	if err != nil {
		return nil, err
	}
	if !indexed(q) {
		if err := checkSpan(q, "filter"); err != nil {
			return nil, err
		}
	}
	q.Limit = pageSize(req.GetLimit())
	counts, err := s.db.CountDecisions(ctx, q, store.Group(req.GetGroup()))
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.CountDecisionsResponse{}
	for _, n := range counts {
		out.Total = n.Total
		out.Counts = append(out.Counts, &cedarpostv1.DecisionCount{Group: groupText(req.GetGroup(), n), Allowed: n.Allowed, Denied: n.Denied})
	}
	kept := &cedarpostv1.CountDecisionsRequest{Filter: shown, Group: req.GetGroup(), Limit: req.GetLimit()}
	if err := s.recorder.RecordLogRead(ctx, cedarpostv1connect.AuditServiceCountDecisionsProcedure, kept, len(counts)); err != nil {
		return nil, err
	}
	return out, nil
}

// groupText returns the name of a group in the form that the contract says.
func groupText(by cedarpostv1.CountDecisionsRequest_Group, n store.DecisionCount) string {
	switch by {
	case cedarpostv1.CountDecisionsRequest_POLICY, cedarpostv1.CountDecisionsRequest_FIELD:
		return n.ID
	case cedarpostv1.CountDecisionsRequest_OUTCOME:
		if n.DeniedAt == 0 {
			return cedarpostv1.Decision_ALLOW.String()
		}
		return cedarpostv1.Decision_DENY.String() + " at " + cedarpostv1.DeniedAt(n.DeniedAt).String()
	}
	return cedar.NewEntityUID(cedar.EntityType(n.Type), cedar.String(n.ID)).String()
}
