package snapshot

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A client watches one server, and keeps answers of this server and of another one until an
// event has one of their tags. At each revision of the watch, each kept answer is what an oracle
// decides at that revision.
func TestHintsAreSound(t *testing.T) {
	t.Parallel() // it takes long
	hintsAreSound(t, 4, 400)
}

// TestSoakHintsAreSound is the long form.
func TestSoakHintsAreSound(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("set CEDARPOST_SOAK=1 to run")
	}
	hintsAreSound(t, 40, 600)
}

// keeper is that client.
type keeper struct {
	w       *world
	rnd     *rand.Rand
	watched *replica
	next    int64 // the next event of the watched server
	applied int64 // revision
	kept    map[question]keptAnswer
	changed map[uint64]int64 // the newest revision that is known to have changed a tag
	floor   int64            // of the newest reset

	compared, dropped, resets int
	outcomes                  map[string]bool
}

type keptAnswer struct {
	words    string
	revision int64
	tags     []uint64
}

func hintsAreSound(t *testing.T, worlds, steps int) {
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	outcomes := map[string]bool{}
	compared, dropped, resets := 0, 0, 0
	for i := range worlds {
		k := playKeeper(t, rand.New(rand.NewPCG(seed, uint64(i))), steps, outcomes)
		compared, dropped, resets = compared+k.compared, dropped+k.dropped, resets+k.resets
		if t.Failed() {
			return
		}
	}
	t.Logf("%d compared, %d dropped, %d resets, %d different outcomes", compared, dropped, resets, len(outcomes))
	if compared < 100*worlds || dropped < 10*worlds || resets == 0 || len(outcomes) < 5 {
		t.Error("nothing was put to the test")
	}
}

func playKeeper(t *testing.T, rnd *rand.Rand, steps int, outcomes map[string]bool) *keeper {
	w := &world{worldPlan: worldPlan{Seed: rnd.Uint64()}, t: t, ctx: t.Context()}
	w.db = w.open(storetest.New(t))
	defer w.db.Close()
	for range 3 {
		w.join(w.db, 1<<20)
	}
	watched, other, publisher := w.replicas[0], w.replicas[1], w.replicas[2]
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); publisher.follower.Run(ctx) }()
	defer func() { stop(); <-ended }()
	w.publish(publisher, rnd)
	w.guard(publisher, rnd)
	w.write(w.first())
	k := &keeper{
		w: w, rnd: rnd, watched: watched, kept: map[question]keptAnswer{}, changed: map[uint64]int64{}, outcomes: outcomes,
	}
	for _, r := range w.replicas[:2] {
		catchUp(t, r)
	}
	k.hear()
	for range steps {
		switch n := rnd.IntN(100); {
		case n < 24:
			w.write([]store.Op{drawOp(rnd)})
		case n < 25:
			w.write(drawWrite(rnd))
		case n < 26:
			w.publish(publisher, rnd)
		case n < 28:
			w.guard(publisher, rnd)
		case n < 36:
			catchUp(t, other)
		case n < 60:
			catchUp(t, watched)
			k.hear()
		default:
			r := pick(rnd, watched, watched, other)
			for range 6 {
				k.ask(r)
			}
		}
		if t.Failed() {
			return k
		}
	}
	return k
}

func catchUp(t *testing.T, r *replica) {
	t.Helper()
	if err := r.follower.CatchUp(t.Context()); err != nil {
		t.Error(err)
	}
}

// guard publishes guardrails.
func (w *world) guard(r *replica, rnd *rand.Rand) {
	text := pick(rnd,
		`@id("g") forbid (principal, action, resource) when { principal is W::User && principal.level > 2 };`,
		`@id("g") forbid (principal in W::Group::"g2", action, resource);`,
		`@id("g") forbid (principal, action, resource) when { resource is W::Doc && resource.owner == principal };`)
	b, err := bundle.FromFiles(engine.Guardrails, []bundle.File{{Path: "schema.cedarschema"}, {Path: "p.cedar", Content: []byte(text)}})
	if err != nil {
		w.t.Error(err)
		return
	}
	if _, err := r.follower.FullyConsistent(w.ctx); err != nil {
		w.t.Error(err)
		return
	}
	w.apply(r, b)
}

// ask keeps an answer, unless what it depends on is known to have changed since.
func (k *keeper) ask(r *replica) {
	t, snap := k.w.t, r.follower.Latest()
	if len(snap.Bundles) == 0 {
		return
	}
	q := question{pick(k.rnd, users...), pick(k.rnd, docs...)}
	evaluations, _, err := r.follower.loader.prepare(t.Context(), snap, []engine.Ask{q.ask()}, nil)
	if err != nil {
		t.Error(err)
		return
	}
	_, words := decideOne(t, &evaluations[0])
	tags, ok := snap.HintTags(&evaluations[0])
	if !ok {
		t.Errorf("%+v cannot be kept", q)
	}
	k.outcomes[words] = true
	revision := snap.Position.Number
	stale := func(tag uint64) bool { return k.changed[tag] > revision }
	if revision >= k.floor && !slices.ContainsFunc(tags, stale) {
		k.kept[q] = keptAnswer{words, revision, tags}
	}
}

// hear applies the events of the watched server, and compares the kept answers after each one.
func (k *keeper) hear() {
	t := k.w.t
	events, next, _, ok := k.watched.follower.hub.next(k.next)
	if !ok {
		t.Fatal("too slow")
	}
	k.next = next
	for _, e := range events {
		at := e.position.Number
		if e.after != k.applied && !e.reset {
			t.Errorf("goes on from %d, applied is %d", e.after, k.applied)
		}
		for _, tag := range e.tags {
			k.changed[tag] = at
		}
		if k.applied = at; e.reset {
			k.floor = at
			k.resets++
		}
		for q, a := range k.kept {
			touched := slices.ContainsFunc(a.tags, func(tag uint64) bool { return slices.Contains(e.tags, tag) })
			if a.revision < at && (touched || e.reset) {
				delete(k.kept, q)
				k.dropped++
			}
		}
		k.compare()
	}
}

func (k *keeper) compare() {
	if len(k.kept) == 0 {
		return
	}
	t := k.w.t
	set := k.w.published(k.applied)
	pool := k.w.stored(k.applied, set)
	for q, a := range k.kept {
		if a.revision > k.applied {
			continue // newer than the last event that was applied
		}
		if _, want := q.decideFrom(t, set, pool); a.words != want {
			t.Errorf("%+v is kept from revision %d on, and at %d it is another one:\n kept %s\n now %s", q, a.revision, k.applied, a.words, want)
		}
		k.compared++
	}
}

// A change of bundles is no reset only if their policies alone changed, once for each bundle.
func TestOnlyPolicies(t *testing.T) {
	b := func(name, schema, policy string) store.Bundle {
		return store.Bundle{Name: name, Schema: schema, OnForbidError: "deny", Policies: []store.Policy{{Text: policy}}}
	}
	published := func(names ...string) (changes []store.Change) {
		for i, name := range names {
			changes = append(changes, store.Change{Revision: int64(i), Kind: store.KindBundle, ID: name},
				store.Change{Revision: int64(i), Kind: store.KindEntity, Type: "T", ID: name})
		}
		return changes
	}
	skip := b("a", "s", "p")
	skip.OnForbidError = "skip"
	fields := b("a", "s", "p")
	fields.Fields = "[]"
	for i, c := range []struct {
		old, now []store.Bundle
		changes  []store.Change
		want     bool
	}{
		{nil, nil, published(), true},
		{[]store.Bundle{b("a", "s", "p")}, []store.Bundle{b("a", "s", "q")}, published("a"), true},
		{[]store.Bundle{b("a", "s", "p"), b("b", "s", "p")}, []store.Bundle{b("a", "s", "q"), b("b", "s", "q")}, published("a", "b"), true},
		{[]store.Bundle{b("a", "s", "p")}, []store.Bundle{b("a", "s", "q")}, published("a", "a"), false},
		{[]store.Bundle{b("a", "s", "p")}, []store.Bundle{b("a", "t", "p")}, published("a"), false},
		{[]store.Bundle{b("a", "s", "p")}, []store.Bundle{skip}, published("a"), false},
		{[]store.Bundle{b("a", "s", "p")}, []store.Bundle{fields}, published("a"), false},
		{nil, []store.Bundle{b("a", "s", "p")}, published("a"), false},
		{[]store.Bundle{b("a", "s", "p")}, nil, published("a"), false},
	} {
		if got := onlyPolicies(c.old, c.now, c.changes); got != c.want {
			t.Errorf("%d: %v", i, got)
		}
	}
}

// Different things have different tags.
func TestTagsAreUnambiguous(t *testing.T) {
	a, b := [16]byte{1}, [16]byte{2}
	seen := map[uint64]string{}
	for i, got := range []uint64{
		tag(a, "entity", "A", "b"), tag(b, "entity", "A", "b"), tag(a, "entity", "Ab", ""), tag(a, "entity", "", "Ab"),
		tag(a, "entityA", "", "b"), tag(a, "bundle", "A", "b"), BundleTag(a, "b"), BundleTag(a, "A"),
	} {
		if other, taken := seen[got]; taken {
			t.Errorf("%d and %s are one", i, other)
		}
		seen[got] = fmt.Sprint(i)
	}
}
