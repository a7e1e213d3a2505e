package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/logformat"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type listDecisionsCmd struct {
	outputFlags
	filterFlags
	Limit int `help:"At most this many; 0 is all (default ${default}). Not with --follow." default:"20" placeholder:"N"`
	afterFlag
	Follow bool `help:"Show decisions as they are recorded, until interrupted."`
	adminFlags
}

// Help is the long help of list.
func (*listDecisionsCmd) Help() string {
	return filterHelp + ` With -o json, prints each DecisionRecord of the API as a line. If a client used the answer again from its cache, the record has the DecisionUses as uses.

A row that is damaged in the database is shown as DAMAGED, with the damage in place of the policies (in JSON, as damaged). Filters then match the columns of its row.

With --follow, each decision is shown within about a second of its commit, in the order of the commits, from --since on (default: now, by the clock of this machine). The client reads the whole log and filters it, so no filter needs a time, and --masked-value and --limit cannot be given.`
}

// Run lists.
func (l *listDecisionsCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	req, err := l.request()
	if err != nil {
		return err
	}
	if l.Limit < 0 {
		return misuse("--limit must not be negative")
	}
	if l.Follow && l.After != "" {
		return misuse("--after cannot be given with --follow; --since says where it begins")
	}
	if l.Follow && onCommandLine(k, "limit") {
		return misuse("--limit cannot be given with --follow, which shows decisions until it is interrupted")
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
	req.PageToken = l.After
	for seen := 0; ; {
		req.PageSize = pageOf(l.Limit, seen)
		res, err := call(ctx, admin, admin.audit().QueryDecisions, req)
		if err != nil {
			return inFlags(err)
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
	c.more(req.GetPageToken(), "--since", l.Since.exact(), "--until", l.Until.exact())
	return nil
}

// follow shows the decisions of an export that match.
func (l *listDecisionsCmd) follow(ctx context.Context, c *console, admin *peer, req *cedarpostv1.QueryDecisionsRequest) error {
	if req.GetMaskedValue() != "" {
		return misuse("--masked-value cannot be given with --follow")
	}
	if req.From == nil {
		req.From = timestamppb.Now()
	}
	err := admin.export(ctx, &cedarpostv1.ExportDecisionsRequest{From: req.From, To: req.To, Follow: true}, func(b *cedarpostv1.ExportDecisionsResponse) error {
		for _, e := range b.GetEntries() {
			d, bad := e.GetDecision(), logformat.DamageOf(e)
			// Nobody can tell whether a damaged row would match, so all of them are shown.
			if bad == nil && (d == nil || !matches(req, d)) {
				continue
			}
			if l.json() {
				var m proto.Message = e // a damaged event, or a missing row
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
				row = damagedRow(bad, len(listColumns))
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
		return nil // the normal end
	default:
		return err
	}
}

// listColumns are the columns of both. The list has REUSED as well.
var listColumns = []string{"TIME", "DECISION", "PRINCIPAL", "ACTION", "RESOURCE", "DENIED AT", "FIELDS", "POLICIES", "ID"}

// fieldsText says which fields a decision denied of those asked for; "-" if none were asked for.
func fieldsText(f *cedarpostv1.Fields) string {
	permitted, denied := len(f.GetPermitted()), f.GetDenied()
	switch {
	case permitted+len(denied) == 0:
		return "-"
	case len(denied) == 0:
		return fmt.Sprintf("all %d", permitted)
	case permitted == 0:
		return fmt.Sprintf("none of %d", len(denied))
	}
	text := fmt.Sprintf("%d of %d, not %s", permitted, permitted+len(denied), strings.Join(denied[:min(len(denied), 2)], ", "))
	if len(denied) > 2 {
		text += fmt.Sprintf(" and %d more", len(denied)-2)
	}
	return text
}

func decisionRow(d *cedarpostv1.DecisionRecord) []string {
	if bad := logformat.DamageOf(&cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Decision{Decision: d}}); bad != nil {
		return damagedRow(bad, len(listColumns))
	}
	at, policies := "", policyTexts(d.GetDeterminingPolicies())
	if d.DeniedAt != nil {
		at = d.GetDeniedAt().String()
	}
	if policies == "" {
		policies = "-"
	}
	return []string{
		localTime(d.GetTime()), d.GetDecision().String(),
		uidText(d.GetPrincipal()), uidText(d.GetAction()), uidText(d.GetResource()), at, fieldsText(d.GetFields()), policies, d.GetDecisionId(),
	}
}
