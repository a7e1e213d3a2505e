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

// encodeRevision puts a revision on the wire. p is a position of the same history, at
// that revision or above it.
func encodeRevision(p store.Position, number int64) *cedarpostv1.Revision {
	return wire.Token{Database: p.Database, Timeline: p.Timeline, Number: number, Anchor: p.Number, Mark: p.Mark}.Revision()
}

// named is a revision as a token names it.
type named struct {
	number int64
	// at is the token's anchor: a position at the revision or above it. A history that has
	// the anchor has the revision too.
	at store.Position
}

// parseToken reads a token.
func parseToken(token string) (named, error) {
	t, err := wire.ParseToken(token)
	return named{t.Number, store.Position{Database: t.Database, Timeline: t.Timeline, Number: t.Anchor, Mark: t.Mark}}, err
}

// The errors of tokens that are not of the history that the server follows. The caller
// made no mistake, and has to read again.
var (
	errOtherDatabase = connect.NewError(connect.CodeAborted, "revision: the token was given out by another database; read again and use a new one")
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

// marks are the marks of the revisions of one history that this server knows. A mark is a
// random id that is made with a revision: when a number is given out again after a restore,
// it has another mark. All fields but older are immutable.
type marks struct {
	newest int64
	recent []uuid.UUID // of the revisions up to newest, the last one being that of newest
	older  *olderMarks // shared by all marks of one history, so equal pointers mean the same history
}

// olderMarks are marks that were looked up, by number. The zero UUID stands for a
// revision that was swept.
type olderMarks struct {
	mu    sync.Mutex
	marks map[int64]uuid.UUID
}

// newMarks returns the marks of a history that the server begins to follow. list ends with
// the mark of the revision newest.
func newMarks(newest int64, list []uuid.UUID) *marks {
	return &marks{newest, list, &olderMarks{marks: map[int64]uuid.UUID{}}}
}

// grow returns the marks when the history has grown to the revision newest, whose mark is
// the last one in list. Only one goroutine grows the marks of a history, and always the
// newest ones: old and new marks share memory.
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
	forgotten // it is older than the history that is kept
)

// look tells what is known of a position of the same database and timeline.
func (m *marks) look(p store.Position) verdict {
	if p.Number == 0 {
		return known // the empty database
	}
	if p.Number > m.newest {
		return unknown
	}
	var mark uuid.UUID
	found := true
	if back := m.newest - p.Number; back < int64(len(m.recent)) {
		mark = m.recent[int64(len(m.recent))-1-back]
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

// ask looks up a position in the database. here is a position of the history of m. If the
// database does not have here any more, the error is [store.ErrOtherHistory].
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

// verify returns an error if a position is not of the history of a snapshot. At most every
// ten seconds, it logs that callers have tokens of a history that is lost.
func (f *follower) verify(ctx context.Context, snap *snapshot, p store.Position) error {
	err := f.compare(ctx, snap, p)
	var why string
	switch {
	case errors.Is(err, errOtherDatabase):
		why = "given out by another database, or before this one was restored or copied"
	case errors.Is(err, errOtherTimeline):
		why = "given out before a failover"
	case errors.Is(err, errLost):
		why = "of revisions that this database does not have: it was restored, or failed over, to an earlier state"
	default:
		return err
	}
	if now, last := time.Now().UnixNano(), f.lostSaid.Load(); now-last > int64(lostEvery) && f.lostSaid.CompareAndSwap(last, now) {
		f.log.Warn("callers have tokens that are "+why, "token", p.Number, "newest", snap.position.Number)
	}
	return err
}

// compare returns an error if a position is not of the history of a snapshot. If this
// server does not know, it asks the primary.
func (f *follower) compare(ctx context.Context, snap *snapshot, p store.Position) (err error) {
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
		if errors.Is(err, store.ErrOtherHistory) {
			f.wake() // the database has another history than the one that this server follows
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
		return errLost
	case forgotten:
		return errForgotten
	}
	return nil
}

// decodeRevision reads a revision from the wire, and returns an error if it is not of the
// history of the snapshot, or does not exist yet.
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

// positionOf returns a position to encode a revision with that was just read from the
// database: that of the snapshot, or the newest one if the snapshot does not have it yet.
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
