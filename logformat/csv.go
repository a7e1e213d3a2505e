package logformat

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// csvColumns are the columns of an export as CSV. docs/audit.md describes them.
var csvColumns = []string{
	"leaf", "row", "kind", "time", "id", "caller", "server", "principal", "action", "resource", "decision", "denied_at",
	"policies", "fields_permitted", "fields_denied", "revision", "request_id", "trace_id", "subject", "detail",
}

// CSVHead returns the first line of a CSV file: the names of the columns.
func CSVHead() string { return csvLine(csvColumns) }

// CSV returns a row of a batch as a line of CSV (RFC 4180). A list is one cell with a JSON
// array, because a name can contain any separator.
func CSV(b *cedarpostv1.ExportDecisionsResponse, row int) (string, error) {
	e := b.GetEntries()[row]
	place := []string{fmt.Sprint(b.GetLeaf()), fmt.Sprint(row)}
	if d := DamageOf(e); d != nil {
		return csvDamage(place, d), nil
	}
	if d := e.GetDecision(); d != nil {
		return csvDecision(place, d), nil
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
	return csvLine(append(place, strings.ToLower(v.GetKind().String()), csvTime(v.GetTime().AsTime()), v.GetEventId(), v.GetCaller(), v.GetServer(),
		"", "", "", "", "", "", "", "", revision, v.GetRequestId(), v.GetTraceId(), v.GetSubject(), detail)), nil
}

func csvDecision(place []string, d *cedarpostv1.DecisionRecord) string {
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
	return csvLine(append(place, "decision", csvTime(d.GetTime().AsTime()), d.GetDecisionId(), d.GetCaller(), d.GetServer(),
		uidText(d.GetPrincipal()), uidText(d.GetAction()), uidText(d.GetResource()), d.GetDecision().String(), deniedAt,
		listText(policies), permitted, denied, fmt.Sprint(d.GetRevision()), d.GetRequestId(), d.GetTraceId(), "", ""))
}

// csvDamage leaves the cells empty that are not known of a damaged row.
func csvDamage(place []string, d *Damage) string {
	at := ""
	if d.Time != nil {
		at = csvTime(d.Time.AsTime())
	}
	cells := append(slices.Clone(place), d.Kind, at, d.ID)
	for len(cells) < len(csvColumns)-2 {
		cells = append(cells, "")
	}
	return csvLine(append(cells, d.Of, d.Reason))
}

func csvTime(t time.Time) string { return t.Format("2006-01-02T15:04:05.000Z") }

func listText(list []string) string {
	if list == nil {
		list = []string{}
	}
	text, _ := json.Marshal(list) // strings always marshal
	return string(text)
}

// detailText returns the part of an event that depends on its kind, as JSON.
func detailText(v *cedarpostv1.EventRecord) (string, error) {
	m := v.ProtoReflect()
	field := m.WhichOneof(m.Descriptor().Oneofs().ByName("detail"))
	if field == nil {
		return "", nil
	}
	return JSON(m.Get(field).Message().Interface())
}

// csvLine joins cells to a line of RFC 4180. A spreadsheet runs a cell that begins with one
// of = + - @, a tab or a carriage return as a formula (OWASP, CSV injection), and clients
// choose many of the texts, so such a cell gets an apostrophe in front.
func csvLine(cells []string) string {
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
