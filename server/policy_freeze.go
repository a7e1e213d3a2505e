package server

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/store"
)

func freezeToProto(f store.BundleFreeze) *cedarpostv1.BundleFreeze {
	return &cedarpostv1.BundleFreeze{Caller: f.Caller, Reason: f.Reason, At: timestamppb.New(f.At)}
}

// changeState commits a write of freezes and changes. fn decides on what is stored when it is committed.
// answer makes the answer of the call, which is also stored for o if that is not nil.
func changeState[A proto.Message](ctx context.Context, s *policyService, o *once, name, change string, answer func(store.Changes, *cedarpostv1.Revision) A, fn func(store.PolicyState) (store.PolicyWrite, error)) (out A, err error) {
	v, err := s.follower.Current()
	if err != nil {
		return out, err
	}
	decided := false // fn returned a write
	made, err := s.db.ChangePolicies(ctx, callerFrom(ctx), name, change, func(now store.PolicyState) (store.PolicyWrite, error) {
		w, err := fn(now)
		decided = err == nil
		w.Once = keep(o, func(made store.Changes) proto.Message { return answer(made, written(v, made.Revision, made.Mark)) })
		return w, err
	})
	if err != nil {
		if decided {
			err = connect.NewError(connect.CodeUnavailable, outcomeUnknown).WithCause(err)
		}
		return out, err
	}
	return answer(made, written(v, made.Revision, made.Mark)), nil
}

// FreezeBundle implements cedarpost.v1.PolicyService.
func (s *policyService) FreezeBundle(ctx context.Context, req *cedarpostv1.FreezeBundleRequest) (*cedarpostv1.FreezeBundleResponse, error) {
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	if _, ok := v.Bundle(req.GetBundle()); !ok {
		return nil, noBundle(req.GetBundle())
	}
	freeze := newFreeze(ctx, req.GetReason())
	answer := func(made store.Changes, at *cedarpostv1.Revision) *cedarpostv1.FreezeBundleResponse {
		return &cedarpostv1.FreezeBundleResponse{Freeze: freezeToProto(freeze), Revision: at, Changed: made.Changed}
	}
	return writeOnce(ctx, s.db, cedarpostv1connect.PolicyServiceFreezeBundleProcedure, req.GetIdempotencyKey(), req, &cedarpostv1.FreezeBundleResponse{},
		func(o *once) (*cedarpostv1.FreezeBundleResponse, error) {
			return changeState(ctx, s, o, req.GetBundle(), "", answer, func(now store.PolicyState) (store.PolicyWrite, error) {
				if now.Freeze != nil {
					freeze = *now.Freeze
					return store.PolicyWrite{}, nil
				}
				return store.PolicyWrite{Freeze: &freeze, Reason: freeze.Reason}, nil
			})
		})
}

// newFreeze is a freeze by the caller of a call. Its time is as precise as it is stored.
func newFreeze(ctx context.Context, reason string) store.BundleFreeze {
	return store.BundleFreeze{Caller: callerFrom(ctx), Reason: reason, At: time.Now().UTC().Truncate(time.Microsecond)}
}

// UnfreezeBundle implements cedarpost.v1.PolicyService.
func (s *policyService) UnfreezeBundle(ctx context.Context, req *cedarpostv1.UnfreezeBundleRequest) (*cedarpostv1.UnfreezeBundleResponse, error) {
	answer := func(made store.Changes, at *cedarpostv1.Revision) *cedarpostv1.UnfreezeBundleResponse {
		return &cedarpostv1.UnfreezeBundleResponse{Revision: at, Changed: made.Changed}
	}
	return writeOnce(ctx, s.db, cedarpostv1connect.PolicyServiceUnfreezeBundleProcedure, req.GetIdempotencyKey(), req, &cedarpostv1.UnfreezeBundleResponse{},
		func(o *once) (*cedarpostv1.UnfreezeBundleResponse, error) {
			return changeState(ctx, s, o, req.GetBundle(), "", answer, func(now store.PolicyState) (store.PolicyWrite, error) {
				return store.PolicyWrite{Unfreeze: now.Freeze != nil, Reason: req.GetReason()}, nil
			})
		})
}

// RollbackVersion implements cedarpost.v1.PolicyService.
func (s *policyService) RollbackVersion(ctx context.Context, req *cedarpostv1.RollbackVersionRequest) (*cedarpostv1.RollbackVersionResponse, error) {
	old, err := s.version(ctx, req.GetBundle(), req.GetVersion())
	if err != nil {
		return nil, err
	}
	b, leave, err := s.storedBundle(ctx, s.publishes, old.Bundle)
	if err != nil {
		return nil, err
	}
	defer leave()
	respond := func(out *cedarpostv1.ApplyBundleResponse) *cedarpostv1.RollbackVersionResponse {
		return &cedarpostv1.RollbackVersionResponse{Bundle: out.GetBundle(), Revision: out.GetRevision(), Warnings: out.GetWarnings()}
	}
	freeze := newFreeze(ctx, req.GetReason())
	p := &publication{
		bundle: b, procedure: cedarpostv1connect.PolicyServiceRollbackVersionProcedure, need: need{"RollbackVersion", access.Target{Bundle: b.Name, Changes: true}},
		message: req.GetReason(), rollbackOf: req.GetVersion(),
		respond: func(out *cedarpostv1.ApplyBundleResponse) proto.Message { return respond(out) },
		rules: func(live store.Bundle, _ store.PolicyState) (w store.PolicyWrite, err error) {
			if live.Digest == old.Digest {
				return w, connect.Errorf(connect.CodeFailedPrecondition, "the live version %d of the bundle %s has the same files as version %d; FreezeBundle (cedarpost freeze) keeps it as it is", live.Version, b.Name, old.Version)
			}
			return store.PolicyWrite{Freeze: &freeze, Reason: freeze.Reason}, nil
		},
	}
	return writeOnce(ctx, s.db, p.procedure, req.GetIdempotencyKey(), req, &cedarpostv1.RollbackVersionResponse{},
		func(o *once) (*cedarpostv1.RollbackVersionResponse, error) {
			out, err := s.publish(ctx, p, o)
			return respond(out), err
		})
}

// storedBundle reads a version of a bundle with its files, which takes the place of an upload. leave
// gives the place back.
func (s *policyService) storedBundle(ctx context.Context, places *bundlePlaces, old store.Bundle) (b *bundle.Bundle, leave func(), err error) {
	files, leave, err := s.storedFiles(ctx, places, old.Name, old.Since)
	if err != nil {
		return nil, nil, err
	}
	if b, err = readFiles(old.Name, files); err != nil {
		leave()
		return nil, nil, err
	}
	return b, leave, nil
}

// storedFiles reads the files of a bundle as they were at a revision.
func (s *policyService) storedFiles(ctx context.Context, places *bundlePlaces, name string, at int64) (files []bundle.File, leave func(), err error) {
	away, err := places.upload(ctx, callerFrom(ctx))
	if err != nil {
		return nil, nil, err
	}
	size := int64(0)
	leave = func() {
		places.bytes.Add(-size)
		away()
	}
	defer func() {
		if err != nil {
			leave()
		}
	}()
	sizes, err := s.db.BundleFiles(ctx, at, name)
	if err != nil {
		return nil, nil, err
	}
	for _, f := range sizes {
		size += int64(f.Bytes)
	}
	if places.bytes.Add(size) > maxUploaded {
		return nil, nil, connect.NewError(connect.CodeResourceExhausted, "other large bundles are being uploaded; try again in a moment")
	}
	list, err := s.db.ReadBundleFiles(ctx, at, name)
	for _, f := range list {
		files = append(files, bundle.File{Path: f.Path, Content: f.Content})
	}
	return files, leave, err
}

// readFiles makes a bundle of files. The error of files that are not a bundle has findings.
func readFiles(name string, files []bundle.File) (*bundle.Bundle, error) {
	b, err := bundle.FromFiles(name, files)
	var problems bundle.Problems
	switch {
	case errors.As(err, &problems):
		return nil, refusal(connect.CodeInvalidArgument, "the bundle cannot be read", problemsToProto(problems))
	case err != nil:
		return nil, err
	case b.Name != name:
		return nil, connect.Errorf(connect.CodeInvalidArgument, "bundle.yaml names the bundle %q, and it is the bundle %q", b.Name, name)
	}
	return b, nil
}
