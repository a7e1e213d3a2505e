package server

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

const (
	// publishRetries is how often a write is checked, at most, if policies change each time
	// between its check and its commit.
	publishRetries = 5
	// outcomeUnknown is the error of a write whose commit may have happened.
	outcomeUnknown = "the service could not write, or could not learn whether it did; read before you try again, or send it again with the same idempotency_key"
)

// entityService writes and reads entities. A write is checked against the schema first, and
// committed only if that schema is still the current one.
type entityService struct {
	db       *store.DB
	follower *snapshot.Follower
	past     *snapshot.Past
	atomic   *sharedPlaces[string] // for atomic imports, by caller
	recorder *decisionlog.Recorder
}

// recordRead records a read of grants, before they are given out. Reads of other entities are not
// recorded.
func (s *entityService) recordRead(ctx context.Context, procedure, typ string, req proto.Message, rows int) error {
	if typ != store.GrantType {
		return nil
	}
	return s.recorder.RecordLogRead(ctx, procedure, req, rows)
}

// WriteEntities implements cedarpost.v1.EntityService.
func (s *entityService) WriteEntities(ctx context.Context, req *cedarpostv1.WriteEntitiesRequest) (*cedarpostv1.WriteEntitiesResponse, error) {
	answer := func(res store.WriteResult, at *cedarpostv1.Revision) *cedarpostv1.WriteEntitiesResponse {
		return &cedarpostv1.WriteEntitiesResponse{Revision: at, Changed: int32(res.Changed)}
	}
	return writeOnce(ctx, s.db, cedarpostv1connect.EntityServiceWriteEntitiesProcedure, req.GetIdempotencyKey(), req, answer(store.WriteResult{}, nil),
		func(o *once) (*cedarpostv1.WriteEntitiesResponse, error) {
			res, at, err := s.write(ctx, edit{ops: req.GetOperations(), once: o, answer: func(res store.WriteResult, at *cedarpostv1.Revision) proto.Message { return answer(res, at) }})
			return answer(res, at), err
		})
}

// written returns the revision of a write that was checked at a view.
func written(v snapshot.View, number int64, mark uuid.UUID) *cedarpostv1.Revision {
	p := v.Position
	p.Number, p.Mark = number, mark
	return snapshot.EncodeRevision(p, number)
}

// edit is a list of operations to commit together.
type edit struct {
	ops   []*cedarpostv1.EntityOperation
	first int64             // the number of the first operation in its import; 0: this is no import
	step  *store.ImportStep // nil unless this is an import that has an id

	once   *once
	answer func(store.WriteResult, *cedarpostv1.Revision) proto.Message // makes the answer that is stored for once
}

// at adds to a message which operation it is about, as the caller counts.
func (e edit) at(i int, message string) string {
	if e.first > 0 {
		return fmt.Sprintf("entity %d: %s", e.first+int64(i), strings.TrimPrefix(message, "entity "))
	}
	return fmt.Sprintf("operation %d: %s", i+1, message)
}

// write checks and commits an edit. It returns after this server has applied it, so that the
// caller reads its own write from this server, and returns the revision of the write.
func (s *entityService) write(ctx context.Context, e edit) (store.WriteResult, *cedarpostv1.Revision, error) {
	var last error
	for range publishRetries {
		v, err := s.follower.Current()
		if err != nil {
			return store.WriteResult{}, nil, err
		}
		w := store.EntityWrite{Caller: callerFrom(ctx), PolicyRevision: v.PolicyRevision, At: v.Position, Ops: make([]store.Op, len(e.ops)), Import: e.step}
		w.Once = keep(e.once, func(res store.WriteResult) proto.Message { return e.answer(res, written(v, res.Revision, res.Mark)) })
		for i, op := range e.ops {
			if w.Ops[i], err = s.readOperation(ctx, v, op); err != nil {
				pe := publicError(cedarpostv1connect.EntityServiceWriteEntitiesProcedure, err)
				return store.WriteResult{}, nil, connect.NewError(pe.Code(), e.at(i, pe.Message())).WithCause(pe.Unwrap())
			}
		}
		w.MayDrop = func(types []string) error { return mayDrop(ctx, v.Set, types) }
		res, err := s.db.WriteEntities(ctx, w)
		if outdated(err) {
			last = err
			if _, err := s.follower.FullyConsistent(ctx); err != nil {
				return store.WriteResult{}, nil, err
			}
			continue
		}
		if err != nil {
			return store.WriteResult{}, nil, writeError(e, err)
		}
		// It is committed. If this server is late to apply it, the write succeeded
		// nevertheless, and the caller has its revision.
		_, _ = s.follower.AtLeast(ctx, res.Revision)
		return res, written(v, res.Revision, res.Mark), nil
	}
	return store.WriteResult{}, nil, last
}

// mayDrop refuses a cascade that changes entities of types that the caller may not write. The error
// does not name them.
func mayDrop(ctx context.Context, set *engine.Set, types []string) error {
	r := access.RightsFrom(ctx)
	for _, typ := range types {
		if !r.May("WriteEntities", access.Target{Bundle: owner(set, cedar.EntityType(typ)), EntityType: typ}) {
			return &refusedError{procedure: cedarpostv1connect.EntityServiceWriteEntitiesProcedure, about: "all members of an entity that is deleted with cascade"}
		}
	}
	return nil
}

// readOperation checks one operation against the schema.
func (s *entityService) readOperation(ctx context.Context, v snapshot.View, op *cedarpostv1.EntityOperation) (store.Op, error) {
	var out store.Op
	set := v.Set
	switch o := op.GetOperation().(type) {
	case *cedarpostv1.EntityOperation_Put:
		e, err := set.ReadEntity(wire.Entity(o.Put))
		if err != nil {
			return out, err
		}
		out.Kind = store.Put
		if out.Entity, err = stored.Entity(e); err != nil {
			return out, err
		}
	case *cedarpostv1.EntityOperation_Delete:
		if err := set.CheckStorable(wire.UID(o.Delete.GetUid())); err != nil {
			return out, err
		}
		out.Kind, out.Cascade = store.Delete, o.Delete.GetCascade()
		out.Entity.UID = stored.FromProto(o.Delete.GetUid())
	case *cedarpostv1.EntityOperation_AddParents:
		parents := wire.UIDs(o.AddParents.GetParents())
		if err := set.CheckParents(wire.UID(o.AddParents.GetUid()), parents); err != nil {
			return out, err
		}
		out.Kind = store.AddParents
		out.Entity = store.Entity{UID: stored.FromProto(o.AddParents.GetUid()), Parents: stored.UIDs(parents)}
	case *cedarpostv1.EntityOperation_RemoveParents:
		if err := set.CheckStorable(wire.UID(o.RemoveParents.GetUid())); err != nil {
			return out, err
		}
		out.Kind = store.RemoveParents
		out.Entity = store.Entity{UID: stored.FromProto(o.RemoveParents.GetUid()), Parents: stored.UIDs(wire.UIDs(o.RemoveParents.GetParents()))}
	case *cedarpostv1.EntityOperation_SetAttributes:
		uid := wire.UID(o.SetAttributes.GetUid())
		rec, err := set.ReadAttributes(uid, o.SetAttributes.GetAttrs().AsMap(), o.SetAttributes.GetRemove())
		if err != nil {
			return out, err
		}
		out.Kind, out.Remove = store.SetAttributes, o.SetAttributes.GetRemove()
		out.Entity.UID = stored.UID(uid)
		if out.Entity.Attrs, err = stored.RecordJSON(rec); err != nil {
			return out, err
		}
	}
	return out, s.readPrecondition(ctx, v, op.GetPrecondition(), &out.Precondition)
}

// readPrecondition reads the precondition of an operation into out.
func (s *entityService) readPrecondition(ctx context.Context, v snapshot.View, p *cedarpostv1.Precondition, out *store.Precondition) (err error) {
	switch c := p.GetCondition().(type) {
	case *cedarpostv1.Precondition_IfRevision:
		var number int64
		number, err = v.DecodeRevision(ctx, c.IfRevision)
		out.IfRevision = &number
	case *cedarpostv1.Precondition_MustExist:
		out.MustExist = true
	case *cedarpostv1.Precondition_MustNotExist:
		out.MustNotExist = true
	}
	return err
}

// writeError returns the error for the caller of a write that failed in the store.
func writeError(e edit, err error) error {
	if errors.Is(err, store.ErrImportTaken) {
		return connect.NewError(connect.CodeAlreadyExists, "import_id: "+store.ErrImportTaken.Error()+"; choose another one")
	}
	if errors.Is(err, store.ErrImportMoved) {
		return connect.NewError(connect.CodeAborted, store.ErrImportMoved.Error())
	}
	if refused, ok := errors.AsType[*refusedError](err); ok {
		return refused
	}
	var oe *store.OpError
	if !errors.As(err, &oe) {
		return connect.NewError(connect.CodeUnavailable, outcomeUnknown).WithCause(err)
	}
	code := connect.CodeFailedPrecondition
	msg := oe.Err.Error()
	var members store.HasMembersError
	switch {
	case errors.As(oe.Err, &members):
		msg = fmt.Sprintf("%d entities name it as parent; drop those memberships first, or set cascade", members.Count)
	case errors.As(oe.Err, new(store.EntityTooLargeError)):
		code, msg = connect.CodeInvalidArgument, "it "+oe.Err.Error()
	case errors.Is(oe.Err, store.ErrStale):
		code, msg = connect.CodeAborted, "it changed after that revision; read it again and decide anew"
	case errors.Is(oe.Err, store.ErrMustExist):
		msg = "it must exist and does not"
	case errors.Is(oe.Err, store.ErrMustNotExist):
		msg = "it must not exist and does"
	case errors.Is(oe.Err, store.ErrNotFound):
		msg = "it is not stored; put it first"
	case errors.Is(oe.Err, store.ErrCycle):
		code, msg = connect.CodeInvalidArgument, "these parents would make it its own ancestor"
	case errors.Is(oe.Err, store.ErrTooManyMembers):
		msg = "too many memberships for one cascade; drop them in several writes"
	}
	return connect.NewError(code, e.at(oe.Index, fmt.Sprintf("entity %s: %s", wire.UID(stored.ToProto(oe.UID)), msg)))
}
