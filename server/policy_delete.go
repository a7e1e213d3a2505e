package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/store"
)

const deleteBundle = "DeleteBundle"

// DeleteBundle implements cedarpost.v1.PolicyService.
func (s *policyService) DeleteBundle(ctx context.Context, req *cedarpostv1.DeleteBundleRequest) (*cedarpostv1.DeleteBundleResponse, error) {
	const procedure = cedarpostv1connect.PolicyServiceDeleteBundleProcedure
	return writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, &cedarpostv1.DeleteBundleResponse{},
		func(o *once) (out *cedarpostv1.DeleteBundleResponse, err error) {
			defer func() {
				if err != nil {
					s.noteRefused(ctx, procedure, req.GetBundle(), false, err)
				}
			}()
			// The rules are about versions that another server may have published a moment ago.
			if err := s.caughtUp(ctx); err != nil {
				return nil, err
			}
			for range publishRetries {
				out, err = s.deleteOnce(ctx, procedure, req, o)
				if !outdated(err) && !errors.Is(err, store.ErrEntitiesStored) && !errors.Is(err, store.ErrNotFound) {
					return out, err
				}
				if err := s.caughtUp(ctx); err != nil {
					return nil, err
				}
			}
			return nil, err
		})
}

// deleteOnce checks a deletion against the newest snapshot, and commits it unless a bundle was published
// meanwhile, or entities of its types were stored.
func (s *policyService) deleteOnce(ctx context.Context, procedure string, req *cedarpostv1.DeleteBundleRequest, o *once) (*cedarpostv1.DeleteBundleResponse, error) {
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	name := req.GetBundle()
	live, published := v.Bundle(name)
	if !published {
		return nil, noBundle(name)
	}
	still := need{deleteBundle, access.Target{Bundle: name, Changes: true}}
	allowed := func(now store.PolicyState) error {
		// The wait for the lock may have taken long, too.
		if err := s.stillMay(ctx, procedure, still); err != nil {
			return err
		}
		return s.deletionRules(req, live, now)
	}
	now, err := s.db.PolicyState(ctx, name, "")
	if err != nil {
		return nil, err
	}
	if err := allowed(now); err != nil {
		return nil, err
	}
	if err := s.checkWithout(ctx, v, name); err != nil {
		return nil, err
	}
	left, types, err := s.leave(ctx, v, req)
	if err != nil {
		return nil, err
	}
	answer := func(made store.Published) *cedarpostv1.DeleteBundleResponse {
		return &cedarpostv1.DeleteBundleResponse{Version: made.Version, Revision: written(v, made.Revision, made.Mark), Left: left}
	}
	made, err := s.db.DeleteBundle(ctx, store.BundleDeletion{
		Name: name, Caller: callerFrom(ctx), Reason: req.GetReason(), BaseRevision: v.PolicyRevision, At: v.Position,
		Empty: types, Rules: allowed,
		Once: keep(o, func(made store.Published) proto.Message { return answer(made) }),
	})
	if err != nil && !errors.As(err, new(*connect.Error)) && !errors.As(err, new(*refusedError)) && !outdated(err) &&
		!errors.Is(err, store.ErrEntitiesStored) && !errors.Is(err, store.ErrNotFound) {
		err = connect.NewError(connect.CodeUnavailable, outcomeUnknown).WithCause(err)
	}
	if err != nil {
		return nil, err
	}
	s.settle(ctx, made.Revision)
	return answer(made), nil
}

// deletionRules refuses to delete another version than the caller expects, and what the rules of the bundle keep
// from being deleted: nobody has approved that it goes.
func (s *policyService) deletionRules(req *cedarpostv1.DeleteBundleRequest, live store.Bundle, now store.PolicyState) error {
	if req.ExpectVersion != nil && req.GetExpectVersion() != live.Version {
		return connect.Errorf(connect.CodeAborted, "version %d of the bundle %s is live, not %d; look at what was published since, and try again", live.Version, live.Name, req.GetExpectVersion())
	}
	return refuse(s.blocks(proposal{bundle: live.Name, deletion: true}, live, now, time.Now()))
}

// checkWithout refuses to delete a bundle whose types other bundles use: they would not compile.
func (s *policyService) checkWithout(ctx context.Context, v snapshot.View, name string) error {
	if name == engine.AdminLocal {
		return nil // it has no types
	}
	others, previous, err := besides(v, name)
	if err != nil {
		return err
	}
	if err := takePlace(ctx, s.publishes.check, s.times.check, "other bundles are being checked; try again in a moment"); err != nil {
		return err
	}
	defer func() { <-s.publishes.check }()
	bounded, cancel := context.WithTimeout(ctx, s.times.check)
	defer cancel()
	set, findings, err := engine.CompileUntil(others, previous, bounded.Err)
	switch {
	case err != nil && ctx.Err() == nil:
		return connect.Errorf(connect.CodeResourceExhausted, "checking the other bundles takes longer than %v; try again when the server has less to do", s.times.check)
	case err != nil:
		return err
	case set != nil:
		return nil
	}
	report := &offline.Report{Findings: slices.DeleteFunc(findings, func(f engine.Finding) bool { return f.Warning })}
	hideFindings(report, name, access.RightsFrom(ctx))
	return refusal(connect.CodeFailedPrecondition, fmt.Sprintf("another bundle would break, because it uses types of the bundle %s; change or delete that one first", name), findingsToProto(name, report.Findings))
}

// leave returns the types of a bundle whose entities a deletion leaves behind, and those of which no entity
// may be stored. It refuses if there are some.
func (s *policyService) leave(ctx context.Context, v snapshot.View, req *cedarpostv1.DeleteBundleRequest) (left []*cedarpostv1.StoredType, empty []string, err error) {
	if req.GetBundle() != engine.AdminLocal { // no entity has a type of it
		empty = v.Set.EntityTypes(req.GetBundle())
	}
	for _, typ := range req.GetLeaveTypes() {
		if !slices.Contains(empty, typ) {
			return nil, nil, connect.Errorf(connect.CodeInvalidArgument, "leave_types: the bundle %s has no entity type %q", req.GetBundle(), typ)
		}
	}
	counts, err := s.db.CountTypes(ctx, empty)
	if err != nil {
		return nil, nil, err
	}
	empty = slices.DeleteFunc(empty, func(t string) bool { return slices.Contains(req.GetLeaveTypes(), t) })
	var stored []*cedarpostv1.StoredType
	for _, c := range counts {
		one := &cedarpostv1.StoredType{Type: c.Type, Entities: c.Count}
		if !access.RightsFrom(ctx).May("GetEntity", access.Target{Bundle: req.GetBundle(), EntityType: c.Type}) {
			one.Entities = 0
		}
		if slices.Contains(empty, c.Type) {
			stored = append(stored, one)
		} else {
			left = append(left, one)
		}
	}
	if len(stored) > 0 {
		return nil, nil, refuseStored(req.GetBundle(), stored)
	}
	return left, empty, nil
}

// maxNamedTypes bounds the types that the text of an error names.
const maxNamedTypes = 20

// refuseStored is the error of a deletion while entities are stored.
func refuseStored(name string, stored []*cedarpostv1.StoredType) error {
	var types []string
	for _, t := range stored[:min(len(stored), maxNamedTypes)] {
		switch n := t.GetEntities(); {
		case n == 0:
			types = append(types, t.GetType())
		case n >= store.MaxTypeCount:
			types = append(types, fmt.Sprintf("%s (%d or more)", t.GetType(), n))
		default:
			types = append(types, fmt.Sprintf("%s (%d)", t.GetType(), n))
		}
	}
	if more := len(stored) - len(types); more > 0 {
		types = append(types, fmt.Sprintf("and %d more types", more))
	}
	err := connect.Errorf(connect.CodeFailedPrecondition,
		"entities of the bundle %s are stored: %s; delete them first, or leave them behind (leave_types, --force): then nobody can read or write them until a bundle declares their types again", name, strings.Join(types, ", "))
	if d, derr := connectproto.NewErrorDetail(&cedarpostv1.StoredEntities{Types: stored}); derr == nil {
		err = err.WithDetail(d)
	}
	return err
}

// departed returns the rules that a name keeps after its bundle was deleted: a bundle without a version, and
// with bundle.yaml and approvals of the last one. So a bundle that is deleted and made again does not shed
// its rules.
func (s *policyService) departed(ctx context.Context, name string) (b store.Bundle, err error) {
	list, err := s.db.BundleVersions(ctx, name, 0, 1)
	if err != nil || len(list) == 0 || list[0].Live {
		return b, err
	}
	b = store.Bundle{Name: name, Approvals: list[0].Approvals, Rules: list[0].Rules}
	b.Manifest, err = s.manifest(ctx, list[0].Bundle)
	return b, err
}

// manifest reads the bundle.yaml of a version; nil if it has none.
func (s *policyService) manifest(ctx context.Context, b store.Bundle) ([]byte, error) {
	content, err := s.db.ReadBundleFile(ctx, b.Since, b.Name, bundle.ManifestName, 0, bundle.MaxYAMLBytes)
	if errors.Is(err, store.ErrNotFound) {
		err = nil
	}
	return content, err
}
