package main

import (
	"fmt"
	"strings"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// decision prints a record as JSON, with its uses in it if there are any.
func (c *console) decision(d *cedarpostv1.DecisionRecord, uses *cedarpostv1.DecisionUses) error {
	text, err := protoText(d)
	if err != nil {
		return err
	}
	if uses != nil {
		more, err := protoText(uses)
		if err != nil {
			return err
		}
		text = strings.TrimSuffix(text, "}") + `,"uses":` + more + "}"
	}
	_, err = fmt.Fprintln(c.out, text)
	return err
}

// hitsText is how often an answer was used again, in a table.
func hitsText(u *cedarpostv1.DecisionUses) string {
	switch {
	case u == nil:
		return "-"
	case u.GetIncomplete():
		return fmt.Sprintf("%d+", u.GetHits())
	}
	return fmt.Sprint(u.GetHits())
}

// usesText is the same in words; "" for never.
func usesText(u *cedarpostv1.DecisionUses) string {
	if u == nil {
		return ""
	}
	text := count(u.GetHits(), "time", "times")
	if u.GetIncomplete() {
		text += " or more"
	}
	if u.GetFirst() != nil {
		text += fmt.Sprintf(", %s to %s", u.GetFirst().AsTime().Local().Format(time.DateTime), u.GetLast().AsTime().Local().Format(time.DateTime))
	}
	return text
}

// reuseText sums up a report.
func reuseText(r *cedarpostv1.ReuseReport) string {
	hits, _, _ := sumOf(r.GetReuses(), (*cedarpostv1.Reuse).GetHits)
	text := fmt.Sprintf("%s of %s", count(hits, "use", "uses"), count(len(r.GetReuses()), "decision", "decisions"))
	if r.GetLost() > 0 {
		text += fmt.Sprintf(", %d lost", r.GetLost())
	}
	if r.GetRefused() > 0 {
		text += fmt.Sprintf(", %d refused", r.GetRefused())
	}
	return text
}

// failedOpenText sums up what went through without an answer.
func failedOpenText(f *cedarpostv1.FailedOpen) string {
	checks, _, _ := sumOf(f.GetFailOpens(), (*cedarpostv1.FailOpen).GetCount)
	text := count(checks, "check", "checks") + " let through"
	if list := f.GetFailOpens(); len(list) > 0 {
		text += fmt.Sprintf(": %s (%s)", list[0].GetReason(), list[0].GetCode())
	}
	return text
}
