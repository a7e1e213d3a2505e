package main

import (
	"fmt"
	"strings"

	"github.com/cedarpost/cedarpost/logformat"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// decision prints a record as JSON. It has a member uses if the answer was used again.
func (c *console) decision(d *cedarpostv1.DecisionRecord, uses *cedarpostv1.DecisionUses) error {
	text, err := logformat.JSON(d)
	if err != nil {
		return err
	}
	if uses != nil {
		more, err := logformat.JSON(uses)
		if err != nil {
			return err
		}
		text = strings.TrimSuffix(text, "}") + `,"uses":` + more + "}"
	}
	_, err = fmt.Fprintln(c.out, text)
	return err
}

// hitsText returns how often an answer was used again, for a table.
func hitsText(u *cedarpostv1.DecisionUses) string {
	switch {
	case u == nil:
		return "-"
	case u.GetIncomplete():
		return fmt.Sprintf("%d+", u.GetHits())
	}
	return fmt.Sprint(u.GetHits())
}

// usesText returns how often and when an answer was used again; "" for never.
func usesText(u *cedarpostv1.DecisionUses) string {
	if u == nil {
		return ""
	}
	text := count(u.GetHits(), "time", "times")
	if u.GetIncomplete() {
		text += " or more"
	}
	if u.GetFirst() != nil {
		text += fmt.Sprintf(", %s to %s", localTime(u.GetFirst()), localTime(u.GetLast()))
	}
	return text
}
