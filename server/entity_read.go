package server

import (
	"context"
	"errors"
	"strconv"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// GetEntity implements cedarpost.v1.EntityService.
func (s *entityService) GetEntity(ctx context.Context, req *cedarpostv1.GetEntityRequest) (*cedarpostv1.GetEntityResponse, error) {
	v, at, err := s.readAt(ctx, req.GetAt())
	if err != nil {
		return nil, err
	}
	row, err := s.db.GetEntity(ctx, at, stored.FromProto(req.GetUid()))
	if errors.Is(err, store.ErrNotFound) {
		return nil, connect.Errorf(connect.CodeNotFound, "entity %s is not stored", wire.UID(req.GetUid()))
	}
	if err != nil {
		return nil, err
	}
	e, err := storedToProto(v, row)
	if err != nil {
		return nil, err
	}
	if err := s.recordRead(ctx, cedarpostv1connect.EntityServiceGetEntityProcedure, req.GetUid().GetType(), req, 1); err != nil {
		return nil, err
	}
	return &cedarpostv1.GetEntityResponse{Entity: e, Revision: snapshot.EncodeRevision(v.Position, at)}, nil
}

// readAt returns the number of the revision to read at, and a view that has applied it: the
// revision given, or the newest one.
func (s *entityService) readAt(ctx context.Context, at *cedarpostv1.Revision) (snapshot.View, int64, error) {
	if at == nil {
		v, err := s.follower.Current()
		if err != nil {
			return v, 0, err
		}
		return v, v.Position.Number, nil
	}
	if number, err := strconv.ParseInt(at.GetToken(), 10, 64); err == nil && number > 0 {
		return s.readAtNumber(ctx, number)
	}
	v, number, err := s.follower.AtRevision(ctx, at)
	if errors.Is(err, snapshot.ErrForgotten) {
		// It cannot be read, whether it is of this history or of another one.
		err = &store.SweptError{Oldest: s.follower.OldestRevision()}
	}
	return v, number, err
}

// readAtNumber is readAt for the number of a revision in place of its token: people see numbers in the log. A
// number says nothing of a history, so it means that of this database.
func (s *entityService) readAtNumber(ctx context.Context, number int64) (snapshot.View, int64, error) {
	v, err := s.follower.Current()
	if err == nil && number > v.Position.Number {
		v, err = s.follower.FullyConsistent(ctx)
	}
	if err == nil && number > v.Position.Number {
		err = connect.Errorf(connect.CodeInvalidArgument, "revision: there is no revision %d yet; the newest one is %d", number, v.Position.Number)
	}
	return v, number, err
}

// storedToProto returns an entity that was read at a view in its form on the wire.
func storedToProto(v snapshot.View, row store.Entity) (*cedarpostv1.StoredEntity, error) {
	e, err := stored.EntityToProto(row)
	if err != nil {
		return nil, err
	}
	return &cedarpostv1.StoredEntity{Entity: e, ChangedAt: snapshot.EncodeRevision(v.Position, row.Since)}, nil
}
