package server

import (
	"context"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// CountDecisions implements cedarpost.v1.AuditService.
func (s *auditService) CountDecisions(context.Context, *cedarpostv1.CountDecisionsRequest) (*cedarpostv1.CountDecisionsResponse, error) {
	return nil, connect.NewError(connect.CodeUnimplemented, "not yet")
}
