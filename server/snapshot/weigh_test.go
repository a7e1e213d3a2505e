package snapshot

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

const weighSchema = `namespace W {
  entity Group in [Group];
  entity User in [Group] { level: Long, active: Bool, region: String };
  entity Doc { owner: User, readers: Group, status: String, size: Long };
  entity Text { t: String };
  entity Longs { s: Set<Long> };
  entity Strings { s: Set<String> };
  entity Refs { s: Set<User> };
  entity Nested { a: { b: { c: Long, d: String }, e: Bool } };
  entity Tagged tags String;
  entity Wide { a: Long, b: Long, c: Long, d: Long, e: Long, f: Long, g: Long, h: Long, i: Long, j: Long };
  entity Extended { d: decimal, t: datetime, i: ipaddr };
  action Read appliesTo { principal: [User], resource: [Doc], context: {} };
}`

// The estimated weight of entities differs from the memory that they take by a quarter at most.
// Otherwise the bound of the cache would be of no use.
func TestWeights(t *testing.T) {
	set, findings := engine.Compile([]engine.Source{{Name: "w", Schema: weighSchema}}, nil)
	if set == nil {
		t.Fatal(findings)
	}
	list := func(n int, format string, from int) string {
		items := make([]string, n)
		for i := range items {
			items[i] = fmt.Sprintf(format, from+i)
		}
		return "[" + strings.Join(items, ", ") + "]"
	}
	const reference = `{"__entity": {"type": "W::User", "id": "u%d"}}`
	for _, c := range []struct {
		typ     string
		attrs   func(i int) string // nil: not stored
		parents int
	}{
		{"Group", nil, 0},
		{"Group", func(int) string { return "{}" }, 0},
		{"Group", func(int) string { return "{}" }, 1},
		{"Group", func(int) string { return "{}" }, 10},
		{"Group", func(int) string { return "{}" }, 100},
		{"User", func(i int) string { return fmt.Sprintf(`{"level": %d, "active": true, "region": "eu-central"}`, i) }, 1},
		{"Doc", func(i int) string {
			return fmt.Sprintf(`{"owner": `+reference+`, "readers": {"__entity": {"type": "W::Group", "id": "g%d"}}, "status": "published", "size": 1}`, i, i)
		}, 0},
		{"Text", func(i int) string { return fmt.Sprintf(`{"t": "%010d"}`, i) }, 0},
		{"Text", func(i int) string { return fmt.Sprintf(`{"t": "%01000d"}`, i) }, 0},
		{"Longs", func(i int) string { return `{"s": ` + list(10, "%d", i) + `}` }, 0},
		{"Longs", func(i int) string { return `{"s": ` + list(100, "%d", i) + `}` }, 0},
		{"Strings", func(i int) string { return `{"s": ` + list(10, `"tag-%d"`, i) + `}` }, 0},
		{"Refs", func(i int) string { return `{"s": ` + list(10, reference, i) + `}` }, 0},
		{"Nested", func(i int) string { return fmt.Sprintf(`{"a": {"b": {"c": %d, "d": "some text"}, "e": true}}`, i) }, 0},
		{"Tagged", func(i int) string { return fmt.Sprintf(`{"env": "prod", "team": "t%d", "cost": "high"}`, i) }, 0},
		{"Wide", func(i int) string {
			return fmt.Sprintf(`{"a": %d, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1, "g": 1, "h": 1, "i": 1, "j": 1}`, i)
		}, 0},
		{"Extended", func(i int) string {
			return fmt.Sprintf(`{"d": "%d.5", "t": "2024-10-15T00:00:00.000Z", "i": "10.0.0.0/8"}`, i)
		}, 0},
	} {
		const entities = 500
		measure := func() (takes, weighs float64) {
			cache := newEntityCache(1 << 30)
			snap := &Snapshot{schema: cache.reset(0)}
			before := heapBytes()
			for i := range entities {
				// Each entity has its own strings, as when it comes from the store.
				uid := store.UID{Type: fmt.Sprint("W::", c.typ), ID: fmt.Sprint("entity-", i)}
				if c.attrs == nil {
					cache.keep(snap, []loaded{{uid: cedar.NewEntityUID(cedar.EntityType(uid.Type), cedar.String(uid.ID))}})
					continue
				}
				row := store.Entity{UID: uid, Attrs: []byte(c.attrs(i)), Tags: []byte("{}")}
				if c.typ == "Tagged" {
					row.Attrs, row.Tags = row.Tags, row.Attrs
				}
				for p := range c.parents {
					typ, id, _ := strings.Cut(fmt.Sprint("W::Group group-", i+p), " ")
					row.Parents = append(row.Parents, store.UID{Type: typ, ID: id})
				}
				e, err := stored.ReadEntity(set, row)
				if err != nil {
					t.Fatal(err)
				}
				cache.keep(snap, []loaded{{uid: e.UID, entity: e}})
			}
			cache.entries.CleanUp() // the library counts weights a little later
			takes, weighs = heapBytes()-before, float64(cache.bytes())
			runtime.KeepAlive(cache)
			return takes, weighs
		}
		takes, weighs := measure()
		near := func() bool { return takes > 0.75*weighs && takes < 1.25*weighs }
		// Other memory may have been freed meanwhile, for example that of the cache before.
		for tries := 0; tries < 10 && !near(); tries++ {
			takes, weighs = measure()
		}
		if !near() {
			t.Errorf("%s with %d parents takes %.0f bytes and weighs %.0f", c.typ, c.parents, takes/entities, weighs/entities)
		}
	}
}

func heapBytes() float64 {
	runtime.GC()
	runtime.GC() // frees what finalizers of the first one released
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}
