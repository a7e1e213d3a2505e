package server

import (
	"context"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

// ExportDecisions implements cedarpost.v1.AuditService.
func (s *auditService) ExportDecisions(context.Context, *cedarpostv1.ExportDecisionsRequest, cedarpostv1connect.AuditServiceExportDecisionsServerStream) error {
	return connect.NewError(connect.CodeUnimplemented, "not yet")
}
