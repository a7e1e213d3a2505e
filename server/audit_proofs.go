package server

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

// maxTruncations is how many statements about truncations are returned with a checkpoint:
// the newest ones. Each has at most [auditlog.MaxStatement] bytes, so the answer stays small.
const maxTruncations = 100

// GetCheckpoint implements cedarpost.v1.AuditService.
func (s *auditService) GetCheckpoint(ctx context.Context, req *cedarpostv1.GetCheckpointRequest) (*cedarpostv1.GetCheckpointResponse, error) {
	c, err := s.checkpoint(ctx, req.GetSize())
	if err != nil {
		return nil, err
	}
	statements, err := s.signer.RecordedTruncations(ctx)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(statements, func(a, b auditlog.Statement) int { return cmp.Compare(a.Number, b.Number) })
	out := &cedarpostv1.GetCheckpointResponse{Checkpoint: string(c.Note), VerifierKeys: s.signer.VerifierKeys()}
	for _, t := range statements[max(len(statements)-maxTruncations, 0):] {
		out.Truncations = append(out.Truncations, string(t.Note))
	}
	return out, nil
}

// checkpoint reads the checkpoint of a tree of this size, or the newest one for 0.
func (s *auditService) checkpoint(ctx context.Context, size int64) (store.Checkpoint, error) {
	var c store.Checkpoint
	var err error
	if size > 0 {
		c, err = s.db.CheckpointOf(ctx, s.signer.Origin, size)
	} else {
		c, err = s.signer.NewestCheckpoint(ctx)
	}
	switch {
	case errors.Is(err, store.ErrNotFound) && size > 0:
		return c, connect.Errorf(connect.CodeNotFound, "there is no checkpoint of size %d", size)
	case errors.Is(err, store.ErrNotFound):
		return c, connect.NewError(connect.CodeNotFound, "there is no checkpoint: the log is not signed, or not yet")
	case err != nil:
		return c, err
	}
	return c, nil
}

// GetInclusionProof implements cedarpost.v1.AuditService.
func (s *auditService) GetInclusionProof(ctx context.Context, req *cedarpostv1.GetInclusionProofRequest) (*cedarpostv1.GetInclusionProofResponse, error) {
	id, err := uuid.Parse(req.GetId())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, "id: not a UUID")
	}
	c, err := s.checkpoint(ctx, req.GetSize())
	if err != nil {
		return nil, err
	}
	in, err := s.prove(ctx, id, c.Size)
	if err != nil {
		return nil, err
	}
	// The proof contains the record, so this is a read of the log.
	if err := s.recorder.RecordLogRead(ctx, cedarpostv1connect.AuditServiceGetInclusionProofProcedure, req, 1); err != nil {
		return nil, err
	}
	return &cedarpostv1.GetInclusionProofResponse{
		Record: in.Record, Row: int64(in.Row), RowProof: hashBytes(in.RowProof),
		Header: in.Header, Leaf: in.Leaf, Proof: hashBytes(in.Proof), Checkpoint: string(c.Note),
	}, nil
}

// prove finds a record and proves that the tree of this size includes it.
func (s *auditService) prove(ctx context.Context, id uuid.UUID, size int64) (in auditlog.Inclusion, err error) {
	var batchID uuid.UUID
	d, err := s.db.GetDecision(ctx, id)
	batchID, in.Row, in.Record = d.Batch, d.Pos, d.Record
	if errors.Is(err, store.ErrNotFound) {
		var e store.Event
		e, err = s.db.GetEvent(ctx, id)
		batchID, in.Row, in.Record = e.Batch, e.Pos, e.Record
	}
	if errors.Is(err, store.ErrNotFound) {
		err = s.notFound(ctx, id, "no record %s is in the log")
	}
	if err != nil {
		return in, err
	}
	batch, err := s.db.BatchByID(ctx, batchID)
	if err != nil {
		return in, err
	}
	if batch.Leaf >= size {
		return in, connect.Errorf(connect.CodeFailedPrecondition, "no checkpoint covers the record yet; one is made each second")
	}
	in.Header, in.Leaf = batch.Header, batch.Leaf
	rows, err := s.db.RowsOf(ctx, []store.Batch{batch}, batch.Rows+1)
	if err != nil {
		return in, err
	}
	leaves, faults := decisionlog.RowHashes(batch, rows)
	if len(faults) > 0 {
		return in, connect.NewError(connect.CodeDataLoss, "the batch of the record is not whole: verify the log").WithCause(&decisionlog.BadLogError{Faults: faults})
	}
	if in.RowProof, err = auditlog.ProveRow(leaves, in.Row); err != nil {
		return in, err
	}
	in.Proof, err = tlog.ProveRecord(size, batch.Leaf, s.db.Tiles(ctx))
	return in, err
}

// GetConsistencyProof implements cedarpost.v1.AuditService.
func (s *auditService) GetConsistencyProof(ctx context.Context, req *cedarpostv1.GetConsistencyProofRequest) (*cedarpostv1.GetConsistencyProofResponse, error) {
	c, err := s.checkpoint(ctx, req.GetSecond())
	if err != nil {
		return nil, err
	}
	if req.GetFirst() > c.Size {
		return nil, connect.Errorf(connect.CodeInvalidArgument, "first: the log has %d batches", c.Size)
	}
	proof, err := tlog.ProveTree(c.Size, req.GetFirst(), s.db.Tiles(ctx))
	if err != nil {
		return nil, err
	}
	return &cedarpostv1.GetConsistencyProofResponse{Proof: hashBytes(proof), Checkpoint: string(c.Note)}, nil
}

func hashBytes(hashes []tlog.Hash) [][]byte {
	out := make([][]byte, len(hashes))
	for i := range hashes {
		out[i] = hashes[i][:]
	}
	return out
}
