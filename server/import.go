package server

import (
	"context"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// GetImport implements cedarpost.v1.EntityService.
func (s *entityService) GetImport(context.Context, *cedarpostv1.GetImportRequest) (*cedarpostv1.GetImportResponse, error) {
	return nil, connect.NewError(connect.CodeUnimplemented, "not yet")
}
