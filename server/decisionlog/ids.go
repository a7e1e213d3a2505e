package decisionlog

import (
	"encoding/binary"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"
)

// clockTolerance is how far a clock may be set back while times stand still instead.
// Programs that keep a clock right step it by less, and then ids go on in order.
const clockTolerance = time.Second

// ids makes the ids of records, UUIDs of version 7. The time in an id is that of the
// record, and it is the clock's: when the clock is set back, so are the times. The
// order of the log is that of its leaves, and does not depend on them. While the
// clock is not set back, ids are in order.
type ids struct {
	// clock reads the wall clock, and how long this process has run by a clock that
	// nobody can set.
	clock func() (wall time.Time, running time.Duration)
	log   *slog.Logger // nil: silent
	// stepped is called, if it is not nil, when the clock was set, and by how much.
	stepped func(by time.Duration)

	mu      sync.Mutex
	last    uint64        // the 60 bits of the newest id that tell its time
	offset  time.Duration // of the wall clock, from when the process began
	started bool
}

func newIDs(log *slog.Logger, stepped func(time.Duration)) *ids {
	began := time.Now()
	return &ids{log: log, stepped: stepped, clock: func() (time.Time, time.Duration) {
		now := time.Now()
		return now, now.Sub(began)
	}}
}

// next returns an id, and the time in it.
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

// look notices that the clock was set while no ids were made.
func (g *ids) look() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.watch(g.clock())
}

// tick returns milliseconds, and in the 12 bits below them the part of one.
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

// watch notices that the clock was set, and says so.
func (g *ids) watch(wall time.Time, running time.Duration) {
	offset := wall.Sub(time.Unix(0, 0)) - running
	by := offset - g.offset
	if !g.started {
		g.started, g.offset = true, offset
		return
	}
	// What is less is how a clock is kept right, and adds up over time.
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
