package decisionlog

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// Limits of what is counted and recorded of one kind for one caller. All callers that are not
// authenticated count as one.
const (
	notedInterval  = 10 * time.Second // until the second record of a subject; it doubles each time
	notedLongest   = time.Minute      // between two records of a subject
	notedBurst     = 60               // events at once
	notedPerMinute = 10               // events after that
	notedSubjects  = 100              // subjects that are counted apart
	notedAddresses = 20               // addresses that are counted apart; of more, their networks
)

// others is the subject of what is not counted apart.
const others = "others"

// Noted counts what callers can do as often as they like: fail to authenticate, call
// what they have no right to, have a bundle refused, try out questions. It must not fill the log, and must not delay other calls. So the
// first of them with one kind, caller and subject is recorded at once, in the background. The next
// ones with the same three are counted and recorded together, less and less often. When a caller
// has used up its events, or has too many subjects, the rest is counted together under the subject
// "others". So a day has at most some megabytes of events of one kind and caller, and no count is
// lost.
type Noted struct {
	recorder *Recorder
	wakeup   chan struct{}
	now      func() time.Time // tests set the time

	mu     sync.Mutex
	groups map[notedGroupKey]*notedGroup
	fresh  []notedKey // not recorded yet
}

type notedGroupKey struct {
	kind   cedarpostv1.EventRecord_Kind
	caller string
}

// notedGroup is everything of one kind by one caller.
type notedGroup struct {
	seen   map[notedKey]*noted
	events float64 // that may be recorded now
	filled time.Time
}

// notedKey is what is counted together. what has few values, except of refused rights: it is what the
// call was about, so that each refused action is in the log.
type notedKey struct {
	notedGroupKey
	subject, what string
}

// noted counts what has one key. count of it are not recorded yet.
type noted struct {
	about       about // the first
	count       int64
	first, last time.Time
	interval    time.Duration // until the next record; 0: none is recorded yet
	next        time.Time
}

// about is what an event tells about the first thing that it counts.
type about struct {
	text     string // procedure, reason or example
	dryRun   bool
	findings []string
	found    int
	call     Call
}

// NewNoted returns a counter that records with r. Nothing is recorded until [Noted.Run] runs.
func NewNoted(r *Recorder) *Noted {
	return &Noted{recorder: r, wakeup: make(chan struct{}, 1), now: time.Now, groups: map[notedGroupKey]*notedGroup{}}
}

// AuthenticationFailure notes that a caller could not be authenticated. peer is its address and
// port, procedure the RPC, and reason why authentication failed. reason must come from a small
// fixed set.
func (n *Noted) AuthenticationFailure(peer, procedure, reason string) {
	address, _, err := net.SplitHostPort(peer)
	if err != nil {
		address = "unknown"
	}
	n.note(cedarpostv1.EventRecord_AUTHENTICATION_FAILURE, "", reason, about{text: procedure}, address, networkOf(address))
}

// networkOf returns the network of an address: /24 for IPv4, /64 for IPv6. One attacker often has
// all addresses of such a network.
func networkOf(address string) string {
	ip, err := netip.ParseAddr(address)
	if err != nil {
		return address
	}
	ip = ip.Unmap()
	bits := 64
	if ip.Is4() {
		bits = 24
	}
	p, err := ip.WithZone("").Prefix(bits)
	if err != nil {
		return address
	}
	return p.String()
}

// Limits of the texts in one event, in bytes.
const (
	maxNotedReason   = 1 << 10
	maxNotedText     = 512
	maxNotedSubject  = 256
	maxNotedFindings = 5
)

// PublishRefused notes that a bundle of the call's caller was refused. reason is the message of
// the refusal, and findings are its findings.
func (n *Noted) PublishRefused(ctx context.Context, bundle string, dryRun bool, reason string, findings []string) {
	a := about{text: bounded(reason, maxNotedReason), dryRun: dryRun, found: len(findings), call: callFrom(ctx)}
	for _, f := range findings[:min(len(findings), maxNotedFindings)] {
		a.findings = append(a.findings, bounded(f, maxNotedText))
	}
	what := "publish"
	if dryRun {
		what = "dry run"
	}
	n.note(cedarpostv1.EventRecord_PUBLISH_REFUSED, a.call.Caller, what, a, bounded(bundle, maxNotedSubject))
}

// Reasons of [Noted.Probing].
const (
	// ProbingExplained is an explained question.
	ProbingExplained = "explained"
	// ProbingInvalid is a question that no schema understands.
	ProbingInvalid = "invalid_question"
	// ProbingCostly is a question that costs too much to decide.
	ProbingCostly = "too_costly"
	// ProbingRateLimited is a call over the caller's rate.
	ProbingRateLimited = "rate_limited"
	// ProbingToken is the beginning of the reason if a principal_token is not accepted. Why it is not
	// follows, as one of the words in docs/tokens.md.
	ProbingToken = "principal_token: "
)

// Probing notes a question of the call's caller. reason is one of the constants; a reason why follows
// [ProbingToken]. principal is whom the question is about, or "", and example is what it asked or what it
// was answered. Both are cut.
func (n *Noted) Probing(ctx context.Context, reason, principal, example string) {
	call := callFrom(ctx)
	n.note(cedarpostv1.EventRecord_PROBING, call.Caller, reason, about{text: bounded(example, maxNotedText), call: call}, bounded(principal, maxNotedSubject))
}

// RefusedRight notes a call that the call's caller had no right to. example says what the call was
// about. It is cut.
func (n *Noted) RefusedRight(ctx context.Context, procedure, example string) {
	call := callFrom(ctx)
	example = bounded(example, maxNotedText)
	n.note(cedarpostv1.EventRecord_REFUSED_RIGHT, call.Caller, example, about{text: example, call: call}, procedure)
}

func bounded(text string, n int) string {
	if len(text) > n {
		text = text[:n]
	}
	return strings.ReplaceAll(strings.ToValidUTF8(text, ""), "\x00", "")
}

// note counts one thing and returns at once. Of subjects, the first is used while the caller has
// few subjects, or if it is counted already; after it the next one.
func (n *Noted) note(kind cedarpostv1.EventRecord_Kind, caller, what string, a about, subjects ...string) {
	now := n.now()
	n.mu.Lock()
	defer n.mu.Unlock()
	g, gk := n.group(notedGroupKey{kind, caller}, now)
	key := notedKey{gk, subjects[0], what}
	if len(subjects) > 1 && g.seen[key] == nil && len(g.seen) >= notedAddresses {
		key.subject = subjects[1]
	}
	if g.seen[key] == nil && (len(g.seen) >= notedSubjects || !g.mayRecord(now)) {
		if key.subject = others; kind == cedarpostv1.EventRecord_REFUSED_RIGHT {
			key.what = "" // it has many values
		}
	}
	c := g.seen[key]
	if c == nil {
		c = &noted{}
		g.seen[key] = c
		n.fresh = append(n.fresh, key)
		select {
		case n.wakeup <- struct{}{}:
		default:
		}
	}
	c.add(noted{about: a, count: 1, first: now, last: now})
}

// group returns the group with a key, and the key.
func (n *Noted) group(key notedGroupKey, now time.Time) (*notedGroup, notedGroupKey) {
	g := n.groups[key]
	if g == nil {
		g = &notedGroup{seen: map[notedKey]*noted{}, events: notedBurst, filled: now}
		n.groups[key] = g
	}
	return g, key
}

// mayRecord takes the right to record one event.
func (g *notedGroup) mayRecord(now time.Time) bool {
	g.events = min(notedBurst, g.events+now.Sub(g.filled).Minutes()*notedPerMinute)
	if g.filled = now; g.events < 1 {
		return false
	}
	g.events--
	return true
}

// add adds what is counted in o, which may be older or newer.
func (c *noted) add(o noted) {
	if c.count == 0 || o.first.Before(c.first) {
		c.about, c.first = o.about, o.first
	}
	if o.last.After(c.last) {
		c.last = o.last
	}
	c.count += o.count
}

// Run records until ctx ends. Then it records what is left, and returns.
func (n *Noted) Run(ctx context.Context) {
	tick := time.NewTicker(notedInterval)
	defer tick.Stop()
	for {
		select {
		case <-n.wakeup:
			n.record(ctx, n.new(), false)
		case <-tick.C:
			n.record(ctx, n.due(false), true)
		case <-ctx.Done():
			n.record(context.WithoutCancel(ctx), n.due(true), true)
			return
		}
	}
}

// new takes what no record has told of yet. The right to record it was taken when it was counted.
func (n *Noted) new() map[notedKey]noted {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := map[notedKey]noted{}
	for _, key := range n.fresh {
		if g := n.groups[key.notedGroupKey]; g != nil && g.seen[key] != nil {
			g.seen[key].take(key, n.now(), list)
		}
	}
	n.fresh = nil
	return list
}

// due takes what is to be recorded now, or everything. It forgets what did not happen again.
func (n *Noted) due(everything bool) map[notedKey]noted {
	now := n.now()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fresh = nil
	list := map[notedKey]noted{}
	for gk, g := range n.groups {
		for key, c := range g.seen {
			switch {
			case c.count == 0 && now.Sub(c.last) > notedLongest:
				delete(g.seen, key)
			case c.count == 0, now.Before(c.next) && !everything:
			case everything || key.subject == others || c.interval == 0 || g.mayRecord(now):
				c.take(key, now, list)
			default:
				rest := notedKey{gk, others, key.what}
				if g.seen[rest] == nil {
					g.seen[rest] = &noted{}
				}
				g.seen[rest].add(*c)
				c.count = 0
			}
		}
		if len(g.seen) == 0 && now.Sub(g.filled) > notedBurst/notedPerMinute*time.Minute {
			delete(n.groups, gk) // its events are all there again
		}
	}
	return list
}

// take moves what is counted to list.
func (c *noted) take(key notedKey, now time.Time, list map[notedKey]noted) {
	if c.count == 0 {
		return
	}
	list[key] = *c
	c.count = 0
	c.interval = min(max(2*c.interval, notedInterval), notedLongest)
	if key.subject == others {
		c.interval = notedLongest
	}
	c.next = now.Add(c.interval - notedInterval/2) // ticks are not exact
}

// record commits one event for each key, all together. What cannot be recorded stays counted.
func (n *Noted) record(ctx context.Context, list map[notedKey]noted, timed bool) {
	if len(list) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, RecordTimeout)
	defer cancel()
	err := n.commit(ctx, list)
	if err != nil {
		n.putBack(list)
	}
	n.recorder.cfg.Task(TaskNoted, err)
	// Only the attempts at fixed times are logged, not those for something new: callers without
	// a key could fill the log.
	if err != nil && timed {
		n.recorder.cfg.Log.Error("failed authentication, refused bundles or probing not recorded yet", "err", err)
	}
}

func (n *Noted) commit(ctx context.Context, list map[notedKey]noted) error {
	events := make([]store.Event, 0, len(list))
	for key, c := range list {
		e, err := n.recorder.NewEvent(WithCall(ctx, c.about.call), c.event(key))
		if err != nil {
			return err
		}
		events = append(events, e)
	}
	return n.recorder.Record(ctx, nil, events)
}

// putBack counts again what could not be recorded.
func (n *Noted) putBack(list map[notedKey]noted) {
	now := n.now()
	n.mu.Lock()
	defer n.mu.Unlock()
	for key, c := range list {
		g, _ := n.group(key.notedGroupKey, now)
		if g.seen[key] == nil {
			g.seen[key] = &noted{}
		}
		g.seen[key].add(c)
		g.seen[key].interval, g.seen[key].next = 0, now // at the next tick, without another right
	}
}

// event returns the record of what is counted.
func (c *noted) event(key notedKey) *cedarpostv1.EventRecord {
	first, last := timestamppb.New(c.first), timestamppb.New(c.last)
	rec := &cedarpostv1.EventRecord{Kind: key.kind, Caller: key.caller, Subject: key.subject}
	switch key.kind {
	case cedarpostv1.EventRecord_PUBLISH_REFUSED:
		rec.Detail = &cedarpostv1.EventRecord_PublishRefused{PublishRefused: &cedarpostv1.PublishRefused{
			Bundle: key.subject, DryRun: c.about.dryRun, Reason: c.about.text, FindingCount: int32(c.about.found), Findings: c.about.findings,
			Count: c.count, First: first, Last: last,
		}}
	case cedarpostv1.EventRecord_REFUSED_RIGHT:
		rec.Detail = &cedarpostv1.EventRecord_RefusedRight{RefusedRight: &cedarpostv1.RefusedRight{
			Procedure: c.about.call.Procedure, Reason: c.about.text, Count: c.count, First: first, Last: last,
		}}
	case cedarpostv1.EventRecord_PROBING:
		rec.Detail = &cedarpostv1.EventRecord_Probing{Probing: &cedarpostv1.Probing{
			Reason: key.what, Principal: key.subject, Example: c.about.text, Count: c.count, First: first, Last: last,
		}}
	default:
		rec.Detail = &cedarpostv1.EventRecord_AuthenticationFailure{AuthenticationFailure: &cedarpostv1.AuthenticationFailure{
			Reason: key.what, Address: key.subject, Procedure: c.about.text, Count: c.count, First: first, Last: last,
		}}
	}
	return rec
}
