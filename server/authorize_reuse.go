package server

import (
	"context"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

const (
	// maxReportAge is how old a decision may be when its use is reported. It bounds the time
	// in which uses of a decision are looked for. maxReportAhead is how much the clocks of two
	// servers may differ.
	maxReportAge   = 24 * time.Hour
	maxReportAhead = time.Minute
	// usesLeeway is how long it may take to commit a report.
	usesLeeway = time.Hour
	// maxReports is how many reports the uses of one page are summed up from, at most.
	maxReports = 100_000
)

// ReportReuse implements cedarpost.v1.AuthorizationService. A report that its caller sends
// again, because the answer was lost, is in the log twice. Reads of the log count it once.
func (s *authorizationService) ReportReuse(ctx context.Context, req *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
	id, err := uuid.Parse(req.GetReportId()) // in lower case it is one id, in whatever case it comes
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, "report_id: not a UUID")
	}
	reportID := id.String()
	for i, f := range req.GetFailOpens() {
		if err := checkTimes("fail_opens", i, f.First, f.Last); err != nil {
			return nil, err
		}
	}
	report := &cedarpostv1.ReuseReport{ReportId: reportID, Lost: req.GetLost()}
	now := time.Now()
	seen := map[uuid.UUID]bool{}
	hits := 0.0
	for i, r := range req.GetReuses() {
		if err := checkTimes("reuses", i, r.First, r.Last); err != nil {
			return nil, err
		}
		id, err := uuid.Parse(r.GetDecisionId())
		if err != nil {
			return nil, connect.Errorf(connect.CodeInvalidArgument, "reuses[%d].decision_id: not a UUID", i)
		}
		if seen[id] {
			return nil, connect.Errorf(connect.CodeInvalidArgument, "reuses[%d].decision_id: stands there twice", i)
		}
		seen[id] = true
		if at := time.Unix(id.Time().UnixTime()); id.Version() != 7 || now.Sub(at) > maxReportAge || at.Sub(now) > maxReportAhead {
			report.Refused++
			continue
		}
		report.Reuses = append(report.Reuses, &cedarpostv1.Reuse{DecisionId: id.String(), Hits: r.Hits, First: r.First, Last: r.Last})
		hits += float64(r.Hits)
	}
	var events []store.Event
	add := func(rec *cedarpostv1.EventRecord) error {
		rec.Subject = reportID
		e, err := s.recorder.NewEvent(ctx, rec)
		events = append(events, e)
		return err
	}
	if len(req.GetReuses()) > 0 || req.GetLost() > 0 {
		if err := add(&cedarpostv1.EventRecord{Kind: cedarpostv1.EventRecord_REUSE, Detail: &cedarpostv1.EventRecord_Reuse{Reuse: report}}); err != nil {
			return nil, err
		}
	}
	failed := 0.0
	if len(req.GetFailOpens()) > 0 {
		for _, f := range req.GetFailOpens() {
			failed += float64(f.Count)
		}
		if err := add(&cedarpostv1.EventRecord{Kind: cedarpostv1.EventRecord_FAILED_OPEN, Detail: &cedarpostv1.EventRecord_FailedOpen{
			FailedOpen: &cedarpostv1.FailedOpen{ReportId: reportID, FailOpens: req.GetFailOpens()}}}); err != nil {
			return nil, err
		}
	}
	place, err := s.places.Enter(ctx, callerFrom(ctx), len(req.GetReuses()))
	if err != nil {
		return nil, err
	}
	defer place.Leave()
	if err := s.record(ctx, nil, events); err != nil {
		return nil, err
	}
	s.metric.reuses.Add(hits)
	s.metric.failOpens.Add(failed)
	s.metric.reuseLost.Add(float64(req.GetLost()))
	return &cedarpostv1.ReportReuseResponse{Refused: report.Refused}, nil
}

// checkTimes refuses invalid times. Validation of the request has compared first and last.
func checkTimes(list string, i int, first, last *timestamppb.Timestamp) error {
	if first.CheckValid() != nil || last.CheckValid() != nil {
		return connect.Errorf(connect.CodeInvalidArgument, "%s[%d]: first or last is not a time", list, i)
	}
	return nil
}
