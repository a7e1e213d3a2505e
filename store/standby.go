package store

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/cedarpost/cedarpost/internal/secret"
)

// How long a decision waits for a standby before it asks the next one. A revision that is
// committed on the primary arrives at a standby within milliseconds, so a read waits for
// a standby that is a little behind. One that stays behind, or does not answer, is not
// asked for a while.
const (
	standbyTimeout = 300 * time.Millisecond // of one read
	largeTimeout   = time.Second            // of one that may weigh more than LargeLoad
	behindTries    = 4
	behindPause    = 5 * time.Millisecond // between them
	restBehind     = 500 * time.Millisecond
	restBroken     = 5 * time.Second
)

// standbys are read from in turn.
type standbys struct {
	list []*standby
	next atomic.Uint32
}

// standby is one hot standby of the primary.
type standby struct {
	name      string // host and port
	pool      *pgxpool.Pool
	restUntil atomic.Int64 // in Unix nanoseconds

	reads, behind, failed atomic.Int64
}

func (s *standbys) add(ctx context.Context, url secret.Secret, maxConns int32, tracer pgx.QueryTracer) (err error) {
	defer wrap(&err, "standby")
	config, err := pgxpool.ParseConfig(url.Reveal())
	if err != nil {
		return err
	}
	c := config.ConnConfig
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = time.Second
	}
	setDefaults(c)
	c.Tracer = tracer
	c.ValidateConnect = nil // any of several hosts will do
	if maxConns > 0 {
		config.MaxConns = maxConns
	}
	pool, err := (&sessions{url: url}).pool(ctx, config, appRole)
	if err != nil {
		return err
	}
	s.list = append(s.list, &standby{name: fmt.Sprintf("%s:%d", c.Host, c.Port), pool: pool})
	return nil
}

func (s *standbys) close() {
	for _, st := range s.list {
		st.pool.Close()
	}
}

// inTurn lists the standbys that are not resting, beginning with another one at each
// call.
func (s *standbys) inTurn() []*standby {
	if len(s.list) == 0 {
		return nil
	}
	first := int(s.next.Add(1))
	now := time.Now().UnixNano()
	awake := make([]*standby, 0, len(s.list))
	for i := range s.list {
		if st := s.list[(first+i)%len(s.list)]; st.restUntil.Load() <= now {
			awake = append(awake, st)
		}
	}
	return awake
}

// LargeLoad is the most that a load may weigh that any standby answers in time.
const LargeLoad = 512 << 10

// load reads a slice. ok is false if another standby or the primary has to be asked,
// whatever the reason: besides a [TooLargeError], only an error of the primary is an error of
// the call.
func (s *standby) load(caller context.Context, at Position, uids []UID, most int64) (found []Entity, ok bool, err error) {
	large := most > LargeLoad
	timeout := standbyTimeout
	if large {
		timeout = largeTimeout
	}
	ctx, cancel := context.WithTimeout(caller, timeout)
	defer cancel()
	for try := 1; ; try++ {
		found, err := loadAt(ctx, s.pool, at, uids, most)
		switch {
		case err == nil, errors.Is(err, ErrTooLarge):
			s.reads.Add(1)
			return found, true, err
		case caller.Err() != nil:
			return nil, false, nil // not a fault of the standby
		case large && ctx.Err() != nil:
			return nil, false, nil // whoever writes entities must not be able to stop the use of standbys
		case !errors.Is(err, ErrBehind):
			s.failed.Add(1)
			s.rest(restBroken)
			return nil, false, nil
		case try == behindTries:
			s.behind.Add(1)
			s.rest(restBehind)
			return nil, false, nil
		}
		select {
		case <-time.After(behindPause):
		case <-ctx.Done():
		}
	}
}

func (s *standby) rest(d time.Duration) { s.restUntil.Store(time.Now().Add(d).UnixNano()) }

// StandbyStats counts the reads of one standby.
type StandbyStats struct {
	// Name is its host and port.
	Name string
	// Reads counts those that it answered. Behind and Failed count those that another
	// server had to answer.
	Reads, Behind, Failed int64
}

// Standbys returns the counts of the standbys of [Config.ReadURLs], in their order.
func (db *DB) Standbys() []StandbyStats {
	stats := make([]StandbyStats, len(db.standbys.list))
	for i, s := range db.standbys.list {
		stats[i] = StandbyStats{s.name, s.reads.Load(), s.behind.Load(), s.failed.Load()}
	}
	return stats
}
