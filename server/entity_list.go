package server

import (
	"context"
	"encoding/json"
	"slices"
	"strings"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// entityEnd is the last entity of a page of ListEntities.
type entityEnd struct {
	Token string // of the revision that is listed
	UID   store.UID
}

// ListEntities implements cedarpost.v1.EntityService.
func (s *entityService) ListEntities(ctx context.Context, req *cedarpostv1.ListEntitiesRequest) (*cedarpostv1.ListEntitiesResponse, error) {
	filters := proto.CloneOf(req)
	filters.PageSize, filters.PageToken = 0, ""
	page, err := readPage[entityEnd](filters, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	at := req.GetAt()
	if req.GetPageToken() != "" {
		// Callers can write tokens themselves. The rights were checked for the type of the request.
		if req.GetType() != "" && page.End.UID.Type != req.GetType() {
			return nil, errPageToken
		}
		at = &cedarpostv1.Revision{Token: page.End.Token}
	}
	v, number, err := s.readAt(ctx, at)
	if err != nil {
		return nil, err
	}
	q, err := s.entityQuery(ctx, v, number, req)
	if err != nil {
		return nil, err
	}
	size := pageSize(req.GetPageSize())
	q.After, q.Limit = page.End.UID, size+1
	room, err := roomFor(ctx)
	if err != nil {
		return nil, err
	}
	q.Room = room.add
	rows, err := s.db.ListEntities(ctx, number, q)
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.ListEntitiesResponse{Revision: snapshot.EncodeRevision(v.Position, number)}
	if len(rows) > size || room.full {
		rows = rows[:min(size, len(rows))]
		out.NextPageToken = page.next(entityEnd{out.Revision.Token, rows[len(rows)-1].UID})
	}
	for _, row := range rows {
		e, err := storedToProto(v, row)
		if err != nil {
			return nil, err
		}
		out.Entities = append(out.Entities, e)
	}
	return out, s.recordRead(ctx, cedarpostv1connect.EntityServiceListEntitiesProcedure, req.GetType(), req, len(out.Entities))
}

// entityQuery reads the filters by the schema of the revision that is listed.
func (s *entityService) entityQuery(ctx context.Context, v snapshot.View, at int64, req *cedarpostv1.ListEntitiesRequest) (q store.EntityQuery, err error) {
	q.Type = req.GetType()
	if req.Ancestor == nil && len(req.GetAttributes()) == 0 {
		return q, nil
	}
	set := v.Set
	if at < v.PolicyRevision {
		if set, err = s.past.Policies(ctx, at); err != nil {
			return q, err
		}
	}
	if req.Ancestor != nil {
		uid := stored.FromProto(req.Ancestor)
		q.Ancestor = &uid
		if q.ParentTypes, err = set.GroupTypes(wire.UID(req.Ancestor)); err != nil {
			return q, err
		}
	}
	if len(req.GetAttributes()) > 0 {
		q.Attrs, err = readAttributes(set, q.Type, req.GetAttributes())
	}
	return q, err
}

// readAttributes returns the values that attributes must have, in the form of the store.
func readAttributes(set *engine.Set, typ string, asked []*cedarpostv1.AttributeEquals) ([]byte, error) {
	if typ == "" {
		return nil, connect.NewError(connect.CodeInvalidArgument, "attributes: needs type as well, whose schema says how to read them")
	}
	if typ == store.GrantType {
		return grantAttributes(asked)
	}
	values := cedar.RecordMap{}
	for _, a := range asked {
		name := cedar.String(a.GetName())
		if _, twice := values[name]; twice {
			return nil, connect.Errorf(connect.CodeInvalidArgument, "attributes: %q is given twice", a.GetName())
		}
		value, err := set.ReadAttribute(cedar.EntityType(typ), a.GetName(), a.GetValue().AsInterface())
		if err != nil {
			return nil, err
		}
		values[name] = value
	}
	return stored.RecordJSON(cedar.NewRecord(values))
}

// grantAttributes is readAttributes for grants, which no schema declares.
func grantAttributes(asked []*cedarpostv1.AttributeEquals) ([]byte, error) {
	values := map[string]any{}
	for _, a := range asked {
		if _, twice := values[a.GetName()]; twice {
			return nil, connect.Errorf(connect.CodeInvalidArgument, "attributes: %q is given twice", a.GetName())
		}
		if known := store.GrantAttributes(); !slices.Contains(known, a.GetName()) {
			return nil, connect.Errorf(connect.CodeInvalidArgument, "attributes: a grant has no attribute %q; it has %s", a.GetName(), strings.Join(known, ", "))
		}
		values[a.GetName()] = a.GetValue().AsInterface()
	}
	return json.Marshal(values)
}
