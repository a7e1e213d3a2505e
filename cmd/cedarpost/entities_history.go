package main

import (
	"context"
	"fmt"
	"strings"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type entityHistoryCmd struct {
	outputFlags
	UID   *uid   `arg:"" optional:"" name:"uid" help:"Only changes of this entity: Shop::User::bob."`
	Type  string `help:"Only changes of entities of this type." placeholder:"TYPE"`
	By    string `help:"Only changes that this caller of Cedarpost made." placeholder:"NAME"`
	Since moment `help:"Not before this time: 2006-01-02T15:04:05Z, 2006-01-02, 15:04 today, or 90m, 12h, 7d, 2w ago." placeholder:"TIME"`
	Until moment `help:"Before this time." placeholder:"TIME"`
	Limit int    `help:"At most this many; 0 is all (default ${default})." default:"20" placeholder:"N"`
	afterFlag
	adminFlags
}

// Help is the long help of history.
func (*entityHistoryCmd) Help() string {
	return `Examples:

  cedarpost entities history Shop::User::bob
  cedarpost entities history --type Shop::Role --by bootstrap --since 7d

With the token of a change, get prints the entity as it was after that change:

  cedarpost entities get Shop::User::bob --at TOKEN

Only changes that match all given filters are listed. Changes older than the --history-retention of the server are gone. With -o json, prints each EntityChange of the API as a line.`
}

// Run lists.
func (h *entityHistoryCmd) Run(ctx context.Context, c *console) error {
	if h.Limit < 0 {
		return misuse("--limit must not be negative")
	}
	admin, err := h.dial()
	if err != nil {
		return err
	}
	req := &cedarpostv1.QueryEntityChangesRequest{
		Type: h.Type, Caller: h.By, From: h.Since.timestamp(), To: h.Until.timestamp(),
	}
	if h.UID != nil {
		req.Uid = h.UID.EntityUid
	}
	rows := [][]string{{"TIME", "CHANGE", "ENTITY", "BY", "REVISION", "TOKEN"}}
	req.PageToken = h.After
	for seen := 0; ; {
		req.PageSize = pageOf(h.Limit, seen)
		res, err := call(ctx, admin, admin.entities().QueryEntityChanges, req)
		if err != nil {
			return err
		}
		for _, e := range res.GetChanges() {
			if seen++; h.json() {
				if err := c.message(e); err != nil {
					return err
				}
				continue
			}
			rows = append(rows, []string{
				localTime(e.GetTime()), strings.ToLower(e.GetKind().String()), uidText(e.GetUid()),
				e.GetCaller(), fmt.Sprint(e.GetRevision().GetNumber()), e.GetRevision().GetToken(),
			})
		}
		req.PageToken = res.GetNextPageToken()
		if req.GetPageToken() == "" || seen == h.Limit {
			break
		}
	}
	switch {
	case h.json():
	case len(rows) == 1:
		fmt.Fprintln(c.out, "no changes")
	default:
		c.table(rows)
	}
	c.more(req.GetPageToken(), "--since", h.Since.exact(), "--until", h.Until.exact())
	return nil
}
