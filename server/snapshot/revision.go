package snapshot

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// EncodeRevision returns a revision in its form on the wire. p is a position of the same
// history, at that revision or a later one.
func EncodeRevision(p store.Position, number int64) *cedarpostv1.Revision {
	return wire.Token{Database: p.Database, Timeline: p.Timeline, Number: number, Anchor: p.Number, Mark: p.Mark}.Revision()
}

// named is a revision as a token names it.
type named struct {
	number int64
	// at is the token's anchor: a position at the revision or a later one. A history that has
	// the anchor has the revision too.
	at store.Position
}

// parseToken reads the token of a revision. field is the field of the request that has the
// token. The error is a [TokenError].
func parseToken(field string, r *cedarpostv1.Revision) (named, error) {
	t, err := wire.ParseToken(r.GetToken())
	if err != nil {
		err = &TokenError{field, err}
	}
	return named{t.Number, store.Position{Database: t.Database, Timeline: t.Timeline, Number: t.Anchor, Mark: t.Mark}}, err
}

// TokenError is the error of a text that is not a revision token. Error returns the text for
// the caller.
type TokenError struct {
	field string // of the request
	err   error
}

// Error names the field of the request.
func (e *TokenError) Error() string { return e.field + ": " + e.err.Error() }

// HistoryError is the error of a token that is not of the history that the server follows.
// The caller made no mistake: it reads again and gets a new token.
type HistoryError struct{ message string }

// Error returns the text for the caller.
func (e *HistoryError) Error() string {
	return "revision: the token " + e.message + "; read again and use a new one"
}

// The errors of tokens of another history.
var (
	errOtherDatabase error = &HistoryError{"was given out by another database"}
	errOtherTimeline error = &HistoryError{"was given out before a failover"}
	errLost          error = &HistoryError{"is of a revision that this database does not have"}
	// ErrForgotten is the HistoryError of a token whose revision was swept: whether it is of
	// this history is not known any more.
	ErrForgotten error = &HistoryError{"is older than the history that is kept"}
)

const (
	// keptMarks is how many marks of the newest revisions a server keeps, and how many marks
	// of older revisions that it looked up.
	keptMarks = 8192
	// primaryAfter is how long a server waits for a revision before it asks the primary
	// whether there is such a revision at all.
	primaryAfter = freshWait / 10
	// lostEvery is how often the log says at most that one caller has a token of another history.
	lostEvery = 10 * time.Second
)

// marks are the marks of the revisions of one history that this server knows. A mark is a
// random id that is made with a revision: when a number is given out again after a restore,
// it has another mark. All fields but older are immutable.
type marks struct {
	newest int64
	recent []uuid.UUID // of the last revisions; the last one is that of newest
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

// ask looks up a position in the database. here is a position of the history of m. The error
// is [store.ErrOtherHistory] if the database does not have here any more.
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

// verify returns an error if a position is not of the history of a snapshot, and logs that, for
// each caller at most once in lostEvery.
func (f *Follower) verify(ctx context.Context, snap *Snapshot, p store.Position) error {
	err := f.compare(ctx, snap, p)
	var why string
	switch {
	case errors.Is(err, errOtherDatabase):
		why = "that another database gave out, or this one before it was restored or copied"
	case errors.Is(err, errOtherTimeline):
		why = "from before a failover"
	case errors.Is(err, errLost):
		why = "of a revision that this database does not have: it was restored, or failed over, to an earlier state, or the caller made the token up"
	default:
		return err
	}
	caller := ""
	if f.cfg.Caller != nil {
		caller = f.cfg.Caller(ctx)
	}
	if f.lost.due(caller, time.Now()) {
		f.cfg.Log.Warn("a caller has a token "+why, "caller", caller, "token", p.Number, "newest", snap.Position.Number)
	}
	return err
}

// lostLines remembers when the log last said that a caller has a token of another history. Each
// caller has lines of its own, so that one with made-up tokens does not hide those of others.
// Their number is bounded by that of the callers.
type lostLines struct {
	mu   sync.Mutex
	last map[string]time.Time
}

// due reports whether a line about a caller is to be written now.
func (l *lostLines) due(caller string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if last, ok := l.last[caller]; ok && now.Sub(last) <= lostEvery {
		return false
	}
	if l.last == nil {
		l.last = map[string]time.Time{}
	}
	l.last[caller] = now
	return true
}

// compare returns an error if a position is not of the history of a snapshot. If this
// server does not know, it asks the primary.
func (f *Follower) compare(ctx context.Context, snap *Snapshot, p store.Position) (err error) {
	here := snap.Position
	if p.Database != here.Database {
		return errOtherDatabase
	}
	if p.Timeline != here.Timeline {
		return errOtherTimeline
	}
	v := snap.marks.look(p)
	if v == unknown {
		v, err = snap.marks.ask(ctx, f.cfg.DB, p, here)
		if errors.Is(err, store.ErrOtherHistory) {
			f.wake() // the database has another history than the one that this server follows
			err = ErrBehind
		}
		if err != nil && p.Number > here.Number {
			return ErrBehind
		}
		if err != nil {
			return err
		}
	}
	switch v {
	case lost:
		return errLost
	case forgotten:
		return ErrForgotten
	}
	return nil
}

// DecodeRevision returns the number of a revision on the wire. The error is a [TokenError] or
// a [HistoryError], and [ErrBehind] if the revision does not exist yet.
func (v View) DecodeRevision(ctx context.Context, r *cedarpostv1.Revision) (int64, error) {
	n, err := parseToken("revision", r)
	if err != nil {
		return 0, err
	}
	return n.number, v.follower.verify(ctx, v.Snapshot, n.at)
}

// AtRevision returns the number of a revision on the wire, and a view that has applied it.
// It waits up to a second for that. The error is a [TokenError] or a [HistoryError], or one of
// [Follower.AtLeast].
func (f *Follower) AtRevision(ctx context.Context, r *cedarpostv1.Revision) (View, int64, error) {
	v, err := f.Current()
	if err != nil {
		return View{}, 0, err
	}
	n, err := parseToken("revision", r)
	if err != nil {
		return View{}, 0, err
	}
	if n.number > v.Position.Number && n.at.SameHistory(v.Position) {
		enough := func(s *Snapshot) bool { return !s.Position.SameHistory(n.at) || s.Position.Number >= n.number }
		next, err := f.await(ctx, primaryAfter, enough)
		if errors.Is(err, ErrBehind) {
			// The primary knows whether there is something to wait for.
			if err := f.verify(ctx, v.Snapshot, n.at); err != nil {
				return View{}, 0, err
			}
			next, err = f.await(ctx, freshWait, enough)
		}
		if err != nil {
			return View{}, 0, err
		}
		v = next
	}
	return v, n.number, f.verify(ctx, v.Snapshot, n.at)
}

// PositionOf returns a position to encode a revision with that was just read from the
// database: that of the view, or the newest one of the database if the view does not have the
// revision yet. If the database does not have it any more, the error is [ErrBehind].
func (v View) PositionOf(ctx context.Context, number int64) (store.Position, error) {
	if number <= v.Position.Number {
		return v.Position, nil
	}
	p, err := v.follower.cfg.DB.Current(ctx)
	if err == nil && p.Number < number {
		err = ErrBehind // it was restored in between
	}
	return p, err
}
