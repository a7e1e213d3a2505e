package main

import (
	"context"
	"encoding/json"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type listEntitiesCmd struct {
	outputFlags
	Type     string   `help:"Only this type: Shop::User." placeholder:"TYPE"`
	Ancestor *uid     `help:"Only descendants of this entity: its members, their members, and so on." placeholder:"UID"`
	Attr     []string `help:"Only entities whose attribute has this value, as JSON or plain text; needs --type. Can be repeated." placeholder:"NAME=VALUE" sep:"none"`
	At       string   `help:"List entities at this revision: a token, or a number (default: the newest)." placeholder:"TOKEN"`
	Limit    int      `help:"At most this many; 0 is all (default ${default})." default:"0" placeholder:"N"`
	afterFlag
	adminFlags
}

// Help is the long help of list.
func (*listEntitiesCmd) Help() string {
	return `Examples:

  cedarpost entities list --ancestor Shop::Role::support
  cedarpost entities list --type Shop::User --attr region=eu --attr suspended=false
  cedarpost entities list --type Shop::Order --attr 'owner={"type": "Shop::User", "id": "bob"}'

Only entities that match all given filters are listed. A value that is not JSON is a text. A text that is also JSON, like "true" or the zip code "12345", needs quotes: --attr 'zip="12345"'. All entities are read at one revision. With -o json, prints each entity as a line, with the revision of its last change.`
}

// request returns the filters as a message of the API.
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
	req.PageToken = l.After
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
	c.more(req.GetPageToken())
	return nil
}
