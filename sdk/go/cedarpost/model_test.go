package cedarpost

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// The model has a service of several servers, each of which may be behind, and whose
// messages may arrive late, twice, in any order or never. An oracle knows the right
// answer to each question at each moment. The cache is the real one.

const (
	modelBound   = 10 * time.Second
	modelThings  = 5 // entities
	modelServers = 2
)

// state is the data of the service at one revision: each thing's value, which is the
// number of the write that made it.
type state struct {
	history int
	number  int64
	things  [modelThings]int64
	changed []int // in this revision
	at      int64 // when it became the newest, in nanoseconds
}

// question i depends on thing i, and on the thing that the value of i names, as with
// memberships. So it depends on other things when the data changes.
func (s *state) answer(q int) (value string, tags []uint64) {
	next := int(s.things[q]) % modelThings
	return fmt.Sprintf("%d: %d, %d: %d", q, s.things[q], next, s.things[next]), []uint64{tagOf(q), tagOf(next)}
}

func tagOf(thing int) uint64 { return uint64(thing)*1_000_003 + 7 }

func modelToken(history int, number int64) string {
	b := make([]byte, 53)
	b[0] = 2
	binary.BigEndian.PutUint32(b[17:], uint32(history))
	binary.BigEndian.PutUint64(b[21:], uint64(number))
	binary.BigEndian.PutUint64(b[29:], uint64(number))
	if number > 0 {
		b[37] = 1
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// ask is a question under way.
type ask struct {
	q     int
	sent  instant
	state *state // the state at which it was decided
	age   time.Duration
}

// probe is a question for the newest revision that is under way. newest was read after
// the question was sent.
type probe struct {
	sent    instant
	reached string // the token of the watch when it was sent
	newest  *state
}

type model struct {
	cache  *cache
	now    instant
	states []*state // the newest states, in order
	writes int64

	server  [modelServers]int // index into states that a server has reached
	asks    []ask
	probes  []probe
	stream  int                          // the server that the watch follows, -1 for none
	told    int                          // index into states that its stream has sent up to
	flying  []*cedarpostv1.WatchResponse // messages that have not arrived
	epoch   *epoch                       // after the last step
	applied int64
	seen    [modelThings]*state // the newest state of an answer to each question,
	history int                 // in this history, which is that of the last answer
	newer   seen
	hits    int
}

func newModel(coarse bool) *model {
	m := &model{stream: -1, states: []*state{{history: 1, number: 1}}}
	m.cache = newCache(1<<20, &Config{MaxStaleness: modelBound, Coarse: coarse, clock: func() instant { return m.now }}, &m.newer)
	return m
}

func (m *model) newest() *state { return m.states[len(m.states)-1] }

// write commits a revision.
func (m *model) write(t *run) {
	next := *m.newest()
	next.number++
	next.at = m.now.wall
	next.changed = nil
	for range t.between(1, 2) {
		thing := t.between(0, modelThings-1)
		m.writes++
		next.things[thing] = m.writes
		next.changed = append(next.changed, thing)
	}
	m.states = append(m.states, &next)
}

// failover loses the newest revisions and begins another history. The servers notice
// that when they follow.
func (m *model) failover(t *run) {
	old := m.newest()
	from := old
	for _, s := range slices.Backward(m.states) {
		if s.history != old.history || old.number-s.number > int64(t.between(0, 3)) {
			break
		}
		from = s
	}
	next := *from
	next.history, next.at, next.changed = old.history+1, m.now.wall, nil
	m.states = append(m.states, &next)
}

// follow makes a server apply committed revisions. It goes through every history.
func (m *model) follow(t *run) {
	i := t.between(0, modelServers-1)
	m.server[i] = t.between(m.server[i], len(m.states)-1)
}

// ask sends a question as a client does after a miss: at least as fresh as the revision
// that the client has applied. Or it asks for the newest revision, which may be ahead
// of the watch.
func (m *model) ask(t *run) {
	s := m.states[m.server[t.between(0, modelServers-1)]]
	if t.between(0, 5) == 0 {
		s = m.newest()
	} else if token := m.cache.reached(); token != "" {
		asked, _ := readToken(token)
		if own, _ := readToken(modelToken(s.history, 0)); own.history != asked.history {
			m.cache.forget()
		} else if s.number < asked.number {
			return // the server does not reach it in time
		}
	}
	m.asks = append(m.asks, ask{
		q: t.between(0, modelThings-1), sent: m.now, state: s,
		age: time.Duration(t.between(1, 40)) * time.Second,
	})
}

// arrive delivers any of the answers under way.
func (m *model) arrive(t *run) {
	a, ok := take(t, &m.asks)
	if !ok {
		return
	}
	value, tags := a.state.answer(a.q)
	if m.history != a.state.history {
		m.history, m.seen = a.state.history, [modelThings]*state{} // it is not known which history is newer
	}
	if old := m.seen[a.q]; old == nil || old.number < a.state.number {
		m.seen[a.q] = a.state
	}
	hint := &cedarpostv1.CacheHint{MaxAge: durationpb.New(a.age), Tags: tags}
	if t.between(0, 9) == 0 {
		hint = nil // it may not be kept
	}
	m.newer.see(modelToken(a.state.history, a.state.number))
	m.cache.put(strconv.Itoa(a.q), &cedarpostv1.AuthorizeResponse{
		DecisionId: value,
		Revision:   &cedarpostv1.Revision{Token: modelToken(a.state.history, a.state.number)},
		CacheHint:  hint,
	}, a.sent)
}

func take[T any](t *run, list *[]T) (v T, ok bool) {
	if len(*list) == 0 {
		return v, false
	}
	i := t.between(0, len(*list)-1)
	v = (*list)[i]
	*list = slices.Delete(*list, i, i+1)
	return v, true
}

// watch begins a stream at a server, from the revision that the cache has applied.
func (m *model) watch(t *run) {
	m.stream = t.between(0, modelServers-1)
	m.flying = nil // messages of the stream before
	at := m.server[m.stream]
	s := m.states[at]
	msg := &cedarpostv1.WatchResponse{After: s.number, Revision: &cedarpostv1.Revision{Token: modelToken(s.history, s.number)}}
	m.told = at
	if token := m.cache.reached(); token != "" {
		after, _ := readToken(token)
		own, _ := readToken(modelToken(s.history, 0))
		if own.history == after.history && after.number <= s.number && t.between(0, 9) > 0 {
			// It goes on from the revision that the cache has applied.
			for i, old := range m.states[:at+1] {
				if old.history == s.history && old.number == after.number {
					m.told = i
					msg = nil
				}
			}
		}
		if msg != nil {
			msg.Reset_ = true
		}
	}
	if msg != nil {
		m.flying = append(m.flying, msg)
	}
}

// tell sends changes that the watched server has applied since the last message, all or
// some of them.
func (m *model) tell(t *run) {
	if m.stream < 0 || m.told >= m.server[m.stream] {
		return
	}
	to := t.between(m.told+1, m.server[m.stream])
	from, last := m.states[m.told], m.states[to]
	msg := &cedarpostv1.WatchResponse{After: from.number, Revision: &cedarpostv1.Revision{Token: modelToken(last.history, last.number)}}
	// The changes can also be too many for a message.
	msg.Reset_ = last.history != from.history || t.between(0, 9) == 0
	for _, s := range m.states[m.told+1 : to+1] {
		if msg.Reset_ {
			break
		}
		for _, thing := range s.changed {
			msg.Tags = append(msg.Tags, tagOf(thing))
		}
	}
	m.told = to
	m.flying = append(m.flying, msg)
}

// deliver delivers any of the messages under way. The message can stay and arrive
// again.
func (m *model) deliver(t *run) {
	again := t.between(0, 4) == 0
	msg, ok := take(t, &m.flying)
	if !ok {
		return
	}
	if again {
		m.flying = append(m.flying, msg)
	}
	m.cache.apply(msg)
}

func (m *model) prove(t *run) {
	m.probes = append(m.probes, probe{sent: m.now, reached: m.cache.reached(), newest: m.newest()})
}

// proven delivers the revision that was the newest at some time after the question was
// sent.
func (m *model) proven(t *run) {
	if p, ok := take(t, &m.probes); ok {
		m.cache.prove(&cedarpostv1.Revision{Token: modelToken(p.newest.history, p.newest.number)}, p.sent, p.reached)
	}
}

// check asks the cache, and asks the oracle whether the answer of the cache may be
// used.
func (m *model) check(t *run) {
	q := t.between(0, modelThings-1)
	var fresh *state
	token := ""
	if t.between(0, 3) == 0 {
		fresh = m.states[t.between(0, len(m.states)-1)]
		token = modelToken(fresh.history, fresh.number)
	}
	e, now := m.cache.get(strconv.Itoa(q), token)
	if e == nil {
		return
	}
	m.hits++
	if age := now.wall - e.sent.wall; age > int64(e.maxAge) {
		t.Errorf("an answer was given %v after it was asked, and may be kept for %v", time.Duration(age), e.maxAge)
	}
	since := m.now.wall - int64(modelBound)
	for i, s := range slices.Backward(m.states) {
		over := m.now.wall // when s was replaced as the newest
		if i+1 < len(m.states) {
			over = m.states[i+1].at
		}
		if over < since {
			break
		}
		if last := m.seen[q]; last != nil && s.history == last.history && s.number < last.number {
			continue // the caller has seen a newer answer, so it must not get this one
		}
		if fresh != nil && (s.history != fresh.history || s.number < fresh.number) {
			continue
		}
		if value, _ := s.answer(q); value == e.response.GetDecisionId() {
			return
		}
	}
	t.Errorf("the answer %q to %d (made at %d) was right at no moment of the last %v with %+v; now it is at %+v", e.response.GetDecisionId(), q, e.number, modelBound, fresh, m.newest())
}

// invariant fails if the applied revision goes back.
func (m *model) invariant(t *run) {
	ep := m.cache.epoch.Load()
	if ep == nil {
		return
	}
	if ep == m.epoch && ep.applied.Load() < m.applied {
		t.Errorf("the revision went back from %d to %d", m.applied, ep.applied.Load())
	}
	m.epoch, m.applied = ep, ep.applied.Load()
}

func (m *model) pass(t *run) {
	d := int64(t.between(0, int(4*time.Second)))
	m.now.mono += d
	m.now.wall += d
}

// suspend lets time pass that the monotonic clock does not show.
func (m *model) suspend(t *run) {
	m.now.wall += int64(t.between(0, int(15*time.Second)))
}

// run is one run of the model. It draws evenly: here that finds more than draws that
// can be shrunk.
type run struct {
	*testing.T
	rand *rand.Rand
}

// between draws a number from a to b.
func (r *run) between(a, b int) int { return a + r.rand.IntN(b-a+1) }

// TestNoAnswerIsOlderThanTheBound runs the real cache against the model.
func TestNoAnswerIsOlderThanTheBound(t *testing.T) {
	runs := 250 // TestSoakSafeguards has more
	if n, err := strconv.Atoi(os.Getenv("CEDARPOST_MODEL_RUNS")); err == nil {
		runs = n
	}
	for _, coarse := range []bool{false, true} {
		t.Run(fmt.Sprintf("coarse %v", coarse), func(t *testing.T) {
			hits := 0
			for seed := range uint64(runs) {
				m := newModel(coarse)
				m.run(&run{t, rand.New(rand.NewPCG(seed, 0))}, 200)
				if hits += m.hits; t.Failed() {
					t.Fatalf("with seed %d", seed)
				}
			}
			if t.Logf("%d answers came from the cache in %d runs", hits, runs); hits < runs {
				t.Error("too few to tell anything")
			}
		})
	}
}

// run makes random steps, some kinds more often than others.
func (m *model) run(t *run, steps int) {
	var bag []func(*run)
	for _, s := range []struct {
		share int
		do    func(*run)
	}{
		{4, m.write}, {6, m.follow}, {10, m.ask}, {10, m.arrive}, {2, m.watch}, {8, m.tell}, {16, m.deliver},
		{6, m.prove}, {6, m.proven}, {3, m.pass}, {2, m.failover}, {20, m.check},
	} {
		for range s.share {
			bag = append(bag, s.do)
		}
	}
	if t.between(0, 3) == 0 {
		bag = append(bag, m.suspend)
	}
	m.watch(t)
	for range steps {
		if bag[t.between(0, len(bag)-1)](t); t.Failed() {
			return
		}
		m.invariant(t)
	}
}
