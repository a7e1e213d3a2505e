package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// oldHistory is a new database, and a way to make all that is written to it older
// than any retention.
func oldHistory(t *testing.T) (db *store.DB, grow func()) {
	t.Helper()
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: url, Event: storetest.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db, func() {
		t.Helper()
		conn, err := pgx.Connect(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(t.Context(), "update revisions set at = now() - interval '100 days'"); err != nil {
			t.Fatal(err)
		}
	}
}

func writeOps(t *testing.T, db *store.DB, kind store.OpKind, id string) {
	t.Helper()
	_, err := db.WriteEntities(t.Context(), store.EntityWrite{Caller: "test", Ops: []store.Op{
		{Kind: kind, Entity: store.Entity{UID: store.UID{Type: "U", ID: id}}}}})
	if err != nil {
		t.Fatal(err)
	}
}

// syncedLog is a log that can be read while it is written.
type syncedLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *syncedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *syncedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// A server whose next revision was swept away cannot go on from where it was: what
// changed in between is not told any more. It begins anew, and misses nothing.
func TestFollowerOfWhatWasSwept(t *testing.T) {
	db, grow := oldHistory(t)
	writeOps(t, db, store.Put, "a")
	f := newFollower(db, slog.New(slog.DiscardHandler), time.Minute, newEntityCache(1<<20), newMetrics())
	if err := f.catchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	a := cedar.NewEntityUID("U", "a")
	f.cache.keep(f.snap.Load(), []loaded{{uid: a, entity: &engine.Entity{UID: a}, since: 1}})
	if _, known := f.cache.get(f.snap.Load(), a); !known {
		t.Fatal("not cached")
	}

	writeOps(t, db, store.Delete, "a")
	key := store.Key{ID: "k", Name: "new caller", Hash: make([]byte, sha256.Size)}
	if err := db.CreateKey(t.Context(), key, "test"); err != nil {
		t.Fatal(err)
	}
	writeOps(t, db, store.Put, "b")
	grow()
	if swept, err := db.Sweep(t.Context(), store.MinKeep); err != nil || swept.Oldest != 4 {
		t.Fatalf("%+v, %v", swept, err)
	}
	if err := f.catchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	snap := f.snap.Load()
	if snap.position.Number != 4 || f.oldest.Load() != 4 {
		t.Errorf("at revision %d, history begins at %d", snap.position.Number, f.oldest.Load())
	}
	if e, known := f.cache.get(snap, a); known {
		t.Errorf("what was deleted is in the cache: %v", e)
	}
	if snap.callers[[sha256.Size]byte(key.Hash)] != key.Name {
		t.Error("a key that was made meanwhile is not known")
	}
	// From there it follows again.
	f.cache.keep(snap, []loaded{{uid: a}})
	writeOps(t, db, store.Put, "c")
	if err := f.catchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, known := f.cache.get(f.snap.Load(), a); !known {
		t.Error("began anew without need")
	}
}

func TestServerSweeps(t *testing.T) {
	db, grow := oldHistory(t)
	writeOps(t, db, store.Put, "a")
	writeOps(t, db, store.Delete, "a")
	writeOps(t, db, store.Put, "b")
	grow()
	var log syncedLog
	s, err := New(t.Context(), Config{
		DB: db, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: "127.0.0.1:0",
		Log: slog.New(slog.NewTextHandler(&log, nil)), logCare: time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	metrics := func() string {
		res, err := http.Get("http://" + s.Addr("ops") + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		said, missing := metrics()+log.String(), ""
		for _, text := range []string{
			`cedarpost_history_swept_rows_total{table="entities"} 1`, `cedarpost_history_swept_rows_total{table="revisions"} 2`,
			`cedarpost_history_oldest_revision 3`, `cedarpost_background_failures_total{task="sweep"} 0`,
			`msg="history swept" oldest=3`, " entities=1 imports=0 revision_entries=2 revisions=2\n",
		} {
			if !strings.Contains(said, text) {
				missing = text
			}
		}
		if missing == "" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("does not say %q:\n%s", missing, said)
		}
	}
}

func TestHistoryRetention(t *testing.T) {
	db, _ := oldHistory(t)
	_, err := New(t.Context(), Config{DB: db, HistoryRetention: 47 * time.Hour})
	if err == nil || !strings.Contains(err.Error(), "48h") {
		t.Errorf("47 hours: %v", err)
	}
	(&Server{cfg: Config{HistoryRetention: -1}}).sweepHistory(t.Context()) // nothing to wait for
	// A sweep that fails is counted.
	s := &Server{cfg: Config{DB: db, HistoryRetention: time.Hour, Log: slog.New(slog.DiscardHandler)}, metrics: newMetrics()}
	s.sweep(t.Context())
	if n := gathered(t, s.metrics, "cedarpost_background_failures_total", taskSweep); n != 1 {
		t.Errorf("%v failures", n)
	}
}

// Each task in the background says when it succeeded last, and counts its failures.
func TestBackgroundTasksAreCounted(t *testing.T) {
	t.Parallel() // it takes long
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: pg.URL()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	var logged bytes.Buffer
	log := slog.New(slog.NewTextHandler(&logged, nil))
	m := newMetrics()
	r := newRecorder(db, "s", auditlog.Strict, log, m, func(store.Position, time.Time) {})
	events := &eventLog{r, "s"}
	s := &Server{
		cfg:     Config{DB: db, Name: "s", HistoryRetention: 90 * 24 * time.Hour, DecisionRetention: 90 * 24 * time.Hour, Log: log},
		metrics: m, recorder: r, unknown: newStrangers(events, log, m),
	}
	if s.signer, err = newSigner(db, events, log, Signing{}); err != nil {
		t.Fatal(err)
	}
	work := map[string]func(){
		taskPartitions: func() { s.makePartitions(t.Context()) },
		taskStateRoot:  func() { s.writeStateRoot(t.Context()) },
		taskRetention:  func() { s.dropLogDays(t.Context()) },
		taskSweep:      func() { s.sweep(t.Context()) },
		taskStrangers: func() {
			s.unknown.note("10.0.0.1:1", "p", "no key")
			s.unknown.record(t.Context(), true)
		},
		taskWatchLog: func() {
			ctx, cancel := context.WithCancel(t.Context())
			s.signer.watchLog(ctx, func(err error) { m.task(taskWatchLog, err); cancel() })
		},
	}
	for task, do := range work {
		do()
		if at := gathered(t, m, "cedarpost_background_success_timestamp_seconds", task); time.Since(time.Unix(int64(at), 0)) > time.Hour {
			t.Errorf("%s succeeded at %v", task, at)
		}
		if n := gathered(t, m, "cedarpost_background_failures_total", task); n != 0 {
			t.Errorf("%s: %v failures\n%s", task, n, &logged)
		}
	}
	r.close()
	if err := pg.Stop(); err != nil {
		t.Fatal(err)
	}
	for task, do := range work {
		logged.Reset()
		do()
		if n := gathered(t, m, "cedarpost_background_failures_total", task); n != 1 {
			t.Errorf("%s: %v failures", task, n)
		}
		if task != taskWatchLog && !strings.Contains(logged.String(), "level=ERROR") {
			t.Errorf("%s: nothing in the log", task)
		}
	}
	if err := pg.Restart(t.Context()); err != nil { // it is stopped with the test
		t.Fatal(err)
	}
}

// gathered reads a metric with one label.
func gathered(t *testing.T, m *metrics, name, label string) float64 {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, metric := range f.GetMetric() {
			if f.GetName() == name && len(metric.GetLabel()) == 1 && metric.GetLabel()[0].GetValue() == label {
				return metric.GetCounter().GetValue() + metric.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no %s of %s", name, label)
	return 0
}
