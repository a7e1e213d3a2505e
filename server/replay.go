package server

import (
	"context"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// ReplayDecision implements cedarpost.v1.AuditService.
func (s *auditService) ReplayDecision(context.Context, *cedarpostv1.ReplayDecisionRequest) (*cedarpostv1.ReplayDecisionResponse, error) {
	return nil, connect.NewError(connect.CodeUnimplemented, "not yet")
}
