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
	reportSize = 100 // reuses, and fail-opens, of one report
	// maxUnreported bounds the bytes that uses take until they are reported. Beyond it no
	// answer is reused: what cannot be accounted for is asked.
	maxUnreported = 16 << 20
	// useBytes is about how much memory the uses of one answer take, without its id: first
	// their counts, later their part of a report.
	useBytes      = 256
	maxFailOpens  = 1000 // told apart in one interval
	reportTimeout = 5 * time.Second
)

// uses counts how often an answer was given again since the last report. It is kept until
// it is reported, so it has no pointer to the answer: the cache may drop that before.
type uses struct {
	id   string // of the decision
	hits atomic.Int64
	last atomic.Int64 // wall clock
}

// bytesOf is about what uses of the answer to a decision take until they are reported.
func bytesOf(id string) int64 { return useBytes + int64(len(id)) }

// reporter tells the service of every answer that was given again, so that its log
// has all that was answered. A report that may have been lost is sent again as it
// was, and counts once.
type reporter struct {
	send func(context.Context, *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error)

	unreported atomic.Int64 // bytes that used and pending take, about
	reported   atomic.Int64 // uses that are in the log
	lost       atomic.Int64 // uses that will not be
	wakeup     chan struct{}

	mu   sync.Mutex
	used []firstUse
	open map[failOpen]*openCount
	// lostOpen are fail-opens beyond maxFailOpens.
	lostOpen int64

	// sending is held by who sends. It owns pending, oldest first, and told.
	sending sync.Mutex
	pending []*cedarpostv1.ReportReuseRequest
	told    int64 // of lost, what the service was told of
}

// firstUse has the uses of an answer, and when the first of them was.
type firstUse struct {
	*uses
	at int64 // wall clock
}

type failOpen struct {
	principal, action, resource EntityUID
	reason                      string
	code                        connect.Code
}

// clone copies the strings, which may be parts of larger strings of the caller's that
// would stay in memory.
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

// use counts a use of an answer, or says that it may not be used. It is called before
// the answer is given.
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
		signal(r.wakeup) // sooner than its time
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
	// Who read the clock first need not come first.
	n.first, n.last = min(n.first, now.wall), max(n.last, now.wall)
}

// cut shortens a reason to what a report may carry.
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
		_ = r.flush(ctx) // what remains is sent the next time
	}
}

// flush reports all that there is. After an error the rest is kept. What waits already
// goes first, and only then more is put behind it: so it does not grow while there is
// nowhere to report to.
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
			// One thing in it is to blame. It will never be taken, and all else can be.
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
		r.pending[0] = nil // or the array behind the rest would hold it
		r.pending = r.pending[1:]
		for _, u := range report.GetReuses() {
			r.unreported.Add(-bytesOf(u.GetDecisionId()))
		}
		r.lost.Add(lost)
		r.reported.Add(hits(report) - lost)
	}
	return nil
}

// halve makes two reports of one, neither of which was sent, or nil of one that tells
// of one thing.
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

// refused are the uses of the so many decisions of a report that were refused for
// their age: the oldest, as their ids begin with the time.
func refused(r *cedarpostv1.ReportReuseRequest, decisions int) (n int64) {
	reuses := slices.SortedFunc(slices.Values(r.GetReuses()), func(a, b *cedarpostv1.Reuse) int {
		return strings.Compare(a.GetDecisionId(), b.GetDecisionId())
	})
	for _, u := range reuses[:min(decisions, len(reuses))] {
		n += u.GetHits()
	}
	return n
}

func hits(report *cedarpostv1.ReportReuseRequest) (n int64) {
	for _, u := range report.GetReuses() {
		n += u.GetHits()
	}
	return n
}

// opened are the checks that failed open.
func opened(report *cedarpostv1.ReportReuseRequest) (n int64) {
	for _, f := range report.GetFailOpens() {
		n += f.GetCount()
	}
	return n
}

// gather makes reports of what was counted since.
func (r *reporter) gather() {
	r.mu.Lock()
	used, open := r.used, r.open
	r.used, r.open = nil, map[failOpen]*openCount{}
	r.lost.Add(r.lostOpen)
	r.lostOpen = 0
	r.mu.Unlock()

	var reuses []*cedarpostv1.Reuse
	for _, u := range used {
		// Whoever counts from here on puts the answer on the next list.
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

// close reports the rest, trying until ctx ends.
func (r *reporter) close(ctx context.Context) error {
	var cause error // says more than that the time is over, if anything does
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := r.flush(ctx)
		if cause == nil || connect.CodeOf(err) != connect.CodeDeadlineExceeded {
			cause = err
		}
		switch connect.CodeOf(err) {
		case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeUnimplemented:
			return r.giveUp(err) // it will not be taken later either
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

// giveUp counts what is not reported as lost.
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
