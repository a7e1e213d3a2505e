package server

import (
	"context"
	"errors"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

// publication is one publish of a bundle, whichever call makes it.
type publication struct {
	bundle    *bundle.Bundle
	procedure string
	need      need // the right that is checked again after the check, and when the publish is committed
	dryRun    bool // only check it
	// allowBreaking says that callers may break.
	allowBreaking bool
	message       string
	change        string // the id of the change that is published; "": none
	// breakGlass is why it is published past rules; "": it is not. also are the rights for that.
	breakGlass string
	also       []need
	// rollbackOf is the version that is restored; 0: none.
	rollbackOf int64
	// approvals returns how many approvals the change after it needs.
	approvals func(live store.Bundle) int
	rules     publishRules
	// respond makes the answer of the call.
	respond func(*cedarpostv1.ApplyBundleResponse) proto.Message
	// report and set are those of the last check, beside the live version; set is nil if the bundle is not
	// valid.
	report *offline.Report
	set    *engine.Set
	live   store.Bundle
}

// publishRules returns what keeps a bundle from being published over its live version, whose version is 0 if
// there is none, and what else the publish writes. It is called twice: before the bundle is checked, to fail
// early, and under the revision lock, with the state that is stored then.
type publishRules func(live store.Bundle, now store.PolicyState) (store.PolicyWrite, []block, error)

// refuseFrozen refuses to publish a bundle that is frozen.
func refuseFrozen(name string, now store.PolicyState) error {
	f := now.Freeze
	if f == nil {
		return nil
	}
	reason := ""
	if f.Reason != "" {
		reason = ": " + f.Reason
	}
	return connect.Errorf(connect.CodeFailedPrecondition, "the bundle %s is frozen, since %s by %s%s; `cedarpost unfreeze %s` ends that", name, f.At.UTC().Format(time.RFC3339), f.Caller, reason, name)
}

// publish checks a bundle, and commits it unless it is a dry run. If another bundle is published
// meanwhile, it is checked again.
func (s *policyService) publish(ctx context.Context, p *publication, o *once) (out *cedarpostv1.ApplyBundleResponse, err error) {
	// The rules are about versions that another server may have published a moment ago.
	if err := s.caughtUp(ctx); err != nil {
		return nil, err
	}
	for range publishRetries {
		out, err = s.publishOnce(ctx, p, o)
		if !outdated(err) {
			return out, err
		}
		if err := s.caughtUp(ctx); err != nil {
			return nil, err
		}
	}
	return nil, err
}

// caughtUp waits until the server has applied all that is committed now. It takes seconds to compile a
// large bundle.
func (s *policyService) caughtUp(ctx context.Context) (err error) {
	for until := time.Now().Add(s.times.check); ; {
		if _, err = s.follower.FullyConsistent(ctx); !errors.Is(err, snapshot.ErrBehind) || time.Now().After(until) {
			return err
		}
	}
}

// publishOnce checks a bundle against the newest snapshot, and commits it unless another bundle
// was published meanwhile.
func (s *policyService) publishOnce(ctx context.Context, p *publication, o *once) (*cedarpostv1.ApplyBundleResponse, error) {
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	b := p.bundle
	needs := append([]need{p.need}, p.also...)
	live, published := v.Bundle(b.Name)
	if !published {
		if live, err = s.departed(ctx, b.Name); err != nil {
			return nil, err
		}
	}
	blocked, err := s.early(ctx, p, live)
	if err != nil {
		return nil, err
	}
	others, previous, err := besides(v, b.Name)
	if err != nil {
		return nil, err
	}
	report, set, err := s.check(ctx, b, others, previous, p.dryRun)
	if err != nil {
		return nil, err
	}
	// The check may have taken long.
	if err := s.stillMay(ctx, p.procedure, needs...); err != nil {
		return nil, err
	}
	for _, path := range b.Ignored {
		report.Findings = append(report.Findings, engine.Finding{Bundle: b.Name, File: path, Message: "is not part of a bundle, and is left out", Warning: true})
	}
	p.report, p.set, p.live = report, set, live
	hideFindings(report, b.Name, access.RightsFrom(ctx))
	broken := breaksOf(v, set, b.Name)
	if p.dryRun || p.allowBreaking {
		var asked *whoAsked
		if p.dryRun && len(broken) > 0 {
			asked = s.whoAsked(ctx, p, broken)
		}
		report.Findings = append(report.Findings, breakFindings(ctx, b.Name, broken, asked, true)...)
		broken = nil
	}
	if !report.Valid() || report.Failed() > 0 {
		return nil, reportRefusal(b.Name, report)
	}
	if err := s.mayOwn(ctx, v, set, b.Name, p.procedure, p.need); err != nil {
		return nil, err
	}
	if !p.dryRun && live.Version > 0 && live.Digest == b.Digest() {
		return s.unchanged(ctx, p, o, v, live)
	}
	var changed []string // no entity has a type of admin-local
	if b.Name != engine.AdminLocal {
		changed = set.ChangedTypes(v.Set)
	}
	// A publisher may have no right to read entities. Entities that do not fit are named to readers only.
	readable := func(typ string) bool {
		return access.RightsFrom(ctx).May("GetEntity", access.Target{Bundle: owner(v.Set, cedar.EntityType(typ)), EntityType: typ})
	}
	if err := s.checkStored(ctx, v, set, changed, readable); err != nil {
		return nil, err
	}
	if err := s.mentions(ctx, v, set, b.Name, report); err != nil {
		return nil, err
	}
	if len(broken) > 0 {
		return nil, s.refuseBreaking(ctx, p, v, broken)
	}
	w, err := stored.Publication(b, set)
	if err != nil {
		return nil, err
	}
	if p.dryRun {
		report.Findings = append(report.Findings, blocked...)
		return applied(v, w.Bundle, v.Position.Number, false, report), nil
	}
	w.Caller = callerFrom(ctx)
	w.Bundle.PublishedBy, w.Bundle.Message, w.Bundle.Change, w.Bundle.RollbackOf = w.Caller, p.message, p.change, p.rollbackOf
	w.Bundle.Approvals = int32(p.approvals(live))
	switch {
	case p.rollbackOf > 0:
		w.Bundle.Rules = keptRules(live, b.Rules)
	case p.breakGlass != "":
		// What others must see before a publish is not shed by passing it once. Windows can be, because one
		// that never ends could not be taken back otherwise.
		w.Bundle.Approvals = int32(max(approvalsNeeded(live), b.Approvals))
		w.Bundle.Rules = keptAfterGlass(live, b.Rules)
	}
	w.BaseRevision, w.EntitiesRevision, w.At = v.PolicyRevision, v.Position.Number, v.Position
	w.Recheck = func(entities []store.Entity) error {
		// The wait for the lock may have taken long, too.
		if err := s.stillMay(ctx, p.procedure, needs...); err != nil {
			return err
		}
		return misfits(set, slices.DeleteFunc(entities, func(e store.Entity) bool { return !slices.Contains(changed, e.Type) }), readable)
	}
	// No bundle was published since the snapshot if this is called, so live is still live.
	var glass *store.BreakGlass
	w.Rules = func(now store.PolicyState) (store.PolicyWrite, error) {
		besides, _, err := p.ask(live, now)
		glass = besides.BreakGlass
		return besides, err
	}
	answer := func(made store.Published) *cedarpostv1.ApplyBundleResponse {
		now := w.Bundle
		now.Version, now.Since, now.PublishedAt, now.PolicyCount = made.Version, made.Revision, made.At, int32(len(now.Policies))
		if glass != nil {
			now.BreakGlass = glass.Reason
		}
		out := applied(v, now, made.Revision, true, report)
		out.Revision = written(v, made.Revision, made.Mark)
		out.Bundle.Revision = out.GetRevision()
		return out
	}
	w.Once = keep(o, func(made store.Published) proto.Message { return p.respond(answer(made)) })
	made, err := s.db.PublishBundle(ctx, w)
	if err != nil && !errors.As(err, new(*connect.Error)) && !errors.As(err, new(*refusedError)) && !outdated(err) {
		err = connect.NewError(connect.CodeUnavailable, outcomeUnknown).WithCause(err)
	}
	if err != nil {
		return nil, err
	}
	if glass != nil {
		s.metric.breakGlass.Inc()
		s.log.Warn("a bundle was published past its rules by break-glass", "bundle", b.Name, "version", made.Version, "caller", w.Caller, "reason", glass.Reason, "rules", glass.Rules)
	}
	s.settle(ctx, made.Revision)
	return answer(made), nil
}

// settle waits until this server has applied a publish or a deletion that is committed, so that the caller reads its
// own write from this server. It takes seconds to compile a large bundle. If the server is later than that, the write
// succeeded nevertheless, so the wait ends early enough for the answer.
func (s *policyService) settle(ctx context.Context, revision int64) {
	patience := s.times.check
	if end, ok := ctx.Deadline(); ok {
		left := time.Until(end)
		patience = min(patience, left-min(left/2, settleMargin))
	}
	_, _ = s.follower.AtLeastWithin(ctx, patience, revision)
}

// settleMargin is the time that settle leaves for the answer, unless half of what is left is less.
const settleMargin = 2 * time.Second

// early asks the rules before the bundle is checked. In a dry run, what is in the way becomes warnings.
func (s *policyService) early(ctx context.Context, p *publication, live store.Bundle) (blocked []engine.Finding, err error) {
	now, err := s.db.PolicyState(ctx, p.bundle.Name, p.change)
	if err != nil {
		return nil, err
	}
	_, list, err := p.ask(live, now)
	if refused, ok := errors.AsType[*connect.Error](err); ok && p.dryRun {
		list, err = append(list, block{message: refused.Message()}), nil
	}
	return warnings(p.bundle.Name, list), err
}

// unchanged answers a publish of what is published already.
func (s *policyService) unchanged(ctx context.Context, p *publication, o *once, v snapshot.View, live store.Bundle) (*cedarpostv1.ApplyBundleResponse, error) {
	out := applied(v, live, v.Position.Number, false, p.report)
	if o == nil {
		return out, nil
	}
	return out, s.db.KeepPublished(ctx, callerFrom(ctx), keep(o, func(store.Published) proto.Message { return p.respond(out) }), store.Published{})
}
