package server

import (
	"context"

	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// QueryEvents implements cedarpost.v1.AuditService.
func (s *auditService) QueryEvents(ctx context.Context, req *cedarpostv1.QueryEventsRequest) (*cedarpostv1.QueryEventsResponse, error) {
	from, to, err := timeRange(req.GetFrom(), req.GetTo())
	if err != nil {
		return nil, err
	}
	filters := proto.CloneOf(req)
	filters.PageSize, filters.PageToken = 0, ""
	page, err := readPage[logEnd](filters, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	size := pageSize(req.GetPageSize())
	q := store.EventQuery{
		From: from, To: to, Caller: req.GetCaller(), Subject: req.GetSubject(),
		BeforeAt: page.End.At, BeforeID: page.End.ID, Limit: size + 1,
	}
	if q.Subject != "" {
		keys, grants, err := s.db.AccessOf(ctx, q.Subject)
		if err != nil {
			return nil, err
		}
		for q.Also = keys; len(grants) > 0; grants = grants[1:] {
			q.Also = append(q.Also, wire.UID(stored.ToProto(grants[0])).String())
		}
	}
	if k := req.GetKind(); k != cedarpostv1.EventRecord_KIND_UNSPECIFIED {
		q.Kind = decisionlog.EventKind(k)
	}
	room, err := roomFor(ctx)
	if err != nil {
		return nil, err
	}
	q.Room = room.add
	rows, err := s.db.QueryEvents(ctx, q)
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.QueryEventsResponse{}
	if len(rows) > size || room.full {
		rows = rows[:min(size, len(rows))]
		last := rows[len(rows)-1]
		out.NextPageToken = page.next(logEnd{last.At, last.ID})
	}
	for _, row := range rows {
		out.Events = append(out.Events, decisionlog.ReadEvent(row))
	}
	if err := s.recorder.RecordLogRead(ctx, cedarpostv1connect.AuditServiceQueryEventsProcedure, req, len(rows)); err != nil {
		return nil, err
	}
	return out, nil
}
