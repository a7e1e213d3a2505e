package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/cedarpost/cedarpost/internal/pause"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

const (
	// firstHousekeeping is how long after its start a server first cleans up, so that this
	// does not slow down the start.
	firstHousekeeping = 5 * time.Minute
	housekeepingEvery = time.Hour
)

// checkRetention refuses a retention that is shorter than the minimum of the database.
func checkRetention(ctx context.Context, db *store.DB, keep time.Duration) error {
	if keep < 0 {
		return nil
	}
	least, err := db.MinRetention(ctx)
	if err == nil && keep < least {
		err = fmt.Errorf("the log is to be kept for %.4g days, and the database keeps it for %.4g at least (its table log_retention)",
			keep.Hours()/24, least.Hours()/24)
	}
	return err
}

// keepLog makes the partitions of the log ahead of time, records the state root of each day,
// and drops the days that are past their retention, until ctx ends. Only one server at a time
// does the last two.
func (s *Server) keepLog(ctx context.Context) {
	for wait := s.cfg.FirstHousekeeping; ; wait = housekeepingEvery {
		if pause.For(ctx, wait); ctx.Err() != nil {
			return
		}
		s.makePartitions(ctx)
		if s.writeStateRoot(ctx) && s.cfg.DecisionRetention >= 0 {
			s.dropLogDays(ctx)
		}
	}
}

// makePartitions makes the partitions of the log for the days ahead.
func (s *Server) makePartitions(ctx context.Context) {
	err := s.cfg.DB.EnsurePartitions(ctx, time.Now())
	if ctx.Err() != nil {
		return
	}
	s.tasks.done(decisionlog.TaskPartitions, err)
	if err != nil {
		s.cfg.Log.Error("partitions not made", "err", err)
	}
}

// writeStateRoot records today's state root, unless it is recorded or another server is
// recording it, and reports whether it is recorded. Only then may days of the log be dropped:
// their events are no longer needed to prove what is stored now.
func (s *Server) writeStateRoot(ctx context.Context) (there bool) {
	there, err := s.cfg.DB.WriteStateRoot(ctx, decisionlog.StateRootEvents(s.cfg.Name))
	if ctx.Err() == nil && (there || err != nil) { // else another server is recording it
		s.tasks.done(taskStateRoot, err)
	}
	if err != nil && ctx.Err() == nil {
		s.cfg.Log.Error("state root not recorded", "err", err)
	}
	return there
}

// dropLogDays drops old days of the log, each after an event that records it.
func (s *Server) dropLogDays(ctx context.Context) {
	dropped, err := s.cfg.DB.DropLogDays(ctx, s.cfg.DecisionRetention, func(ctx context.Context, d store.LogDay) error {
		day := d.Day.Format(time.DateOnly)
		return s.recorder.RecordEvent(ctx, &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_RETENTION_DROP, Subject: day,
			Detail: &cedarpostv1.EventRecord_RetentionDrop{RetentionDrop: &cedarpostv1.RetentionDrop{
				Day: day, Decisions: d.Decisions, Events: d.Events, FirstLeaf: d.FirstLeaf,
			}},
		})
	})
	for _, d := range dropped {
		s.tasks.daysDropped.Inc()
		s.cfg.Log.Info("day of the log dropped", "day", d.Day.Format(time.DateOnly), "decisions", d.Decisions, "events", d.Events)
	}
	if ctx.Err() != nil {
		return
	}
	s.tasks.done(taskRetention, err)
	if err != nil {
		s.cfg.Log.Error("days of the log not dropped", "err", err)
	}
}

// sweepHistory removes history that is past its retention, and imports and idempotency keys that do
// not count any more, each hour until ctx ends. Only one server at a time does that.
func (s *Server) sweepHistory(ctx context.Context) {
	for wait := s.cfg.FirstHousekeeping; ; wait = housekeepingEvery {
		if pause.For(ctx, wait); ctx.Err() != nil {
			return
		}
		s.sweep(ctx)
	}
}

// sweep removes history once.
func (s *Server) sweep(ctx context.Context) {
	began := time.Now()
	swept, err := s.cfg.DB.Sweep(ctx, s.cfg.HistoryRetention)
	attrs := []any{"oldest", swept.Oldest, "took", time.Since(began).Round(time.Millisecond)}
	removed := int64(0)
	for _, table := range slices.Sorted(maps.Keys(swept.Rows)) {
		rows := swept.Rows[table]
		s.tasks.sweptRows.WithLabelValues(table).Add(float64(rows))
		attrs = append(attrs, table, rows)
		removed += rows
	}
	if ctx.Err() != nil {
		return
	}
	s.tasks.done(taskSweep, err)
	switch {
	case err != nil:
		s.cfg.Log.Error("history not swept", append(attrs, "err", err)...)
	case removed > 0:
		s.cfg.Log.Info("history swept", attrs...)
	}
}
