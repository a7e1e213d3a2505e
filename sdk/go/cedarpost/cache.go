package cedarpost

import (
	"encoding/base64"
	"encoding/binary"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// cache keeps answers, and gives one again only while it would be the answer of a
// service that is at most the bound behind.
//
// What makes that so:
//
//   - An answer depends on what its tags say. The watch tells of every change by its
//     tags, and for each tag the newest change is kept: an answer made before that is
//     never given. It does not matter when the answer arrives; one that comes late,
//     after a change of what it was made from, is refused like one that was there.
//   - The watch has to be known to be up to date. A question to the service for its
//     newest revision, sent at some time and answered with a revision that the watch
//     has applied, proves that all that was committed before it was sent is applied.
//     The lease runs from then, for the bound. Without a lease nothing is given.
//   - What the watch missed cannot be known. After a gap, only answers made since are
//     given.
//   - Revisions compare within one history alone. After a failover there is another one,
//     and the cache begins empty. So it does after a database was restored under the same
//     name. The client notices that because the watch says that it begins anew, or because
//     the newest revision of the service is older than one that the watch reported, or has
//     the same number and another mark.
type cache struct {
	entries *otter.Cache[string, *entry]
	bound   time.Duration
	maxAge  time.Duration // beside that of the hint; 0: none
	coarse  bool
	clock   func() instant
	seen    *seen

	epoch atomic.Pointer[epoch] // nil: no watch has begun

	gaps atomic.Int64 // how often something was missed

	mu    sync.Mutex // of those who change an epoch
	asked []proof    // those that the watch has not reached, oldest first
}

// maxProofs bounds the proofs that wait. A watch so far behind has no lease.
const maxProofs = 16

// proof is a revision that the service had after a question was sent.
type proof struct {
	number int64
	sent   instant
}

const (
	changeSlots  = 1 << 16
	tokenBytes   = 53
	historyChars = 28 // of a token's text, before its number
)

// epoch is one history of revisions, as the watch has followed it. All that is in it
// grows only.
type epoch struct {
	history string
	applied atomic.Int64 // the watch has told of all changes up to it
	floor   atomic.Int64 // what changed before it is not known
	lease   atomic.Pointer[instant]
	// since is a monotonic time. Answers to questions that were sent before it are not used.
	since atomic.Int64
	token atomic.Pointer[string] // of applied
	// newest has, by hash of a tag, the newest change of one of them.
	newest [changeSlots]atomic.Int64
}

// entry is a kept answer. All but the counts stays as it is.
type entry struct {
	response *cedarpostv1.AuthorizeResponse
	epoch    *epoch
	number   int64 // of the revision that it was decided at
	tags     []uint64
	sent     instant // when its question was
	maxAge   time.Duration
	*uses
}

// newCache makes a cache of about so many bytes.
func newCache(bytes uint64, cfg *Config, seen *seen) *cache {
	return &cache{
		entries: otter.Must(&otter.Options[string, *entry]{
			MaximumWeight: bytes,
			Weigher:       weigh,
		}),
		bound: cfg.MaxStaleness, maxAge: cfg.MaxAge, coarse: cfg.Coarse, clock: cfg.clock, seen: seen,
	}
}

// weigh is about what an answer takes in memory.
func weigh(key string, e *entry) uint32 {
	return uint32(250 + len(key) + 8*len(e.tags) + 3*proto.Size(e.response))
}

// get returns the answer to a question, if one is kept that may be given now. fresh is
// the token of a revision that the answer has to know of, or "".
func (c *cache) get(key string, fresh string) (*entry, instant) {
	now := c.clock()
	ep := c.epoch.Load()
	if ep == nil {
		return nil, now
	}
	// The lease is read before what it vouches for: a change that is applied in
	// between makes the answer miss, and not the other way round.
	lease := ep.lease.Load()
	if lease == nil || now.since(*lease) > c.bound {
		return nil, now
	}
	if fresh != "" && !(ep.covers(fresh) && c.seen.trusted().has(fresh)) {
		return nil, now
	}
	e, ok := c.entries.GetIfPresent(key)
	if !ok || !ep.valid(e) || now.since(e.sent) > e.maxAge {
		return nil, now
	}
	return e, now
}

// valid says whether nothing that the answer depends on has changed since.
func (ep *epoch) valid(e *entry) bool {
	if e.epoch != ep || e.number < ep.floor.Load() || e.sent.mono < ep.since.Load() {
		return false
	}
	for _, tag := range e.tags {
		if ep.newest[tag%changeSlots].Load() > e.number {
			return false
		}
	}
	return true
}

// covers says whether the revision of a token is applied.
func (ep *epoch) covers(token string) bool {
	history, number, ok := readToken(token)
	return ok && history == ep.history && number <= ep.applied.Load()
}

// put keeps an answer whose question was sent at a time, if it may be kept. Either way
// it takes the place of an older one, and one that comes after a newer one is not
// kept: who has seen an answer is not given one from before it.
func (c *cache) put(key string, r *cedarpostv1.AuthorizeResponse, sent instant) {
	hint, ep := r.GetCacheHint(), c.epoch.Load()
	history, number, ok := readToken(r.GetRevision().GetToken())
	if ep == nil || !ok {
		return
	}
	if history != ep.history {
		c.entries.Invalidate(key)
		return
	}
	e := &entry{response: r, epoch: ep, number: number, tags: hint.GetTags(), sent: sent, maxAge: hint.GetMaxAge().AsDuration(), uses: &uses{id: r.GetDecisionId()}}
	if c.maxAge > 0 {
		e.maxAge = min(e.maxAge, c.maxAge)
	}
	c.entries.Compute(key, func(old *entry, found bool) (*entry, otter.ComputeOp) {
		switch {
		case found && old.epoch == ep && old.number > number:
			return old, otter.CancelOp
		case hint != nil && ep.valid(e) && !c.seen.beyond(history, number):
			return e, otter.WriteOp
		}
		return nil, otter.InvalidateOp
	})
}

// apply takes a message of the watch. They may come doubled, late or not at all: what
// is missing shows in where the next one begins.
func (c *cache) apply(m *cedarpostv1.WatchResponse) {
	token := m.GetRevision().GetToken()
	history, number, ok := readToken(token)
	c.mu.Lock()
	defer c.mu.Unlock()
	ep := c.epoch.Load()
	if !ok {
		c.drop()
		return
	}
	if ep == nil || ep.history != history {
		c.begin(history, number, token)
		return
	}
	applied := ep.applied.Load()
	changed := number > m.GetAfter()
	if m.GetReset_() && (!changed || number <= applied) {
		// The server does not continue from the revision that this client has: the server's
		// database may have lost it. Another server can still answer from lost revisions, for
		// as long as it may be behind.
		c.gaps.Add(1)
		c.seen.forget()
		c.begin(history, number, token).since.Store(c.clock().mono + int64(c.bound))
		return
	}
	if m.GetReset_() || m.GetAfter() > applied {
		c.gaps.Add(1)
		raise(&ep.floor, max(number, applied))
		c.seen.distrust() // what came before may be of another history
		if m.GetReset_() {
			raise(&ep.since, c.clock().mono)
		}
	} else if c.coarse && changed && number > applied {
		raise(&ep.floor, number)
	}
	for _, tag := range m.GetTags() {
		raise(&ep.newest[tag%changeSlots], number)
	}
	ep.reach(number, token)
	c.seen.trusted().add(token)
	c.grant(ep)
}

// begin starts the epoch of another history, with an empty cache. Its caller holds mu.
func (c *cache) begin(history string, number int64, token string) *epoch {
	ep := &epoch{history: history}
	ep.since.Store(math.MinInt64)
	ep.floor.Store(number)
	ep.reach(number, token)
	c.seen.trusted().add(token)
	c.asked = nil
	c.epoch.Store(ep)
	c.entries.InvalidateAll()
	return ep
}

func (ep *epoch) reach(number int64, token string) {
	if ep.token.Load() == nil || number > ep.applied.Load() {
		ep.token.Store(&token)
		ep.applied.Store(number)
	}
}

// raise makes a number larger, by one writer at a time.
func raise(a *atomic.Int64, n int64) {
	if n > a.Load() {
		a.Store(n)
	}
}

// prove takes the newest revision of the service, which answers a question sent at a
// time. reached is the token that the watch had reached at that time. Once the watch has
// reached the newest revision too, the cache has a lease from that time on. If the newest
// revision is older than reached, or contradicts it, the service has lost revisions: then
// prove drops all answers and reports that.
func (c *cache) prove(r *cedarpostv1.Revision, sent instant, reached string) (lost bool) {
	history, number, ok := readToken(r.GetToken())
	c.mu.Lock()
	defer c.mu.Unlock()
	ep := c.epoch.Load()
	if !ok || ep == nil || ep.history != history {
		return false
	}
	if before, told, ok := readToken(reached); ok && before == history && (number < told || contradict(reached, r.GetToken())) {
		c.drop()
		return true
	}
	c.asked = append(c.asked, proof{number, sent})
	if len(c.asked) > maxProofs {
		c.asked = c.asked[1:]
	}
	c.grant(ep)
	return false
}

// grant begins the newest lease that the watch has reached.
func (c *cache) grant(ep *epoch) {
	for len(c.asked) > 0 && c.asked[0].number <= ep.applied.Load() {
		sent := c.asked[0].sent
		c.asked = c.asked[1:]
		if old := ep.lease.Load(); old == nil || sent.mono > old.mono {
			ep.lease.Store(&sent)
		}
	}
}

// behind says whether the watch has not reached a revision that the service had so
// long ago.
func (c *cache) behind(d time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.asked) > 0 && c.clock().since(c.asked[0].sent) > d
}

// forget drops all, as when the service does not know this client any more, or has
// another history.
func (c *cache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop()
}

func (c *cache) drop() {
	c.asked = nil
	c.epoch.Store(nil)
	c.entries.InvalidateAll()
}

// leased says whether answers are given.
func (c *cache) leased() bool {
	ep := c.epoch.Load()
	if ep == nil {
		return false
	}
	lease := ep.lease.Load()
	return lease != nil && c.clock().since(*lease) <= c.bound
}

// reached is the token of the revision that the watch has applied, or "".
func (c *cache) reached() string {
	if ep := c.epoch.Load(); ep != nil {
		return *ep.token.Load()
	}
	return ""
}

// readToken takes a revision's token apart, as far as that has to be known: what
// names its history, and its number. The contract has its form.
func readToken(token string) (history string, number int64, ok bool) {
	var buf [tokenBytes]byte
	if len(token) != tokenText.EncodedLen(tokenBytes) {
		return "", 0, false
	}
	n, err := tokenText.Decode(buf[:], []byte(token))
	if err != nil || n != tokenBytes || buf[0] != 2 { // line breaks are skipped
		return "", 0, false
	}
	number = int64(binary.BigEndian.Uint64(buf[21:]))
	anchor, mark := int64(binary.BigEndian.Uint64(buf[29:])), [16]byte(buf[37:])
	if number < 0 || anchor < number || (anchor == 0) != (mark == [16]byte{}) {
		return "", 0, false
	}
	return token[:historyChars], number, true
}

// contradict says whether two tokens cannot be of the same history.
func contradict(a, b string) bool {
	var x, y [tokenBytes]byte
	_, errA := tokenText.Decode(x[:], []byte(a))
	_, errB := tokenText.Decode(y[:], []byte(b))
	const anchor, mark = 29, 37
	return errA == nil && errB == nil && [8]byte(x[anchor:]) == [8]byte(y[anchor:]) && [16]byte(x[mark:]) != [16]byte(y[mark:])
}

var tokenText = base64.RawURLEncoding.Strict()
