package server

import (
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"
)

// maxSkew is how far the clock of a server and that of the database may differ before
// it is warned of. Servers that keep their clocks right differ by milliseconds.
const maxSkew = 2 * time.Second

// skew is how far the clock of this server is from that of the database, measured with
// a question that is asked each second anyway.
type skew struct {
	log *slog.Logger

	mu    sync.Mutex
	known bool
	ahead time.Duration // of this server
	large bool          // it is more than maxSkew, and that was logged
}

// note takes the database's clock, read by a question that was sent and answered at
// these times of this server's clock. The database read its clock somewhere in between.
func (s *skew) note(asked, answered, database time.Time) {
	unsure := answered.Sub(asked) / 2
	ahead := asked.Add(unsure).Sub(database)
	s.mu.Lock()
	defer s.mu.Unlock()
	// An answer that took long is imprecise. It is ignored if it does not show on which side
	// of maxSkew the difference is.
	large := ahead.Abs()-unsure > maxSkew
	if !large && ahead.Abs()+unsure > maxSkew {
		return
	}
	s.known, s.ahead = true, ahead
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

// seconds is the skew for a metric, NaN as long as it is not known.
func (s *skew) seconds() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.known {
		return math.NaN()
	}
	return s.ahead.Seconds()
}

// warning returns "", or that the clocks differ.
func (s *skew) warning() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.large {
		return ""
	}
	return fmt.Sprintf("clock: this server is %+.1f s ahead of the database", s.ahead.Seconds())
}
