package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/logformat"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type eventsCmd struct {
	outputFlags
	Kind    string `help:"Only change, authentication_failure, refused_right, log_read, retention_drop, checkpoint_key, reuse, failed_open, state_root, database_renewed, log_truncated, publish_refused, probing, break_glass or server_started." type:"word" enum:",change,authentication_failure,refused_right,log_read,retention_drop,checkpoint_key,reuse,failed_open,state_root,database_renewed,log_truncated,publish_refused,probing,break_glass,server_started" default:"" placeholder:"KIND"`
	Caller  string `help:"Only this caller of Cedarpost." placeholder:"NAME"`
	Subject string `help:"Only events about this entity, bundle, key, caller whose keys or grants were changed, procedure, day, report, address or principal." placeholder:"TEXT"`
	Since   moment `help:"Not before this time: 2006-01-02T15:04:05Z, 2006-01-02, 15:04 today, or 90m, 12h, 7d, 2w ago." placeholder:"TIME"`
	Until   moment `help:"Before this time." placeholder:"TIME"`
	Limit   int    `help:"At most this many; 0 is all (default ${default})." default:"20" placeholder:"N"`
	afterFlag
	adminFlags
}

// Help is the long help of events.
func (*eventsCmd) Help() string {
	return `The newest event is first. Only events that match all given filters are listed, and each filter has an index. A long subject or detail is cut. With -o json, prints each EventRecord of the API as a line. A row that is damaged in the database is shown as DAMAGED, with the damage (in JSON, as damaged).`
}

// Run lists.
func (l *eventsCmd) Run(ctx context.Context, c *console) error {
	if l.Limit < 0 {
		return misuse("--limit must not be negative")
	}
	admin, err := l.dial()
	if err != nil {
		return err
	}
	req := &cedarpostv1.QueryEventsRequest{
		From: l.Since.timestamp(), To: l.Until.timestamp(), Caller: l.Caller, Subject: l.Subject,
		Kind: cedarpostv1.EventRecord_Kind(cedarpostv1.EventRecord_Kind_value[strings.ToUpper(l.Kind)]),
	}
	damaged := 0
	rows := [][]string{{"TIME", "KIND", "CALLER", "SUBJECT", "DETAIL", "ID"}}
	req.PageToken = l.After
	for seen := 0; ; {
		req.PageSize = pageOf(l.Limit, seen)
		res, err := call(ctx, admin, admin.audit().QueryEvents, req)
		if err != nil {
			return err
		}
		for _, e := range res.GetEvents() {
			bad := logformat.DamageOf(&cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Event{Event: e}})
			if bad != nil {
				damaged++
			}
			if seen++; l.json() {
				if err := c.message(e); err != nil {
					return err
				}
				continue
			}
			if bad != nil {
				rows = append(rows, damagedRow(bad, len(rows[0])))
				continue
			}
			rows = append(rows, []string{
				localTime(e.GetTime()), strings.ToLower(e.GetKind().String()),
				e.GetCaller(), shortCell(e.GetSubject()), shortCell(eventDetail(e)), e.GetEventId(),
			})
		}
		req.PageToken = res.GetNextPageToken()
		if req.GetPageToken() == "" || seen == l.Limit {
			break
		}
	}
	switch {
	case l.json():
	case len(rows) == 1:
		fmt.Fprintln(c.out, "no events")
	default:
		c.table(rows)
	}
	c.warnDamaged(damaged)
	c.more(req.GetPageToken(), "--since", l.Since.exact(), "--until", l.Until.exact())
	return nil
}

// maxCell is how many characters of a text that may come from a request a table shows.
const maxCell = 160

// shortCell cuts a long text, so that one event does not make a table too wide to be read.
func shortCell(text string) string {
	if runes := []rune(text); len(runes) > maxCell {
		return string(runes[:maxCell]) + "…"
	}
	return text
}

// eventDetail returns the part of an event that depends on its kind, in a few words.
func eventDetail(e *cedarpostv1.EventRecord) string {
	switch d := e.GetDetail().(type) {
	case *cedarpostv1.EventRecord_Change:
		text := d.Change.GetOperation()
		if n := d.Change.GetEntityCount(); n > 0 {
			text += ", " + count(n, "entity", "entities")
		}
		if v := d.Change.GetVersion(); v > 0 {
			text += fmt.Sprintf(", version %d", v)
		}
		if who := d.Change.GetKeyCaller(); who != "" {
			text += ", a key of " + who
		}
		if why := d.Change.GetReason(); why != "" {
			text += ": " + why
		}
		return text
	case *cedarpostv1.EventRecord_AuthenticationFailure:
		f := d.AuthenticationFailure
		return fmt.Sprintf("%s, %s from %s", f.GetReason(), count(f.GetCount(), "time", "times"), f.GetAddress())
	case *cedarpostv1.EventRecord_PublishRefused:
		return logformat.PublishRefusedText(d.PublishRefused)
	case *cedarpostv1.EventRecord_Probing:
		return logformat.ProbingText(d.Probing)
	case *cedarpostv1.EventRecord_BreakGlass:
		return logformat.BreakGlassText(d.BreakGlass)
	case *cedarpostv1.EventRecord_RefusedRight:
		return fmt.Sprintf("%s, %s", d.RefusedRight.GetReason(), count(d.RefusedRight.GetCount(), "time", "times"))
	case *cedarpostv1.EventRecord_LogRead:
		if d.LogRead.GetRows() < 0 {
			return "a stream"
		}
		return count(d.LogRead.GetRows(), "row", "rows")
	case *cedarpostv1.EventRecord_RetentionDrop:
		return fmt.Sprintf("%s, %s", count(d.RetentionDrop.GetDecisions(), "decision", "decisions"), count(d.RetentionDrop.GetEvents(), "event", "events"))
	case *cedarpostv1.EventRecord_Reuse:
		return logformat.ReuseText(d.Reuse)
	case *cedarpostv1.EventRecord_FailedOpen:
		return logformat.FailedOpenText(d.FailedOpen)
	case *cedarpostv1.EventRecord_StateRoot:
		r := d.StateRoot
		return fmt.Sprintf("%s, %s, %s", count(r.GetEntities(), "entity", "entities"), count(r.GetBundles(), "bundle", "bundles"), count(r.GetKeys(), "key", "keys"))
	case *cedarpostv1.EventRecord_DatabaseRenewed:
		why := "it was restored"
		if d.DatabaseRenewed.GetCopied() {
			why = "it is a copy"
		}
		return why + "; before " + d.DatabaseRenewed.GetBefore()
	case *cedarpostv1.EventRecord_ServerStarted:
		return logformat.ServerStartedText(d.ServerStarted)
	case *cedarpostv1.EventRecord_LogTruncated:
		t, err := auditlog.PeekTruncation([]byte(d.LogTruncated.GetStatement()))
		if err != nil {
			return err.Error()
		}
		return truncatedText(t)
	}
	return ""
}
