package cedarpost

import (
	"errors"
	"log/slog"
	"sync"
	"time"
)

// errFailOpenUsedUp is the error of a check that would fail open, had not so many
// others before it.
var errFailOpenUsedUp = errors.New("checks failed open for too long, so this one does not: see Config.FailOpenTime")

const (
	failOpenWindow = time.Hour
	failOpenSlot   = time.Second // what one check that fails open takes, with all others within it
)

// failOpenTime bounds for how much of an hour checks fail open. It counts time and not
// checks: in a true outage all checks fail open, so a bound on their number would close
// a busy service within seconds, and would not bind a quiet one that is attacked.
//
// It is a bucket of time. Each second in which a check fails open takes a second from
// it, and it fills as fast as the window passes. Once it is empty, each second in which
// a check would fail open empties it again: so it stays closed while the trouble goes
// on as it did, and opens when the trouble has become rare.
type failOpenTime struct {
	most time.Duration // of a window
	log  *slog.Logger

	mu     sync.Mutex
	left   time.Duration
	slot   int64 // monotonic start of the newest slot
	begun  bool  // there is a slot
	open   bool  // what was said in that slot
	closed bool  // as the log knows
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
