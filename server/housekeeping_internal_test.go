package server

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

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

func TestServerSweeps(t *testing.T) {
	db, grow := storetest.OldHistory(t)
	storetest.WriteOp(t, db, store.Put, "a")
	storetest.WriteOp(t, db, store.Delete, "a")
	storetest.WriteOp(t, db, store.Put, "b")
	grow()
	var log syncedLog
	s, err := New(t.Context(), Config{
		DB: db, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: "127.0.0.1:0",
		Log: slog.New(slog.NewTextHandler(&log, nil)), FirstHousekeeping: time.Millisecond,
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
			`msg="history swept" oldest=3`, " entities=1 idempotency_keys=0 imports=0 revision_entries=2 revisions=2\n",
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
	db, _ := storetest.OldHistory(t)
	_, err := New(t.Context(), Config{DB: db, HistoryRetention: 47 * time.Hour})
	if err == nil || !strings.Contains(err.Error(), "48h") {
		t.Errorf("47 hours: %v", err)
	}
	// A sweep that fails is counted.
	registry := prometheus.NewRegistry()
	s := &Server{cfg: Config{DB: db, HistoryRetention: time.Hour, Log: slog.New(slog.DiscardHandler)}, tasks: newTaskMetrics(registry)}
	s.sweep(t.Context())
	if n := gathered(t, registry, "cedarpost_background_failures_total", taskSweep); n != 1 {
		t.Errorf("%v failures", n)
	}
	// Without a retention, imports and idempotency keys are swept nevertheless.
	s.cfg.HistoryRetention, s.cfg.FirstHousekeeping = -1, time.Millisecond
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { s.sweepHistory(ctx); close(ended) }()
	swept := func() bool {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "cedarpost_background_success_timestamp_seconds" {
				return true
			}
		}
		return false
	}
	for deadline := time.Now().Add(2 * time.Minute); !swept(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing is swept")
		}
	}
	stop()
	<-ended
}

// Metrics have the time of the last success of each background task, and the number of its
// failures.
func TestBackgroundTasksAreCounted(t *testing.T) {
	t.Parallel() // it takes long
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(pg.URL())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	var logged bytes.Buffer
	log := slog.New(slog.NewTextHandler(&logged, nil))
	registry := prometheus.NewRegistry()
	r := runRecorder(t, decisionlog.Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: log})
	s := &Server{
		cfg:   Config{DB: db, Name: "s", HistoryRetention: 90 * 24 * time.Hour, DecisionRetention: 90 * 24 * time.Hour, Log: log},
		tasks: newTaskMetrics(registry), recorder: r,
	}
	work := map[string]func(){
		decisionlog.TaskPartitions: func() { s.makePartitions(t.Context()) },
		taskStateRoot:              func() { s.writeStateRoot(t.Context()) },
		taskRetention:              func() { s.dropLogDays(t.Context()) },
		taskSweep:                  func() { s.sweep(t.Context()) },
	}
	for task, do := range work {
		do()
		if at := gathered(t, registry, "cedarpost_background_success_timestamp_seconds", task); time.Since(time.Unix(int64(at), 0)) > time.Hour {
			t.Errorf("%s succeeded at %v", task, at)
		}
		if n := gathered(t, registry, "cedarpost_background_failures_total", task); n != 0 {
			t.Errorf("%s: %v failures\n%s", task, n, &logged)
		}
	}
	if err := pg.Stop(); err != nil {
		t.Fatal(err)
	}
	for task, do := range work {
		logged.Reset()
		do()
		if n := gathered(t, registry, "cedarpost_background_failures_total", task); n != 1 {
			t.Errorf("%s: %v failures", task, n)
		}
		if !strings.Contains(logged.String(), "level=ERROR") {
			t.Errorf("%s: nothing in the log", task)
		}
	}
	if err := pg.Restart(t.Context()); err != nil { // the end of the test stops it
		t.Fatal(err)
	}
}

// gathered returns the value of a metric with one label.
func gathered(t *testing.T, r *prometheus.Registry, name, label string) float64 {
	t.Helper()
	families, err := r.Gather()
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
