package decisionlog

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// recorderMetrics counts commits to the log.
type recorderMetrics struct {
	batchRows   prometheus.Histogram
	commit      prometheus.Histogram
	commitFails prometheus.Counter
	lost        prometheus.Counter
	clockSteps  *prometheus.CounterVec // direction
}

func newRecorderMetrics(r *Recorder) *recorderMetrics {
	with := promauto.With(r.cfg.Metrics)
	m := &recorderMetrics{
		batchRows: with.NewHistogram(prometheus.HistogramOpts{
			Name: "cedarpost_record_batch_rows", Help: "Decision records in one commit.", Buckets: prometheus.ExponentialBuckets(1, 2, 12)}),
		commit: with.NewHistogram(prometheus.HistogramOpts{
			Name: "cedarpost_record_commit_seconds", Help: "Time of one commit of decision records.", Buckets: prometheus.ExponentialBuckets(0.0002, 2, 14)}),
		commitFails: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_record_failures_total", Help: "Commits to the log that failed. In strict mode their decisions were not answered."}),
		lost: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_decisions_lost_total", Help: "Decisions that were answered and never recorded: buffered mode, stopped while the log was not available."}),
		clockSteps: with.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_clock_steps_total", Help: "Times that the clock of this server was set by more than a second: back, or forward (or the machine slept)."}, []string{"direction"}),
	}
	m.clockSteps.WithLabelValues("back")
	m.clockSteps.WithLabelValues("forward")
	with.NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_record_queue", Help: "Calls that wait for a commit."},
		func() float64 { return float64(len(r.queue)) })
	with.NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_decisions_at_risk", Help: "Decisions that were answered and are not committed yet; always 0 in strict mode."},
		func() float64 { return float64(r.atRisk.Load()) })
	return m
}

// clockStep counts a step of the clock.
func (m *recorderMetrics) clockStep(by time.Duration) {
	if by < 0 {
		m.clockSteps.WithLabelValues("back").Inc()
	} else {
		m.clockSteps.WithLabelValues("forward").Inc()
	}
}
