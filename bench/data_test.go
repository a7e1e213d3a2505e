package bench

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

const (
	cacheBytes  = 64 << 20
	measured    = 2 * time.Second
	connections = 16
)

// TestData prints the tables of docs/benchmarks.md about stored data. One process
// holds the servers and those who ask them; Postgres is real and durable.
func TestData(t *testing.T) {
	if os.Getenv("CEDARPOST_BENCH") == "" {
		t.Skip("set CEDARPOST_BENCH=1 to run")
	}
	pg := storetest.NewServer(t)
	few, many := worldOf(1_000), worldOf(1_000_000)
	small, big := newTarget(t, database(t, pg.URL(), "few"), cacheBytes), newTarget(t, database(t, pg.URL(), "many"), cacheBytes)
	small.apply()
	big.apply()
	importing(small, big, few, many)
	for _, s := range []*target{small, big} {
		s.exec("vacuum analyze")
	}
	deciding(t, small, big, few, many)
	visibility(t, big)
	writing(big, many)
}

// target is a server with a connection for each who asks.
type target struct {
	*servertest.Server
	t       *testing.T
	clients []cedarpostv1connect.AuthorizationServiceClient
}

func newTarget(t *testing.T, databaseURL string, cacheBytes int64) *target {
	s := &target{t: t, Server: servertest.On(t, databaseURL, func(c *server.Config) { c.CacheBytes = cacheBytes })}
	for range connections {
		s.clients = append(s.clients, cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, s.Token)))
	}
	return s
}

func (s *target) apply() {
	s.t.Helper()
	s.MustApply("files", "schema.cedarschema", schema, "policies.cedar", policies)
}

func (s *target) exec(sql string) {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.URL)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(s.t.Context(), sql); err != nil {
		s.t.Fatal(err)
	}
}

// database makes a migrated database beside another one.
func database(t *testing.T, serverURL, name string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), serverURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "create database "+name); err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(serverURL)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + name
	if err := store.Migrate(t.Context(), u.String(), nil); err != nil {
		t.Fatal(err)
	}
	return u.String()
}

// counters reads what the server says of itself.
func (s *target) counters() map[string]float64 {
	s.t.Helper()
	res, err := http.Get(s.Ops + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	text := new(strings.Builder)
	if err := res.Write(text); err != nil {
		s.t.Fatal(err)
	}
	values := map[string]float64{}
	for line := range strings.Lines(text.String()) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		values[name], _ = strconv.ParseFloat(value, 64)
	}
	return values
}

// figures are of one load.
type figures struct {
	times   []time.Duration // sorted
	took    time.Duration
	counted map[string]float64
}

func (f figures) quantile(q float64) time.Duration {
	if len(f.times) == 0 {
		return 0
	}
	return f.times[min(int(q*float64(len(f.times))), len(f.times)-1)]
}

func (f figures) rate() float64 { return float64(len(f.times)) / f.took.Seconds() }

// ms writes a time as the tables have it.
func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1000) }

// during runs fn, of which several run at once, over and over for a while.
func during(several int, while time.Duration, fn func(who int, rnd *rand.Rand) error) (figures, error) {
	var mu sync.Mutex
	var f figures
	var failed error
	var all sync.WaitGroup
	began := time.Now()
	for who := range several {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(who), uint64(began.UnixNano())))
			var times []time.Duration
			var err error
			for time.Since(began) < while && err == nil {
				start := time.Now()
				err = fn(who, rnd)
				times = append(times, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			f.times = append(f.times, times...)
			if err != nil {
				failed = err
			}
		})
	}
	all.Wait()
	f.took = time.Since(began)
	slices.Sort(f.times)
	return f, failed
}

// ask has single questions decided over so many connections.
func (s *target) ask(connections int, while time.Duration, draw draw) figures {
	s.t.Helper()
	before := s.counters()
	f, err := during(connections, while, func(who int, rnd *rand.Rand) error {
		_, err := s.clients[who].Authorize(s.t.Context(), draw(rnd))
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	f.counted = map[string]float64{}
	for name, value := range s.counters() {
		f.counted[name] = value - before[name]
	}
	return f
}

// warm asks in batches for a while.
func (s *target) warm(while time.Duration, draw draw) {
	s.t.Helper()
	_, err := during(4, while, func(who int, rnd *rand.Rand) error {
		req := &cedarpostv1.AuthorizeBatchRequest{}
		for range 100 {
			req.Checks = append(req.Checks, draw(rnd))
		}
		_, err := s.clients[who].AuthorizeBatch(s.t.Context(), req)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// heap is what lives after a collection, and the pages it lives on.
func heap() (live, inUse float64) {
	runtime.GC()
	runtime.GC() // what the first one let go of
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20), float64(m.HeapInuse) / (1 << 20)
}

func deciding(t *testing.T, small, big *target, few, many world) {
	const (
		hits, misses, shared = `cedarpost_entity_lookups_total{result="hit"}`, `cedarpost_entity_lookups_total{result="miss"}`, `cedarpost_entity_lookups_total{result="shared"}`
		trips, rows, cached  = "cedarpost_entity_loads_total", "cedarpost_entity_loaded_rows_total", "cedarpost_entity_cache_bytes"
	)
	fmt.Println("\n| stored | cache | questions about | at once | p50 | p99 | calls/s | hit rate | rows a miss | round trips a miss |")
	fmt.Println("|---:|---|---|---:|---:|---:|---:|---:|---:|---:|")
	row := func(s *target, stored, cache, about string, draw draw) {
		for _, n := range []int{1, connections} {
			f := s.ask(n, measured, draw)
			c := f.counted
			each := func(name string) string {
				if c[misses] < 100 {
					return ""
				}
				return fmt.Sprintf("%.2f", c[name]/c[misses])
			}
			fmt.Printf("| %s | %s | %s | %d | %s | %s | %.0f | %.1f %% | %s | %s |\n", stored, cache, about, n, ms(f.quantile(.5)), ms(f.quantile(.99)), f.rate(),
				100*c[hits]/(c[hits]+c[misses]+c[shared]), each(rows), each(trips))
		}
	}
	smallCold, bigCold := newTarget(t, small.URL, -1), newTarget(t, big.URL, -1)
	row(smallCold, "1,000", "none", "all", few.uniform())
	row(bigCold, "1,000,000", "none", "all", many.uniform())
	small.warm(time.Second, few.uniform())
	row(small, "1,000", "64 MiB", "all", few.uniform())
	big.warm(time.Second, few.uniform())
	row(big, "1,000,000", "64 MiB", "the first 1,000", few.uniform())

	ratio := func(name string, a, b *target) {
		var of [2][]time.Duration
		for range 60 {
			for i, s := range []*target{a, b} {
				f := s.ask(1, 50*time.Millisecond, few.uniform())
				of[i] = append(of[i], f.quantile(.5))
			}
		}
		for i := range of {
			slices.Sort(of[i])
		}
		fmt.Printf("| %s | %.2f |\n", name, float64(of[1][len(of[1])/2])/float64(of[0][len(of[0])/2]))
	}
	live, inUse := heap()
	full := 0.0 // bytes
	for tries := 0; full < .95*cacheBytes && tries < 30; tries++ {
		big.warm(time.Second, many.uniform())
		full = big.counters()[cached]
	}
	fullLive, fullInUse := heap()
	row(big, "1,000,000", "64 MiB", "all", many.uniform())
	big.warm(5*time.Second, many.skewed())
	row(big, "1,000,000", "64 MiB", "all, skewed", many.skewed())

	fmt.Println("\n| 1,000,000 : 1,000, in turns | ratio |\n|---|---:|")
	big.warm(time.Second, few.uniform())
	ratio("warm, the same 1,000 entities", small, big)
	ratio("no cache, the same 1,000 entities", smallCold, bigCold)
	fmt.Println("\n| MiB | entities, by the cache's count | live heap | heap in use |\n|---|---:|---:|---:|")
	fmt.Printf("| before | | %.1f | %.1f |\n| cache full | %.1f | %.1f | %.1f |\n", live, inUse, full/(1<<20), fullLive, fullInUse)
}

// visibility times how long a committed write takes to be seen on another server.
func visibility(t *testing.T, a *target) {
	b := newTarget(t, a.URL, cacheBytes)
	policies, err := a.DB.PolicyRevision(t.Context(), math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	var fromCommit, fromSend figures
	seen := func(revision int64) {
		for {
			res, err := b.Policies.ListBundles(t.Context(), &cedarpostv1.ListBundlesRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if res.Revision.Number >= revision {
				return
			}
			time.Sleep(500 * time.Microsecond) // to take the processor from nobody
		}
	}
	for i := range 1000 {
		time.Sleep(rand.N(5 * time.Millisecond))
		// By the store itself: a server's answer waits until that server has applied it.
		res, err := a.DB.WriteEntities(t.Context(), store.EntityWrite{Caller: "bench", PolicyRevision: policies, Ops: []store.Op{{
			Kind: store.SetAttributes, Entity: store.Entity{UID: store.UID{Type: "Files::User", ID: "u1"}, Attrs: fmt.Appendf(nil, `{"level": %d}`, i)},
		}}})
		committed := time.Now()
		if err != nil {
			t.Fatal(err)
		}
		seen(res.Revision)
		fromCommit.times = append(fromCommit.times, time.Since(committed))

		sent := time.Now()
		answer, err := a.Entities.WriteEntities(t.Context(), revoke(1, i))
		if err != nil {
			t.Fatal(err)
		}
		seen(answer.Revision.Number)
		fromSend.times = append(fromSend.times, time.Since(sent))
	}
	fmt.Println("\n| visible on another server, after | p50 | p99 |\n|---|---:|---:|")
	for _, r := range []struct {
		name string
		f    figures
	}{{"the commit", fromCommit}, {"the call was sent", fromSend}} {
		slices.Sort(r.f.times)
		fmt.Printf("| %s | %s | %s |\n", r.name, ms(r.f.quantile(.5)), ms(r.f.quantile(.99)))
	}
}

// writing puts new users, one or a thousand with a call.
func writing(s *target, w world) {
	fmt.Println("\n| entities a call | writers | entities/s | calls/s | p50 | p99 |\n|---:|---:|---:|---:|---:|---:|")
	var next atomic.Int64
	for _, size := range []int{1, 1000} {
		for _, writers := range []int{1, 8} {
			f, err := during(writers, measured, func(int, *rand.Rand) error {
				req := &cedarpostv1.WriteEntitiesRequest{}
				for range size {
					e := w.user(w.users + int(next.Add(1)))
					req.Operations = append(req.Operations, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: e}})
				}
				_, err := s.Entities.WriteEntities(s.t.Context(), req)
				return err
			})
			if err != nil {
				s.t.Fatal(err)
			}
			fmt.Printf("| %d | %d | %.0f | %.0f | %s | %s |\n", size, writers, f.rate()*float64(size), f.rate(), ms(f.quantile(.5)), ms(f.quantile(.99)))
		}
	}
}

// importing fills the two worlds, and revokes meanwhile.
func importing(small, big *target, few, many world) {
	small.importAll(few)
	big.importAll(few) // somebody to revoke from
	turn := 0
	revoking := func(done <-chan time.Duration) (f figures) {
		for {
			select {
			case f.took = <-done:
				slices.Sort(f.times)
				return f
			case <-time.After(rand.N(40 * time.Millisecond)):
			}
			turn++
			began := time.Now()
			if _, err := big.Entities.WriteEntities(big.t.Context(), revoke(turn/2%few.users, turn)); err != nil {
				big.t.Fatal(err)
			}
			f.times = append(f.times, time.Since(began))
		}
	}
	done := make(chan time.Duration)
	go func() { done <- big.importAll(many) }()
	meanwhile := revoking(done)
	time.AfterFunc(10*time.Second, func() { done <- 0 })
	alone := revoking(done)
	fmt.Printf("\n1,000,000 entities imported in %.0f s: %.0f/s.\n", meanwhile.took.Seconds(), 1e6/meanwhile.took.Seconds())
	fmt.Println("\n| one revocation | p50 | p99 |\n|---|---:|---:|")
	fmt.Printf("| alone | %s | %s |\n| during the import | %s | %s |\n",
		ms(alone.quantile(.5)), ms(alone.quantile(.99)), ms(meanwhile.quantile(.5)), ms(meanwhile.quantile(.99)))
}

// importAll imports a world in messages of 1,000 entities.
func (s *target) importAll(w world) time.Duration {
	began := time.Now()
	// The clients of tests give a call a minute.
	for part := range slices.Chunk(slices.Collect(w.numbers()), 50_000) {
		stream, err := s.Entities.ImportEntities(s.t.Context())
		if err != nil {
			s.t.Error(err)
			break
		}
		for chunk := range slices.Chunk(part, 1000) {
			msg := &cedarpostv1.ImportEntitiesRequest{}
			for _, i := range chunk {
				msg.Entities = append(msg.Entities, w.entity(i))
			}
			if stream.Send(msg) != nil {
				break // the answer says why
			}
		}
		if res, err := stream.CloseAndReceive(); err != nil || res.Entities != int64(len(part)) {
			s.t.Errorf("import: %v %v", res, err)
			break
		}
	}
	return time.Since(began)
}
