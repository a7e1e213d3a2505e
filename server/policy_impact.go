package server

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/impact"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxAnalyses     = 1               // at once
	analysisWindow  = 24 * time.Hour  // if the request gives no time
	analysisBudget  = 5 * time.Minute // if the request gives none
	progressEvery   = time.Second
	saveEvery       = 10 * time.Second // until when at most a stopped analysis has to do its work again
	maxNamedReports = 20               // that a change names
	readDecisions   = "QueryDecisions" // the right to read recorded decisions
)

// impacts compares recorded questions by the live policies and by those of a proposed state of a bundle.
type impacts struct {
	past     *snapshot.Past
	recorder *decisionlog.Recorder
	shares   *access.Shares
	places   *access.Places // of the decisions that must not be slowed down
	stopping <-chan struct{}
	running  chan struct{} // has a place for each analysis
	// shadowed has the compiled changes in shadow, by id, for the task that compares them.
	shadowed map[string]shadowed
}

// AnalyzeChange implements cedarpost.v1.PolicyService.
func (s *policyService) AnalyzeChange(ctx context.Context, req *cedarpostv1.AnalyzeChangeRequest, stream cedarpostv1connect.PolicyServiceAnalyzeChangeServerStream) error {
	select {
	case s.impacts.running <- struct{}{}:
		defer func() { <-s.impacts.running }()
	default:
		return connect.Errorf(connect.CodeResourceExhausted, "another analysis is under way on this server; try again later")
	}
	a, err := s.beginAnalysis(ctx, req)
	if err != nil {
		return err
	}
	const procedure = cedarpostv1connect.PolicyServiceAnalyzeChangeProcedure
	if err := s.impacts.recorder.RecordLogRead(ctx, procedure, shownAnalysis(req), -1); err != nil {
		return err
	}
	v, err := s.follower.Current()
	if err != nil {
		return err
	}
	may := func() error { return s.stillMay(ctx, procedure, rules[procedure].needs(v.Set, req)...) }
	send := func(full bool) error {
		if err := may(); err != nil {
			return err
		}
		return stream.Send(&cedarpostv1.AnalyzeChangeResponse{Report: a.Report(full)})
	}
	budget := analysisBudget
	if req.GetBudget() != nil {
		budget = req.GetBudget().AsDuration()
	}
	end := time.Now().Add(budget)
	sent, saved := time.Now(), time.Now()
	for {
		if err := a.Next(ctx); err != nil {
			return analysisError(err, a)
		}
		now := time.Now()
		over, stopping := a.Done() || now.After(end), isClosed(s.impacts.stopping)
		if over && len(req.GetWho()) > 0 {
			if err := s.who(ctx, a, req, end, may); err != nil {
				return analysisError(err, a)
			}
		}
		if over || stopping || now.Sub(saved) > saveEvery {
			if err := s.saveReport(ctx, a, may); err != nil {
				return analysisError(err, a)
			}
			saved = now
		}
		switch {
		case over:
			return send(true)
		case stopping:
			return connect.Errorf(connect.CodeUnavailable, "the server is stopping; go on with the report %s", a.Report(false).GetId())
		case now.Sub(sent) > progressEvery:
			if err := send(false); err != nil {
				return err
			}
			sent = now
		}
	}
}

// who asks for which stored principals the outcome of actions changes. It comes after all decisions, and has
// the rest of the time.
func (s *policyService) who(ctx context.Context, a *impact.Analysis, req *cedarpostv1.AnalyzeChangeRequest, end time.Time, may func() error) error {
	if !a.Done() {
		a.LeftOut("who gains and who loses: the time was over before; ask again when the analysis goes on")
		return nil
	}
	goOn := func() error {
		if time.Now().After(end) || isClosed(s.impacts.stopping) {
			return impact.ErrEnd
		}
		return may()
	}
	return a.Who(ctx, req.GetWho(), req.GetWhoContext().AsMap(), goOn, func(typ cedar.EntityType) bool { return s.mayList(ctx, typ) })
}

// mayList reports whether the caller may list the entities of a type now.
func (s *policyService) mayList(ctx context.Context, typ cedar.EntityType) bool {
	return access.RightsFrom(ctx).May("ListEntities", access.Target{Bundle: owner(s.follower.Latest().Set, typ), EntityType: string(typ)})
}

// analysisError is the error of an analysis that cannot go on.
func analysisError(err error, a *impact.Analysis) error {
	if errors.Is(err, store.ErrReportComplete) {
		return connect.Errorf(connect.CodeAborted, "another server has completed the report %s", a.Report(false).GetId())
	}
	if errors.Is(err, store.ErrSwept) {
		return connect.Errorf(connect.CodeFailedPrecondition, "history no longer goes back to the revision of the report %s; begin a new one", a.Report(false).GetId())
	}
	return err
}

// beginAnalysis reads what a request is about, and makes a report of it or reads the one to go on with.
func (s *policyService) beginAnalysis(ctx context.Context, req *cedarpostv1.AnalyzeChangeRequest) (*impact.Analysis, error) {
	if err := s.caughtUp(ctx); err != nil {
		return nil, err
	}
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	report, cursor, err := s.reportOf(ctx, req, v)
	if err != nil {
		return nil, err
	}
	b, set, err := s.candidate(ctx, req, report, v)
	if err != nil {
		return nil, err
	}
	live, _ := v.Bundle(report.GetBundle())
	if report.GetDigest() == "" {
		report.Digest, report.LiveVersion = b.Digest(), live.Version
	} else if report.GetDigest() != b.Digest() || report.GetLiveVersion() != live.Version || report.GetPolicyRevision() != v.PolicyRevision {
		return nil, connect.Errorf(connect.CodeAborted, "policies were published or the change was edited since the report %s was begun; begin a new one", report.GetId())
	}
	at, err := v.DecodeRevision(ctx, report.GetRevision())
	if err != nil {
		return nil, err
	}
	return impact.New(impact.Config{
		DB: s.db, Past: s.impacts.past, Places: s.impacts.places, Work: s.impacts.shares.Call(ctx, access.CallerFrom(ctx)),
		Report: report, Cursor: cursor, Live: v.Set, Proposed: set, ActionTypes: s.actionTypes(v, report.GetBundle(), live), Revision: at,
	}), nil
}

// reportOf returns a new report for a request, or the stored one that it names with where it goes on.
func (s *policyService) reportOf(ctx context.Context, req *cedarpostv1.AnalyzeChangeRequest, v snapshot.View) (report *cedarpostv1.ImpactReport, at store.DecisionCursor, err error) {
	if id := req.GetReport(); id != "" {
		kept, report, err := s.report(ctx, id)
		if err != nil {
			return nil, at, err
		}
		if report.GetComplete() || report.GetShadow() {
			return nil, at, connect.Errorf(connect.CodeFailedPrecondition, "the report %s is complete, or of a shadow, which goes on by itself", id)
		}
		if report.GetChange() == "" {
			return nil, at, connect.Errorf(connect.CodeFailedPrecondition, "the report %s is about edits that are in no change, and these are not stored; begin a new one", id)
		}
		return report, kept.Cursor, nil
	}
	name := req.GetEdits().GetBundle()
	if req.GetChange() != "" {
		name = bundleOfChange(req.GetChange())
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	if report, err = newReport(ctx, v, name, req.GetChange(), now); err != nil {
		return nil, at, err
	}
	report.Principal, report.Action, report.Resource, report.AskedBy, report.Data = req.GetPrincipal(), req.GetAction(), req.GetResource(), req.GetCaller(), req.GetData()
	if req.GetSample() > 0 {
		report.Sample = req.GetSample()
	}
	from, to, err := timeRange(req.GetFrom(), req.GetTo())
	if err != nil {
		return nil, at, err
	}
	if to.IsZero() || to.After(now) {
		to = now
	}
	if from.IsZero() {
		from = to.Add(-analysisWindow)
	}
	if !from.Before(to) {
		return nil, at, connect.NewError(connect.CodeInvalidArgument, "from: not before now")
	}
	report.From, report.To = timestamppb.New(from), timestamppb.New(to)
	return report, at, nil
}

// report reads a stored report.
func (s *policyService) report(ctx context.Context, id string) (kept store.ImpactReport, report *cedarpostv1.ImpactReport, err error) {
	kept, err = s.db.ImpactReport(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return kept, nil, connect.Errorf(connect.CodeNotFound, "there is no report %q", id)
	}
	if err != nil {
		return kept, nil, err
	}
	report = &cedarpostv1.ImpactReport{}
	return kept, report, proto.Unmarshal(kept.Report, report)
}

// candidate reads the proposed state of a request, checks it, and compiles it.
func (s *policyService) candidate(ctx context.Context, req *cedarpostv1.AnalyzeChangeRequest, report *cedarpostv1.ImpactReport, v snapshot.View) (*bundle.Bundle, *engine.Set, error) {
	if report.GetBundle() == engine.AdminLocal {
		return nil, nil, connect.Errorf(connect.CodeFailedPrecondition, "no decision is recorded about the rights that %s is about", engine.AdminLocal)
	}
	held, err := hold(ctx, s.dryRuns)
	if err != nil {
		return nil, nil, err
	}
	defer held.leave()
	var d draft
	if report.GetChange() != "" {
		if d, err = s.draft(ctx, held, report.GetChange()); err == nil {
			err = refuseEnded(d.change)
		}
		if err == nil && req.GetDigest() != "" {
			err = refuseOther(d.change, req.GetDigest())
		}
	} else {
		d, err = s.unstored(ctx, held, req.GetEdits())
	}
	if err != nil {
		return nil, nil, err
	}
	b, checked, set, err := s.compileDraft(ctx, d, v)
	if err != nil {
		return nil, nil, err
	}
	if hideFindings(checked, b.Name, access.RightsFrom(ctx)); set == nil {
		return nil, nil, reportRefusal(b.Name, checked)
	}
	return b, set, s.mayOwn(ctx, v, set, b.Name, cedarpostv1connect.PolicyServiceAnalyzeChangeProcedure, need{"AnalyzeChange", access.Target{Bundle: b.Name}})
}

// compileDraft compiles the bundle of a draft with the others of a snapshot. set is nil if it is not valid;
// its tests may fail, because the impact says why that matters.
func (s *policyService) compileDraft(ctx context.Context, d draft, v snapshot.View) (b *bundle.Bundle, checked *offline.Report, set *engine.Set, err error) {
	if b, err = readFiles(d.change.Bundle, d.files()); err != nil {
		return nil, nil, nil, err
	}
	others, previous, err := besides(v, b.Name)
	if err != nil {
		return nil, nil, nil, err
	}
	if checked, set, err = s.check(ctx, b, others, previous, true); err == nil && !checked.Valid() {
		set = nil
	}
	return b, checked, set, err
}

// actionTypes returns the types of the actions whose decisions an analysis of a bundle compares; nil: all.
func (s *policyService) actionTypes(v snapshot.View, name string, live store.Bundle) []string {
	switch {
	case name == engine.Guardrails:
		return nil
	case live.Version == 0:
		return []string{}
	}
	return append([]string{}, actionTypesOf(v.Set, name)...) // nil would be all, and a bundle can have no namespace
}

// newReport begins a report of the caller.
func newReport(ctx context.Context, v snapshot.View, name, change string, now time.Time) (*cedarpostv1.ImpactReport, error) {
	id := make([]byte, 8)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	return &cedarpostv1.ImpactReport{
		Id: name + "-r" + hex.EncodeToString(id), Bundle: name, Change: change, Caller: callerFrom(ctx), Sample: 1,
		CreatedAt: timestamppb.New(now), UpdatedAt: timestamppb.New(now), Revision: snapshot.EncodeRevision(v.Position, v.Position.Number), PolicyRevision: v.PolicyRevision,
	}, nil
}

// unstored makes a draft of edits that are in no change.
func (s *policyService) unstored(ctx context.Context, held *heldFiles, p *cedarpostv1.AnalyzeChangeRequest_ProposedEdits) (d draft, err error) {
	live, err := s.live(ctx, p.GetBundle())
	if err != nil {
		return d, err
	}
	if live.Version != p.GetBaseVersion() {
		return d, connect.Errorf(connect.CodeAborted, "version %d of the bundle %s is live, not %d; look at what was published since, and try again", live.Version, p.GetBundle(), p.GetBaseVersion())
	}
	d.change = store.BundleChange{Bundle: p.GetBundle(), BaseVersion: live.Version}
	if d.base, err = s.versionFiles(ctx, held, p.GetBundle(), live.Version); err != nil {
		return d, err
	}
	if d.edits, err = editFiles(nil, p.GetEdits(), nil); err != nil {
		return d, err
	}
	return d, d.settle()
}

// saveReport stores a report. A complete one is named by its change, if that is still open and was not
// edited, and if the caller may still do that.
func (s *policyService) saveReport(ctx context.Context, a *impact.Analysis, may func() error) error {
	message := a.Report(true)
	bytes, err := s.putReport(ctx, message, a.Cursor())
	if err != nil || !message.GetComplete() || message.GetChange() == "" {
		return err
	}
	sum := sha256.Sum256(bytes)
	ref := store.ReportRef{
		ID: message.GetId(), SHA256: hex.EncodeToString(sum[:]), Digest: message.GetDigest(), LiveVersion: message.GetLiveVersion(), Caller: message.GetCaller(),
		At: time.Now().UTC().Truncate(time.Microsecond), From: message.GetFrom().AsTime(), To: message.GetTo().AsTime(), Sample: message.GetSample(),
		Narrowed: a.Narrowed(), Decisions: message.GetDecisions(), Unknown: message.GetUnknown(),
	}
	_, err = s.db.ChangePolicies(ctx, callerFrom(ctx), message.GetBundle(), message.GetChange(), func(now store.PolicyState) (w store.PolicyWrite, err error) {
		if err := may(); err != nil { // the wait for the lock may have taken long
			return w, err
		}
		if now.Change == nil || now.Change.State != store.ChangeOpen || now.Change.Digest != ref.Digest {
			return w, nil // the report stays what it is, about a state that is not proposed any more
		}
		c := *now.Change
		c.Reports = namedReports(append(slices.Clone(c.Reports), ref), c.Approvals)
		return store.PolicyWrite{Change: &c, Reason: "report " + message.GetId()}, nil
	})
	return err
}

// namedReports drops the oldest reports that a change has room for no more, but none that an approval names:
// the approval counts by it.
func namedReports(list []store.ReportRef, approvals []store.Verdict) []store.ReportRef {
	over := len(list) - maxNamedReports
	return slices.DeleteFunc(list, func(r store.ReportRef) bool {
		if over <= 0 || slices.ContainsFunc(approvals, func(v store.Verdict) bool { return v.Report == r.ID }) {
			return false
		}
		over--
		return true
	})
}

// putReport stores a report, and returns the bytes that it is stored as.
func (s *policyService) putReport(ctx context.Context, report *cedarpostv1.ImpactReport, at store.DecisionCursor) ([]byte, error) {
	bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(report)
	if err != nil {
		return nil, err
	}
	return bytes, s.db.PutImpactReport(ctx, store.ImpactReport{
		ID: report.GetId(), Bundle: report.GetBundle(), Change: report.GetChange(), Complete: report.GetComplete(), Shadow: report.GetShadow(),
		CreatedAt: report.GetCreatedAt().AsTime(), Cursor: at, Report: bytes,
	})
}

func reportsToProto(list []store.ReportRef) (out []*cedarpostv1.ChangeReport) {
	for _, r := range list {
		out = append(out, &cedarpostv1.ChangeReport{
			Id: r.ID, Sha256: r.SHA256, Digest: r.Digest, LiveVersion: r.LiveVersion, Caller: r.Caller, At: timestamppb.New(r.At),
			From: timestamppb.New(r.From), To: timestamppb.New(r.To), Sample: r.Sample, Narrowed: r.Narrowed, Decisions: r.Decisions, Unknown: r.Unknown,
		})
	}
	return out
}

// GetImpactReport implements cedarpost.v1.PolicyService.
func (s *policyService) GetImpactReport(ctx context.Context, req *cedarpostv1.GetImpactReportRequest) (*cedarpostv1.GetImpactReportResponse, error) {
	kept, report, err := s.report(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if err := s.checkReport(ctx, kept); err != nil {
		return nil, err
	}
	s.hideWho(ctx, report)
	if !access.RightsFrom(ctx).MayAll(readDecisions, decisionsOf(report.GetBundle())) {
		report.Samples, report.ByCaller, report.Who, report.WhoLeftOut, report.Warnings, report.Hidden = nil, nil, nil, nil, nil, true
		report.Principal, report.Resource, report.AskedBy = nil, nil, ""
	}
	if !report.GetHidden() {
		if err := s.impacts.recorder.RecordLogRead(ctx, cedarpostv1connect.PolicyServiceGetImpactReportProcedure, req, len(report.GetSamples())); err != nil {
			return nil, err
		}
	}
	return &cedarpostv1.GetImpactReportResponse{Report: report}, nil
}

// hideWho removes from a report the principals and resources that the caller may not list. Another caller
// may have asked for it.
func (s *policyService) hideWho(ctx context.Context, report *cedarpostv1.ImpactReport) {
	hidden := func(uid *cedarpostv1.EntityUid) bool { return !s.mayList(ctx, cedar.EntityType(uid.GetType())) }
	listed := len(report.GetWho())
	report.Who = slices.DeleteFunc(report.GetWho(), func(w *cedarpostv1.ImpactWho) bool { return hidden(w.GetPrincipal()) })
	report.WhoChanged -= int32(listed - len(report.GetWho()))
	for _, w := range report.GetWho() {
		w.GainedResources, w.LostResources = slices.DeleteFunc(w.GetGainedResources(), hidden), slices.DeleteFunc(w.GetLostResources(), hidden)
	}
}

// checkReport refuses a report that is not the one that its change names.
func (s *policyService) checkReport(ctx context.Context, kept store.ImpactReport) error {
	if kept.Change == "" || !kept.Complete {
		return nil
	}
	c, err := s.db.BundleChange(ctx, kept.Change)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(kept.Report)
	for _, r := range c.Reports {
		if r.ID == kept.ID && r.SHA256 != hex.EncodeToString(sum[:]) {
			return connect.Errorf(connect.CodeDataLoss, "the report %s is not the one that the change %s names: its SHA-256 is another one", kept.ID, c.ID)
		}
	}
	return nil
}

// decisionsOf returns what the recorded decisions are about that the policies of a bundle decide. Those of
// guardrails decide all.
func decisionsOf(name string) access.Target {
	if name == engine.Guardrails {
		return access.Target{}
	}
	return access.Target{Bundle: name}
}

// shownAnalysis returns a request in the form that is recorded: without the contents of files and
// the context.
func shownAnalysis(req *cedarpostv1.AnalyzeChangeRequest) proto.Message {
	shown := proto.CloneOf(req)
	shown.WhoContext = nil // it can have values that the schema marks @sensitive
	for _, e := range shown.GetEdits().GetEdits() {
		e.Edit = nil
	}
	return shown
}
