package cedarpost

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

const (
	reportSize = 100 // the most reuses in one report, and the most fail-opens
	// maxUnreported bounds the memory of uses that wait to be reported. Beyond it no answer
	// is reused, because the use could not be reported: the check goes to the service.
	maxUnreported = 16 << 20
	// useBytes is about how much memory the uses of one answer take, without its id: first
	// as counts, later as a part of a report.
	useBytes      = 256
	maxFailOpens  = 1000 // different fail-opens in one interval
	reportTimeout = 5 * time.Second
)

// uses counts how often an answer was reused since the last report. It is kept until it is
// reported. It has no pointer to the answer, which the cache may drop earlier.
type uses struct {
	id   string // of the decision
	hits atomic.Int64
	last atomic.Int64 // wall clock
}

// bytesOf estimates the memory that the uses of a decision take until they are reported.
func bytesOf(id string) int64 { return useBytes + int64(len(id)) }

// reporter reports every reuse of an answer to the service, so that the log has them all. A
// report that may have been lost is sent again unchanged; the service counts it once.
type reporter struct {
	send func(context.Context, *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error)

	unreported atomic.Int64 // about how many bytes used and pending take
	reported   atomic.Int64 // uses that are in the log
	lost       atomic.Int64 // uses that will never be in the log
	wakeup     chan struct{}

	mu   sync.Mutex
	used []firstUse
	open map[failOpen]*openCount
	// lostOpen counts fail-opens beyond maxFailOpens.
	lostOpen int64

	// sending is held to send reports. It protects pending, oldest first, and told.
	sending sync.Mutex
	pending []*cedarpostv1.ReportReuseRequest
	told    int64 // how many of lost were reported as lost
}

// firstUse has the uses of an answer and the time of the first one.
type firstUse struct {
	*uses
	at int64 // wall clock
}

type failOpen struct {
	principal, action, resource EntityUID
	reason                      string
	code                        connect.Code
}

// clone copies the strings: each may be a part of a larger string of the caller, which would
// stay in memory.
func (f failOpen) clone() failOpen {
	for _, u := range []*EntityUID{&f.principal, &f.action, &f.resource} {
		*u = EntityUID{strings.Clone(u.Type), strings.Clone(u.ID)}
	}
	f.reason = strings.Clone(f.reason)
	return f
}

type openCount struct{ count, first, last int64 }

func newReporter() *reporter {
	return &reporter{wakeup: make(chan struct{}, 1), open: map[failOpen]*openCount{}}
}

// use counts a use of an answer before the answer is returned. It returns false if the
// answer must not be reused.
func (r *reporter) use(e *entry, now instant) bool {
	if r.unreported.Load() >= maxUnreported {
		return false
	}
	if e.last.Load() < now.wall {
		e.last.Store(now.wall)
	}
	if e.hits.Add(1) > 1 {
		return true
	}
	size := bytesOf(e.id)
	n := r.unreported.Add(size)
	r.mu.Lock()
	r.used = append(r.used, firstUse{e.uses, now.wall})
	r.mu.Unlock()
	if n >= maxUnreported/10 && n-size < maxUnreported/10 {
		signal(r.wakeup) // report before the interval ends
	}
	return true
}

// letThrough counts a check that failed open.
func (r *reporter) letThrough(c *Check, code connect.Code, now instant) {
	key := failOpen{c.Principal, c.Action, c.Resource, cut(c.FailOpen), code}
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.open[key]
	if n == nil && len(r.open) >= maxFailOpens {
		r.lostOpen++
		return
	}
	if n == nil {
		n = &openCount{first: now.wall, last: now.wall}
		r.open[key.clone()] = n
	}
	n.count++
	// Calls may arrive here in another order than they read the clock.
	n.first, n.last = min(n.first, now.wall), max(n.last, now.wall)
}

// cut shortens a reason to the length that a report may have.
func cut(reason string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(reason[:min(len(reason), 256)], ""), "\x00", "")
}

// run reports at intervals until ctx ends.
func (r *reporter) run(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-r.wakeup:
		}
		_ = r.flush(ctx) // after an error, the rest is sent the next time
	}
}

// flush reports all uses. After an error the rest is kept. Pending reports are sent before
// new ones are made, so that they do not grow in number while the service is away.
func (r *reporter) flush(ctx context.Context) error {
	r.sending.Lock()
	defer r.sending.Unlock()
	if err := r.sendAll(ctx); err != nil {
		return err
	}
	r.gather()
	return r.sendAll(ctx)
}

func (r *reporter) sendAll(ctx context.Context) error {
	for len(r.pending) > 0 {
		report := r.pending[0]
		ctx, cancel := context.WithTimeout(ctx, reportTimeout)
		res, err := r.send(ctx, report)
		cancel()
		lost := refused(report, int(res.GetRefused()))
		if connect.CodeOf(err) == connect.CodeInvalidArgument {
			// One item is invalid and will always be refused. Halve the report, so that the
			// others are accepted.
			if a, b := halve(report); a != nil {
				r.pending = append([]*cedarpostv1.ReportReuseRequest{a, b}, r.pending[1:]...)
				continue
			}
			r.told -= report.GetLost()
			r.lost.Add(opened(report))
			lost, err = hits(report), nil
		}
		if err != nil {
			return err
		}
		r.pending[0] = nil // otherwise the array would keep the report in memory
		r.pending = r.pending[1:]
		for _, u := range report.GetReuses() {
			r.unreported.Add(-bytesOf(u.GetDecisionId()))
		}
		r.lost.Add(lost)
		r.reported.Add(hits(report) - lost)
	}
	return nil
}

// halve splits a report into two with ids of their own. It returns nil for a report with a
// single item.
func halve(r *cedarpostv1.ReportReuseRequest) (a, b *cedarpostv1.ReportReuseRequest) {
	n := len(r.GetReuses()) + len(r.GetFailOpens())
	if n < 2 {
		return nil, nil
	}
	reuses := min(n/2, len(r.GetReuses()))
	opens := n/2 - reuses
	a = &cedarpostv1.ReportReuseRequest{ReportId: uuid.NewString(), Lost: r.GetLost(), Reuses: r.GetReuses()[:reuses], FailOpens: r.GetFailOpens()[:opens]}
	b = &cedarpostv1.ReportReuseRequest{ReportId: uuid.NewString(), Reuses: r.GetReuses()[reuses:], FailOpens: r.GetFailOpens()[opens:]}
	return a, b
}

// refused counts the uses of decisions that the service refused because of their age. These
// are the oldest decisions of the report; their ids begin with the time.
func refused(r *cedarpostv1.ReportReuseRequest, decisions int) (n int64) {
	reuses := slices.SortedFunc(slices.Values(r.GetReuses()), func(a, b *cedarpostv1.Reuse) int {
		return strings.Compare(a.GetDecisionId(), b.GetDecisionId())
	})
	for _, u := range reuses[:min(decisions, len(reuses))] {
		n += u.GetHits()
	}
	return n
}

// hits counts the uses in a report.
func hits(report *cedarpostv1.ReportReuseRequest) (n int64) {
	for _, u := range report.GetReuses() {
		n += u.GetHits()
	}
	return n
}

// opened counts the checks in a report that failed open.
func opened(report *cedarpostv1.ReportReuseRequest) (n int64) {
	for _, f := range report.GetFailOpens() {
		n += f.GetCount()
	}
	return n
}

// gather makes reports of all uses that were counted since the last call.
func (r *reporter) gather() {
	r.mu.Lock()
	used, open := r.used, r.open
	r.used, r.open = nil, map[failOpen]*openCount{}
	r.lost.Add(r.lostOpen)
	r.lostOpen = 0
	r.mu.Unlock()

	var reuses []*cedarpostv1.Reuse
	for _, u := range used {
		// A use from here on puts the answer into the next list.
		n := u.hits.Swap(0)
		reuses = append(reuses, &cedarpostv1.Reuse{
			DecisionId: u.id, Hits: n, First: wallTime(u.at), Last: wallTime(max(u.last.Load(), u.at)),
		})
	}
	var opens []*cedarpostv1.FailOpen
	for k, n := range open {
		opens = append(opens, &cedarpostv1.FailOpen{
			Principal: protoUID(k.principal), Action: protoUID(k.action), Resource: protoUID(k.resource),
			Reason: k.reason, Code: k.code.String(), Count: n.count, First: wallTime(n.first), Last: wallTime(n.last),
		})
	}
	lost := r.lost.Load() - r.told
	r.told += lost
	for len(reuses) > 0 || len(opens) > 0 || lost > 0 {
		report := &cedarpostv1.ReportReuseRequest{ReportId: uuid.NewString(), Lost: lost}
		lost = 0
		report.Reuses, reuses = split(reuses)
		report.FailOpens, opens = split(opens)
		r.pending = append(r.pending, report)
	}
}

func split[T any](list []T) (head, tail []T) {
	n := min(len(list), reportSize)
	return list[:n:n], list[n:]
}

func wallTime(nanos int64) *timestamppb.Timestamp { return timestamppb.New(time.Unix(0, nanos)) }

// close reports all remaining uses, and tries again until ctx ends.
func (r *reporter) close(ctx context.Context) error {
	var cause error // the newest error other than a deadline, which says more than that ctx ended
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := r.flush(ctx)
		if cause == nil || connect.CodeOf(err) != connect.CodeDeadlineExceeded {
			cause = err
		}
		switch connect.CodeOf(err) {
		case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeUnimplemented:
			return r.giveUp(err) // a later report would be refused too
		}
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return r.giveUp(cause)
		case <-time.After(wait):
		}
	}
}

// giveUp counts all uses that are not reported as lost.
func (r *reporter) giveUp(err error) error {
	r.sending.Lock()
	defer r.sending.Unlock()
	r.gather()
	used, open := int64(0), int64(0)
	for _, p := range r.pending {
		used += hits(p)
		open += opened(p)
	}
	r.pending = nil
	r.lost.Add(used)
	return fmt.Errorf("cedarpost: %d uses of answers and %d checks that failed open are not in the log: %w", used, open, err)
}
