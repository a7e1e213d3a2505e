package server

import (
	"net/http"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

// metrics is what one server counts, in a registry of its own. No label holds
// an id or a key, so their number is bounded.
type metrics struct {
	registry    *prometheus.Registry
	calls       *prometheus.CounterVec   // procedure, code
	seconds     *prometheus.HistogramVec // procedure
	decisions   *prometheus.CounterVec   // decision, denied_at
	daysDropped prometheus.Counter
	sweptRows   *prometheus.CounterVec // table
	reuses      prometheus.Counter
	failOpens   prometheus.Counter
	reuseLost   prometheus.Counter
	taskFails   *prometheus.CounterVec // task
	taskDone    *prometheus.GaugeVec   // task
}

// The tasks that a server does in the background, besides those of the decision log. Signing
// has metrics of its own.
const (
	taskStateRoot     = "state_root"    // the daily state root
	taskRetention     = "retention"     // old days of the log are dropped
	taskSweep         = "sweep"         // old history is removed
	taskNotifications = "notifications" // new revisions are heard of; without it, by polling
)

var tasks = []string{decisionlog.TaskPartitions, taskStateRoot, taskRetention, taskSweep, decisionlog.TaskAuthenticationFailures, taskNotifications, decisionlog.TaskWatchLog}

// task counts the outcome of a task in the background.
func (m *metrics) task(name string, err error) {
	if err != nil {
		m.taskFails.WithLabelValues(name).Inc()
		return
	}
	m.taskDone.WithLabelValues(name).SetToCurrentTime()
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_calls_total", Help: "Calls by procedure and Connect code."}, []string{"procedure", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cedarpost_call_seconds", Help: "Time from authentication to answer, recording included.",
			Buckets: prometheus.ExponentialBuckets(0.0002, 2, 14)}, []string{"procedure"}),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_decisions_total", Help: "Recorded decisions by outcome and by the check that denied."}, []string{"decision", "denied_at"}),
		daysDropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_log_days_dropped_total", Help: "Days of the log that this server dropped, being past their retention."}),
		sweptRows: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_history_swept_rows_total", Help: "Rows of history that this server removed."}, []string{"table"}),
		reuses: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_reuse_reported_total", Help: "Uses of kept answers that callers reported; what they report again counts again."}),
		failOpens: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_fail_open_reported_total", Help: "Checks that callers let through without an answer, as they reported. Alert on it."}),
		reuseLost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_reuse_lost_total", Help: "Uses of kept answers that callers lost count of, as they reported."}),
	}
	m.taskFails = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "cedarpost_background_failures_total", Help: "Attempts of this server at work in the background that failed, by task. Alert on it."}, []string{"task"})
	m.taskDone = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "cedarpost_background_success_timestamp_seconds", Help: "When this server last finished work in the background without an error, by task, as Unix time. A task that has not succeeded yet is missing."}, []string{"task"})
	for _, task := range tasks {
		m.taskFails.WithLabelValues(task)
	}
	m.registry.MustRegister(m.calls, m.seconds, m.decisions,
		m.daysDropped, m.sweptRows, m.taskFails, m.taskDone,
		m.reuses, m.failOpens, m.reuseLost,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// gauge adds a metric that is read when it is asked for.
func (m *metrics) gauge(name, help string, read func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read))
}

// watchClock adds the difference of the clocks.
func (m *metrics) watchClock(clock *skew) {
	m.gauge("cedarpost_clock_skew_seconds", "How far the clock of this server is ahead of that of the database; less than 0: behind. Alert on 2 s either way.", clock.seconds)
}

func (m *metrics) watchCertificate(c *certificate) {
	m.registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_certificate_expiry_timestamp_seconds",
			Help: "When the TLS certificate that is served ends, or one of its chain if that is earlier, as Unix time."},
			func() float64 { return unixSeconds(chainEnd(c.current.Load())) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "cedarpost_certificate_reload_failures_total",
			Help: "Attempts to take up a new TLS certificate from its files that failed; one each ten seconds. Alert on it."},
			func() float64 { return float64(c.failures.Load()) }))
}

// unixSeconds is a time as Prometheus has it.
func unixSeconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

// watchStandbys counts what was asked of each standby.
func (m *metrics) watchStandbys(db *store.DB) {
	for i, s := range db.Standbys() {
		for result, read := range map[string]func(store.StandbyStats) int64{
			"read":   func(s store.StandbyStats) int64 { return s.Reads },
			"behind": func(s store.StandbyStats) int64 { return s.Behind },
			"failed": func(s store.StandbyStats) int64 { return s.Failed },
		} {
			m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
				Name: "cedarpost_standby_reads_total", Help: "Loads that a standby answered, and those that it had to leave to another server, being behind or failing.",
				ConstLabels: prometheus.Labels{"standby": s.Name, "result": result},
			}, func() float64 { return float64(read(db.Standbys()[i])) }))
		}
	}
}

func (m *metrics) call(spec connect.Spec, began time.Time, err error) {
	code := "ok"
	if err != nil {
		code = connect.CodeOf(err).String()
	}
	// A procedure that nobody registered is named by whoever calls.
	procedure := spec.Procedure
	if spec.Schema == nil {
		procedure = "unknown"
	}
	m.calls.WithLabelValues(procedure, code).Inc()
	m.seconds.WithLabelValues(procedure).Observe(time.Since(began).Seconds())
}

func (m *metrics) decision(allowed bool, deniedAt string) {
	if allowed {
		m.decisions.WithLabelValues("allow", "").Inc()
	} else {
		m.decisions.WithLabelValues("deny", deniedAt).Inc()
	}
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
