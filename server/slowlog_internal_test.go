package server

import (
	"log/slog"
	"strings"
	"testing"
	"time"
)

// blockedLog returns a log that nobody reads, and what waits until somebody writes to it.
func blockedLog(t *testing.T) (log *slog.Logger, written <-chan struct{}) {
	t.Helper()
	w := blockedWriter{make(chan struct{}, 1), make(chan struct{})}
	t.Cleanup(func() { close(w.release) })
	return slog.New(slog.NewTextHandler(w, nil)), w.entered
}

type blockedWriter struct{ entered, release chan struct{} }

func (w blockedWriter) Write(p []byte) (int, error) {
	select {
	case w.entered <- struct{}{}:
	default:
	}
	<-w.release
	return len(p), nil
}

// A log that nobody reads does not keep readiness and metrics from the clocks.
func TestSlowLogDoesNotHideClocks(t *testing.T) {
	log, written := blockedLog(t)
	s := &skew{log: log}
	now := time.Now()
	go s.note(now, now, now.Add(-time.Hour))
	<-written
	if w := s.warning(); !strings.HasPrefix(w, "clock: this server is +3600.0 s ahead of the database") {
		t.Error(w)
	}
	if n := s.seconds(); n != 3600 {
		t.Error(n)
	}
}

// A look at the database that never ends is a reason, and what it had found before counts no more.
func TestOldLookIsAReason(t *testing.T) {
	r := newReadiness(nil, nil, slog.New(slog.DiscardHandler))
	r.found.Store(&found{at: time.Now(), warnings: []string{"partition: x"}})
	if last := r.lastLook(); len(last.reasons) != 0 || len(last.warnings) != 1 {
		t.Errorf("%+v", last)
	}
	r.found.Store(&found{at: time.Now().Add(-time.Hour)})
	if last := r.lastLook(); len(last.reasons) != 1 || last.reasons[0] != (reason{reasonDatabase, "the server has not looked at its database for 1h0m0s"}) {
		t.Errorf("%+v", last)
	}
}

// The partition of tomorrow is a warning until an hour before it is needed, that of today a reason.
func TestPartitionOfTomorrow(t *testing.T) {
	midnight := time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		now    time.Time
		days   int
		reason bool
	}{
		{midnight.Add(-24 * time.Hour), 1, false},
		{midnight.Add(-61 * time.Minute), 1, false},
		{midnight.Add(-60 * time.Minute), 1, true},
		{midnight.Add(-time.Second).In(time.FixedZone("east", 14*3600)), 1, true},
		{midnight.Add(-24 * time.Hour), 0, true},
		{midnight.Add(-time.Second), 0, true},
	} {
		f := found{}
		day := c.now.UTC().AddDate(0, 0, c.days)
		f.noPartition(day, c.now)
		text := "the decision log has no partition for " + day.Format(time.DateOnly)
		if c.reason && (len(f.reasons) != 1 || f.reasons[0] != (reason{reasonPartition, text})) || !c.reason && (len(f.warnings) != 1 || f.warnings[0] != "partition: "+text) || len(f.reasons)+len(f.warnings) != 1 {
			t.Errorf("%v, %d days: %+v", c.now, c.days, f)
		}
	}
}
