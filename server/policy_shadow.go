package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/impact"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/store"
)

// A change in shadow is evaluated beside the live bundle. That costs decisions nothing: one server reads
// them from the log some seconds later, as an analysis does, and adds the differences to a report.

// shadowWindow is how much of the time is looked at together. A server that stops begins the window anew.
const shadowWindow = time.Minute

func shadowToProto(s *store.Shadow) *cedarpostv1.ChangeShadow {
	if s == nil {
		return nil
	}
	return &cedarpostv1.ChangeShadow{Report: s.Report, Digest: s.Digest, Caller: s.Caller, Until: timestamppb.New(s.Until)}
}

// ShadowChange implements cedarpost.v1.PolicyService.
func (s *policyService) ShadowChange(ctx context.Context, req *cedarpostv1.ShadowChangeRequest) (*cedarpostv1.ShadowChangeResponse, error) {
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	name := bundleOfChange(req.GetId())
	live, err := s.live(ctx, name)
	if err != nil {
		return nil, err
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	report, err := newReport(ctx, v, name, req.GetId(), now)
	if err != nil {
		return nil, err
	}
	from := timestamppb.New(now.Truncate(time.Millisecond)) // as precise as the times of decisions
	report.From, report.To, report.Shadow, report.Digest, report.LiveVersion = from, from, true, req.GetDigest(), live.Version
	var c store.BundleChange
	answer := func(_ store.Changes, at *cedarpostv1.Revision) *cedarpostv1.ShadowChangeResponse {
		return &cedarpostv1.ShadowChangeResponse{Change: s.shown(c), Revision: at}
	}
	const procedure = cedarpostv1connect.PolicyServiceShadowChangeProcedure
	return writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, &cedarpostv1.ShadowChangeResponse{},
		func(o *once) (*cedarpostv1.ShadowChangeResponse, error) {
			goesOn := ""
			if req.GetDuration() != nil {
				if err := s.impacts.recorder.RecordLogRead(ctx, procedure, req, -1); err != nil {
					return nil, err
				}
				if err := s.mayShadow(ctx, req, report, v); err != nil {
					return nil, err
				}
				// The report is stored first: without it, nothing is compared. If the change does not name it in the
				// end, it is removed later.
				if _, err := s.putReport(ctx, report, store.DecisionCursor{}); err != nil {
					return nil, err
				}
				var err error
				if goesOn, err = s.growing(ctx, req.GetId(), live.Version); err != nil {
					return nil, err
				}
			}
			return changeState(ctx, s, procedure, req, o, name, req.GetId(), answer, func(state store.PolicyState) (w store.PolicyWrite, err error) {
				if c, err = openChange(req.GetId(), state); err != nil {
					return w, err
				}
				if err := refuseOther(c, req.GetDigest()); err != nil {
					return w, err
				}
				if c.BaseVersion != live.Version {
					return w, connect.Errorf(connect.CodeFailedPrecondition, "the change %s is of version %d of the bundle %s, and version %d is live; `cedarpost change edit %s --rebase` makes that its base", c.ID, c.BaseVersion, name, live.Version, c.ID)
				}
				switch {
				case req.GetDuration() != nil:
					shadow := &store.Shadow{Report: report.GetId(), Digest: c.Digest, Caller: callerFrom(ctx), Until: now.Add(req.GetDuration().AsDuration())}
					if runs(c, now) && c.Shadow.Report == goesOn {
						shadow.Report = goesOn
					}
					c.Shadow = shadow
				case c.Shadow == nil || !c.Shadow.Until.After(now):
					return w, nil
				default:
					ended := *c.Shadow
					ended.Until = now
					c.Shadow = &ended
				}
				return store.PolicyWrite{Change: &c, Reason: "shadow"}, nil
			})
		})
}

// growing returns the report of the shadow of a change if it still grows, beside a live version; "" if it does
// not.
func (s *policyService) growing(ctx context.Context, id string, live int64) (string, error) {
	c, err := s.db.BundleChange(ctx, id)
	if errors.Is(err, store.ErrNotFound) || err == nil && c.Shadow == nil {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	_, report, err := s.report(ctx, c.Shadow.Report)
	if err != nil || report.GetComplete() || report.GetLiveVersion() != live {
		return "", err
	}
	return c.Shadow.Report, nil
}

// maxShadows is how many changes can be in shadow at once; one of each bundle.
const maxShadows = 10

// mayShadow refuses a shadow of a change that does not compile, one more than there may be, and one of a
// caller whose right does not come from a stored grant: it is looked at as long as the shadow runs.
func (s *policyService) mayShadow(ctx context.Context, req *cedarpostv1.ShadowChangeRequest, report *cedarpostv1.ImpactReport, v snapshot.View) error {
	list, err := s.db.Shadows(ctx)
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(c store.BundleChange) bool { return c.ID == req.GetId() || !runs(c, time.Now()) })
	if i := slices.IndexFunc(list, func(c store.BundleChange) bool { return c.Bundle == report.GetBundle() }); i >= 0 {
		return connect.Errorf(connect.CodeFailedPrecondition, "the change %s of the bundle is in shadow; end that first (cedarpost change shadow %s --end)", list[i].ID, list[i].ID)
	}
	if len(list) >= maxShadows {
		return connect.Errorf(connect.CodeResourceExhausted, "%d changes are in shadow, which is the limit", maxShadows)
	}
	if !s.granted(callerFrom(ctx), report.GetBundle()) {
		return connect.Errorf(connect.CodeFailedPrecondition, "the right to a shadow must come from a stored grant (cedarpost grants put), because it is looked at as long as the shadow runs")
	}
	_, _, err = s.candidate(ctx, &cedarpostv1.AnalyzeChangeRequest{Digest: req.GetDigest()}, report, v)
	return err
}

// granted reports whether a caller may have a change of a bundle in shadow, by its stored grants.
func (s *policyService) granted(caller, name string) bool {
	rights, err := s.rightsOf(caller)
	return err == nil && rights.MayAll("ShadowChange", access.Target{Bundle: name}) && rights.MayAll(readDecisions, decisionsOf(name))
}

// runs reports whether a change is evaluated beside the live bundle at a time.
func runs(c store.BundleChange, now time.Time) bool {
	return c.State == store.ChangeOpen && c.Shadow != nil && c.Shadow.Digest == c.Digest && c.Shadow.Until.After(now)
}

// keepShadows compares new decisions with those by changes in shadow, until ctx ends. Only one server at a
// time does that.
func (s *Server) keepShadows(ctx context.Context) {
	for {
		var done chan struct{}
		select {
		case <-ctx.Done():
			return
		case <-time.After(s.cfg.times.shadow):
		case done = <-s.cfg.shadowNow:
		}
		led, err := s.policies.shadows(ctx)
		if ctx.Err() != nil {
			return
		}
		if led || err != nil {
			s.tasks.done(taskShadow, err)
		}
		if err != nil {
			s.cfg.Log.Error("changes in shadow not compared", "err", err)
		}
		if done != nil {
			close(done)
		}
	}
}

// shadows compares the newest decisions by all changes in shadow, and reports whether this server does that.
func (s *policyService) shadows(ctx context.Context) (led bool, err error) {
	list, err := s.db.Shadows(ctx)
	if err != nil || len(list) == 0 {
		return err == nil, err
	}
	return s.db.Lead(ctx, store.ShadowLock, func(ctx context.Context, alive func(context.Context) error) (err error) {
		maps.DeleteFunc(s.impacts.shadowed, func(id string, _ shadowed) bool {
			return !slices.ContainsFunc(list, func(c store.BundleChange) bool { return c.ID == id })
		})
		for _, c := range list {
			err = errors.Join(err, s.shadow(ctx, c, alive))
		}
		return err
	})
}

// shadow compares the decisions that are new since the last time.
func (s *policyService) shadow(ctx context.Context, c store.BundleChange, alive func(context.Context) error) (err error) {
	defer func() { // a candidate must not end the server
		if r := recover(); r != nil {
			err = fmt.Errorf("compare by the change %s: panic: %v\n%s", c.ID, r, debug.Stack())
		}
	}()
	_, report, err := s.report(ctx, c.Shadow.Report)
	if err != nil {
		return err
	}
	v, err := s.follower.Current()
	if err != nil {
		return err
	}
	live, _ := v.Bundle(c.Bundle)
	active := s.granted(c.Shadow.Caller, c.Bundle) && c.State == store.ChangeOpen && c.Shadow.Digest == c.Digest && live.Version == report.GetLiveVersion()
	end := time.Now().Add(-s.times.late).Truncate(time.Millisecond)
	if c.Shadow.Until.Before(end) {
		end = c.Shadow.Until
	}
	var proposed *engine.Set
	if active && report.GetTo().AsTime().Before(end) {
		proposed, err = s.shadowSet(ctx, v, c)
		refused := connect.CodeOf(err) == connect.CodeInvalidArgument || connect.CodeOf(err) == connect.CodeFailedPrecondition
		if err != nil && !refused && time.Now().Before(c.Shadow.Until) {
			return err
		}
		active = err == nil // else it does not fit the other bundles any more, or takes too long until its end
	}
	for from := report.GetTo().AsTime(); active && from.Before(end); {
		if err := alive(ctx); err != nil {
			return err
		}
		to := from.Add(min(end.Sub(from), shadowWindow))
		a := impact.New(impact.Config{
			DB: s.db, Past: s.impacts.past, Places: s.impacts.places, Work: s.impacts.shares.Call(ctx, access.Caller{Name: c.Shadow.Caller}),
			Report: report, Live: v.Set, Proposed: proposed, ActionTypes: s.actionTypes(v, c.Bundle, live), Revision: v.Position.Number, From: from, To: to,
		})
		for !a.Done() {
			if err := a.Next(ctx); err != nil {
				return err
			}
		}
		report = a.Report(true)
		report.To, report.Reached, report.Complete = timestamppb.New(to), nil, false
		if _, err := s.putReport(ctx, report, store.DecisionCursor{}); err != nil {
			return err
		}
		from = to
	}
	if active && report.GetTo().AsTime().Before(c.Shadow.Until) {
		return nil
	}
	report.Complete = true
	_, err = s.putReport(ctx, report, store.DecisionCursor{})
	return err
}

// shadowSet compiles the bundle of a change with the others that are live, unless that was done before.
func (s *policyService) shadowSet(ctx context.Context, v snapshot.View, c store.BundleChange) (*engine.Set, error) {
	if last := s.impacts.shadowed[c.ID]; last.digest == c.Digest && last.revision == v.PolicyRevision {
		return last.set, nil
	}
	held, err := hold(ctx, s.dryRuns)
	if err != nil {
		return nil, err
	}
	defer held.leave()
	d, err := s.draft(ctx, held, c.ID)
	if err != nil {
		return nil, err
	}
	b, checked, set, err := s.compileDraft(ctx, d, v)
	if err == nil && set == nil {
		err = reportRefusal(b.Name, checked)
	}
	if err == nil {
		s.impacts.shadowed[c.ID] = shadowed{c.Digest, v.PolicyRevision, set}
	}
	return set, err
}

// shadowed is a change in shadow that was compiled.
type shadowed struct {
	digest   string
	revision int64
	set      *engine.Set
}
