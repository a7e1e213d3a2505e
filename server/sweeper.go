package server

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/cedarpost/cedarpost/internal/pause"
)

// sweepHistory removes each hour what is past its retention, unless another server
// is at it.
func (s *Server) sweepHistory(ctx context.Context) {
	if s.cfg.HistoryRetention < 0 {
		return
	}
	for wait := s.cfg.FirstHousekeeping; ; wait = housekeepingEvery {
		if pause.For(ctx, wait); ctx.Err() != nil {
			return
		}
		s.sweep(ctx)
	}
}

func (s *Server) sweep(ctx context.Context) {
	began := time.Now()
	swept, err := s.cfg.DB.Sweep(ctx, s.cfg.HistoryRetention)
	attrs := []any{"oldest", swept.Oldest, "took", time.Since(began).Round(time.Millisecond)}
	removed := int64(0)
	for _, table := range slices.Sorted(maps.Keys(swept.Rows)) {
		rows := swept.Rows[table]
		s.metrics.sweptRows.WithLabelValues(table).Add(float64(rows))
		attrs = append(attrs, table, rows)
		removed += rows
	}
	if ctx.Err() != nil {
		return
	}
	s.metrics.task(taskSweep, err)
	switch {
	case err != nil:
		s.cfg.Log.Error("history not swept", append(attrs, "err", err)...)
	case removed > 0:
		s.cfg.Log.Info("history swept", attrs...)
	}
}
