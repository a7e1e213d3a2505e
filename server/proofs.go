package server

import (
	"context"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// GetCheckpoint implements cedarpost.v1.AuditService.
func (s *auditService) GetCheckpoint(context.Context, *cedarpostv1.GetCheckpointRequest) (*cedarpostv1.GetCheckpointResponse, error) {
	return nil, connect.NewError(connect.CodeUnimplemented, "not yet")
}

// GetInclusionProof implements cedarpost.v1.AuditService.
func (s *auditService) GetInclusionProof(context.Context, *cedarpostv1.GetInclusionProofRequest) (*cedarpostv1.GetInclusionProofResponse, error) {
	return nil, connect.NewError(connect.CodeUnimplemented, "not yet")
}

// GetConsistencyProof implements cedarpost.v1.AuditService.
func (s *auditService) GetConsistencyProof(context.Context, *cedarpostv1.GetConsistencyProofRequest) (*cedarpostv1.GetConsistencyProofResponse, error) {
	return nil, connect.NewError(connect.CodeUnimplemented, "not yet")
}
