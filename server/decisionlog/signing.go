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
	signingLook    = 5 * time.Second // between two looks
	signingTimeout = 2 * time.Second // of one look
	// signingOverdue is how long batches may wait for a checkpoint before readiness warns. A
	// server that takes over from another one needs a few seconds.
	signingOverdue = time.Minute
)

// The causes of cedarpost_checkpoint_failures_total.
const (
	failedContradiction = "contradiction" // the log contradicts a checkpoint
	failedFile          = "file"          // the checkpoint file cannot be read or written
	failedDatabase      = "database"      // any other error
	failedAgent         = "agent"         // the ssh-agent does not sign
	failedForeign       = "foreign"       // checkpoints under the log's name without its signature
)

// newSignerMetrics registers the metrics of a signer, and returns the counter of failures by
// cause.
func newSignerMetrics(s *Signer, r prometheus.Registerer) *prometheus.CounterVec {
	with := promauto.With(r)
	gauge := func(name, help string, read func() float64) {
		with.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read)
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
	gauge("cedarpost_checkpoint_age_seconds", "While batches wait for a checkpoint: how old the newest checkpoint is, whichever server signed it; 0 if none waits, and NaN if the log is not signed. Alert on it.",
		s.checkpointAge)
	gauge("cedarpost_checkpoint_unsigned_batches", "Batches of the log that the newest checkpoint does not cover.",
		func() float64 { return float64(s.state.Load().unsigned) })
	gauge("cedarpost_checkpoint_refused", "1 while this server refuses to sign, because the log contradicts an earlier checkpoint. It says nothing about other servers: alert on cedarpost_checkpoint_age_seconds.",
		func() float64 {
			if s.refused.Load() {
				return 1
			}
			return 0
		})
	v := with.NewCounterVec(prometheus.CounterOpts{Name: "cedarpost_checkpoint_failures_total",
		Help: "Attempts of this server to sign that failed, by cause: contradiction, file, agent, database; and foreign, checkpoints in the database that this log's keys did not sign. Alert on it."},
		[]string{"cause"})
	for _, cause := range []string{failedContradiction, failedFile, failedAgent, failedDatabase, failedForeign} {
		v.WithLabelValues(cause)
	}
	return v
}

// checkpointFileError is an error of reading or writing the checkpoint file.
type checkpointFileError struct{ err error }

func (e *checkpointFileError) Error() string { return "checkpoint file: " + e.err.Error() }
func (e *checkpointFileError) Unwrap() error { return e.err }

// signFailure returns the cause of a failed attempt to sign.
func signFailure(err error) string {
	if _, ok := errors.AsType[*checkpointFileError](err); ok {
		return failedFile
	}
	if _, ok := errors.AsType[*agentError](err); ok {
		return failedAgent
	}
	if errors.Is(err, errContradiction) {
		return failedContradiction
	}
	return failedDatabase
}

// signingState is how much of the log is signed, as read from the database.
type signingState struct {
	size     int64     // of the newest checkpoint
	at       time.Time // when it was stored; zero: there is none
	unsigned int64     // batches after it
	// since is when this server first saw batches after the newest checkpoint; zero if there
	// are none. A new checkpoint sets it again.
	since time.Time
	seen  time.Time // when this state was read
}

// waited returns how long batches have waited for a checkpoint, as this server saw it.
func (s *signingState) waited() time.Duration {
	if s.since.IsZero() {
		return 0
	}
	return s.seen.Sub(s.since)
}

// WatchLog reads every few seconds how much of the log is signed, until ctx ends. It must run
// on servers that do not sign, too: they warn if no server signs.
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
	row, err := s.NewestCheckpoint(ctx)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	end, err := s.db.NextLeaf(ctx) // after the checkpoint was read, because the log grows
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
func (s *Signer) signs() bool { return len(s.keys()) > 0 || !s.state.Load().at.IsZero() }

// checkpointAge returns the age of the newest checkpoint in seconds, if batches wait for the next
// one. Without a checkpoint it is the time for which this server has seen them wait.
func (s *Signer) checkpointAge() float64 {
	state := s.state.Load()
	switch {
	case !s.signs():
		return math.NaN()
	case state.unsigned == 0:
		return 0
	case state.at.IsZero():
		return time.Since(state.since).Seconds()
	}
	return max(time.Since(state.at).Seconds(), 0) // the clock of the database may be ahead
}

// Warning returns a text for operators if batches have waited too long for a checkpoint, or if it
// is not known whether they do, and "" otherwise. The server can make and record decisions in each
// case.
func (s *Signer) Warning() string {
	state := s.state.Load()
	if unseen := time.Since(state.seen); !state.seen.IsZero() && unseen >= max(s.overdue, signingOverdue) && s.signs() {
		return fmt.Sprintf("signing: for %v this server could not look how much of the log is signed", unseen.Round(time.Second))
	}
	if waited := state.waited(); waited == 0 || waited < s.overdue || !s.signs() {
		return ""
	}
	why := map[string]string{
		failedContradiction: ": the log contradicts an earlier checkpoint",
		failedFile:          ": this server cannot read or write the checkpoint file",
		failedAgent:         ": the ssh-agent of this server is away or refuses to sign",
		failedDatabase:      ": this server cannot read or store the tree in the database",
	}
	cause, _ := s.cause.Load().(string)
	newest := "there is no checkpoint"
	if !state.at.IsZero() {
		newest = fmt.Sprintf("the newest one is %.0f s old", s.checkpointAge())
	}
	return fmt.Sprintf("signing: %d batches of the log have waited for a checkpoint for %v, %s%s",
		state.unsigned, state.waited().Round(time.Second), newest, why[cause])
}
