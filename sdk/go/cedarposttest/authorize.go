package cedarposttest

import (
	"context"
	"errors"
	"strconv"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/wire"
)

// The methods here answer as package server does, with the same checks in the same order
// and the same errors, but without a database. conformance_test.go compares the two.

const (
	maxReuse = 5 * time.Minute // how long a client may keep an answer, by default of the server
	timeline = 1               // in tokens
)

// handler implements cedarpost.v1.AuthorizationService. It is a type of its own so that
// Service does not export these methods.
type handler struct{ *Service }

func (s *Service) handler() cedarpostv1connect.AuthorizationServiceHandler { return handler{s} }

// overTheWire copies a message as a network would: encoded and decoded again. So a test
// cannot send a message that a server would refuse by its size or its encoding, and
// neither side sees later changes of the other.
func overTheWire(dst, src any) error {
	in, ok := src.(proto.Message)
	out, okOut := dst.(proto.Message)
	if !ok || !okOut {
		return connect.Errorf(connect.CodeInternal, "%T is no message", src)
	}
	b, err := proto.Marshal(in)
	if err != nil {
		return connect.Errorf(connect.CodeInternal, "marshal message: %s", err.Error())
	}
	limit, what, size := 0, "message", "" // 0: none, for an answer
	switch in.(type) {
	case *cedarpostv1.AuthorizeRequest:
		limit, what = wire.MaxAuthorizeBytes, "question"
	case *cedarpostv1.AuthorizeBatchRequest:
		limit, what = wire.MaxBatchBytes, "batch"
	case *cedarpostv1.ReportReuseRequest:
		limit = wire.MaxReportBytes
	case *cedarpostv1.GetRevisionRequest:
		limit = wire.MaxSmallBytes
	case *cedarpostv1.WatchRequest:
		limit, size = wire.MaxSmallBytes, strconv.Itoa(len(b)) // only the size of a stream's message is known
	}
	if limit > 0 && len(b) > limit {
		return connect.NewError(connect.CodeInvalidArgument, wire.TooLarge(what, size, strconv.Itoa(limit)))
	}
	if err := wire.CheckFields(b, out.ProtoReflect().Descriptor()); err != nil {
		return connect.Errorf(connect.CodeInvalidArgument, "unmarshal message: %s", err.Error())
	}
	return proto.Unmarshal(b, out)
}

// guard refuses calls while the service is closed or fails.
func (s *Service) guard(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		if err := s.broken(); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		return next(ctx, spec, stream)
	}
}

var errClosed = connect.NewError(connect.CodeUnavailable, "the server is stopping; watch another one")

// broken returns the error that calls get now, or nil.
func (s *Service) broken() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return errClosed
	}
	return s.failure
}

// Authorize implements cedarpost.v1.AuthorizationService.
func (s handler) Authorize(_ context.Context, req *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if err := s.fresh(req.GetConsistency()); err != nil {
		return nil, err
	}
	res, err := s.decide(req, engine.NewPool())
	if err != nil {
		return nil, publicError(err)
	}
	return res, nil
}

// AuthorizeBatch implements cedarpost.v1.AuthorizationService.
func (s handler) AuthorizeBatch(_ context.Context, req *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
	s.mu.RLock() // held to the end, so that the whole batch is decided at one revision
	defer s.mu.RUnlock()
	if err := s.fresh(req.GetConsistency()); err != nil {
		return nil, err
	}
	pool := engine.NewPool()
	out := &cedarpostv1.AuthorizeBatchResponse{Revision: s.revision(s.number)}
	for _, check := range req.GetChecks() {
		r := &cedarpostv1.AuthorizeBatchResult{}
		if res, err := s.decide(check, pool); err != nil {
			pe := publicError(err)
			r.Result = &cedarpostv1.AuthorizeBatchResult_Error{Error: &cedarpostv1.BatchError{Code: pe.Code().String(), Message: pe.Message()}}
		} else {
			r.Result = &cedarpostv1.AuthorizeBatchResult_Response{Response: res}
		}
		out.Results = append(out.Results, r)
	}
	return out, nil
}

// GetRevision implements cedarpost.v1.AuthorizationService.
func (s handler) GetRevision(context.Context, *cedarpostv1.GetRevisionRequest) (*cedarpostv1.GetRevisionResponse, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return &cedarpostv1.GetRevisionResponse{Revision: s.revision(s.number)}, nil
}

// decide answers one check and adds it to the decisions. The caller holds mu.
func (s *Service) decide(req *cedarpostv1.AuthorizeRequest, pool *engine.Pool) (*cedarpostv1.AuthorizeResponse, error) {
	if err := s.readToken(req); err != nil {
		return nil, err
	}
	evaluation, err := s.set.Prepare(wire.Ask(req, time.Now().UnixMilli()), pool, func(missing []cedar.EntityUID) error {
		for _, uid := range missing {
			pool.Put(uid, s.entities[uid])
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	result, err := evaluation.Decide()
	if err != nil {
		return nil, err
	}
	id, err := uuid.NewV7()
	if err != nil {
		return nil, err
	}
	res := wire.Response(result)
	res.DecisionId = id.String()
	res.Revision = s.revision(s.number)
	if req.GetExplain() {
		x, err := evaluation.Explain(result)
		if err != nil {
			return nil, err
		}
		res.Explanation = wire.Explanation(x)
	} else if req.GetWantCacheHint() && evaluation.Question.Reusable() {
		res.CacheHint = &cedarpostv1.CacheHint{MaxAge: durationpb.New(maxReuse), Tags: anything}
	}
	s.log.add(req, res)
	return res, nil
}

// publicError turns an error into the one that package server sends to a client.
func publicError(err error) *connect.Error {
	var bad *engine.RequestError
	var ce *connect.Error
	switch {
	case errors.As(err, &ce):
		return ce
	case errors.As(err, &bad):
		return connect.NewError(connect.CodeInvalidArgument, bad.Message)
	case errors.Is(err, engine.ErrTooCostly), errors.Is(err, engine.ErrTooLarge):
		return connect.NewError(connect.CodeFailedPrecondition, err.Error()+"; no decision was given")
	case errors.Is(err, engine.ErrTooManyAncestors):
		return connect.Errorf(connect.CodeFailedPrecondition, "an entity has more than %d ancestors; no decision was given", engine.MaxAncestors)
	}
	return connect.NewError(connect.CodeUnavailable, "the service could not read or record; no decision was given").WithCause(err)
}

// fresh refuses a question whose AtLeastAsFresh is not a revision of this service. The
// caller holds mu.
func (s *Service) fresh(c *cedarpostv1.Consistency) error {
	at := c.GetAtLeastAsFresh()
	if at == nil {
		return nil // every answer is of the newest revision
	}
	token, err := wire.ParseToken(at.GetToken())
	switch {
	case err != nil:
		return connect.Errorf(connect.CodeInvalidArgument, "revision: %s", err)
	case token.Database != s.database:
		return connect.NewError(connect.CodeAborted, "revision: the token was given out by another database; read again and use a new one")
	case token.Timeline != timeline:
		return connect.NewError(connect.CodeAborted, "revision: the token was given out before a failover; read again and use a new one")
	case token.Anchor > s.number, token.Anchor > 0 && token.Mark != s.database:
		return connect.NewError(connect.CodeAborted, "revision: the token is of a revision that this database does not have; read again and use a new one")
	}
	return nil
}

// revision makes the message of a revision.
func (s *Service) revision(number int64) *cedarpostv1.Revision {
	t := wire.Token{Database: s.database, Timeline: timeline, Number: number, Anchor: number}
	if number > 0 {
		t.Mark = s.database // all revisions have one mark, since there is only one history
	}
	return t.Revision()
}
