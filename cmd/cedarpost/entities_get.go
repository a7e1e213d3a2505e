package main

import (
	"context"
	"fmt"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type getEntityCmd struct {
	outputFlags
	UID uid    `arg:"" name:"uid" help:"The entity: Shop::User::bob."`
	At  string `help:"Read the entity at this revision: a token, or a number (default: the newest)." placeholder:"TOKEN"`
	adminFlags
}

// Help is the long help of get.
func (*getEntityCmd) Help() string { return `With -o json, prints the GetEntityResponse of the API.` }

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
