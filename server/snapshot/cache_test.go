package snapshot

import (
	"slices"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

// The cache returns for a snapshot what is stored at its revision, in whatever order there are
// writes, applied changes, slow loads, new schemas, failovers and evictions.
func TestCacheNeverDiffersFromTheStore(t *testing.T) {
	hits := 0
	rapid.Check(t, func(t *rapid.T) {
		type version struct {
			revision int64
			stored   bool
		}
		// The same row is another entity under another schema.
		type reading struct {
			uid              cedar.EntityUID
			revision, schema int64
		}
		readings := map[reading]*engine.Entity{}
		type load struct {
			snap *Snapshot
			list []loaded
		}
		// The smaller size makes it evict.
		c := newEntityCache(uint64(rapid.SampledFrom([]int{1 << 20, 1000}).Draw(t, "bytes")))
		// A failover begins another history. Reads by the old one go on.
		history := map[cedar.EntityUID][]version{}
		histories := map[*Snapshot]map[cedar.EntityUID][]version{}
		var committed int64
		var unapplied []store.Change
		schema := c.reset(0)
		var snaps []*Snapshot
		give := func() {
			unapplied = nil
			snap := &Snapshot{Position: store.Position{Number: committed}, schema: schema}
			snaps, histories[snap] = append(snaps, snap), history
		}
		give()
		var loads []load
		names := []string{"a", "b", "c", "d"}
		uid := func() cedar.EntityUID {
			return cedar.NewEntityUID("T", cedar.String(rapid.SampledFrom(names).Draw(t, "uid")))
		}
		read := func(u cedar.EntityUID, snap *Snapshot) (*engine.Entity, int64) {
			var v version
			for _, w := range histories[snap][u] {
				if w.revision <= snap.Position.Number {
					v = w
				}
			}
			if !v.stored {
				return nil, v.revision
			}
			r := reading{u, v.revision, snap.schema}
			if readings[r] == nil {
				readings[r] = &engine.Entity{UID: u}
			}
			return readings[r], v.revision
		}
		recent := func() *Snapshot {
			return snaps[rapid.IntRange(max(0, len(snaps)-4), len(snaps)-1).Draw(t, "snapshot")]
		}
		actions := map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				committed++
				u := uid()
				history[u] = append(history[u], version{committed, rapid.IntRange(0, 3).Draw(t, "delete") > 0})
				unapplied = append(unapplied, store.Change{Revision: committed, Kind: store.KindEntity, Type: string(u.Type), ID: string(u.ID)})
			},
			"apply": func(*rapid.T) {
				c.apply(unapplied)
				give()
			},
			"new schema": func(*rapid.T) {
				schema = c.reset(committed)
				give()
			},
			"failover": func(t *rapid.T) {
				committed = rapid.Int64Range(max(0, committed-3), committed).Draw(t, "what is left")
				kept := map[cedar.EntityUID][]version{}
				for u, versions := range history {
					kept[u] = slices.DeleteFunc(slices.Clone(versions), func(v version) bool { return v.revision > committed })
				}
				history = kept
				schema = c.reset(committed)
				give()
			},
			"load begins": func(t *rapid.T) {
				snap, u := recent(), uid()
				e, since := read(u, snap)
				loads = append(loads, load{snap, []loaded{{uid: u, entity: e, since: since}}})
			},
			"load ends": func(t *rapid.T) {
				if len(loads) == 0 {
					t.SkipNow()
				}
				i := rapid.IntRange(0, len(loads)-1).Draw(t, "load")
				c.keep(loads[i].snap, loads[i].list)
				loads = append(loads[:i], loads[i+1:]...)
			},
			"": func(t *rapid.T) {
				for _, snap := range snaps[max(0, len(snaps)-4):] {
					for _, name := range names {
						u := cedar.NewEntityUID("T", cedar.String(name))
						e, known := c.get(snap, u)
						if !known {
							continue
						}
						hits++
						if want, _ := read(u, snap); e != want {
							t.Fatalf("%s at revision %d: %p, stored is %p", u, snap.Position.Number, e, want)
						}
					}
				}
			},
		}
		for range 8 { // a fault may show only after many steps
			t.Repeat(actions)
		}
	})
	if hits == 0 {
		t.Error("the cache never had anything")
	}
}
