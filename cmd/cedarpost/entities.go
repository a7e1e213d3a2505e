package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

const maxPage = 1000

type entitiesCmd struct {
	Import  importCmd        `cmd:"" help:"Put entities from a file."`
	Get     getEntityCmd     `cmd:"" help:"Read one entity."`
	List    listEntitiesCmd  `cmd:"" help:"List entities by type and id."`
	History entityHistoryCmd `cmd:"" help:"List who changed which entity when, newest first."`
}

type getEntityCmd struct {
	outputFlags
	UID uid    `arg:"" name:"uid" help:"The entity: Shop::User::bob."`
	At  string `help:"Read it at this revision: a token (default: now)." placeholder:"TOKEN"`
	adminFlags
}

// Help is the long help of get.
func (*getEntityCmd) Help() string { return `With -o json, the GetEntityResponse of the API.` }

// Run reads one entity.
func (g *getEntityCmd) Run(ctx context.Context, c *console) error {
	admin, err := g.dial()
	if err != nil {
		return err
	}
	req := &cedarpostv1.GetEntityRequest{Uid: g.UID.EntityUid}
	if g.At != "" {
		req.At = &cedarpostv1.Revision{Token: g.At}
	}
	res, err := call(ctx, admin, admin.entities().GetEntity, req)
	if err != nil {
		return err
	}
	if g.json() {
		return c.message(res)
	}
	e := res.GetEntity().GetEntity()
	fmt.Fprintln(c.out, c.paint(bold, clean(uidText(e.GetUid()))))
	c.pair("parents", uidTexts(e.GetParents()))
	c.pair("attributes", structText(e.GetAttrs()))
	c.pair("tags", structText(e.GetTags()))
	c.pair("changed at", fmt.Sprint(res.GetEntity().GetChangedAt().GetNumber()))
	c.printRevision(res.GetRevision())
	return nil
}

type listEntitiesCmd struct {
	outputFlags
	Type     string   `help:"Only this type: Shop::User." placeholder:"TYPE"`
	Ancestor *uid     `help:"Only entities below this one: its members, their members, and so on." placeholder:"UID"`
	Attr     []string `help:"Only entities whose attribute has this value, as JSON or plain text; needs --type. Can be repeated." placeholder:"NAME=VALUE" sep:"none"`
	At       string   `help:"List them at this revision: a token (default: now)." placeholder:"TOKEN"`
	Limit    int      `help:"At most so many; 0 is all (default ${default})." default:"0" placeholder:"N"`
	adminFlags
}

// Help is the long help of list.
func (*listEntitiesCmd) Help() string {
	return `Examples:

  cedarpost entities list --ancestor Shop::Role::support
  cedarpost entities list --type Shop::User --attr region=eu --attr suspended=false
  cedarpost entities list --type Shop::Order --attr 'owner={"type": "Shop::User", "id": "bob"}'

All filters that are given must match. A value that is not JSON is text; text that is, like the zip code 08544, needs quotes: --attr 'zip="08544"'. All are read at one revision. With -o json, a line for each entity, with the revision of its last change.`
}

// request is the filters on the wire.
func (l *listEntitiesCmd) request() (*cedarpostv1.ListEntitiesRequest, error) {
	if l.Limit < 0 {
		return nil, misuse("--limit must not be negative")
	}
	req := &cedarpostv1.ListEntitiesRequest{Type: l.Type}
	if l.Ancestor != nil {
		req.Ancestor = l.Ancestor.EntityUid
	}
	if l.At != "" {
		req.At = &cedarpostv1.Revision{Token: l.At}
	}
	for _, text := range l.Attr {
		a, err := parseAttr(text)
		if err != nil {
			return nil, err
		}
		req.Attributes = append(req.Attributes, a)
	}
	return req, nil
}

// parseAttr reads NAME=VALUE.
func parseAttr(s string) (*cedarpostv1.AttributeEquals, error) {
	name, text, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return nil, misuse("--attr: %q is not NAME=VALUE", s)
	}
	a := &cedarpostv1.AttributeEquals{Name: name, Value: structpb.NewStringValue(text)}
	if json.Valid([]byte(text)) {
		record, err := parseContext(`{"value": ` + text + `}`)
		if err != nil {
			return nil, misuse("--attr %s: %w", name, err)
		}
		a.Value = record.GetFields()["value"]
	}
	return a, nil
}

// Run lists.
func (l *listEntitiesCmd) Run(ctx context.Context, c *console) error {
	req, err := l.request()
	if err != nil {
		return err
	}
	admin, err := l.dial()
	if err != nil {
		return err
	}
	rows := [][]string{{"ENTITY", "PARENTS", "ATTRIBUTES"}}
	for seen := 0; ; {
		req.PageSize = pageOf(l.Limit, seen)
		res, err := call(ctx, admin, admin.entities().ListEntities, req)
		if err != nil {
			return err
		}
		for _, e := range res.GetEntities() {
			if seen++; l.json() {
				if err := c.message(e); err != nil {
					return err
				}
				continue
			}
			rows = append(rows, []string{
				uidText(e.GetEntity().GetUid()), uidTexts(e.GetEntity().GetParents()), structText(e.GetEntity().GetAttrs()),
			})
		}
		req.PageToken = res.GetNextPageToken()
		if req.GetPageToken() == "" || seen == l.Limit {
			break
		}
	}
	if !l.json() {
		c.table(rows)
	}
	return nil
}

// pageOf is the size of the next page, when so many were seen of a limit.
func pageOf(limit, seen int) int32 {
	if limit == 0 {
		return maxPage
	}
	return int32(min(limit-seen, maxPage))
}

// structText is a record as JSON, "" if it is empty.
func structText(s *structpb.Struct) string {
	if len(s.GetFields()) == 0 {
		return ""
	}
	text, err := protoText(s)
	if err != nil {
		return err.Error()
	}
	return text
}
