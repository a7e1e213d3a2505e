package decisionlog

import (
	"errors"
	"fmt"
	"time"

	"github.com/cedarpost/cedarpost/store"
)

// maxWaiting is longer than a record waits for the commit before its own, and for its own.
const maxWaiting = 2 * RecordTimeout

// outage is a time in which commits to the log fail, all or some of them: on a full disk a small
// commit can succeed now and then. It begins with a failure, and ends with the first success
// after outageEnd without a failure.
type outage struct {
	first, last time.Time // when the first and the last commit failed
	err         error     // of the last failure
}

// Outage returns why the log cannot be written, if commits have failed for more than a moment, or if a
// record waits for its commit for longer than commits can take, and nil otherwise. A server that is not
// ready gets no calls, so an idle recorder finds out by itself when the outage is over.
func (r *Recorder) Outage() error {
	o := r.outage.Load()
	if o == nil || o.last.Sub(o.first) < outageMoment {
		if age := r.waiting(); age > r.cfg.maxWaiting {
			return fmt.Errorf("the decision log is not written: a record has waited for its commit for %v", age.Round(time.Second))
		}
		return nil
	}
	why := "this server's log says why"
	switch {
	case store.IsDiskFull(o.err):
		why = "the disk of the database is full"
	case store.IsReadOnly(o.err):
		why = "the database accepts no writes"
	}
	return fmt.Errorf("the decision log cannot be written for %v: %s", time.Since(o.first).Round(time.Second), why)
}

// waiting returns for how long the oldest record of the batch in progress has waited for its commit.
func (r *Recorder) waiting() time.Duration {
	oldest := time.Duration(r.oldest.Load())
	if oldest == 0 {
		return 0
	}
	return time.Since(r.began) - oldest
}

// working notes that a batch is in progress, and since when its oldest record waits.
func (r *Recorder) working(since time.Time) { r.oldest.Store(max(1, int64(since.Sub(r.began)))) }

// idle notes that no batch is in progress.
func (r *Recorder) idle() { r.oldest.Store(0) }

// note notes the outcome of a commit. One that fails is no outage yet, however long it took.
func (r *Recorder) note(err error) {
	o := r.outage.Load()
	switch {
	case errors.Is(err, store.ErrBehind), errors.Is(err, store.ErrRecorded), errors.Is(err, store.ErrText): // the log refused these rows only
	case err != nil:
		now := time.Now()
		next := &outage{first: now, last: now, err: err}
		if o != nil {
			next.first = o.first
		}
		r.outage.Store(next)
	case o != nil && time.Since(o.last) >= outageEnd:
		r.outage.Store(nil)
		if o.last.Sub(o.first) >= outageMoment {
			r.cfg.Log.Info("the decision log can be written again", "after", time.Since(o.first).Round(time.Second))
		}
	}
}
