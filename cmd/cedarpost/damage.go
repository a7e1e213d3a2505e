package main

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// damage is a row of the log that the server could not give out.
type damage struct {
	// what is "damaged" or "missing"; of is "decision" or "event", "" if that is not
	// known.
	what, of string
	id       string // "" for a row that is missing
	at       *timestamppb.Timestamp
	how      string
}

// damageOf is nil for a row that is whole.
func damageOf(e *cedarpostv1.LogEntry) *damage {
	switch {
	case e.GetDecision().GetDamaged() != "":
		d := e.GetDecision()
		return &damage{"damaged", "decision", d.GetDecisionId(), d.GetTime(), d.GetDamaged()}
	case e.GetEvent().GetDamaged() != "":
		v := e.GetEvent()
		return &damage{"damaged", "event", v.GetEventId(), v.GetTime(), v.GetDamaged()}
	case e.GetMissing() != "":
		return &damage{what: "missing", how: e.GetMissing()}
	}
	return nil
}

// csvDamage is the row of an export.
func csvDamage(head []string, d *damage) string {
	at := ""
	if d.at != nil {
		at = csvTime(d.at.AsTime())
	}
	cells := append(slices.Clone(head), d.what, at, d.id)
	for len(cells) < len(csvColumns)-2 {
		cells = append(cells, "")
	}
	return csvRow(append(cells, d.of, d.how))
}

// ocsfDamage is the row of an export. A row that is missing has no id and no time.
func ocsfDamage(leaf int64, row int, d *damage) object {
	message := "a row of the log is " + d.what + ": " + d.how
	id, log := d.id, d.of+"s"
	if d.of == "" {
		id, log = fmt.Sprintf("leaf %d row %d", leaf, row), "log"
	}
	o := ocsfHead(apiActivity, activityOther, severityMedium, d.at, id, log, message)
	o["metadata"].(object)["event_code"] = d.what
	o["actor"] = object{"user": named("")}
	o["api"] = object{"operation": "ExportDecisions", "service": named("Cedarpost")}
	o["src_endpoint"], o["dst_endpoint"] = named(""), named("")
	succeeded(o, false)
	o["status_detail"] = d.how
	return o
}

// cells is the row of a table whose last two columns are text and an id.
func (d *damage) cells(columns int) []string {
	row := []string{"-", "DAMAGED"}
	if d.at != nil {
		row[0] = d.at.AsTime().Local().Format(time.DateTime)
	}
	if d.what == "missing" {
		row[1] = "MISSING"
	}
	for len(row) < columns-2 {
		row = append(row, "-")
	}
	return append(row, d.how, d.id)
}

// warnDamaged says so besides the output, which a program may read.
func (c *console) warnDamaged(n int) {
	if n > 0 {
		fmt.Fprintf(c.err, "%s damaged: verify the log (cedarpost audit verify)\n", count(n, "row is", "rows are"))
	}
}
