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

// cache keeps answers. It returns one only while a service that is at most the bound
// behind would give the same answer.
//
// Four rules ensure that:
//
//   - The tags of an answer say what it depends on. The watch reports every change with its
//     tags, and the cache keeps the newest change of each tag. It never returns an answer
//     made before the newest change of one of its tags, even if the answer arrives after
//     the change.
//   - The watch must be known to be up to date. The client asks the service for its newest
//     revision. Once the watch has applied that revision, all changes that were committed
//     before the question was sent are applied. From that time a lease runs, for the bound.
//     Without a lease the cache returns nothing.
//   - Changes that the watch missed are unknown. After a gap, only answers made since then
//     are returned.
//   - Revisions compare only within one history. After a failover there is another history,
//     and the cache begins empty. The same holds after a database was restored under the
//     same name: then the watch says that it begins anew, or the newest revision of the
//     service is older than one that the watch reported, or has its number and another mark.
type cache struct {
	entries *otter.Cache[string, *entry]
	bound   time.Duration
	maxAge  time.Duration // beside that of the hint; 0: none
	coarse  bool
	clock   func() instant
	seen    *seen

	epoch atomic.Pointer[epoch] // nil: no watch has begun

	gaps atomic.Int64 // how often the watch missed changes

	mu    sync.Mutex // held to change an epoch
	asked []proof    // the proofs that the watch has not reached, oldest first
}

// maxProofs bounds the proofs that wait. A watch that is so far behind has no lease.
const maxProofs = 16

// proof is the newest revision of the service, from a question that was sent at a time.
type proof struct {
	number int64
	sent   instant
}

const changeSlots = 1 << 16

// epoch is one history of revisions, as the watch has followed it. Its numbers only grow.
type epoch struct {
	history string
	applied atomic.Int64 // the watch has reported all changes up to this revision
	floor   atomic.Int64 // changes before this revision are not known
	lease   atomic.Pointer[instant]
	// since is a monotonic time. Answers to questions that were sent before it are not used.
	since atomic.Int64
	token atomic.Pointer[string] // of applied
	// newest has, for all tags with one hash, the revision of their newest change.
	newest [changeSlots]atomic.Int64
}

// entry is a kept answer. Only the counts of its uses change.
type entry struct {
	response *cedarpostv1.AuthorizeResponse
	epoch    *epoch
	number   int64 // of the revision that it was decided at
	tags     []uint64
	sent     instant // when its question was sent
	maxAge   time.Duration
	*uses
}

// newCache makes a cache that takes about a number of bytes.
func newCache(bytes uint64, cfg *Config, seen *seen) *cache {
	return &cache{
		entries: otter.Must(&otter.Options[string, *entry]{
			MaximumWeight: bytes,
			Weigher:       weigh,
		}),
		bound: cfg.MaxStaleness, maxAge: cfg.MaxAge, coarse: cfg.Coarse, clock: cfg.clock, seen: seen,
	}
}

// weigh estimates the memory that an answer takes.
func weigh(key string, e *entry) uint32 {
	return uint32(250 + len(key) + 8*len(e.tags) + 3*proto.Size(e.response))
}

// get returns the kept answer to a question, if it may be used now. The answer must be at
// least as new as the revision of the token fresh, if that is not "".
func (c *cache) get(key string, fresh string) (*entry, instant) {
	now := c.clock()
	ep := c.epoch.Load()
	if ep == nil {
		return nil, now
	}
	// Read the lease before the entry and its tags. A change that is applied in between
	// then only makes the answer miss.
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

// valid says whether nothing that an answer depends on has changed since it was made.
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
	t, ok := readToken(token)
	return ok && t.history == ep.history && t.number <= ep.applied.Load()
}

// put keeps an answer whose question was sent at a time, if it may be kept. An older
// answer to the same question is dropped in any case. A newer one stays: a caller that
// has got an answer must not get an older one afterwards.
func (c *cache) put(key string, r *cedarpostv1.AuthorizeResponse, sent instant) {
	hint, ep := r.GetCacheHint(), c.epoch.Load()
	t, ok := readToken(r.GetRevision().GetToken())
	if ep == nil || !ok {
		return
	}
	if t.history != ep.history {
		c.entries.Invalidate(key)
		return
	}
	e := &entry{response: r, epoch: ep, number: t.number, tags: hint.GetTags(), sent: sent, maxAge: hint.GetMaxAge().AsDuration(), uses: &uses{id: r.GetDecisionId()}}
	if c.maxAge > 0 {
		e.maxAge = min(e.maxAge, c.maxAge)
	}
	c.entries.Compute(key, func(old *entry, found bool) (*entry, otter.ComputeOp) {
		switch {
		case found && old.epoch == ep && old.number > e.number:
			return old, otter.CancelOp
		case hint != nil && ep.valid(e) && !c.seen.beyond(t):
			return e, otter.WriteOp
		}
		return nil, otter.InvalidateOp
	})
}

// apply takes a message of the watch. Messages may be doubled, late or missing: each says
// where it begins, which shows what is missing.
func (c *cache) apply(m *cedarpostv1.WatchResponse) {
	token := m.GetRevision().GetToken()
	t, ok := readToken(token)
	c.mu.Lock()
	defer c.mu.Unlock()
	ep := c.epoch.Load()
	if !ok {
		c.drop()
		return
	}
	if ep == nil || ep.history != t.history {
		c.begin(t, token)
		return
	}
	number, applied := t.number, ep.applied.Load()
	changed := number > m.GetAfter()
	if m.GetReset_() && (!changed || number <= applied) {
		// The server does not go on from the revision that this client has: its database may
		// have lost that revision. Another server can still answer from lost revisions, for as
		// long as it may be behind.
		c.gaps.Add(1)
		c.seen.forget()
		c.begin(t, token).since.Store(c.clock().mono + int64(c.bound))
		return
	}
	if m.GetReset_() || m.GetAfter() > applied {
		c.gaps.Add(1)
		raise(&ep.floor, max(number, applied))
		c.seen.distrust() // earlier tokens may be of another history
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

// begin starts the epoch of another history, with an empty cache. The caller holds mu.
func (c *cache) begin(t revisionToken, token string) *epoch {
	ep := &epoch{history: t.history}
	ep.since.Store(math.MinInt64)
	ep.floor.Store(t.number)
	ep.reach(t.number, token)
	c.seen.trusted().add(token)
	c.asked = nil
	c.epoch.Store(ep)
	c.entries.InvalidateAll()
	return ep
}

// reach notes that all changes up to a revision are applied.
func (ep *epoch) reach(number int64, token string) {
	if ep.token.Load() == nil || number > ep.applied.Load() {
		ep.token.Store(&token)
		ep.applied.Store(number)
	}
}

// raise sets a to n if that is larger. There must be one writer at a time.
func raise(a *atomic.Int64, n int64) {
	if n > a.Load() {
		a.Store(n)
	}
}

// prove takes the newest revision of the service, from a question that was sent at a time.
// reached is the token that the watch had reached at that time. Once the watch has reached
// the newest revision too, the cache has a lease that runs from that time. If the newest
// revision is older than reached, or contradicts it, the service has lost revisions: prove
// then drops all answers and returns true.
func (c *cache) prove(r *cedarpostv1.Revision, sent instant, reached string) (lost bool) {
	t, ok := readToken(r.GetToken())
	c.mu.Lock()
	defer c.mu.Unlock()
	ep := c.epoch.Load()
	if !ok || ep == nil || ep.history != t.history {
		return false
	}
	if told, ok := readToken(reached); ok && told.history == t.history && (t.number < told.number || t.contradicts(told)) {
		c.drop()
		return true
	}
	c.asked = append(c.asked, proof{t.number, sent})
	if len(c.asked) > maxProofs {
		c.asked = c.asked[1:]
	}
	c.grant(ep)
	return false
}

// grant starts the lease of the newest proof that the watch has reached. The caller holds
// mu.
func (c *cache) grant(ep *epoch) {
	for len(c.asked) > 0 && c.asked[0].number <= ep.applied.Load() {
		sent := c.asked[0].sent
		c.asked = c.asked[1:]
		if old := ep.lease.Load(); old == nil || sent.mono > old.mono {
			ep.lease.Store(&sent)
		}
	}
}

// behind says whether the watch has not yet reached a revision that the service had d ago.
func (c *cache) behind(d time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.asked) > 0 && c.clock().since(c.asked[0].sent) > d
}

// forget drops all answers, for example because the service refuses the key of this
// client or is on another history.
func (c *cache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop()
}

// drop is forget for a caller that holds mu.
func (c *cache) drop() {
	c.asked = nil
	c.epoch.Store(nil)
	c.entries.InvalidateAll()
}

// leased says whether the cache has a lease, without which it returns no answers.
func (c *cache) leased() bool {
	ep := c.epoch.Load()
	if ep == nil {
		return false
	}
	lease := ep.lease.Load()
	return lease != nil && c.clock().since(*lease) <= c.bound
}

// reached returns the token of the newest revision that the watch has applied, or "".
func (c *cache) reached() string {
	if ep := c.epoch.Load(); ep != nil {
		return *ep.token.Load()
	}
	return ""
}

// revisionToken is what a revision's token says. proto/cedarpost/v1/cedar.proto has the
// layout of its bytes.
type revisionToken struct {
	history string // names the database and the timeline; numbers compare only within it
	number  int64
	anchor  int64 // a revision of the same history, number or later
	mark    [16]byte
}

const (
	tokenFormat  = 2  // the first byte
	tokenBytes   = 53 // format, database (16), timeline (4), number (8), anchor (8), mark (16)
	historyChars = 28 // characters of the text before the number: format, database and timeline
)

var tokenText = base64.RawURLEncoding.Strict()

// readToken reads a token. ok is false for any text that is not a token.
func readToken(text string) (t revisionToken, ok bool) {
	var b [tokenBytes]byte
	if len(text) != tokenText.EncodedLen(tokenBytes) {
		return t, false
	}
	// Decode skips line breaks, so n can be too small.
	if n, err := tokenText.Decode(b[:], []byte(text)); err != nil || n != tokenBytes || b[0] != tokenFormat {
		return t, false
	}
	t = revisionToken{
		history: text[:historyChars],
		number:  int64(binary.BigEndian.Uint64(b[21:])),
		anchor:  int64(binary.BigEndian.Uint64(b[29:])),
		mark:    [16]byte(b[37:]),
	}
	if t.number < 0 || t.anchor < t.number || (t.anchor == 0) != (t.mark == [16]byte{}) {
		return revisionToken{}, false
	}
	return t, true
}

// contradicts says whether two tokens with the same history text are of different
// histories: they give one revision two marks.
func (t revisionToken) contradicts(o revisionToken) bool {
	return t.anchor == o.anchor && t.mark != o.mark
}
