package main

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

const maxPage = 1000

type entitiesCmd struct {
	Import importCmd       `cmd:"" help:"Put entities from a file."`
	Get    getEntityCmd    `cmd:"" help:"Read one entity."`
	List   listEntitiesCmd `cmd:"" help:"List entities by type and id."`
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
	Type  string `help:"Only entities of this type: Shop::User." placeholder:"TYPE"`
	Limit int    `help:"At most so many; 0 is all (default ${default})." default:"0" placeholder:"N"`
	adminFlags
}

// Help is the long help of list.
func (*listEntitiesCmd) Help() string {
	return `All are read at one revision. With -o json, a line for each entity, with the revision of its last change.`
}

// Run lists.
func (l *listEntitiesCmd) Run(ctx context.Context, c *console) error {
	if l.Limit < 0 {
		return misuse("--limit must not be negative")
	}
	admin, err := l.dial()
	if err != nil {
		return err
	}
	rows := [][]string{{"ENTITY", "PARENTS", "ATTRIBUTES"}}
	seen := 0
	for token := ""; ; {
		res, err := call(ctx, admin, admin.entities().ListEntities, &cedarpostv1.ListEntitiesRequest{
			Type: l.Type, PageSize: pageOf(l.Limit, seen), PageToken: token,
		})
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
		token = res.GetNextPageToken()
		if token == "" || seen == l.Limit {
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
