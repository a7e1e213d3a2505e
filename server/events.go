package server

import (
	"context"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// QueryEvents implements cedarpost.v1.AuditService.
func (s *auditService) QueryEvents(context.Context, *cedarpostv1.QueryEventsRequest) (*cedarpostv1.QueryEventsResponse, error) {
	return nil, connect.NewError(connect.CodeUnimplemented, "not yet")
}
