package decisionlog

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// startRecorder runs a recorder until the test ends.
func startRecorder(t *testing.T, cfg Config) *Recorder {
	t.Helper()
	if cfg.Metrics == nil {
		cfg.Metrics = prometheus.NewRegistry()
	}
	r, err := NewRecorder(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !r.stopping() {
			r.Close()
		}
	})
	return r
}

func aDecision(t *testing.T) store.Decision {
	t.Helper()
	id, err := uuid.NewV7()
	if err != nil {
		t.Fatal(err)
	}
	return store.Decision{ID: id, At: time.Now(), Caller: "c", Principal: store.UID{Type: "T", ID: "p"}, Record: []byte("x")}
}

// Close commits what is queued and refuses later calls. No call waits for ever, and each call
// that returned nil has its record.
func TestRecorderStops(t *testing.T) {
	db := storetest.Open(t)
	if err := db.EnsurePartitions(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	r := startRecorder(t, Config{DB: db, Name: "test", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler)})
	var wg sync.WaitGroup
	var mu sync.Mutex
	recorded := map[uuid.UUID]bool{}
	for range 20 {
		wg.Go(func() {
			for {
				d := aDecision(t)
				err := r.Record(t.Context(), []store.Decision{d}, nil)
				if errors.Is(err, ErrRecorderDown) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				recorded[d.ID] = true
				mu.Unlock()
			}
		})
	}
	for {
		mu.Lock()
		n := len(recorded)
		mu.Unlock()
		if n > 500 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	r.Close()
	wg.Wait()
	for id := range recorded {
		if _, err := db.GetDecision(t.Context(), id); err != nil {
			t.Fatalf("a recorded decision is not in the log: %v", err)
		}
	}
}

// The reply to the commit of an answered decision was lost. The recorder tries again, finds the
// record in the log, and commits the next ones.
func TestBufferedRetryFindsItsRecord(t *testing.T) {
	db := storetest.Open(t)
	r := startRecorder(t, Config{DB: db, Name: "test", Mode: auditlog.Buffered, Log: slog.New(slog.DiscardHandler)})
	committed, next := aDecision(t), aDecision(t)
	w := db.NewLogWriter("test", auditlog.Strict, 0)
	defer w.Close()
	if _, err := w.Append(t.Context(), []store.Decision{committed}, nil); err != nil {
		t.Fatal(err)
	}
	if err := r.Record(t.Context(), []store.Decision{committed}, nil); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); r.atRisk.Load() > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if err := r.Record(t.Context(), []store.Decision{next}, nil); err != nil || r.down.Load() {
		t.Fatalf("the recorder is stuck: %v", err)
	}
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if _, err := db.GetDecision(t.Context(), next.ID); err == nil {
			return
		}
	}
	t.Error("the next decision is not in the log")
}

// If Postgres refuses one row, the whole commit fails, and all calls in it get an error.
func TestRecorderTellsAllOfAFailedCommit(t *testing.T) {
	db := storetest.Open(t)
	if err := db.EnsurePartitions(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	r := startRecorder(t, Config{DB: db, Name: "test", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler)})
	bad := aDecision(t)
	bad.Principal.ID = "nul\x00"
	good := aDecision(t)
	if err := r.Record(t.Context(), []store.Decision{good, bad}, nil); err == nil {
		t.Fatal("a row that cannot be stored was reported as recorded")
	}
	if _, err := db.GetDecision(t.Context(), good.ID); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a part of the commit is in the log: %v", err)
	}
	if err := r.Record(t.Context(), []store.Decision{good}, nil); err != nil {
		t.Errorf("the recorder did not recover: %v", err)
	}
}

// blocked starts a recorder whose first commit has begun and waits until release.
func blocked(t *testing.T) (r *Recorder, conn *pgx.Conn, release func()) {
	t.Helper()
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	if conn, err = pgx.Connect(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	locker, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() { locker.Close(context.Background()) })
	t.Cleanup(release)
	if _, err := locker.Exec(t.Context(), "begin; lock table decisions in exclusive mode"); err != nil {
		t.Fatal(err)
	}
	r = startRecorder(t, Config{DB: db, Name: "test", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler)})
	go func() { _ = r.Record(t.Context(), []store.Decision{aDecision(t)}, nil) }()
	for waiting := false; !waiting; time.Sleep(5 * time.Millisecond) {
		err := conn.QueryRow(t.Context(), `select exists (select from pg_stat_activity
			where datname = current_database() and wait_event_type = 'Lock')`).Scan(&waiting)
		if err != nil {
			t.Fatal(err)
		}
	}
	return r, conn, release
}

// queued waits until n calls are in the queue.
func queued(t *testing.T, r *Recorder, n int) {
	t.Helper()
	for len(r.queue) != n {
		if t.Context().Err() != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// A commit is bounded by the bytes of its records, except for a single call that is larger.
func TestCommitsAreBoundedByBytes(t *testing.T) {
	r, conn, release := blocked(t)
	const mib = 1 << 20
	var group sync.WaitGroup
	for i, size := range []int{3 * mib, 3 * mib, 3 * mib, 10 * mib, 1 * mib, 1 * mib} {
		group.Go(func() {
			d := aDecision(t)
			d.Record = make([]byte, size)
			if err := r.Record(t.Context(), []store.Decision{d}, nil); err != nil {
				t.Error(err)
			}
		})
		queued(t, r, i+1)
	}
	release()
	group.Wait()
	// Rows of one commit have one xmin.
	rows, _ := conn.Query(t.Context(), "select sum(length(record)) / (1024 * 1024) from decisions group by xmin::text order by max(decision_id::text)")
	sizes, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil || !slices.Equal(sizes, []int64{0, 6, 3, 10, 2}) {
		t.Errorf("commits of %v MiB, %v", sizes, err)
	}
}

// The rows of a call that ended while they were queued are not recorded.
func TestGivenUpCallsAreNotRecorded(t *testing.T) {
	r, conn, release := blocked(t)
	ctx, cancel := context.WithCancel(t.Context())
	given := aDecision(t)
	result := make(chan error, 1)
	go func() { result <- r.Record(ctx, []store.Decision{given}, nil) }()
	queued(t, r, 1)
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	release()
	last := aDecision(t)
	if err := r.Record(t.Context(), []store.Decision{last}, nil); err != nil {
		t.Fatal(err)
	}
	var recorded []string
	err := conn.QueryRow(t.Context(), "select array_agg(decision_id::text) from decisions").Scan(&recorded)
	if err != nil || len(recorded) != 2 || slices.Contains(recorded, given.ID.String()) {
		t.Errorf("recorded %v, %v; %v was given up", recorded, err, given.ID)
	}
}

// A recorder merges the index of decisions after it has committed decisions, once, and again after the
// next ones.
func TestRecorderMergesAfterDecisions(t *testing.T) {
	db := storetest.Open(t)
	if err := db.EnsurePartitions(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	merges := 0
	r := startRecorder(t, Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler), mergeEvery: time.Hour, Task: func(name string, err error) {
		if name != TaskMergeKeys {
			return
		}
		if err != nil {
			t.Error(err)
		}
		merges++
	}})
	for want := range 3 {
		for range 2 {
			r.mergeOnce(t.Context())
			if merges != want {
				t.Fatalf("%d merges, want %d", merges, want)
			}
		}
		if err := r.RecordLogRead(t.Context(), "p", nil, 0); err != nil { // an event, which is not in the index
			t.Fatal(err)
		}
		r.mergeOnce(t.Context())
		if merges != want {
			t.Fatalf("%d merges after an event, want %d", merges, want)
		}
		if err := r.Record(t.Context(), []store.Decision{aDecision(t)}, nil); err != nil {
			t.Fatal(err)
		}
	}
}
