package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/prometheus/client_golang/prometheus"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// Several servers follow one database over a slow network, while others write and publish.
// Afterwards an oracle, which has no cache and no follower, decides each question again from
// history. The answers are the same.
func TestOracle(t *testing.T) {
	t.Parallel() // it takes long
	consultOracle(t, 4, 250)
}

// TestSoakOracle is the long form.
func TestSoakOracle(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("set CEDARPOST_SOAK=1 to run")
	}
	consultOracle(t, 20, 1500)
}

// consultOracle plays worlds of at most so many writes each. Rapid draws them but does not
// shrink them, because a race does not repeat.
func consultOracle(t *testing.T, worlds, writes int) {
	var total tally
	rapid.Check(t, func(rt *rapid.T) {
		p := drawWorld(rt, writes)
		if worlds > 0 && !t.Failed() {
			worlds--
			total.add(p.play(t))
		}
	})
	t.Logf("%+v", total)
	if total.Hits == 0 || total.Allowed == 0 || total.Denied == 0 || total.Publishes == 0 || total.Policies < 5 {
		t.Errorf("nothing was put to the test: %+v", total)
	}
}

// tally counts what happened.
type tally struct {
	Writes, Publishes, Questions, Hits, Revisions, Answers, Allowed, Denied, Policies int
}

func (a *tally) add(b tally) {
	a.Writes += b.Writes
	a.Publishes += b.Publishes
	a.Questions += b.Questions
	a.Hits += b.Hits
	a.Revisions += b.Revisions
	a.Answers += b.Answers
	a.Allowed += b.Allowed
	a.Denied += b.Denied
	a.Policies = max(a.Policies, b.Policies)
}

// worldPlan is what rapid draws of a world. The scheduler decides the rest.
type worldPlan struct {
	Seed                     uint64
	Writes, Writers, Readers int
	CacheBytes               []uint64 // of each server
	SlowOneIn, AskMany       int
	// The longest times: of the network, until a follower notices a revision, between writes,
	// and between publishes.
	Delay, Lag, WriteEvery, PublishEvery time.Duration
}

func drawWorld(rt *rapid.T, writes int) worldPlan {
	draw := func(name string, from, to int) int { return rapid.IntRange(from, to).Draw(rt, name) }
	return worldPlan{
		Seed:         rapid.Uint64().Draw(rt, "seed"),
		Writes:       draw("writes", writes/2, writes),
		Writers:      draw("writers", 2, 4),
		Readers:      draw("readers of each server", 2, 4),
		PublishEvery: time.Duration(draw("ms between publishes", 10, 200)) * time.Millisecond,
		Delay:        time.Duration(draw("delay in ms", 2, 15)) * time.Millisecond,
		Lag:          time.Duration(draw("lag in ms", 1, 30)) * time.Millisecond,
		// One has no cache, one keeps everything, and some evict.
		CacheBytes: []uint64{0, 1 << 20, 3000, uint64(draw("bytes", 1500, 6000))},
		SlowOneIn:  draw("one slow answer in", 2, 8),
		WriteEvery: time.Duration(draw("ms between writes", 1, 8)) * time.Millisecond,
		AskMany:    draw("questions at once", 1, 4),
	}
}

// world is a running world.
type world struct {
	worldPlan
	t        *testing.T
	ctx      context.Context
	db       *store.DB // without the slow network, for writers and for the oracle
	replicas []*replica
	acked    atomic.Int64 // the newest revision of an acknowledged write
	policies atomic.Int64 // the newest revision of an acknowledged publish
	over     atomic.Bool

	mu      sync.Mutex
	tally   tally
	answers map[int64]map[question]map[string]string // revision → question → answer → server that gave it
}

// replica is the part of a server that decides.
type replica struct {
	name     string
	db       *store.DB
	follower *Follower
	metrics  *prometheus.Registry
}

// question asks whether a user may read a document.
type question struct{ user, doc string }

func (p worldPlan) play(t *testing.T) tally {
	w := &world{worldPlan: p, t: t, ctx: t.Context(), answers: map[int64]map[question]map[string]string{}}
	defer func() {
		if t.Failed() {
			t.Logf("%+v", p)
		}
	}()
	databaseURL := storetest.New(t)
	w.db = w.open(databaseURL)
	defer w.db.Close()
	slow := w.slowly(databaseURL)
	defer func() {
		for _, r := range w.replicas {
			r.db.Close()
		}
	}()
	for _, bytes := range p.CacheBytes {
		w.join(w.open(slow), bytes)
	}

	var following, reading, writing sync.WaitGroup
	var caughtUp atomic.Bool
	for i, r := range w.replicas {
		following.Go(func() { w.follow(r, w.rand(i), &caughtUp) })
	}
	w.publish(w.replicas[0], w.rand(9))
	w.write(w.first())
	for i, r := range w.replicas {
		reading.Go(func() { w.hinder(r) })
		for j := range p.Readers {
			reading.Go(func() { w.read(r, w.rand(10*i+j+100)) })
		}
	}
	for i := range p.Writers {
		writing.Go(func() { w.change(w.rand(i + 1000)) })
	}
	reading.Go(func() {
		for rnd := w.rand(10); !w.over.Load() && !t.Failed(); w.publish(pick(rnd, w.replicas...), rnd) {
			time.Sleep(rand.N(p.PublishEvery))
		}
	})
	writing.Wait()
	time.Sleep(2 * p.Lag) // so that there are answers after the last write
	w.over.Store(true)
	reading.Wait()
	caughtUp.Store(true)
	following.Wait()
	for _, r := range w.replicas {
		w.tally.Hits += r.hits(t)
		if n := r.follower.Latest().Position.Number; n != w.acked.Load() {
			t.Errorf("%s ends at revision %d, the last write was %d", r.name, n, w.acked.Load())
		}
	}
	if !t.Failed() {
		w.judge()
	}
	return w.tally
}

// rand returns a source of random numbers. Each goroutine has its own.
func (w *world) rand(stream int) *rand.Rand { return rand.New(rand.NewPCG(w.Seed, uint64(stream))) }

func (w *world) open(databaseURL string) *store.DB {
	w.t.Helper()
	db, err := store.Open(w.ctx, store.Config{DatabaseURL: secret.New(databaseURL), MaxConns: 8})
	if err != nil {
		w.t.Fatal(err)
	}
	return db
}

// join starts a server, without the goroutine that drives its follower.
func (w *world) join(db *store.DB, cacheBytes uint64) {
	r := &replica{name: fmt.Sprintf("server %d (%d bytes)", len(w.replicas), cacheBytes), db: db}
	w.replicas = append(w.replicas, r)
	r.metrics = prometheus.NewRegistry()
	r.follower = NewFollower(Config{
		DB: db, Log: slog.New(slog.DiscardHandler), MaxStaleness: time.Minute, CacheBytes: cacheBytes, Metrics: r.metrics,
	})
	if err := r.follower.CatchUp(w.ctx); err != nil {
		w.t.Fatal(err)
	}
}

func (r *replica) hits(t *testing.T) int { return hits(t, r.metrics) }

// hits returns how many entities were found in the cache.
func hits(t *testing.T, metrics *prometheus.Registry) int {
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == "cedarpost_entity_lookups_total" && m.Label[0].GetValue() == "hit" {
				return int(m.GetCounter().GetValue())
			}
		}
	}
	return 0
}

// slowly returns the URL of a database behind a network that sometimes delays an answer.
func (w *world) slowly(databaseURL string) string {
	u, err := url.Parse(databaseURL)
	if err != nil {
		w.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	target := u.Host
	carry := func(to, from net.Conn, delay bool) {
		defer func() { _ = to.Close() }()
		buffer := make([]byte, 32<<10)
		for {
			n, err := from.Read(buffer)
			if delay && rand.IntN(w.SlowOneIn) == 0 {
				time.Sleep(rand.N(w.Delay))
			}
			if _, failed := to.Write(buffer[:n]); err != nil || failed != nil {
				return
			}
		}
	}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				_ = client.Close()
				continue
			}
			go carry(server, client, false)
			go carry(client, server, true)
		}
	}()
	u.Host = l.Addr().String()
	return u.String()
}

// follow drives a follower in place of Run: notifications are late, lost and doubled.
func (w *world) follow(r *replica, rnd *rand.Rand, last *atomic.Bool) {
	for done := false; !done; {
		time.Sleep(rand.N(w.Lag))
		done = last.Load()
		for range 1 + rnd.IntN(2) {
			if err := r.follower.CatchUp(w.ctx); err != nil {
				w.t.Errorf("%s: %v", r.name, err)
				return
			}
		}
	}
}

// hinder keeps the cache locked for a while, as a large load does, so that nothing can be
// applied.
func (w *world) hinder(r *replica) {
	for !w.over.Load() {
		time.Sleep(rand.N(w.Lag))
		r.follower.cache.mu.RLock()
		time.Sleep(rand.N(3 * time.Millisecond))
		r.follower.cache.mu.RUnlock()
	}
}

// read asks a server until the world ends. It is a fast caller or a slow one, whose snapshot is
// not the newest any more.
func (w *world) read(r *replica, rnd *rand.Rand) {
	var newest int64
	slow := r.follower.Latest()
	for turns := int64(0); !w.over.Load() && !w.t.Failed(); {
		time.Sleep(rand.N(time.Millisecond)) // so that other goroutines run
		// At most one turn for each revision. Otherwise readers take all of the processors, writers
		// wait for them, and a busy machine asks many more questions about the same writes.
		if turns > w.acked.Load() {
			continue
		}
		turns++
		told, _, _ := r.follower.hub.newest()
		snap := r.follower.Latest()
		if told.Number > snap.Position.Number {
			w.t.Errorf("%s tells of revision %d, and answers by %d", r.name, told.Number, snap.Position.Number)
			return
		}
		if snap.Position.Number < newest {
			w.t.Errorf("%s went back from revision %d to %d", r.name, newest, snap.Position.Number)
			return
		}
		newest = snap.Position.Number
		switch rnd.IntN(6) {
		case 0, 1:
			slow, snap = pick(rnd, slow, slow, slow, snap), slow
		case 2:
			written := w.acked.Load()
			fresh, err := r.follower.AtLeast(w.ctx, written)
			if errors.Is(err, ErrBehind) {
				continue
			}
			if err != nil || fresh.Position.Number < written {
				w.t.Errorf("%s: asked for revision %d, got %+v, %v", r.name, written, fresh, err)
				return
			}
			snap = fresh.Snapshot
		}
		if len(snap.Bundles) > 0 {
			w.ask(r, snap, rnd)
		}
	}
}

// ask decides questions at one snapshot and keeps the answers.
func (w *world) ask(r *replica, snap *Snapshot, rnd *rand.Rand) {
	drawn := map[question]bool{}
	for range 1 + rnd.IntN(w.AskMany) {
		drawn[question{pick(rnd, users...), pick(rnd, docs...)}] = true
	}
	questions := slices.Collect(maps.Keys(drawn))
	asks := make([]engine.Ask, len(questions))
	for i, q := range questions {
		asks[i] = q.ask()
	}
	evaluations, _, err := r.follower.loader.prepare(w.ctx, snap, asks, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		return // an error is not a wrong answer
	}
	if err != nil {
		w.t.Errorf("%s at revision %d: %v", r.name, snap.Position.Number, err)
		return
	}
	for i, q := range questions {
		_, answer := decideOne(w.t, &evaluations[i])
		w.note(snap.Position.Number, q, answer, r.name)
	}
}

func (q question) ask() engine.Ask {
	return engine.Ask{
		Principal: cedar.NewEntityUID("W::User", cedar.String(q.user)),
		Action:    cedar.NewEntityUID("W::Action", "Read"),
		Resource:  cedar.NewEntityUID("W::Doc", cedar.String(q.doc)),
	}
}

// decideFrom answers a question from a pool that has every entity.
func (q question) decideFrom(t *testing.T, set *engine.Set, pool *engine.Pool) (res *engine.Result, words string) {
	e, err := set.Prepare(q.ask(), pool, func(missing []cedar.EntityUID) error {
		return fmt.Errorf("%s is not in the pool", missing[0])
	})
	if err != nil {
		t.Fatal(err)
	}
	return decideOne(t, e)
}

// decideOne decides a question. The text contains everything that a caller sees.
func decideOne(t *testing.T, e *engine.Evaluation) (res *engine.Result, words string) {
	res, err := e.Decide()
	if err != nil {
		t.Error(err)
		return &engine.Result{}, err.Error()
	}
	return res, fmt.Sprintf("%+v", *res)
}

func (w *world) note(revision int64, q question, answer, by string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tally.Questions++
	if w.answers[revision] == nil {
		w.answers[revision] = map[question]map[string]string{}
	}
	if w.answers[revision][q] == nil {
		w.answers[revision][q] = map[string]string{}
	}
	w.answers[revision][q][answer] = by
}

// change writes until it has done its share of the writes.
func (w *world) change(rnd *rand.Rand) {
	for range w.Writes / w.Writers {
		time.Sleep(rand.N(w.WriteEvery))
		if w.t.Failed() {
			return
		}
		w.write(drawWrite(rnd))
	}
}

// write commits operations, which fit every version of the bundle. The store may refuse them.
func (w *world) write(ops []store.Op) {
	write := store.EntityWrite{Ops: ops, Caller: "test", PolicyRevision: w.policies.Load()}
	res, err := w.db.WriteEntities(w.ctx, write)
	for errors.Is(err, store.ErrPolicyChanged) {
		if write.PolicyRevision, err = w.db.PolicyRevision(w.ctx, math.MaxInt64); err == nil {
			res, err = w.db.WriteEntities(w.ctx, write)
		}
	}
	w.policies.Store(write.PolicyRevision)
	var refused *store.OpError
	switch {
	case errors.As(err, &refused):
	case err != nil:
		w.t.Error(err)
	default:
		w.acknowledge(res.Revision, &w.tally.Writes)
	}
}

func (w *world) acknowledge(revision int64, count *int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acked.Store(max(w.acked.Load(), revision))
	*count++
}

// publish replaces the bundle through a server.
func (w *world) publish(r *replica, rnd *rand.Rand) {
	b, err := bundle.FromFiles("w", drawBundle(rnd))
	if err != nil {
		w.t.Error(err)
		return
	}
	if _, err := r.follower.FullyConsistent(w.ctx); err != nil {
		return // a server that is too far behind does not publish
	}
	if revision := w.apply(r, b); revision > 0 {
		w.acknowledge(revision, &w.tally.Publishes)
	}
}

// apply publishes a bundle through a server that has applied everything before, and returns
// the revision; 0 if the bundle is published already.
func (w *world) apply(r *replica, b *bundle.Bundle) int64 {
	made, err := publishAt(w.ctx, r.db, r.follower.Latest(), b)
	for errors.Is(err, store.ErrPolicyChanged) || errors.Is(err, store.ErrOtherHistory) {
		if _, err = r.follower.FullyConsistent(w.ctx); err == nil {
			made, err = publishAt(w.ctx, r.db, r.follower.Latest(), b)
		}
	}
	if err != nil {
		w.t.Error(err)
	}
	return made
}

// publishAt publishes a bundle that is checked at a snapshot, as the server does. It does
// not look at stored entities: in these tests they fit every schema.
func publishAt(ctx context.Context, db *store.DB, snap *Snapshot, b *bundle.Bundle) (revision int64, err error) {
	var others []engine.Source
	for _, o := range snap.Bundles {
		if o.Name == b.Name {
			if o.Digest == b.Digest() {
				return 0, nil
			}
			continue
		}
		src, err := stored.Source(o)
		if err != nil {
			return 0, err
		}
		others = append(others, src)
	}
	report, set := offline.Check(b, others, snap.Set)
	if !report.Valid() {
		return 0, fmt.Errorf("%v", report.Findings)
	}
	p, err := stored.Publication(b, set)
	if err != nil {
		return 0, err
	}
	p.Caller, p.BaseRevision, p.EntitiesRevision, p.At = "test", snap.PolicyRevision, snap.Position.Number, snap.Position
	made, err := db.PublishBundle(ctx, p)
	return made.Revision, err
}
