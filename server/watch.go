package server

import (
	"context"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

// Watch implements cedarpost.v1.AuthorizationService.
func (s *authorizationService) Watch(context.Context, *cedarpostv1.WatchRequest, cedarpostv1connect.AuthorizationServiceWatchServerStream) error {
	return connect.NewError(connect.CodeUnimplemented, "not yet")
}

// ReportReuse implements cedarpost.v1.AuthorizationService.
func (s *authorizationService) ReportReuse(context.Context, *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
	return nil, connect.NewError(connect.CodeUnimplemented, "not yet")
}
