package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// TestImpact prints the table of docs/benchmarks.md about the impact of a change: how long it takes to
// compare recorded decisions, and what callers notice of it.
func TestImpact(t *testing.T) {
	if os.Getenv("CEDARPOST_BENCH") == "" {
		t.Skip("set CEDARPOST_BENCH=1 to run")
	}
	total, err := strconv.Atoi(os.Getenv("DECISIONS"))
	if err != nil {
		total = 1_000_000
	}
	pg := storetest.NewServer(t)
	s := newTarget(t, database(t, pg.URL(), "impact"), cacheBytes)
	s.apply()
	w := worldOf(100_000)
	s.importAll(w)
	s.record(w, total)
	s.exec("vacuum analyze")

	fmt.Println("\n| | compared | time | rate | heap at most |\n|---|---:|---:|---:|---:|")
	s.analyze("alone", nil)
	quiet := s.lightly(10*time.Second, w.uniform())
	stop := make(chan struct{})
	var busy figures
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		busy = s.lightly(10*time.Second, w.uniform())
		close(stop)
	}()
	s.analyze("while callers ask", stop)
	<-ended
	fmt.Println("\n| Authorize, 8 connections with pauses | rate | p50 | p99 |\n|---|---:|---:|---:|")
	for _, f := range []struct {
		name string
		figures
	}{{"alone", quiet}, {"during the analysis", busy}} {
		fmt.Printf("| %s | %.0f/s | %s | %s |\n", f.name, f.rate(), ms(f.quantile(.5)), ms(f.quantile(.99)))
	}
}

// record has decisions made in batches.
func (s *target) record(w world, total int) {
	s.t.Helper()
	var made atomic.Int64
	draw := w.uniform()
	_, err := during(8, time.Hour, func(who int, rnd *rand.Rand) error {
		if made.Load() >= int64(total) {
			return io.EOF
		}
		req := &cedarpostv1.AuthorizeBatchRequest{}
		for range 100 {
			req.Checks = append(req.Checks, draw(rnd))
		}
		if _, err := s.clients[who].AuthorizeBatch(s.t.Context(), req); err != nil {
			return err
		}
		made.Add(100)
		return nil
	})
	if !errors.Is(err, io.EOF) {
		s.t.Fatal(err)
	}
}

// lightly asks over eight connections, with pauses, so that the processors are not busy with it.
func (s *target) lightly(while time.Duration, draw draw) figures {
	s.t.Helper()
	var times figures
	f, err := during(8, while, func(who int, rnd *rand.Rand) error {
		time.Sleep(pause)
		_, err := s.clients[who].Authorize(s.t.Context(), draw(rnd))
		return err
	})
	if err != nil {
		s.t.Error(err)
	}
	times = f
	for i := range times.times {
		times.times[i] -= pause
	}
	return times
}

const pause = 10 * time.Millisecond

// analyze compares all recorded decisions with those by other policies, until stop is closed, and prints the
// figures.
func (s *target) analyze(name string, stop <-chan struct{}) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	most := make(chan float64)
	go func() {
		highest := 0.0
		for ctx.Err() == nil {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			highest = max(highest, float64(m.HeapInuse)/(1<<20))
			time.Sleep(200 * time.Millisecond)
		}
		most <- highest
	}()
	began := time.Now()
	stream, err := s.Policies.AnalyzeChange(ctx, &cedarpostv1.AnalyzeChangeRequest{
		Candidate: &cedarpostv1.AnalyzeChangeRequest_Edits{Edits: &cedarpostv1.AnalyzeChangeRequest_ProposedEdits{
			Bundle: "files", BaseVersion: 1,
			Edits: []*cedarpostv1.FileEdit{{Path: "policies.cedar", Edit: &cedarpostv1.FileEdit_Content{Content: []byte(policies + `@id("large") forbid (principal, action == Files::Action::"Read", resource) when { resource.size > 90000 && principal.level < 3 };`)}}},
		}},
		Budget: durationpb.New(time.Hour),
	})
	if err != nil {
		s.t.Fatal(err)
	}
	var last *cedarpostv1.ImpactReport
receive:
	for {
		res, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			s.t.Fatal(err)
		}
		last = res.Report
		select {
		case <-stop:
			break receive
		default:
		}
	}
	took := time.Since(began)
	cancel()
	fmt.Printf("| %s | %d (%d denied) | %.1f s | %.0f/s | %.0f MiB |\n", name, last.GetDecisions(), last.GetAllowToDeny(), took.Seconds(), float64(last.GetDecisions())/took.Seconds(), <-most)
}
