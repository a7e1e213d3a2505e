package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// encodeRevision puts a revision on the wire. p is a position of the history that the
// revision is of, not below it.
func encodeRevision(p store.Position, number int64) *cedarpostv1.Revision {
	return wire.Token{Database: p.Database, Timeline: p.Timeline, Number: number, Anchor: p.Number, Mark: p.Mark}.Revision()
}

// named is a revision as a token names it.
type named struct {
	number int64
	// at is the position that the token was given out at. A history that has it has the
	// revision too.
	at store.Position
}

// parseToken reads a token.
func parseToken(token string) (named, error) {
	t, err := wire.ParseToken(token)
	return named{t.Number, store.Position{Database: t.Database, Timeline: t.Timeline, Number: t.Anchor, Mark: t.Mark}}, err
}

// Errors of tokens that are none of this history. They are no mistake of the caller,
// who has to begin afresh.
var (
	errOtherDatabase = connect.NewError(connect.CodeAborted, "revision: the token was given out by another database")
	errOtherTimeline = connect.NewError(connect.CodeAborted, "revision: the token was given out before a failover; read again and use a new one")
	errLost          = connect.NewError(connect.CodeAborted, "revision: the token is of a revision that this database does not have; read again and use a new one")
	errForgotten     = connect.NewError(connect.CodeAborted, "revision: the token is older than the history that is kept; read again and use a new one")
)

const (
	// keptMarks is how many marks of the newest revisions a server keeps, and how many of
	// older ones that it looked up.
	keptMarks = 8192
	// primaryAfter is how long a server waits for a revision before it asks the primary
	// whether there is such a revision at all.
	primaryAfter = freshWait / 10
	// lostEvery is how often the log says that callers have tokens of a lost history.
	lostEvery = 10 * time.Second
)

// marks are the marks of revisions of one history, as far as a server knows them. All
// but older is immutable.
type marks struct {
	newest int64
	recent []uuid.UUID // of the revisions up to newest, the last one being that of newest
	older  *olderMarks // shared by all marks of the history, and by those of no other
}

// olderMarks are marks that were looked up, by number. The zero UUID stands for a
// revision that was swept.
type olderMarks struct {
	mu    sync.Mutex
	marks map[int64]uuid.UUID
}

// newMarks makes those of a history that begins here. list ends with the mark of newest.
func newMarks(newest int64, list []uuid.UUID) *marks {
	return &marks{newest, list, &olderMarks{marks: map[int64]uuid.UUID{}}}
}

// grow returns the marks after more revisions, whose marks are in list. One goroutine
// alone grows the marks of a history, each time the newest ones.
func (m *marks) grow(newest int64, list []uuid.UUID) *marks {
	recent := m.recent
	if int64(len(list)) < newest-m.newest {
		recent = nil // there is a gap
	}
	recent = append(recent, list...) // into memory that nobody reads yet
	if len(recent) > 2*keptMarks {
		recent = append(make([]uuid.UUID, 0, 2*keptMarks), recent[len(recent)-keptMarks:]...)
	}
	return &marks{newest, recent, m.older}
}

// A verdict says whether a history has a position.
type verdict int

const (
	unknown verdict = iota // the database has to be asked
	known
	lost
	forgotten // it was swept
)

// look tells what is known of a position of the same database and timeline.
func (m *marks) look(p store.Position) verdict {
	if p.Number == 0 {
		return known // the empty database
	}
	if p.Number > m.newest {
		return unknown
	}
	mark, found := uuid.UUID{}, false
	if back := m.newest - p.Number; back < int64(len(m.recent)) {
		mark, found = m.recent[int64(len(m.recent))-1-back], true
	} else {
		m.older.mu.Lock()
		mark, found = m.older.marks[p.Number]
		m.older.mu.Unlock()
	}
	switch {
	case !found:
		return unknown
	case mark == p.Mark:
		return known
	case mark == uuid.Nil:
		return forgotten
	}
	return lost
}

// ask looks a position up in the database, which must have the position here of the
// history of m.
func (m *marks) ask(ctx context.Context, db *store.DB, p, here store.Position) (verdict, error) {
	mark, oldest, err := db.Mark(ctx, p.Number, here)
	if errors.Is(err, store.ErrNotFound) {
		mark, err = uuid.Nil, nil
		if p.Number >= oldest {
			return lost, nil
		}
	}
	if err != nil {
		return unknown, err
	}
	m.older.mu.Lock()
	if len(m.older.marks) >= keptMarks {
		clear(m.older.marks)
	}
	m.older.marks[p.Number] = mark
	m.older.mu.Unlock()
	switch mark {
	case p.Mark:
		return known, nil
	case uuid.Nil:
		return forgotten, nil
	}
	return lost, nil
}

// verify refuses a position that is none of the history of a snapshot. If the server
// does not know, it asks the primary.
func (f *follower) verify(ctx context.Context, snap *snapshot, p store.Position) (err error) {
	here := snap.position
	if p.Database != here.Database {
		return errOtherDatabase
	}
	if p.Timeline != here.Timeline {
		return errOtherTimeline
	}
	v := snap.marks.look(p)
	if v == unknown {
		v, err = snap.marks.ask(ctx, f.db, p, here)
		if errors.Is(err, store.ErrPolicyChanged) {
			f.wake() // the history that the server follows is not that of the database any more
			err = errBehind
		}
		if err != nil && p.Number > here.Number {
			return errBehind
		}
		if err != nil {
			return err
		}
	}
	switch v {
	case lost:
		if now, last := time.Now().UnixNano(), f.lostSaid.Load(); now-last > int64(lostEvery) && f.lostSaid.CompareAndSwap(last, now) {
			f.log.Warn("callers have tokens of revisions that this database does not have: it was restored, or failed over, to an earlier state", "token", p.Number, "newest", here.Number)
		}
		return errLost
	case forgotten:
		return errForgotten
	}
	return nil
}

// decodeRevision reads a revision from the wire, and refuses one that is none of the
// history of the snapshot, or that is not made yet.
func (f *follower) decodeRevision(ctx context.Context, snap *snapshot, r *cedarpostv1.Revision) (int64, error) {
	n, err := parseToken(r.GetToken())
	if err != nil {
		return 0, connect.Errorf(connect.CodeInvalidArgument, "revision: %s", err)
	}
	return n.number, f.verify(ctx, snap, n.at)
}

// atRevision returns the number of a revision on the wire, and a snapshot that has
// applied it, waiting for that a bounded time.
func (f *follower) atRevision(ctx context.Context, r *cedarpostv1.Revision) (*snapshot, int64, error) {
	snap, err := f.current()
	if err != nil {
		return nil, 0, err
	}
	n, err := parseToken(r.GetToken())
	if err != nil {
		return nil, 0, connect.Errorf(connect.CodeInvalidArgument, "revision: %s", err)
	}
	if n.number > snap.position.Number && n.at.SameHistory(snap.position) {
		enough := func(s *snapshot) bool { return !s.position.SameHistory(n.at) || s.position.Number >= n.number }
		next, err := f.await(ctx, primaryAfter, enough)
		if errors.Is(err, errBehind) {
			// The primary knows whether there is something to wait for.
			if err := f.verify(ctx, snap, n.at); err != nil {
				return nil, 0, err
			}
			next, err = f.await(ctx, freshWait, enough)
		}
		if err != nil {
			return nil, 0, err
		}
		snap = next
	}
	return snap, n.number, f.verify(ctx, snap, n.at)
}

// positionOf returns a position at which a revision that was just read from the
// database is known.
func (f *follower) positionOf(ctx context.Context, snap *snapshot, number int64) (store.Position, error) {
	if number <= snap.position.Number {
		return snap.position, nil
	}
	p, err := f.db.Current(ctx)
	if err == nil && p.Number < number {
		err = errBehind // it was restored in between
	}
	return p, err
}
