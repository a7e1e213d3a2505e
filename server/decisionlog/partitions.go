package decisionlog

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/cedarpost/cedarpost/store"
)

// partitionsEvery is the least time between two attempts to make a missing partition.
const partitionsEvery = 10 * time.Second

// partitions makes partitions of the log that are missing now. Housekeeping makes those of
// the days ahead once an hour, but after a step of the clock today's may be missing.
type partitions struct {
	db    *store.DB
	log   *slog.Logger
	task  func(name string, err error)
	every time.Duration

	mu   sync.Mutex
	last time.Time
	day  time.Time // the day of the last attempt, if it succeeded
}

// ensure makes the partition of a day and those around it, and reports whether the
// partition exists. It makes only days near the clock of this server or of the database,
// and tries at most once every p.every.
func (p *partitions) ensure(ctx context.Context, day time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.last.IsZero() && time.Since(p.last) < p.every {
		return p.day.Equal(DayOf(day))
	}
	p.last, p.day = time.Now(), time.Time{}
	made, clock, err := p.db.EnsurePartition(ctx, day, time.Now())
	ahead := time.Until(clock) * -1
	switch {
	case err != nil:
		p.task(TaskPartitions, err)
		p.log.Error("partitions not made", "day", day.UTC().Format(time.DateOnly), "err", err)
	case made:
		p.task(TaskPartitions, nil)
		p.day = DayOf(day)
		p.log.Warn("the log had no partition for a day that is needed now: made", "day", day.UTC().Format(time.DateOnly),
			"server_ahead_of_database", ahead.Round(time.Second))
	default:
		p.task(TaskPartitions, store.ErrNoPartition)
		p.log.Error("the log has no partition for a day, and none is made: it is not near the clock of this server or of the database",
			"day", day.UTC().Format(time.DateOnly), "server_ahead_of_database", ahead.Round(time.Second))
	}
	return made
}
