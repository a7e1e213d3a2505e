package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// An atomic import is held in memory to its end. All other writers wait while it is written,
// so its size is bounded.
const (
	maxAtomicEntities = 10_000
	maxAtomicBytes    = 40 << 20
	maxAtomicImports  = 4 // at once, which are held in memory; half of them of one caller
)

// importing is the state of one stream of an import.
type importing struct {
	*entityService
	options *cedarpostv1.ImportOptions
	place   store.Import // how far the import is, if it has an id
	stored  int64        // how many entities of the import are stored, those of other streams included

	held      []*cedarpostv1.EntityOperation // of an atomic import, to its end
	heldBytes int
	lot       map[store.UID]int64 // the entities of one commit, with their numbers in the import

	out *cedarpostv1.ImportEntitiesResponse
}

// ImportEntities implements cedarpost.v1.EntityService.
func (s *entityService) ImportEntities(ctx context.Context, stream cedarpostv1connect.EntityServiceImportEntitiesServerStream) (*cedarpostv1.ImportEntitiesResponse, error) {
	msg, err := stream.Receive()
	if errors.Is(err, io.EOF) {
		return nil, connect.NewError(connect.CodeInvalidArgument, "nothing to import")
	}
	if err != nil {
		return nil, nameEntity(ctx, err, -1)
	}
	i, err := s.beginImport(ctx, msg.GetOptions())
	if err != nil {
		return nil, err
	}
	if msg.GetOptions().GetAtomic() {
		leave, ok := s.atomic.enter(callerFrom(ctx))
		if !ok {
			return nil, connect.Errorf(connect.CodeResourceExhausted, "atomic: %d atomic imports go on already, or %d of this caller; try again later", maxAtomicImports, maxAtomicImports/2)
		}
		defer leave()
	}
	// The first message of an import that goes on may have options only.
	if len(msg.GetEntities()) > 0 || i.stored == 0 {
		if err := i.take(ctx, msg); err != nil {
			return nil, i.explain(err)
		}
	}
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		err = nameEntity(ctx, err, i.stored+int64(len(i.held)))
		if err == nil && msg.GetOptions() != nil {
			err = connect.NewError(connect.CodeInvalidArgument, "options: only the first message of a stream has them")
		}
		if err == nil {
			err = i.take(ctx, msg)
		}
		if err != nil {
			return nil, i.explain(err)
		}
	}
	if err := i.end(ctx); err != nil {
		return nil, i.explain(err)
	}
	return i.out, nil
}

// lastMessage is the last message of an import that was received, whether it is valid or not.
type lastMessage struct {
	connect.ServerStream
	msg *cedarpostv1.ImportEntitiesRequest
}

type lastMessageKey struct{}

func (s *lastMessage) Receive(msg any) error {
	s.msg, _ = msg.(*cedarpostv1.ImportEntitiesRequest)
	return s.ServerStream.Receive(msg)
}

// keepLast keeps the last message of an import, so that an error about an entity in it can name
// the entity. It stands before the validation, which returns only an error.
func keepLast(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		if spec.Procedure != cedarpostv1connect.EntityServiceImportEntitiesProcedure {
			return next(ctx, spec, stream)
		}
		last := &lastMessage{ServerStream: stream}
		return next(context.WithValue(ctx, lastMessageKey{}, last), spec, last)
	}
}

// ofEntity matches a problem that validation found in an entity of a message. The number counts
// from 0.
var ofEntity = regexp.MustCompile(`\bentities\[(\d+)\]\.?([^:]*: )`)

// nameEntity names entities in an error of validation by their numbers in the import, from 1, and
// by their uids. before is how many entities come before the message; -1 means the first message
// of a stream, whose options say it.
func nameEntity(ctx context.Context, err error, before int64) error {
	last, ok := ctx.Value(lastMessageKey{}).(*lastMessage)
	invalid, is := errors.AsType[*connect.Error](err)
	if !ok || !is || invalid.Code() != connect.CodeInvalidArgument || last.msg == nil {
		return err
	}
	if before < 0 {
		before = last.msg.GetOptions().GetSkip()
	}
	text := ofEntity.ReplaceAllStringFunc(invalid.Message(), func(found string) string {
		m := ofEntity.FindStringSubmatch(found)
		n, err := strconv.Atoi(m[1])
		if err != nil || n >= len(last.msg.GetEntities()) {
			return found
		}
		of := fmt.Sprintf("entity %d: ", before+int64(n)+1)
		if uid := last.msg.GetEntities()[n].GetUid(); uid != nil && !strings.HasPrefix(m[2], "uid") {
			of += wire.UID(uid).String() + ": "
		}
		return of + m[2]
	})
	if text == invalid.Message() {
		return err
	}
	return connect.NewError(connect.CodeInvalidArgument, text).WithCause(err)
}

// beginImport reads the options, and finds the place of an import that goes on.
func (s *entityService) beginImport(ctx context.Context, o *cedarpostv1.ImportOptions) (*importing, error) {
	i := &importing{entityService: s, options: o, stored: o.GetSkip(), out: &cedarpostv1.ImportEntitiesResponse{}}
	i.place.ID = o.GetImportId()
	switch {
	case o.GetAtomic() && (i.place.ID != "" || o.GetSkip() > 0 || o.GetMore()):
		return nil, connect.NewError(connect.CodeInvalidArgument, "atomic: an atomic import cannot be continued; leave out import_id, skip and more")
	case !o.GetAtomic() && o.GetIdempotencyKey() != "":
		return nil, connect.NewError(connect.CodeInvalidArgument, "idempotency_key: only atomic imports take one; give others an import_id, with which they can go on")
	case i.place.ID == "" && (o.GetSkip() > 0 || o.GetMore()):
		return nil, connect.NewError(connect.CodeInvalidArgument, "import_id: skip and more need one")
	case o.GetSkip() == 0:
		return i, nil
	}
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	if _, err = s.importFor(ctx, o.GetImportId()); err == nil {
		i.place, err = s.db.ContinueImport(ctx, o.GetImportId(), o.GetSkip())
	}
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, connect.NewError(connect.CodeFailedPrecondition, "skip: no unfinished import of that id, so there is nothing to skip")
	case errors.Is(err, store.ErrImportMoved):
		return nil, connect.Errorf(connect.CodeFailedPrecondition, "skip: %d entities of this import are stored, not %d", i.place.Entities, o.GetSkip())
	case err != nil:
		return nil, err
	}
	at, err := v.PositionOf(ctx, i.place.Revision)
	i.out.Revision = snapshot.EncodeRevision(at, i.place.Revision)
	return i, err
}

// take stores the entities of a message, or holds them to the end.
func (i *importing) take(ctx context.Context, msg *cedarpostv1.ImportEntitiesRequest) error {
	if len(msg.GetEntities()) == 0 {
		return connect.NewError(connect.CodeInvalidArgument, "entities: a message has 1 to 1000")
	}
	ops := make([]*cedarpostv1.EntityOperation, len(msg.GetEntities()))
	before := i.stored + int64(len(i.held))
	if len(i.held) == 0 {
		i.lot = map[store.UID]int64{}
	}
	for n, e := range msg.GetEntities() {
		number, uid := before+int64(n)+1, stored.FromProto(e.GetUid())
		if first, twice := i.lot[uid]; twice {
			return connect.Errorf(connect.CodeInvalidArgument, "entity %d: %s is in the import twice, it is also entity %d; an import puts each entity once", number, wire.UID(e.GetUid()), first)
		}
		i.lot[uid] = number
		ops[n] = &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: e}}
	}
	if !i.options.GetAtomic() {
		return i.store(ctx, ops, nil)
	}
	i.held = append(i.held, ops...)
	i.heldBytes += proto.Size(msg)
	if len(i.held) > maxAtomicEntities || i.heldBytes > maxAtomicBytes {
		return connect.Errorf(connect.CodeInvalidArgument, "atomic: at most %d entities or %d MiB at once, because all other writes wait meanwhile", maxAtomicEntities, maxAtomicBytes>>20)
	}
	return nil
}

// store commits entities together with the place of the import.
func (i *importing) store(ctx context.Context, ops []*cedarpostv1.EntityOperation, o *once) error {
	e := edit{ops: ops, first: i.stored + 1, once: o}
	total := i.stored + int64(len(ops))
	if i.place.ID != "" {
		e.step = &store.ImportStep{From: i.place, Entities: total, OfAnyone: access.RightsFrom(ctx).MayEverywhere("ImportEntities")}
	}
	sum := func(res store.WriteResult, at *cedarpostv1.Revision) *cedarpostv1.ImportEntitiesResponse {
		return &cedarpostv1.ImportEntitiesResponse{Entities: i.out.GetEntities() + int64(len(ops)), Changed: i.out.GetChanged() + int64(res.Changed), Revision: at}
	}
	e.answer = func(res store.WriteResult, at *cedarpostv1.Revision) proto.Message { return sum(res, at) }
	res, at, err := i.write(ctx, e)
	if err != nil {
		return err
	}
	i.place, i.stored, i.out = res.Import, total, sum(res, at)
	return nil
}

// end ends the import, after the last message.
func (i *importing) end(ctx context.Context) error {
	if i.options.GetAtomic() {
		request := &cedarpostv1.WriteEntitiesRequest{Operations: i.held}
		out, err := writeOnce(ctx, i.db, cedarpostv1connect.EntityServiceImportEntitiesProcedure, i.options.GetIdempotencyKey(), request, &cedarpostv1.ImportEntitiesResponse{},
			func(o *once) (*cedarpostv1.ImportEntitiesResponse, error) { return i.out, i.store(ctx, i.held, o) })
		i.out = out
		return err
	}
	if i.place.ID == "" || i.options.GetMore() {
		return nil
	}
	if err := i.db.FinishImport(ctx, i.place); err != nil {
		return connect.NewError(connect.CodeUnavailable, "the service could not note the end of the import").WithCause(err)
	}
	return nil
}

// explain adds to an error how many entities are stored nevertheless.
func (i *importing) explain(err error) error {
	pe := publicError(cedarpostv1connect.EntityServiceImportEntitiesProcedure, err)
	if i.options.GetAtomic() || i.stored == 0 {
		return pe
	}
	return connect.Errorf(pe.Code(), "%s; the %d entities before this chunk are stored", pe.Message(), i.stored).WithCause(pe.Unwrap())
}

// importFor reads an import. A caller sees those that it sent itself, or all if it may import entities
// of all types. The error is [store.ErrNotFound] if there is none that the caller sees.
func (s *entityService) importFor(ctx context.Context, id string) (store.Import, error) {
	i, err := s.db.GetImport(ctx, id)
	if err == nil && i.Caller != callerFrom(ctx) && !access.RightsFrom(ctx).MayEverywhere("ImportEntities") {
		return store.Import{}, store.ErrNotFound
	}
	return i, err
}

// GetImport implements cedarpost.v1.EntityService.
func (s *entityService) GetImport(ctx context.Context, req *cedarpostv1.GetImportRequest) (*cedarpostv1.GetImportResponse, error) {
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	i, err := s.importFor(ctx, req.GetImportId())
	if errors.Is(err, store.ErrNotFound) {
		return nil, connect.NewError(connect.CodeNotFound, "no unfinished import of that id")
	}
	if err != nil {
		return nil, err
	}
	at, err := v.PositionOf(ctx, i.Revision)
	if err != nil {
		return nil, err
	}
	return &cedarpostv1.GetImportResponse{
		Entities: i.Entities, Revision: snapshot.EncodeRevision(at, i.Revision), Caller: i.Caller, UpdatedAt: timestamppb.New(i.UpdatedAt),
	}, nil
}
