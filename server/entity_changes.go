package server

import (
	"cmp"
	"context"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

// changeEnd is the last change of a page of QueryEntityChanges. Pages go back in time, so
// later writes do not move them.
type changeEnd struct {
	Token string // of the revision
	UID   store.UID
}

var changeKinds = map[store.ChangeKind]cedarpostv1.EntityChange_Kind{
	store.EntityCreated: cedarpostv1.EntityChange_CREATED,
	store.EntityChanged: cedarpostv1.EntityChange_CHANGED,
	store.EntityDeleted: cedarpostv1.EntityChange_DELETED,
}

// QueryEntityChanges implements cedarpost.v1.EntityService.
func (s *entityService) QueryEntityChanges(ctx context.Context, req *cedarpostv1.QueryEntityChangesRequest) (*cedarpostv1.QueryEntityChangesResponse, error) {
	filters := proto.CloneOf(req)
	filters.PageSize, filters.PageToken = 0, ""
	page, err := readPage[changeEnd](filters, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	size := pageSize(req.GetPageSize())
	q := store.ChangeQuery{Type: req.GetType(), Caller: req.GetCaller(), Limit: size + 1}
	if req.Uid != nil {
		uid := stored.FromProto(req.Uid)
		q.UID = &uid
	}
	if q.From, q.To, err = timeRange(req.GetFrom(), req.GetTo()); err != nil {
		return nil, err
	}
	if req.GetPageToken() != "" {
		if q.BeforeRevision, err = v.DecodeRevision(ctx, &cedarpostv1.Revision{Token: page.End.Token}); err != nil {
			return nil, err
		}
		q.AfterUID = page.End.UID
	}
	rows, err := s.db.QueryEntityChanges(ctx, q)
	if err != nil {
		return nil, err
	}
	at := v.Position
	if len(rows) > 0 {
		if at, err = v.PositionOf(ctx, rows[0].Revision); err != nil {
			return nil, err
		}
	}
	out := &cedarpostv1.QueryEntityChangesResponse{}
	if len(rows) > size {
		rows = rows[:size]
		last := rows[size-1]
		out.NextPageToken = page.next(changeEnd{snapshot.EncodeRevision(at, last.Revision).Token, last.UID})
	}
	for _, c := range rows {
		out.Changes = append(out.Changes, &cedarpostv1.EntityChange{
			Revision: snapshot.EncodeRevision(at, c.Revision), Time: timestamppb.New(c.At), Caller: c.Caller,
			Uid: stored.ToProto(c.UID), Kind: changeKinds[c.Kind],
		})
	}
	typ := cmp.Or(req.GetUid().GetType(), req.GetType())
	return out, s.recordRead(ctx, cedarpostv1connect.EntityServiceQueryEntityChangesProcedure, typ, req, len(out.Changes))
}
