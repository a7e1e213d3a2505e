package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/store"
)

// GetChange implements cedarpost.v1.PolicyService.
func (s *policyService) GetChange(ctx context.Context, req *cedarpostv1.GetChangeRequest) (*cedarpostv1.GetChangeResponse, error) {
	c, edits, err := s.db.ChangeEdits(ctx, req.GetId(), bundle.MaxDiffFile, maxShownEdits)
	if errors.Is(err, store.ErrNotFound) {
		return nil, noChange(req.GetId())
	}
	if err != nil {
		return nil, err
	}
	size := 0
	for _, e := range edits {
		size += len(e.Content)
	}
	if err := replyFrom(ctx).take(2*size + bundle.MaxDiffFile); err != nil { // and the text of the difference, and a file of the base
		return nil, err
	}
	now, err := s.stateOf(ctx, c)
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.GetChangeResponse{Change: now.change, ApprovalsNeeded: now.change.GetApprovalsNeeded(), LiveVersion: now.live.Version, BlockedBy: now.blockedBy}
	if c.Version > 0 {
		as, err := s.version(ctx, c.Bundle, c.Version)
		if err != nil {
			return nil, err
		}
		if out.Servers, err = s.serversAt(ctx, as.Since); err != nil {
			return nil, err
		}
	}
	var base store.BundleVersion
	if c.BaseVersion > 0 {
		if base, err = s.version(ctx, c.Bundle, c.BaseVersion); err != nil {
			return nil, err
		}
	}
	sizes, err := s.db.BundleFiles(ctx, base.Since, c.Bundle)
	if err != nil {
		return nil, err
	}
	had := map[string]*int{}
	for i := range sizes {
		had[sizes[i].Path] = &sizes[i].Bytes
	}
	var d bundle.Differ
	for _, e := range edits {
		before, err := s.side(ctx, base.Bundle, e.Path, had[e.Path])
		if err != nil {
			return nil, err
		}
		after, leftOut := e.Content, !e.Removed && e.Content == nil
		if leftOut {
			after = []byte{}
		}
		out.Files = append(out.Files, diffToProto(d.Diff(e.Path, before, after, large(had[e.Path]) || leftOut)))
	}
	return out, nil
}

// changeNow is a change with what its bundle is now.
type changeNow struct {
	live      store.Bundle
	change    *cedarpostv1.BundleChange
	blockedBy []string // what keeps it from being published, in words
}

// stateOf reads the live version and the state of the bundle of a change.
func (s *policyService) stateOf(ctx context.Context, c store.BundleChange) (out changeNow, err error) {
	if out.live, err = s.live(ctx, c.Bundle); err != nil {
		return out, err
	}
	at := time.Now()
	out.change = changeToProto(c, s.rulesOf(out.live, decodeRules(c.Rules)), at)
	if ended, ok := errors.AsType[*connect.Error](refuseEnded(c)); ok {
		out.blockedBy = []string{ended.Message()}
		return out, nil
	}
	now, err := s.db.PolicyState(ctx, c.Bundle, "")
	out.blockedBy = messagesOf(s.blocks(proposalOf(&c), out.live, now, at))
	return out, err
}

// CheckChange implements cedarpost.v1.PolicyService.
func (s *policyService) CheckChange(ctx context.Context, req *cedarpostv1.CheckChangeRequest) (*cedarpostv1.CheckChangeResponse, error) {
	held, err := hold(ctx, s.dryRuns)
	if err != nil {
		return nil, err
	}
	defer held.leave()
	d, err := s.draft(ctx, held, req.GetId())
	if err != nil {
		return nil, err
	}
	now, err := s.stateOf(ctx, d.change)
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.CheckChangeResponse{Change: now.change, BlockedBy: now.blockedBy}
	b, err := readFiles(d.change.Bundle, d.files())
	if err != nil {
		return out, collect(out, err)
	}
	p := &publication{
		bundle: b, procedure: cedarpostv1connect.PolicyServiceCheckChangeProcedure, need: need{"CheckChange", access.Target{Bundle: b.Name}}, dryRun: true,
		rules: func(store.Bundle, store.PolicyState) (w store.PolicyWrite, blocked []block, err error) {
			return w, nil, nil
		},
	}
	res, err := s.publish(ctx, p, nil)
	out.Ok, out.Findings = err == nil, res.GetWarnings()
	if p.report != nil {
		for _, t := range p.report.Tests {
			out.Tests = append(out.Tests, &cedarpostv1.TestResult{Name: t.Name, Line: int32(t.Line), Failures: t.Failures})
		}
	}
	if p.set != nil {
		out.Policies = policyDiffs(p.live.Policies, p.set.Policies(b.Name))
		var ferr error
		if out.FieldsAdded, out.FieldsRemoved, ferr = fieldDiffs(p.live, b); ferr != nil {
			return nil, ferr
		}
	}
	return out, collect(out, err)
}

// collect moves the findings in the error of a refused bundle to the answer. It returns other errors.
func collect(out *cedarpostv1.CheckChangeResponse, err error) error {
	refused, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return err
	}
	for _, d := range refused.Details() {
		if m, derr := connectproto.UnmarshalErrorDetail(d); derr == nil {
			if list, ok := m.(*cedarpostv1.BundleFindings); ok {
				out.Findings = list.GetFindings()
				return nil
			}
		}
	}
	if code := refused.Code(); code == connect.CodeInvalidArgument || code == connect.CodeFailedPrecondition {
		out.Findings = []*cedarpostv1.Finding{{Severity: cedarpostv1.Finding_ERROR, Message: refused.Message()}}
		return nil
	}
	return err
}

// ApproveChange implements cedarpost.v1.PolicyService.
func (s *policyService) ApproveChange(ctx context.Context, req *cedarpostv1.ApproveChangeRequest) (*cedarpostv1.ApproveChangeResponse, error) {
	return verdict(ctx, s, cedarpostv1connect.PolicyServiceApproveChangeProcedure, req, &cedarpostv1.ApproveChangeResponse{},
		func(c *cedarpostv1.BundleChange, at *cedarpostv1.Revision) *cedarpostv1.ApproveChangeResponse {
			return &cedarpostv1.ApproveChangeResponse{Change: c, Revision: at}
		},
		func(c *store.BundleChange) (*[]store.Verdict, error) {
			if slices.Contains(c.Authors, callerFrom(ctx)) {
				return nil, connect.Errorf(connect.CodeFailedPrecondition, "%s edited the change %s, and its authors cannot approve it", callerFrom(ctx), c.ID)
			}
			// A new approval takes the place of one that has expired, or that names another report.
			_, expired := countedApprovals(*c, s.rulesNow(*c), time.Now())
			c.Approvals = slices.DeleteFunc(slices.Clone(c.Approvals), func(v store.Verdict) bool {
				return v.Caller == callerFrom(ctx) && (slices.Contains(expired, v) || req.GetReport() != "" && v.Report != req.GetReport())
			})
			if id := req.GetReport(); id != "" && !slices.ContainsFunc(c.Reports, func(r store.ReportRef) bool { return r.ID == id && r.Digest == c.Digest }) {
				return nil, connect.Errorf(connect.CodeFailedPrecondition, "the change %s names no report %s of its present state", c.ID, id)
			}
			return &c.Approvals, nil
		})
}

// DeclineChange implements cedarpost.v1.PolicyService.
func (s *policyService) DeclineChange(ctx context.Context, req *cedarpostv1.DeclineChangeRequest) (*cedarpostv1.DeclineChangeResponse, error) {
	return verdict(ctx, s, cedarpostv1connect.PolicyServiceDeclineChangeProcedure, req, &cedarpostv1.DeclineChangeResponse{},
		func(c *cedarpostv1.BundleChange, at *cedarpostv1.Revision) *cedarpostv1.DeclineChangeResponse {
			return &cedarpostv1.DeclineChangeResponse{Change: c, Revision: at}
		},
		func(c *store.BundleChange) (*[]store.Verdict, error) { return &c.Declines, nil })
}

// verdict adds what the caller decided to a list of a change.
func verdict[A proto.Message](ctx context.Context, s *policyService, procedure string, req interface {
	proto.Message
	GetId() string
	GetDigest() string
	GetReason() string
	GetIdempotencyKey() string
}, empty A, respond func(*cedarpostv1.BundleChange, *cedarpostv1.Revision) A, list func(*store.BundleChange) (*[]store.Verdict, error)) (A, error) {
	var c store.BundleChange
	answer := func(_ store.Changes, at *cedarpostv1.Revision) A { return respond(s.shown(c), at) }
	return writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, empty, func(o *once) (A, error) {
		return changeState(ctx, s, procedure, req, o, bundleOfChange(req.GetId()), req.GetId(), answer, func(now store.PolicyState) (w store.PolicyWrite, err error) {
			if c, err = openChange(req.GetId(), now); err != nil {
				return w, err
			}
			if err := refuseOther(c, req.GetDigest()); err != nil {
				return w, err
			}
			verdicts, err := list(&c)
			if err != nil {
				return w, err
			}
			mine := func(v store.Verdict) bool { return v.Caller == callerFrom(ctx) && v.Digest == c.Digest }
			if i := slices.IndexFunc(*verdicts, mine); i >= 0 {
				if reason := req.GetReason(); reason == "" || reason == (*verdicts)[i].Reason {
					return w, nil // it is said already
				}
				// Another reason takes the place of the first one, and the report that was named stays.
				*verdicts = slices.Clone(*verdicts)
				(*verdicts)[i].Reason = req.GetReason()
				return store.PolicyWrite{Change: &c, Reason: req.GetReason()}, nil
			}
			if len(*verdicts) >= maxVerdicts {
				return w, connect.Errorf(connect.CodeFailedPrecondition, "the change %s has %d of them already, which is the limit", c.ID, maxVerdicts)
			}
			report := ""
			if approval, ok := any(req).(*cedarpostv1.ApproveChangeRequest); ok {
				report = approval.GetReport()
			}
			*verdicts = append(slices.Clone(*verdicts), store.Verdict{Caller: callerFrom(ctx), Digest: c.Digest, Reason: req.GetReason(), At: time.Now().UTC().Truncate(time.Microsecond), Report: report})
			return store.PolicyWrite{Change: &c, Reason: req.GetReason()}, nil
		})
	})
}

// PublishChange implements cedarpost.v1.PolicyService.
func (s *policyService) PublishChange(ctx context.Context, req *cedarpostv1.PublishChangeRequest) (*cedarpostv1.PublishChangeResponse, error) {
	const procedure = cedarpostv1connect.PolicyServicePublishChangeProcedure
	return writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, &cedarpostv1.PublishChangeResponse{},
		func(o *once) (*cedarpostv1.PublishChangeResponse, error) {
			out, err := s.publishChange(ctx, procedure, req, o)
			if err != nil {
				s.noteRefused(ctx, procedure, bundleOfChange(req.GetId()), false, err)
			}
			return out, err
		})
}

func (s *policyService) publishChange(ctx context.Context, procedure string, req *cedarpostv1.PublishChangeRequest, o *once) (*cedarpostv1.PublishChangeResponse, error) {
	held, err := hold(ctx, s.publishes)
	if err != nil {
		return nil, err
	}
	defer held.leave()
	d, err := s.draft(ctx, held, req.GetId())
	if err != nil {
		return nil, err
	}
	if err := refuseEnded(d.change); err != nil {
		return nil, err
	}
	if err := refuseOther(d.change, req.GetDigest()); err != nil {
		return nil, err
	}
	b, err := readFiles(d.change.Bundle, d.files())
	if err != nil {
		return nil, err
	}
	if b.Digest() != d.change.Digest { // somebody altered the tables
		return nil, fmt.Errorf("the files of the change %s are not those of its digest", d.change.ID)
	}
	var made store.BundleChange
	respond := func(out *cedarpostv1.ApplyBundleResponse) *cedarpostv1.PublishChangeResponse {
		return &cedarpostv1.PublishChangeResponse{Change: s.shown(made), Bundle: out.GetBundle(), Revision: out.GetRevision(), Warnings: out.GetWarnings()}
	}
	p := &publication{
		bundle: b, procedure: procedure, need: need{"PublishChange", access.Target{Bundle: b.Name, Changes: true}},
		message: d.change.Title, change: d.change.ID, allowBreaking: req.GetAllowBreaking(),
		approvals: func(store.Bundle) int { return b.Approvals },
		respond:   func(out *cedarpostv1.ApplyBundleResponse) proto.Message { return respond(out) },
		rules: func(live store.Bundle, now store.PolicyState) (w store.PolicyWrite, blocked []block, err error) {
			if made, err = openChange(req.GetId(), now); err != nil {
				return w, nil, err
			}
			if err := refuseOther(made, req.GetDigest()); err != nil {
				return w, nil, err
			}
			at := time.Now()
			blocked = s.blocks(proposal{bundle: b.Name, digest: b.Digest(), rules: b.Rules, change: &made}, live, now, at)
			made.Approvals, _ = countedApprovals(made, s.rulesOf(live, b.Rules), at)
			made.State, made.UpdatedAt = store.ChangePublished, at.UTC().Truncate(time.Microsecond)
			return store.PolicyWrite{Change: &made, Reason: made.Title}, blocked, nil
		},
	}
	if err := p.breakGlassBy(req.BreakGlass); err != nil {
		return nil, err
	}
	out, err := s.publish(ctx, p, o)
	if err != nil {
		return nil, err
	}
	return respond(out), nil
}
