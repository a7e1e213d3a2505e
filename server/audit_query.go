package server

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

// auditService reads the log, and decides from the bytes of a record again what was
// decided. It records each read in the log, before it answers.
type auditService struct {
	db       *store.DB
	recorder *decisionlog.Recorder
	stopping <-chan struct{}       // closed when the server stops
	exports  *sharedPlaces[string] // for exports, by caller
	reports  int                   // how many reports of reuse one page is summed up from, at most
	signer   *decisionlog.Signer
	past     *snapshot.Past
	shares   *access.Shares
	gate     *gate // nil in tests that make no server
}

func newAuditService(db *store.DB, recorder *decisionlog.Recorder, stopping <-chan struct{}) *auditService {
	return &auditService{db: db, recorder: recorder, stopping: stopping, exports: newSharedPlaces[string](maxExports, maxExports/2), reports: maxReports}
}

const (
	// maxScan is how much of the log a query may read row by row.
	maxScan = 24 * time.Hour
	// scanLeeway is for callers that ask for the last 24 hours: the server reads its clock
	// some time after the caller.
	scanLeeway = time.Minute
)

// logEnd is the last row of a page of QueryDecisions or QueryEvents.
type logEnd struct {
	At time.Time
	ID uuid.UUID
}

// QueryDecisions implements cedarpost.v1.AuditService.
func (s *auditService) QueryDecisions(ctx context.Context, req *cedarpostv1.QueryDecisionsRequest) (*cedarpostv1.QueryDecisionsResponse, error) {
	q, shown, err := s.filter(ctx, req, "QueryDecisions")
	if err != nil {
		return nil, err
	}
	filters := proto.CloneOf(shown)
	filters.PageSize, filters.PageToken = 0, ""
	page, err := readPage[logEnd](filters, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	q.BeforeAt, q.BeforeID = page.End.At, page.End.ID
	if name := scanned(q); name != "" {
		if err := checkSpan(q, name); err != nil {
			return nil, err
		}
	}
	size := pageSize(req.GetPageSize())
	q.Limit = size + 1
	room, err := roomFor(ctx)
	if err != nil {
		return nil, err
	}
	q.Room = room.add
	rows, err := s.db.QueryDecisions(ctx, q)
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.QueryDecisionsResponse{}
	if len(rows) > size || room.full {
		rows = rows[:min(size, len(rows))]
		last := rows[len(rows)-1]
		out.NextPageToken = page.next(logEnd{last.At, last.ID})
	}
	for _, row := range rows {
		out.Decisions = append(out.Decisions, decisionlog.ReadDecision(row))
	}
	if out.Uses, err = s.uses(ctx, rows); err != nil {
		return nil, err
	}
	if err := s.recorder.RecordLogRead(ctx, cedarpostv1connect.AuditServiceQueryDecisionsProcedure, shown, len(rows)); err != nil {
		return nil, err
	}
	return out, nil
}

// filter reads the filters of a request. shown is the request in the form that may be
// recorded: instead of the masked value that it looks for, it has the hash. Only decisions are
// selected that the caller may read by action.
func (s *auditService) filter(ctx context.Context, req *cedarpostv1.QueryDecisionsRequest, action string) (q store.DecisionQuery, shown *cedarpostv1.QueryDecisionsRequest, err error) {
	q = store.DecisionQuery{
		DeniedAt: int16(req.GetDeniedAt()), Caller: req.GetCaller(), RequestID: req.GetRequestId(), TraceID: req.GetTraceId(),
		Revision: req.GetRevision(), Field: req.GetField(), PermittedField: req.GetPermittedField(), DeniedField: req.GetDeniedField(),
	}
	if types, all := s.readable(ctx, action); !all {
		q.ActionTypes = append([]string{}, types...)
	}
	if q.From, q.To, err = timeRange(req.GetFrom(), req.GetTo()); err != nil {
		return q, nil, err
	}
	for _, f := range []struct {
		from *cedarpostv1.EntityUid
		into **store.UID
	}{{req.GetPrincipal(), &q.Principal}, {req.GetAction(), &q.Action}, {req.GetResource(), &q.Resource}} {
		if f.from != nil {
			uid := stored.FromProto(f.from)
			*f.into = &uid
		}
	}
	if d := req.GetDecision(); d != cedarpostv1.Decision_DECISION_UNSPECIFIED {
		q.Allowed = proto.Bool(d == cedarpostv1.Decision_ALLOW)
	}
	if p := req.GetPolicy(); p != nil {
		q.Policy = p.GetBundle() + "/" + p.GetId()
	}
	shown = req
	if value := req.GetMaskedValue(); value != "" {
		if q.Masked, err = s.recorder.MaskedHash(value); err != nil {
			return q, nil, connect.Errorf(connect.CodeInvalidArgument, "masked_value: %s", err)
		}
		shown = proto.CloneOf(req)
		shown.MaskedValue = "hash " + hex.EncodeToString(q.Masked)
	}
	return q, shown, nil
}

// timeRange reads the bounds of a time. An absent bound is zero.
func timeRange(from, to *timestamppb.Timestamp) (a, b time.Time, err error) {
	for _, t := range []struct {
		name string
		from *timestamppb.Timestamp
		into *time.Time
	}{{"from", from, &a}, {"to", to, &b}} {
		if t.from == nil {
			continue
		}
		if err := t.from.CheckValid(); err != nil {
			return a, b, connect.Errorf(connect.CodeInvalidArgument, "%s: not a time", t.name)
		}
		*t.into = t.from.AsTime()
	}
	if from != nil && to != nil && !a.Before(b) {
		return a, b, connect.NewError(connect.CodeInvalidArgument, "from: not before to")
	}
	return a, b, nil
}

// indexed reports whether a query can use an index besides that of the time.
func indexed(q store.DecisionQuery) bool {
	return q.Principal != nil || q.Resource != nil || q.RequestID != "" || q.DeniedAt != 0 || q.Allowed != nil && !*q.Allowed
}

// someBundles stands for the filter by what the caller may read.
const someBundles = "a caller with a right to some bundles only"

// scanned returns the name of a filter for which all rows of the time have to be read, or "".
func scanned(q store.DecisionQuery) string {
	if indexed(q) {
		return ""
	}
	for _, f := range []struct {
		name  string
		given bool
	}{
		{"action", q.Action != nil}, {"policy", q.Policy != ""}, {"caller", q.Caller != ""}, {"trace_id", q.TraceID != ""},
		{"revision", q.Revision != 0}, {"field", q.Field != ""}, {"permitted_field", q.PermittedField != ""}, {"denied_field", q.DeniedField != ""}, {"masked_value", q.Masked != nil}, {"decision", q.Allowed != nil},
		{someBundles, q.ActionTypes != nil},
	} {
		if f.given {
			return f.name
		}
	}
	return ""
}

// checkSpan refuses to read more than a day of the log for a filter that has no index.
func checkSpan(q store.DecisionQuery, what string) error {
	end := time.Now()
	if !q.To.IsZero() {
		end = q.To
	}
	if !q.BeforeAt.IsZero() {
		end = q.BeforeAt
	}
	if !q.From.IsZero() && end.Sub(q.From) <= maxScan+scanLeeway {
		return nil
	}
	return connect.Errorf(connect.CodeInvalidArgument, "%s: has to read all decisions of a time: give from, and to (absent: now) at most %.0f hours later; "+
		"or principal, resource, request_id, denied_at or decision DENY, which are indexed", what, maxScan.Hours())
}

// notFound is the error of an id that is not in the log. If the id is of a day that was
// dropped, the record may have been there, and the error says so.
func (s *auditService) notFound(ctx context.Context, id uuid.UUID, text string) error {
	if id.Version() == 7 {
		seconds, nanoseconds := id.Time().UnixTime()
		day := decisionlog.DayOf(time.Unix(seconds, nanoseconds))
		dropped, err := s.db.DayDropped(ctx, day)
		if err != nil {
			return err
		}
		if dropped {
			return connect.Errorf(connect.CodeNotFound, "%s is of %s, and that day of the log was dropped by retention", id, day.Format(time.DateOnly))
		}
	}
	return connect.Errorf(connect.CodeNotFound, text, id)
}

// readable lists the types of actions whose decisions the caller may read; all is true if these
// are all.
func (s *auditService) readable(ctx context.Context, action string) (types []string, all bool) {
	if s.gate == nil {
		return nil, true
	}
	return s.gate.actionTypesFor(ctx, action)
}

// decision reads a row. It is missing, too, if the caller may not read decisions on its action: not
// even that there is one.
func (s *auditService) decision(ctx context.Context, id uuid.UUID, action string) (row store.Decision, missing bool, err error) {
	row, err = s.db.GetDecision(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return row, true, nil
	}
	if types, all := s.readable(ctx, action); err == nil && !all && !slices.Contains(types, row.Action.Type) {
		return store.Decision{}, true, nil
	}
	return row, false, err
}

// GetDecision implements cedarpost.v1.AuditService.
func (s *auditService) GetDecision(ctx context.Context, req *cedarpostv1.GetDecisionRequest) (*cedarpostv1.GetDecisionResponse, error) {
	id, err := uuid.Parse(req.GetDecisionId())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, "decision_id: not a UUID")
	}
	row, missing, err := s.decision(ctx, id, "GetDecision")
	if err != nil {
		return nil, err
	}
	rows := 1
	var uses map[string]*cedarpostv1.DecisionUses
	if missing {
		rows = 0 // that there is no such decision is also something that is read
	} else if uses, err = s.uses(ctx, []store.Decision{row}); err != nil {
		return nil, err
	}
	if err := s.recorder.RecordLogRead(ctx, cedarpostv1connect.AuditServiceGetDecisionProcedure, req, rows); err != nil {
		return nil, err
	}
	if missing {
		return nil, s.notFound(ctx, id, "no decision %s is recorded")
	}
	rec := decisionlog.ReadDecision(row)
	if rec.Damaged != "" {
		return nil, damageError(rec)
	}
	return &cedarpostv1.GetDecisionResponse{Decision: rec, Uses: uses[row.ID.String()]}, nil
}

// damageError is the error of a call that needs the record of a row that is damaged.
func damageError(rec *cedarpostv1.DecisionRecord) *connect.Error {
	return connect.NewError(connect.CodeDataLoss, fmt.Sprintf(
		"the row of decision %s is damaged: %s; verify the log (cedarpost audit verify)", rec.GetDecisionId(), rec.GetDamaged()))
}
