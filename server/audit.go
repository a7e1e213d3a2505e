package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// auditService answers what was decided, from the bytes that were recorded.
type auditService struct {
	db     *store.DB
	events *eventLog
	signer *signer
	// mask hashes a value, given as JSON, as it stands in records.
	mask func(json string) []byte
	past *past
}

// decisionPage is where a page of QueryDecisions ended, and of which query.
type decisionPage struct {
	Query []byte
	At    time.Time
	ID    uuid.UUID
}

// QueryDecisions implements cedarpost.v1.AuditService.
func (s *auditService) QueryDecisions(ctx context.Context, req *cedarpostv1.QueryDecisionsRequest) (*cedarpostv1.QueryDecisionsResponse, error) {
	fingerprint, err := queryFingerprint(req)
	if err != nil {
		return nil, publicError(err)
	}
	size := pageSize(req.GetPageSize())
	q := store.DecisionQuery{
		DeniedAt: int16(req.GetDeniedAt()), Caller: req.GetCaller(), RequestID: req.GetRequestId(), Limit: size + 1,
	}
	if req.From != nil {
		q.From = req.From.AsTime()
	}
	if req.To != nil {
		q.To = req.To.AsTime()
	}
	for _, f := range []struct {
		from *cedarpostv1.EntityUid
		into **store.UID
	}{{req.Principal, &q.Principal}, {req.Action, &q.Action}, {req.Resource, &q.Resource}} {
		if f.from != nil {
			uid := protoToStore(f.from)
			*f.into = &uid
		}
	}
	if d := req.GetDecision(); d != cedarpostv1.Decision_DECISION_UNSPECIFIED {
		q.Allowed = proto.Bool(d == cedarpostv1.Decision_ALLOW)
	}
	if p := req.GetPolicy(); p != nil {
		q.Policy = p.GetBundle() + "/" + p.GetId()
	}
	if value := req.GetMaskedValue(); value != "" {
		q.Masked = s.mask(value)
	}
	if req.GetPageToken() != "" {
		var page decisionPage
		if err := parsePage(req.GetPageToken(), &page); err != nil || string(page.Query) != string(fingerprint) {
			return nil, errPageToken
		}
		q.BeforeAt, q.BeforeID = page.At, page.ID
	}
	rows, err := s.db.QueryDecisions(ctx, q)
	if err != nil {
		return nil, publicError(err)
	}
	out := &cedarpostv1.QueryDecisionsResponse{}
	if len(rows) > size {
		rows = rows[:size]
		last := rows[size-1]
		out.NextPageToken = formatPage(decisionPage{fingerprint, last.At, last.ID})
	}
	for _, row := range rows {
		rec, err := decodeRecord(row)
		if err != nil {
			return nil, publicError(err)
		}
		out.Decisions = append(out.Decisions, rec)
	}
	return out, nil
}

// queryFingerprint binds a page token to the filters it was made for.
func queryFingerprint(req *cedarpostv1.QueryDecisionsRequest) ([]byte, error) {
	filters := proto.CloneOf(req)
	filters.PageSize, filters.PageToken = 0, ""
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(filters)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	return sum[:16], nil
}

// GetDecision implements cedarpost.v1.AuditService.
func (s *auditService) GetDecision(ctx context.Context, req *cedarpostv1.GetDecisionRequest) (*cedarpostv1.GetDecisionResponse, error) {
	id, err := uuid.Parse(req.GetDecisionId())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, "decision_id: not a UUID")
	}
	row, err := s.db.GetDecision(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, connect.Errorf(connect.CodeNotFound, "no decision %s is recorded", id)
	}
	if err != nil {
		return nil, publicError(err)
	}
	rec, err := decodeRecord(row)
	if err != nil {
		return nil, publicError(err)
	}
	return &cedarpostv1.GetDecisionResponse{Decision: rec}, nil
}

func decodeRecord(row store.Decision) (*cedarpostv1.DecisionRecord, error) {
	rec := &cedarpostv1.DecisionRecord{}
	if err := proto.Unmarshal(row.Record, rec); err != nil {
		return nil, fmt.Errorf("record of decision %s: %w", row.ID, err)
	}
	return rec, nil
}
