package server

import (
	"context"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// QueryEntityChanges implements cedarpost.v1.EntityService.
func (s *entityService) QueryEntityChanges(context.Context, *cedarpostv1.QueryEntityChangesRequest) (*cedarpostv1.QueryEntityChangesResponse, error) {
	return nil, connect.NewError(connect.CodeUnimplemented, "not yet")
}
