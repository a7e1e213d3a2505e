package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type countDecisionsCmd struct {
	outputFlags
	By string `required:"" help:"What to count by: principal, action, resource, field, policy or outcome." type:"word" enum:"principal,action,resource,field,policy,outcome" placeholder:"WORD"`
	filterFlags
	Limit int `help:"At most this many groups, the largest first (default ${default})." default:"20" placeholder:"N"`
	adminFlags
}

// Help is the long help of count.
func (*countDecisionsCmd) Help() string {
	return filterHelp + ` Without --since, counts the day before --until, or the last 24 hours.

By policy, a decision counts once for each policy that determined it. A decision that no policy determined does not count. By field, a decision counts once for each field that it permitted (allowed) or denied. With -o json, prints the CountDecisionsResponse of the API.`
}

// Run counts.
func (n *countDecisionsCmd) Run(ctx context.Context, c *console) error {
	filter, err := n.request()
	if err != nil {
		return err
	}
	if n.Limit < 1 || n.Limit > maxPage {
		return misuse("--limit is from 1 to %d", maxPage)
	}
	if filter.From == nil {
		until := time.Now()
		if filter.To != nil {
			until = filter.To.AsTime()
		}
		filter.From = timestamppb.New(until.Add(-24 * time.Hour))
	}
	admin, err := n.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.audit().CountDecisions, &cedarpostv1.CountDecisionsRequest{
		Filter: filter, Limit: int32(n.Limit),
		Group: cedarpostv1.CountDecisionsRequest_Group(cedarpostv1.CountDecisionsRequest_Group_value[strings.ToUpper(n.By)]),
	})
	if err != nil {
		return inFlags(err)
	}
	if n.json() {
		return c.message(res)
	}
	rows := [][]string{{strings.ToUpper(n.By), "ALLOWED", "DENIED", "BOTH"}}
	for _, g := range res.GetCounts() {
		rows = append(rows, []string{g.GetGroup(), fmt.Sprint(g.GetAllowed()), fmt.Sprint(g.GetDenied()), fmt.Sprint(g.GetAllowed() + g.GetDenied())})
	}
	if len(rows) > 1 {
		c.table(rows)
	}
	fmt.Fprintf(c.out, "%s since %s\n", count(res.GetTotal(), "decision", "decisions"), localTime(filter.GetFrom()))
	return nil
}
