package server

import (
	"context"
	"errors"
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
			if req.GetDuration() != nil {
				if err := s.impacts.recorder.RecordLogRead(ctx, procedure, req, -1); err != nil {
					return nil, err
				}
				if _, err := s.putReport(ctx, report, store.ImpactReport{}); err != nil {
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
					if runs(c, now) {
						shadow.Report = c.Shadow.Report
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
		for _, c := range list {
			err = errors.Join(err, s.shadow(ctx, c, alive))
		}
		return err
	})
}

// shadow compares the decisions that are new since the last time.
func (s *policyService) shadow(ctx context.Context, c store.BundleChange, alive func(context.Context) error) error {
	_, report, err := s.report(ctx, c.Shadow.Report)
	if err != nil {
		return err
	}
	v, err := s.follower.Current()
	if err != nil {
		return err
	}
	live, _ := v.Bundle(c.Bundle)
	active := c.State == store.ChangeOpen && c.Shadow.Digest == c.Digest && live.Version == report.GetLiveVersion()
	end := time.Now().Add(-s.times.late).Truncate(time.Millisecond)
	if c.Shadow.Until.Before(end) {
		end = c.Shadow.Until
	}
	var proposed *engine.Set
	for from := report.GetTo().AsTime(); active && from.Before(end); {
		if err := alive(ctx); err != nil {
			return err
		}
		if proposed == nil {
			if proposed, err = s.shadowSet(ctx, v, c); err != nil {
				return err
			}
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
		if _, err := s.putReport(ctx, report, store.ImpactReport{}); err != nil {
			return err
		}
		from = to
	}
	if !active || !report.GetTo().AsTime().Before(c.Shadow.Until) {
		report.Complete = true
		_, err = s.putReport(ctx, report, store.ImpactReport{})
	}
	return err
}

// shadowSet compiles the bundle of a change with the others that are live, unless it is the one that was
// compiled last.
func (s *policyService) shadowSet(ctx context.Context, v snapshot.View, c store.BundleChange) (*engine.Set, error) {
	if last := s.impacts.shadowed; last.change == c.ID && last.digest == c.Digest && last.revision == v.PolicyRevision {
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
	b, err := readFiles(c.Bundle, d.files())
	if err != nil {
		return nil, err
	}
	checked, set, err := s.compileBeside(ctx, b, v)
	if err == nil && !checked.Valid() {
		err = reportRefusal(b.Name, checked)
	}
	if err == nil {
		s.impacts.shadowed = shadowed{c.ID, c.Digest, v.PolicyRevision, set}
	}
	return set, err
}

// shadowed is the bundle in shadow that was compiled last.
type shadowed struct {
	change, digest string
	revision       int64
	set            *engine.Set
}
