package logformat

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// spanned is a part of a report. It covers a time span.
type spanned interface {
	GetFirst() *timestamppb.Timestamp
	GetLast() *timestamppb.Timestamp
}

// sumOf adds up the parts of a report, and returns the earliest and the latest time of them.
func sumOf[T spanned](list []T, number func(T) int64) (sum int64, first, last time.Time) {
	for i, part := range list {
		n := number(part)
		sum += min(n, math.MaxInt64-sum)
		if at := part.GetFirst().AsTime(); i == 0 || at.Before(first) {
			first = at
		}
		if at := part.GetLast().AsTime(); i == 0 || at.After(last) {
			last = at
		}
	}
	return sum, first, last
}

// counted adds count, start_time and end_time, which the base event has for an event that
// stands for many.
func counted(o object, n int64, first, last time.Time) {
	if n > 0 {
		o["count"], o["start_time"], o["end_time"] = n, first.UnixMilli(), last.UnixMilli()
	}
}

// ocsfReuse adds the uses of kept answers that a client reported.
func ocsfReuse(o object, r *cedarpostv1.ReuseReport) {
	hits, first, last := sumOf(r.GetReuses(), (*cedarpostv1.Reuse).GetHits)
	counted(o, hits, first, last)
	var list []object
	for _, u := range r.GetReuses() {
		list = append(list, object{"decision_id": u.GetDecisionId(), "hits": u.GetHits(), "first": millis(u.GetFirst()), "last": millis(u.GetLast())})
	}
	more := o["unmapped"].(object)
	more["report_id"], more["reuses"], more["lost"], more["refused"] = r.GetReportId(), list, r.GetLost(), r.GetRefused()
}

// ocsfFailedOpen adds the checks that a client let through without an answer.
func ocsfFailedOpen(o object, f *cedarpostv1.FailedOpen) {
	checks, first, last := sumOf(f.GetFailOpens(), (*cedarpostv1.FailOpen).GetCount)
	counted(o, checks, first, last)
	var list []object
	for _, c := range f.GetFailOpens() {
		list = append(list, object{
			"principal": uidText(c.GetPrincipal()), "action": uidText(c.GetAction()), "resource": uidText(c.GetResource()),
			"reason": c.GetReason(), "code": c.GetCode(), "count": c.GetCount(), "first": millis(c.GetFirst()), "last": millis(c.GetLast()),
		})
	}
	more := o["unmapped"].(object)
	more["report_id"], more["fail_opens"] = f.GetReportId(), list
}

// PublishRefusedText sums up refused uploads of a bundle in words: "dry run of shop refused, 3
// times: the bundle is not valid".
func PublishRefusedText(p *cedarpostv1.PublishRefused) string {
	what := "publish"
	if p.GetDryRun() {
		what = "dry run"
	}
	return fmt.Sprintf("%s of %s refused, %s: %s", what, p.GetBundle(), plural(p.GetCount(), "time"), p.GetReason())
}

// BreakGlassText sums up a publish past rules in words: "version 8: production is down; past: the bundle
// shop is frozen".
func BreakGlassText(g *cedarpostv1.BreakGlass) string {
	return fmt.Sprintf("version %d: %s; past: %s", g.GetVersion(), g.GetReason(), strings.Join(g.GetRules(), "; "))
}

// ProbingText sums up questions of a caller in words, with the first of them as an example:
// "invalid_question about Shop::User::\"bob\", 3 times, such as Shop::Action::\"ViewOrder\" on
// Shop::Order::\"42\"".
func ProbingText(p *cedarpostv1.Probing) string {
	text := p.GetReason()
	if p.GetPrincipal() != "" {
		text += " about " + p.GetPrincipal()
	}
	text += ", " + plural(p.GetCount(), "time")
	switch {
	case p.GetExample() == "":
		return text
	case p.GetCount() == 1:
		return text + ": " + p.GetExample()
	}
	return text + ", such as " + p.GetExample()
}

// ReuseText sums up a report of kept answers in words: "7 uses of 1 decision, 2 lost".
func ReuseText(r *cedarpostv1.ReuseReport) string {
	hits, _, _ := sumOf(r.GetReuses(), (*cedarpostv1.Reuse).GetHits)
	text := fmt.Sprintf("%s of %s", plural(hits, "use"), plural(int64(len(r.GetReuses())), "decision"))
	if r.GetLost() > 0 {
		text += fmt.Sprintf(", %d lost", r.GetLost())
	}
	if r.GetRefused() > 0 {
		text += fmt.Sprintf(", %d refused", r.GetRefused())
	}
	return text
}

// FailedOpenText sums up in words which checks a client let through without an answer. It
// gives the reason of the first one.
func FailedOpenText(f *cedarpostv1.FailedOpen) string {
	checks, _, _ := sumOf(f.GetFailOpens(), (*cedarpostv1.FailOpen).GetCount)
	text := plural(checks, "check") + " let through"
	if list := f.GetFailOpens(); len(list) > 0 {
		text += fmt.Sprintf(": %s (%s)", list[0].GetReason(), list[0].GetCode())
	}
	return text
}

// plural returns "1 check" or "3 checks".
func plural(n int64, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// ServerStartedText sums up the start of a server in words, such as: v1.2.0, max-staleness: "5s" -> "1s".
func ServerStartedText(s *cedarpostv1.ServerStarted) string {
	text := s.GetVersion()
	switch {
	case s.GetPreviousEventId() == "":
		return text + ", the first start"
	case len(s.GetDifferences()) == 0:
		return text + ", nothing changed"
	}
	for _, d := range s.GetDifferences() {
		text += fmt.Sprintf(", %s: %s -> %s", d.GetName(), strconv.Quote(d.GetBefore()), strconv.Quote(d.GetAfter()))
	}
	return text
}
