package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// csvColumns are the columns of an export as CSV; docs/audit.md describes them.
var csvColumns = []string{
	"leaf", "row", "kind", "time", "id", "caller", "server", "principal", "action", "resource", "decision", "denied_at",
	"policies", "fields_permitted", "fields_denied", "revision", "request_id", "trace_id", "subject", "detail",
}

var csvHead = csvRow(csvColumns)

// csvLine is a row of the log. A list is JSON in one cell, for any character can be
// in a name.
func csvLine(leaf int64, row int, e *cedarpostv1.LogEntry) (string, error) {
	head := []string{fmt.Sprint(leaf), fmt.Sprint(row)}
	if d := damageOf(e); d != nil {
		return csvDamage(head, d), nil
	}
	if d := e.GetDecision(); d != nil {
		deniedAt := ""
		if d.DeniedAt != nil {
			deniedAt = d.GetDeniedAt().String()
		}
		policies := make([]string, len(d.GetDeterminingPolicies()))
		for i, p := range d.GetDeterminingPolicies() {
			policies[i] = policyText(p)
		}
		permitted, denied := "", ""
		if f := d.GetFields(); f != nil {
			permitted, denied = listText(f.GetPermitted()), listText(f.GetDenied())
		}
		return csvRow(append(head, "decision", csvTime(d.GetTime().AsTime()), d.GetDecisionId(), d.GetCaller(), d.GetServer(),
			uidText(d.GetPrincipal()), uidText(d.GetAction()), uidText(d.GetResource()), d.GetDecision().String(), deniedAt,
			listText(policies), permitted, denied, fmt.Sprint(d.GetRevision()), d.GetRequestId(), d.GetTraceId(), "", "")), nil
	}
	v := e.GetEvent()
	detail, err := detailText(v)
	if err != nil {
		return "", err
	}
	revision := ""
	if v.GetRevision() != 0 {
		revision = fmt.Sprint(v.GetRevision())
	}
	return csvRow(append(head, strings.ToLower(v.GetKind().String()), csvTime(v.GetTime().AsTime()), v.GetEventId(), v.GetCaller(), v.GetServer(),
		"", "", "", "", "", "", "", "", revision, v.GetRequestId(), v.GetTraceId(), v.GetSubject(), detail)), nil
}

func csvTime(t time.Time) string { return t.Format("2006-01-02T15:04:05.000Z") }

func listText(list []string) string {
	if list == nil {
		list = []string{}
	}
	text, _ := json.Marshal(list) // strings always marshal
	return string(text)
}

// detailText is what is particular to the kind of an event, as JSON.
func detailText(v *cedarpostv1.EventRecord) (string, error) {
	m := v.ProtoReflect()
	field := m.WhichOneof(m.Descriptor().Oneofs().ByName("detail"))
	if field == nil {
		return "", nil
	}
	return protoText(m.Get(field).Message().Interface())
}

// csvRow is a line of RFC 4180. A cell that a spreadsheet would take for a formula
// begins with an apostrophe: ids come from anywhere.
func csvRow(cells []string) string {
	var b strings.Builder
	for i, cell := range cells {
		if i > 0 {
			b.WriteByte(',')
		}
		if cell != "" && strings.ContainsRune("=+-@\t\r", rune(cell[0])) {
			cell = "'" + cell
		}
		if strings.ContainsAny(cell, "\",\r\n") {
			cell = `"` + strings.ReplaceAll(cell, `"`, `""`) + `"`
		}
		b.WriteString(cell)
	}
	b.WriteString("\r\n")
	return b.String()
}
