package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type listDecisionsCmd struct {
	outputFlags
	filterFlags
	Limit  int  `help:"At most so many; 0 is all (default ${default})." default:"20" placeholder:"N"`
	Follow bool `help:"Show decisions as they are recorded, until interrupted."`
	adminFlags
}

// Help is the long help of list.
func (*listDecisionsCmd) Help() string {
	return filterHelp + ` With -o json, a line for each DecisionRecord of the API, and in it, as uses, the DecisionUses of an answer that was used again from a cache.

A row that is damaged in the database is shown as DAMAGED, with what is wrong with it in place of the policies (in JSON, as damaged), and its filters match by its columns.

With --follow, decisions come in the order of their commits, oldest first, within about a second, from --since on (default: now, by this machine's clock) and without a limit. The whole log is read for it and filtered here, so no filter needs a time, and --masked-value cannot be given.`
}

// Run lists.
func (l *listDecisionsCmd) Run(ctx context.Context, c *console) error {
	req, err := l.request()
	if err != nil {
		return err
	}
	if l.Limit < 0 {
		return misuse("--limit must not be negative")
	}
	admin, err := l.dial()
	if err != nil {
		return err
	}
	if l.Follow {
		return l.follow(ctx, c, admin, req)
	}
	rows := [][]string{slices.Insert(slices.Clone(listColumns), len(listColumns)-1, "REUSED")}
	damaged := 0
	for seen := 0; ; {
		req.PageSize = pageOf(l.Limit, seen)
		res, err := call(ctx, admin, admin.audit().QueryDecisions, req)
		if err != nil {
			return err
		}
		for _, d := range res.GetDecisions() {
			uses := res.GetUses()[d.GetDecisionId()]
			if d.GetDamaged() != "" {
				damaged++
			}
			if seen++; l.json() {
				if err := c.decision(d, uses); err != nil {
					return err
				}
				continue
			}
			row := decisionRow(d)
			rows = append(rows, slices.Insert(row, len(row)-1, hitsText(uses)))
		}
		req.PageToken = res.GetNextPageToken()
		if req.GetPageToken() == "" || seen == l.Limit {
			break
		}
	}
	switch {
	case l.json():
	case len(rows) == 1:
		fmt.Fprintln(c.out, "no decisions")
	default:
		c.table(rows)
	}
	c.warnDamaged(damaged)
	return nil
}

// follow shows what the export brings, as far as it matches.
func (l *listDecisionsCmd) follow(ctx context.Context, c *console, admin *peer, req *cedarpostv1.QueryDecisionsRequest) error {
	if req.GetMaskedValue() != "" {
		return misuse("--masked-value cannot be given with --follow")
	}
	if req.From == nil {
		req.From = timestamppb.Now()
	}
	err := admin.export(ctx, &cedarpostv1.ExportDecisionsRequest{From: req.From, To: req.To, Follow: true}, func(b *cedarpostv1.ExportDecisionsResponse) error {
		for _, e := range b.GetEntries() {
			d, bad := e.GetDecision(), damageOf(e)
			// Whether a row that is damaged would match cannot be told, so all are shown.
			if bad == nil && (d == nil || !matches(req, d)) {
				continue
			}
			if l.json() {
				var m proto.Message = e // of an event, and of a row that is missing
				if d != nil {
					m = d
				}
				if err := c.message(m); err != nil {
					return err
				}
				continue
			}
			var row []string
			if bad != nil {
				row = bad.cells(len(listColumns))
			} else {
				row = decisionRow(d)
			}
			for i := range row {
				row[i] = clean(row[i])
			}
			fmt.Fprintln(c.out, strings.Join(row, "  "))
		}
		return nil
	})
	select {
	case <-ctx.Done():
		return nil // that is how it ends
	default:
		return err
	}
}

// listColumns are those of the list; the follower leaves REUSED out.
var listColumns = []string{"TIME", "DECISION", "PRINCIPAL", "ACTION", "RESOURCE", "DENIED AT", "POLICIES", "ID"}

func decisionRow(d *cedarpostv1.DecisionRecord) []string {
	if bad := damageOf(&cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Decision{Decision: d}}); bad != nil {
		return bad.cells(len(listColumns))
	}
	at, policies := "", policyTexts(d.GetDeterminingPolicies())
	if d.DeniedAt != nil {
		at = d.GetDeniedAt().String()
	}
	if policies == "" {
		policies = "-"
	}
	return []string{
		d.GetTime().AsTime().Local().Format(time.DateTime), d.GetDecision().String(),
		uidText(d.GetPrincipal()), uidText(d.GetAction()), uidText(d.GetResource()), at, policies, d.GetDecisionId(),
	}
}
