package cedarpost

import (
	"errors"
	"log/slog"
	"sync"
	"time"
)

// errFailOpenUsedUp is in the error of a check with FailOpen that is not let through
// because Config.FailOpenTime is used up.
var errFailOpenUsedUp = errors.New("checks failed open for too long, so this one does not: see Config.FailOpenTime")

const (
	failOpenWindow = time.Hour
	failOpenSlot   = time.Second // the first check that fails open in a slot uses up the slot; further ones use no more
)

// failOpenTime bounds for how long checks fail open. It counts seconds and not checks: in
// an outage all checks fail open, so a bound on their number would be reached within
// seconds by a busy client, and would be too high for a quiet one that is attacked.
//
// It is a token bucket of time. Each second in which a check fails open takes a second
// from it. It holds at most `most`, and in each hour `most` is added, evenly. Once the
// bucket is empty, each second in which a check is refused empties it again. So checks are
// refused for as long as the outage goes on, and fail open again when outages are rare.
type failOpenTime struct {
	most time.Duration // in one window
	log  *slog.Logger

	mu     sync.Mutex
	left   time.Duration
	slot   int64 // monotonic start of the newest slot
	begun  bool  // there is a slot
	open   bool  // the result of allow in that slot
	closed bool  // the last line in the log says that checks fail closed
}

// allow says whether a check may fail open now.
func (f *failOpenTime) allow(now instant) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	passed := time.Duration(now.mono - f.slot)
	if f.begun && passed < failOpenSlot {
		return f.open
	}
	if !f.begun || passed >= failOpenWindow {
		f.left = f.most
	} else {
		f.left = min(f.most, f.left+time.Duration(float64(passed)*float64(f.most)/float64(failOpenWindow)))
	}
	f.slot, f.begun = now.mono, true
	if f.open = f.left >= failOpenSlot; f.open {
		f.left -= failOpenSlot
	} else {
		f.left = 0
	}
	if f.open == f.closed {
		if f.closed = !f.open; f.closed {
			f.log.Error("cedarpost: checks failed open for too long; from now on they fail closed, until that becomes rare", "FailOpenTime", f.most)
		} else {
			f.log.Warn("cedarpost: checks fail open again", "FailOpenTime", f.most)
		}
	}
	return f.open
}
