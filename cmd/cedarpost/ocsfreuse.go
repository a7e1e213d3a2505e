package main

import (
	"math"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// spanned is a part of a report, that says when it was.
type spanned interface {
	GetFirst() *timestamppb.Timestamp
	GetLast() *timestamppb.Timestamp
}

// sumOf adds up the parts of a report, and says when the first and the last was.
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

// counted adds the number of what happened, and when.
func counted(o object, n int64, first, last time.Time) {
	if n > 0 {
		o["count"], o["start_time"], o["end_time"] = n, first.UnixMilli(), last.UnixMilli()
	}
}

// ocsfReuse adds what was used again.
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

// ocsfFailedOpen adds what was let through.
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
