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

// changeSlots is the number of slots that remember the newest changes.
const changeSlots = 1 << 16

// entityCache keeps entities in memory, as the schema reads them, bounded by bytes. An
// entry says what is stored of one entity, or that nothing is. It has the direct parents
// only, so a change of one entity touches one entry.
//
// An entry is valid from the revision that wrote the entity, or at which it was found
// absent, until a change of the entity is applied, which drops the entry. A load that raced
// with a change, or with a new schema, is not kept. So get returns for a snapshot what the
// store would return for its revision.
//
// Older versions of an entity are not kept: only the few requests that began before the
// newest snapshot could use them. So an entry needs the start of its interval only.
type entityCache struct {
	entries *otter.Cache[cedar.EntityUID, *cachedEntity]

	// mu keeps keep (shared) and apply (exclusive) apart.
	mu     sync.RWMutex
	seed   maphash.Seed
	newest []int64 // by hash of the entity: the newest applied revision that changed such an entity
	floor  int64   // what was loaded at an older revision is not kept
	schema int64   // the current schema generation
}

// cachedEntity is immutable.
type cachedEntity struct {
	entity *engine.Entity // nil: not stored
	from   int64          // the first revision that it is valid for
	schema int64          // the schema generation that it was read by
	weight uint32         // about how many bytes it takes
}

// newEntityCache makes a cache that takes about this many bytes. With 0 it keeps nothing.
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

// get returns an entity as of a snapshot. e is nil if the entity is not stored. known is
// false if the store has to be asked.
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

// loaded is an entity as a load found it. entity is nil if it is not stored. since is the
// revision of its row.
type loaded struct {
	uid    cedar.EntityUID
	entity *engine.Entity
	since  int64
}

// keep adds what was loaded at a snapshot, except entities that changed meanwhile.
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
		// Two entities can share a slot. Then a change of one keeps the other out too, which
		// costs one more load.
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

// weigh estimates the bytes of an entry. The figures were measured, for Go on 64 bits: the
// memory of an entity has little to do with the size of its JSON.
func weigh(l loaded) uint32 {
	n := 144 + len(l.uid.Type) + len(l.uid.ID) // with the overhead of the library
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
	case cedar.EntityUID: // entities share the text of the type
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

// weighMap estimates the bytes of a map of n elements. A map has eight slots, or a power of
// two of which it fills seven eighths at most.
func weighMap(n, slot int) int {
	switch {
	case n == 0:
		return 0
	case n <= 8:
		return 56 + 8*slot
	}
	return 120 + (slot+1)<<bits.Len(uint(n*8/7))
}

// apply drops the entries of entities that changed. Only the follower calls it, with the
// changes of a snapshot, before it gives out that snapshot.
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

// reset drops everything that was loaded before a revision, and returns the schema
// generation of the snapshots from then on: another schema reads the same rows
// differently, and another timeline has other rows.
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

// bytes returns about how many bytes the entries take.
func (c *entityCache) bytes() uint64 {
	if c.entries == nil {
		return 0
	}
	return c.entries.WeightedSize()
}
