package server

import (
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"
)

// maxSkew is how far the clocks of a server and of the database may differ without a
// warning. The clocks of servers that synchronize them differ by milliseconds. No difference makes a
// server unready, because a server cannot know which of the two clocks is wrong: if it is that of the
// database, decisions are right, and all servers would become unready together.
const maxSkew = 2 * time.Second

// skew is the difference between the clocks of this server and of the database. It is
// measured with a query that readiness sends each second.
type skew struct {
	log *slog.Logger

	mu    sync.Mutex
	known bool
	ahead time.Duration // of this server
	large bool          // more than maxSkew, as was logged
}

// note measures the difference. asked and answered are when this server sent a query and got
// the answer, by its own clock; database is the clock of the database at some time in between. The log
// is written without the lock, because readiness waits for the lock.
func (s *skew) note(asked, answered, database time.Time) {
	ahead, large, changed := s.measure(asked, answered, database)
	switch {
	case changed && large:
		s.log.Warn("the clocks of this server and of its database differ: times of records, days of the log and retention depend on them",
			"server_ahead_of_database", ahead.Round(time.Millisecond))
	case changed:
		s.log.Info("the clocks of this server and of its database agree again", "server_ahead_of_database", ahead.Round(time.Millisecond))
	}
}

// measure keeps the difference, and reports whether it is large, and whether that is new.
func (s *skew) measure(asked, answered, database time.Time) (ahead time.Duration, large, changed bool) {
	unsure := answered.Sub(asked) / 2
	ahead = asked.Add(unsure).Sub(database)
	s.mu.Lock()
	defer s.mu.Unlock()
	// An answer that took long is imprecise. It is ignored if the difference may be more or
	// less than maxSkew.
	large = ahead.Abs()-unsure > maxSkew
	if !large && ahead.Abs()+unsure > maxSkew {
		return ahead, s.large, false
	}
	s.known, s.ahead = true, ahead
	changed = large != s.large
	s.large = large
	return ahead, large, changed
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
	if !s.large {
		return ""
	}
	return fmt.Sprintf("clock: this server is %+.1f s ahead of the database, so one of the two clocks is wrong", s.ahead.Seconds())
}
