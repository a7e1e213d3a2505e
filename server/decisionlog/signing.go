package decisionlog

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/cedarpost/cedarpost/internal/pause"
	"github.com/cedarpost/cedarpost/store"
)

const (
	signingLook    = 5 * time.Second
	signingTimeout = 2 * time.Second // of one look
	// signingOverdue is how long batches may wait for a checkpoint before readiness
	// warns of it. A server that takes over from another one needs a few seconds.
	signingOverdue = time.Minute
)

// The causes of cedarpost_checkpoint_failures_total.
const (
	failedContradiction = "contradiction" // the log is not what was signed before
	failedFile          = "file"          // the checkpoint file cannot be read or written
	failedDatabase      = "database"      // everything else that keeps a server from signing
	failedForeign       = "foreign"       // checkpoints under the log's name that its keys did not sign
)

// newSignerMetrics registers the metrics of a signer, and returns the one that counts what
// failed, by cause.
func newSignerMetrics(s *Signer, r prometheus.Registerer) *prometheus.CounterVec {
	make := promauto.With(r)
	gauge := func(name, help string, read func() float64) {
		make.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read)
	}
	gauge("cedarpost_checkpoint_size", "Batches that the newest checkpoint covers, whichever server signed it.",
		func() float64 { return float64(s.state.Load().size) })
	gauge("cedarpost_checkpoint_timestamp_seconds", "When the newest checkpoint was stored, whichever server signed it, as Unix time; without one, 0 on a server that has keys, and NaN on another one.",
		func() float64 {
			switch at := s.state.Load().at; {
			case !at.IsZero():
				return float64(at.UnixMilli()) / 1000
			case s.signs():
				return 0
			}
			return math.NaN()
		})
	gauge("cedarpost_checkpoint_unsigned_batches", "Batches of the log that the newest checkpoint does not cover. Alert on it when the checkpoint is old, too.",
		func() float64 { return float64(s.state.Load().unsigned) })
	gauge("cedarpost_checkpoint_refused", "1 while this server refuses to sign, because the log contradicts an earlier checkpoint. Alert on it.",
		func() float64 {
			if s.refused.Load() {
				return 1
			}
			return 0
		})
	v := make.NewCounterVec(prometheus.CounterOpts{Name: "cedarpost_checkpoint_failures_total",
		Help: "Attempts of this server to sign that failed, by cause: contradiction, file, database; and foreign, checkpoints in the database that this log's keys did not sign. Alert on it."},
		[]string{"cause"})
	for _, cause := range []string{failedContradiction, failedFile, failedDatabase, failedForeign} {
		v.WithLabelValues(cause)
	}
	return v
}

// checkpointFileError is a checkpoint file that cannot be read or written.
type checkpointFileError struct{ err error }

func (e *checkpointFileError) Error() string { return "checkpoint file: " + e.err.Error() }
func (e *checkpointFileError) Unwrap() error { return e.err }

// signFailure names the cause of an error of an attempt to sign.
func signFailure(err error) string {
	if _, ok := errors.AsType[*checkpointFileError](err); ok {
		return failedFile
	}
	if errors.Is(err, errContradiction) {
		return failedContradiction
	}
	return failedDatabase
}

// signingState is how much of the log is signed, as the database has it.
type signingState struct {
	size     int64     // of the newest checkpoint
	at       time.Time // when it was stored; zero: there is none
	unsigned int64     // batches after it
	// since is when this server first saw batches that the newest checkpoint does not
	// cover. It is zero if there are none, and begins again with each new checkpoint.
	since time.Time
	seen  time.Time // when this server looked
}

// waited is how long batches have waited for a checkpoint, as far as was seen.
func (s *signingState) waited() time.Duration {
	if s.since.IsZero() {
		return 0
	}
	return s.seen.Sub(s.since)
}

// WatchLog looks every few seconds how much of the log is signed, until ctx ends. Every
// server does, whether or not it signs: one that does not sign would otherwise not know
// that nobody does.
func (s *Signer) WatchLog(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.lookAtLog(ctx)
		if ctx.Err() == nil {
			s.recorder.cfg.Task(TaskWatchLog, err)
		}
		pause.For(ctx, signingLook)
	}
}

func (s *Signer) lookAtLog(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, signingTimeout)
	defer cancel()
	row, err := s.Newest(ctx)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	end, err := s.db.NextLeaf(ctx) // read after the checkpoint, so it is not smaller than its size
	if err != nil {
		return err
	}
	next := &signingState{size: row.Size, at: row.At, unsigned: max(end-row.Size, 0), seen: time.Now()}
	last := s.state.Load()
	switch {
	case next.unsigned == 0:
	case last.since.IsZero() || last.size != next.size:
		next.since = next.seen
	default:
		next.since = last.since
	}
	s.state.Store(next)
	return nil
}

// signs reports whether the log is signed, by this server or another one.
func (s *Signer) signs() bool { return len(s.keys) > 0 || !s.state.Load().at.IsZero() }

// Warning returns "", or that the log has not been signed for too long. Decisions can be
// made and recorded all the same.
func (s *Signer) Warning() string {
	state := s.state.Load()
	if waited := state.waited(); waited == 0 || waited < s.overdue || !s.signs() {
		return ""
	}
	why := map[string]string{
		failedContradiction: ": the log contradicts an earlier checkpoint",
		failedFile:          ": this server cannot read or write the checkpoint file",
		failedDatabase:      ": this server cannot read or store the tree in the database",
	}
	cause, _ := s.cause.Load().(string)
	return fmt.Sprintf("signing: %d batches of the log have waited for a checkpoint for %v%s",
		state.unsigned, state.waited().Round(time.Second), why[cause])
}
