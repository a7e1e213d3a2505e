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

// changeState commits a write of freezes and changes, for a call with a request. fn decides on what is
// stored when it is committed; the caller needs its rights until then. answer makes the answer of the
// call, which is also stored for o if that is not nil.
func changeState[A proto.Message](ctx context.Context, s *policyService, procedure string, req proto.Message, o *once, name, change string, answer func(store.Changes, *cedarpostv1.Revision) A, fn func(store.PolicyState) (store.PolicyWrite, error)) (out A, err error) {
	v, err := s.follower.Current()
	if err != nil {
		return out, err
	}
	decided := false // fn returned a write
	made, err := s.db.ChangePolicies(ctx, callerFrom(ctx), name, change, func(now store.PolicyState) (store.PolicyWrite, error) {
		// The wait for the lock may have taken long.
		if err := s.stillMay(ctx, procedure, rules[procedure].needs(v.Set, req)...); err != nil {
			return store.PolicyWrite{}, err
		}
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
	if live, err := s.live(ctx, req.GetBundle()); err != nil {
		return nil, err
	} else if live.Version == 0 {
		return nil, noBundle(req.GetBundle())
	}
	freeze := newFreeze(ctx, req.GetReason())
	answer := func(made store.Changes, at *cedarpostv1.Revision) *cedarpostv1.FreezeBundleResponse {
		return &cedarpostv1.FreezeBundleResponse{Freeze: freezeToProto(freeze), Revision: at, Changed: made.Changed}
	}
	const procedure = cedarpostv1connect.PolicyServiceFreezeBundleProcedure
	return writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, &cedarpostv1.FreezeBundleResponse{},
		func(o *once) (*cedarpostv1.FreezeBundleResponse, error) {
			return changeState(ctx, s, procedure, req, o, req.GetBundle(), "", answer, func(now store.PolicyState) (store.PolicyWrite, error) {
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
	const procedure = cedarpostv1connect.PolicyServiceUnfreezeBundleProcedure
	return writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, &cedarpostv1.UnfreezeBundleResponse{},
		func(o *once) (*cedarpostv1.UnfreezeBundleResponse, error) {
			return changeState(ctx, s, procedure, req, o, req.GetBundle(), "", answer, func(now store.PolicyState) (store.PolicyWrite, error) {
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
	held, err := hold(ctx, s.publishes)
	if err != nil {
		return nil, err
	}
	defer held.leave()
	files, err := s.storedFiles(ctx, held, old.Name, old.Since)
	if err != nil {
		return nil, err
	}
	b, err := readFiles(old.Name, files)
	if err != nil {
		return nil, err
	}
	respond := func(out *cedarpostv1.ApplyBundleResponse) *cedarpostv1.RollbackVersionResponse {
		return &cedarpostv1.RollbackVersionResponse{Bundle: out.GetBundle(), Revision: out.GetRevision(), Warnings: out.GetWarnings()}
	}
	freeze := newFreeze(ctx, req.GetReason())
	p := &publication{
		bundle: b, procedure: cedarpostv1connect.PolicyServiceRollbackVersionProcedure, need: need{"RollbackVersion", access.Target{Bundle: b.Name, Changes: true}},
		message: req.GetReason(), rollbackOf: req.GetVersion(), allowBreaking: req.GetAllowBreaking(),
		// The rule of the live version stays: it must not be shed by a rollback to a time before it.
		approvals: func(live store.Bundle) int { return max(approvalsNeeded(live), b.Approvals) },
		respond:   func(out *cedarpostv1.ApplyBundleResponse) proto.Message { return respond(out) },
		rules: func(live store.Bundle, now store.PolicyState) (store.PolicyWrite, []block, error) {
			blocked := s.blocks(proposal{bundle: b.Name, digest: old.Digest, rules: b.Rules, rollbackOf: old.Version}, live, now, time.Now())
			return store.PolicyWrite{Freeze: &freeze, Reason: freeze.Reason}, blocked, nil
		},
	}
	return writeOnce(ctx, s.db, p.procedure, req.GetIdempotencyKey(), req, &cedarpostv1.RollbackVersionResponse{},
		func(o *once) (*cedarpostv1.RollbackVersionResponse, error) {
			out, err := s.publish(ctx, p, o)
			if err != nil {
				s.noteRefused(ctx, p.procedure, b.Name, false, err)
			}
			return respond(out), err
		})
}

// heldFiles are files in memory that take the place of an upload.
type heldFiles struct {
	places *bundlePlaces
	size   int64
	away   func()
}

// hold waits for the place of an upload.
func hold(ctx context.Context, places *bundlePlaces) (*heldFiles, error) {
	away, err := places.upload(ctx, callerFrom(ctx))
	return &heldFiles{places: places, away: away}, err
}

// leave gives the place back.
func (h *heldFiles) leave() {
	h.places.bytes.Add(-h.size)
	h.away()
}

// add counts bytes that are about to be in memory.
func (h *heldFiles) add(n int) error {
	h.size += int64(n)
	if h.places.bytes.Add(int64(n)) > maxUploaded {
		return connect.NewError(connect.CodeResourceExhausted, "other large bundles are being uploaded; try again in a moment")
	}
	return nil
}

// storedFiles reads the files of a bundle as they were at a revision, by path.
func (s *policyService) storedFiles(ctx context.Context, h *heldFiles, name string, at int64) (files []bundle.File, err error) {
	sizes, err := s.db.BundleFiles(ctx, at, name)
	if err != nil {
		return nil, err
	}
	size := 0
	for _, f := range sizes {
		size += f.Bytes
	}
	if err := h.add(size); err != nil {
		return nil, err
	}
	list, err := s.db.ReadBundleFiles(ctx, at, name)
	for _, f := range list {
		files = append(files, bundle.File{Path: f.Path, Content: f.Content})
	}
	return files, err
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
