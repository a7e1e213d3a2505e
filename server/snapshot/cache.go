package snapshot

import (
	"hash/maphash"
	"math/bits"
	"sync"

	"github.com/cedar-policy/cedar-go"
	"github.com/maypok86/otter/v2"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

// changeSlots is how many slots remember the newest changes.
const changeSlots = 1 << 16

// entityCache keeps entities in memory, as the schema reads them, bounded by
// bytes. It holds what is stored and what is known not to be, direct parents
// only, so that a change of one entity touches one entry.
//
// An entry is good for every revision from the one it was written at, or was
// missed at, until a change of the entity is applied, which drops it. A load that
// raced with a change, or with a new schema, is not kept. So what get returns for
// a snapshot is what the store would return for its revision.
//
// Closed versions are not kept: they would serve only the few requests that began
// before the newest snapshot and are not done. So an entry needs the start of its
// interval alone, and the library needs to know nothing of intervals: it evicts.
type entityCache struct {
	entries *otter.Cache[cedar.EntityUID, *cachedEntity]

	// mu orders keeping (many, shared) against applying (one, exclusive).
	mu     sync.RWMutex
	seed   maphash.Seed
	newest []int64 // by hash of entity: the newest applied revision that changed one of them
	floor  int64   // nothing loaded before it is kept
	schema int64   // the schema generation in force
}

// cachedEntity is immutable.
type cachedEntity struct {
	entity *engine.Entity // nil: not stored
	from   int64          // the first revision it is good for
	schema int64          // the generation it was read by
	weight uint32         // bytes, about
}

// newEntityCache makes a cache of about so many bytes; 0 makes none.
func newEntityCache(bytes uint64) *entityCache {
	c := &entityCache{seed: maphash.MakeSeed(), newest: make([]int64, changeSlots)}
	if bytes > 0 {
		c.entries = otter.Must(&otter.Options[cedar.EntityUID, *cachedEntity]{
			MaximumWeight: bytes,
			Weigher:       func(_ cedar.EntityUID, e *cachedEntity) uint32 { return e.weight },
		})
	}
	return c
}

// get returns an entity as of a snapshot; e is nil when it is not stored, known
// is false when the store has to be asked.
func (c *entityCache) get(snap *Snapshot, uid cedar.EntityUID) (e *engine.Entity, known bool) {
	if c.entries == nil {
		return nil, false
	}
	v, ok := c.entries.GetIfPresent(uid)
	if !ok || v.from > snap.Position.Number || v.schema != snap.schema {
		return nil, false
	}
	return v.entity, true
}

// loaded is an entity as a load found it. Entity is nil when it is not stored;
// since is the revision of its row.
type loaded struct {
	uid    cedar.EntityUID
	entity *engine.Entity
	since  int64
}

// keep takes in what was loaded at a snapshot, but for what changed meanwhile.
func (c *entityCache) keep(snap *Snapshot, list []loaded) {
	if c.entries == nil {
		return
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	at := snap.Position.Number
	if at < c.floor || snap.schema != c.schema {
		return
	}
	for _, l := range list {
		// Two entities can share a slot: then one of them is loaded once more.
		if *c.slot(l.uid) > at {
			continue
		}
		v := &cachedEntity{entity: l.entity, from: at, schema: snap.schema, weight: weigh(l)}
		if l.entity != nil {
			v.from = l.since
		}
		c.entries.Set(l.uid, v)
	}
}

// weigh estimates the bytes of an entry. The figures are of Go on 64 bits, and
// measured: what an entity takes has little to do with the size of its JSON.
func weigh(l loaded) uint32 {
	n := 144 + len(l.uid.Type) + len(l.uid.ID) // with the library's part
	if l.entity != nil {
		n += 112 + weighValue(l.entity.Attrs) + weighValue(l.entity.Tags)
		for _, p := range l.entity.Parents {
			n += 50 + len(p.Type) + len(p.ID)
		}
	}
	return uint32(min(n, 1<<31))
}

// weighValue estimates the bytes of a value behind its interface.
func weighValue(v cedar.Value) int {
	switch v := v.(type) {
	case cedar.String:
		return 24 + len(v)
	case cedar.EntityUID: // types are shared
		return 40 + len(v.ID)
	case cedar.Record:
		n := 16 + weighMap(v.Len(), 32)
		for name, e := range v.All() {
			n += len(name) + weighValue(e)
		}
		return n
	case cedar.Set:
		n := 24 + weighMap(v.Len(), 24)
		for e := range v.All() {
			n += weighValue(e)
		}
		return n
	}
	return 8
}

// weighMap estimates the bytes of a map, which has room for eight, or for a power
// of two of which at most seven eighths are taken.
func weighMap(n, slot int) int {
	switch {
	case n == 0:
		return 0
	case n <= 8:
		return 56 + 8*slot
	}
	return 120 + (slot+1)<<bits.Len(uint(n*8/7))
}

// apply drops what changed. It is called with the changes of a snapshot before
// that snapshot is given out, by the follower alone.
func (c *entityCache) apply(changes []store.Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ch := range changes {
		if ch.Kind != store.KindEntity {
			continue
		}
		uid := cedar.NewEntityUID(cedar.EntityType(ch.Type), cedar.String(ch.ID))
		*c.slot(uid) = ch.Revision
		if c.entries != nil {
			c.entries.Invalidate(uid)
		}
	}
}

func (c *entityCache) slot(uid cedar.EntityUID) *int64 {
	return &c.newest[maphash.Comparable(c.seed, uid)%changeSlots]
}

// reset forgets everything up to a revision and returns the generation that
// snapshots carry from then on: another schema reads the same rows differently,
// and another timeline has other rows.
func (c *entityCache) reset(floor int64) (schema int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.schema++
	c.floor = floor
	clear(c.newest) // the floor covers them
	if c.entries != nil {
		c.entries.InvalidateAll()
	}
	return c.schema
}

// bytes is what the entries weigh, about.
func (c *entityCache) bytes() uint64 {
	if c.entries == nil {
		return 0
	}
	return c.entries.WeightedSize()
}
