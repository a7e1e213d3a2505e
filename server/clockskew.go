package server

import (
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"
)

// maxSkew is how far the clocks of a server and of the database may differ without a
// warning. The clocks of servers that synchronize them differ by milliseconds.
const maxSkew = 2 * time.Second

// farSkew is the difference from which on a server is not ready. It is the bound of Kerberos. Beyond it
// the server would accept tokens and keys that ended minutes ago, or refuse valid ones, and its records
// would have wrong times. It is far above maxSkew because all servers become unready together if the
// clock of the database is wrong.
const farSkew = 5 * time.Minute

// skew is the difference between the clocks of this server and of the database. It is
// measured with a query that readiness sends each second.
type skew struct {
	log *slog.Logger

	mu    sync.Mutex
	known bool
	ahead time.Duration // of this server
	large bool          // more than maxSkew, as was logged
	far   bool          // more than farSkew
}

// note measures the difference. asked and answered are when this server sent a query and got
// the answer, by its own clock; database is the clock of the database at some time in between.
func (s *skew) note(asked, answered, database time.Time) {
	unsure := answered.Sub(asked) / 2
	ahead := asked.Add(unsure).Sub(database)
	s.mu.Lock()
	defer s.mu.Unlock()
	// An answer that took long is imprecise. It is ignored if the difference may be more or
	// less than maxSkew.
	large := ahead.Abs()-unsure > maxSkew
	if !large && ahead.Abs()+unsure > maxSkew {
		return
	}
	s.known, s.ahead = true, ahead
	s.far = ahead.Abs()-unsure > farSkew
	if large == s.large {
		return
	}
	s.large = large
	if large {
		s.log.Warn("the clocks of this server and of its database differ: times of records, days of the log and retention depend on them",
			"server_ahead_of_database", ahead.Round(time.Millisecond))
	} else {
		s.log.Info("the clocks of this server and of its database agree again", "server_ahead_of_database", ahead.Round(time.Millisecond))
	}
}

// seconds returns the skew for a metric; NaN if it is not known yet.
func (s *skew) seconds() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.known {
		return math.NaN()
	}
	return s.ahead.Seconds()
}

// warning returns a warning that the clocks differ, or "".
func (s *skew) warning() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.large || s.far {
		return ""
	}
	return "clock: " + s.text()
}

// problem returns why the clock makes the server unready, or "".
func (s *skew) problem() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.far {
		return ""
	}
	return s.text() + ", so one of the two clocks is wrong"
}

// text says how far the clocks differ. The caller holds mu.
func (s *skew) text() string {
	return fmt.Sprintf("this server is %+.1f s ahead of the database", s.ahead.Seconds())
}
