package decisionlog

import (
	"encoding/binary"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"
)

// clockTolerance is the largest step back of the clock that ids do not follow: their times
// stand still until the clock has caught up. Programs that synchronize clocks make smaller
// steps, so ids stay in order then.
const clockTolerance = time.Second

// ids makes the ids of records, UUIDs of version 7. The time in an id is the time of the
// record. It follows the clock, also when the clock is set back by more than
// clockTolerance; otherwise ids are in order. The order of the log is the order of its
// leaves and does not depend on ids.
type ids struct {
	// clock reads the wall clock and, from a monotonic clock, how long this process runs.
	clock func() (wall time.Time, running time.Duration)
	log   *slog.Logger // nil: silent
	// stepped, if not nil, is called with the size of each step of the wall clock.
	stepped func(by time.Duration)

	mu      sync.Mutex
	last    uint64        // time of the newest id, as tick returns it
	offset  time.Duration // wall time when the process began, by the newest reading
	started bool          // offset is set
}

func newIDs(log *slog.Logger, stepped func(time.Duration)) *ids {
	began := time.Now()
	return &ids{log: log, stepped: stepped, clock: func() (time.Time, time.Duration) {
		now := time.Now()
		return now, now.Sub(began)
	}}
}

// next returns a new id and the time in it.
func (g *ids) next() (uuid.UUID, time.Time, error) {
	id, err := uuid.NewRandom()
	if err != nil {
		return id, time.Time{}, err
	}
	bits := g.tick()
	ms := bits >> 12
	binary.BigEndian.PutUint64(id[:8], ms<<16|0x7000|bits&0xfff)
	return id, time.UnixMilli(int64(ms)).UTC(), nil
}

// checkClock reports a step of the clock. Without it, a step is reported with the next id.
func (g *ids) checkClock() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.watch(g.clock())
}

// tick returns the time for the next id: milliseconds since 1970, and in the 12 bits below
// them the fraction of a millisecond.
func (g *ids) tick() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	wall, running := g.clock()
	g.watch(wall, running)
	ns := max(wall.UnixNano(), 0)
	bits := uint64(ns/1e6)<<12 | uint64(ns%1e6)<<12/1e6
	if bits <= g.last {
		behind := time.Duration(g.last>>12)*time.Millisecond - time.Duration(bits>>12)*time.Millisecond
		if behind <= clockTolerance {
			bits = g.last + 1
		}
	}
	g.last = bits
	return bits
}

// watch compares the wall clock with the monotonic clock, and reports a step of more than
// clockTolerance.
func (g *ids) watch(wall time.Time, running time.Duration) {
	offset := wall.Sub(time.Unix(0, 0)) - running
	by := offset - g.offset
	if !g.started {
		g.started, g.offset = true, offset
		return
	}
	// Smaller steps add up over time without being reported: they are how clocks are
	// synchronized.
	g.offset = offset
	if by.Abs() <= clockTolerance {
		return
	}
	if g.log != nil {
		word := "forward, or the machine slept"
		if by < 0 {
			word = "back"
		}
		g.log.Warn("the clock of this server was set "+word+": times in the log follow it, and the order of the log does not depend on them",
			"by", by.Round(time.Millisecond), "now", wall.UTC())
	}
	if g.stepped != nil {
		g.stepped(by)
	}
}
