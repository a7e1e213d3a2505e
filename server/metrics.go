package server

import (
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"go.opentelemetry.io/otel/trace"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

// newRegistry returns the registry of one server. No label of its metrics holds an id or a
// key, so their number is bounded.
func newRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// callMetrics counts calls.
type callMetrics struct {
	calls   *prometheus.CounterVec   // procedure, code
	seconds *prometheus.HistogramVec // procedure

	unauthenticated *prometheus.CounterVec // reason
	refused         *prometheus.CounterVec // procedure
}

func newCallMetrics(r prometheus.Registerer) *callMetrics {
	with := promauto.With(r)
	m := &callMetrics{
		calls: with.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_calls_total", Help: "Calls by procedure and Connect code."}, []string{"procedure", "code"}),
		seconds: with.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cedarpost_call_seconds", Help: "Time from authentication to answer, recording included.",
			Buckets: prometheus.ExponentialBuckets(0.0002, 2, 14)}, []string{"procedure"}),
		unauthenticated: with.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_authentication_failures_total", Help: "Calls and TLS handshakes whose caller could not be authenticated, by reason."}, []string{"reason"}),
		refused: with.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_rights_refused_total", Help: "Calls to which the caller has no right, by procedure."}, []string{"procedure"}),
	}
	// So that each metric has a series from the start.
	m.unauthenticated.WithLabelValues("unknown key")
	m.seconds.WithLabelValues(cedarpostv1connect.AuthorizationServiceAuthorizeProcedure)
	m.refused.WithLabelValues(cedarpostv1connect.AuthorizationServiceAuthorizeProcedure)
	return m
}

// procedureLabel returns the procedure of a call. The caller chooses the name of one that is not
// registered.
func procedureLabel(spec connect.Spec) string {
	if spec.Schema == nil {
		return "unknown"
	}
	return spec.Procedure
}

// call counts a call. span is its span, or nil.
func (m *callMetrics) call(spec connect.Spec, began time.Time, span trace.Span, err error) {
	code := "ok"
	if err != nil {
		code = connect.CodeOf(err).String()
	}
	procedure := procedureLabel(spec)
	m.calls.WithLabelValues(procedure, code).Inc()
	observe(m.seconds.WithLabelValues(procedure), time.Since(began), span)
}

// decisionMetrics counts decisions, and what callers report about their kept answers.
type decisionMetrics struct {
	decisions *decisionCounter
	load      stage // entities of the questions are found
	decide    stage // policies are evaluated, and the record is made
	record    stage // the record waits for its commit
	reuses    prometheus.Counter
	failOpens prometheus.Counter
	reuseLost prometheus.Counter
	tooCostly prometheus.Counter

	tokensRefused *prometheus.CounterVec // reason
}

func newDecisionMetrics(r prometheus.Registerer) *decisionMetrics {
	with := promauto.With(r)
	stages := with.NewHistogramVec(prometheus.HistogramOpts{
		Name: "cedarpost_stage_seconds", Help: "Time of the stages of calls that decide: load, decide, and record, which waits for the commit.",
		Buckets: prometheus.ExponentialBuckets(0.00001, 2, 20)}, []string{"stage"})
	return &decisionMetrics{
		decisions: newDecisionCounter(with.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_decisions_total", Help: "Recorded decisions by action, by outcome and by the check that denied. 256 actions have labels of their own, and those that come later are other."}, []string{"action", "decision", "denied_at"})),
		load:   stage{"load", stages.WithLabelValues("load")},
		decide: stage{"decide", stages.WithLabelValues("decide")},
		record: stage{"record", stages.WithLabelValues("record")},
		reuses: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_reuse_reported_total", Help: "Uses of kept answers that callers reported; what they report again counts again."}),
		failOpens: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_fail_open_reported_total", Help: "Checks that callers let through without an answer, as they reported. Alert on it."}),
		reuseLost: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_reuse_lost_total", Help: "Uses of kept answers that callers lost count of, as they reported."}),
		tooCostly: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_decisions_too_costly_total", Help: "Questions that were refused because their decision takes more work than one may. Alert on it."}),
		tokensRefused: with.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_principal_tokens_refused_total", Help: "Questions whose principal_token was not accepted, by reason."}, []string{"reason"}),
	}
}

// The tasks that a server does in the background, besides those of the decision log. Signing
// has metrics of its own.
const (
	taskStateRoot     = "state_root"    // records the daily state root
	taskRetention     = "retention"     // drops old days of the log
	taskSweep         = "sweep"         // removes old history
	taskShadow        = "shadow"        // compares new decisions with those by changes in shadow
	taskNotifications = "notifications" // listens for new revisions; while it fails, the server polls
)

// taskMetrics counts work in the background.
type taskMetrics struct {
	failures    *prometheus.CounterVec // task
	succeeded   *prometheus.GaugeVec   // task
	daysDropped prometheus.Counter
	sweptRows   *prometheus.CounterVec // table
}

func newTaskMetrics(r prometheus.Registerer) *taskMetrics {
	with := promauto.With(r)
	m := &taskMetrics{
		failures: with.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_background_failures_total", Help: "Attempts of this server at work in the background that failed, by task. Alert on it."}, []string{"task"}),
		succeeded: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "cedarpost_background_success_timestamp_seconds", Help: "When this server last finished work in the background without an error, by task, as Unix time. A task that has not succeeded yet is missing."}, []string{"task"}),
		daysDropped: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_log_days_dropped_total", Help: "Days of the log that this server dropped, being past their retention."}),
		sweptRows: with.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_history_swept_rows_total", Help: "Rows of history that this server removed."}, []string{"table"}),
	}
	for _, task := range []string{
		taskStateRoot, taskRetention, taskSweep, taskShadow, taskNotifications,
		decisionlog.TaskPartitions, decisionlog.TaskNoted, decisionlog.TaskMergeKeys, decisionlog.TaskPolicyUses, decisionlog.TaskWatchLog,
	} {
		m.failures.WithLabelValues(task)
	}
	return m
}

// done counts the outcome of a task.
func (m *taskMetrics) done(task string, err error) {
	if err != nil {
		m.failures.WithLabelValues(task).Inc()
		return
	}
	m.succeeded.WithLabelValues(task).SetToCurrentTime()
}

// registerConnections adds the connections of a plane.
func registerConnections(r prometheus.Registerer, plane string, l *boundedListener) {
	with := promauto.With(r)
	with.NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_connections", Help: "Open connections, by plane.",
		ConstLabels: prometheus.Labels{"plane": plane}}, func() float64 { return float64(l.open()) })
	for why, n := range map[string]*atomic.Int64{"refused": &l.refused, "displaced": &l.displaced} {
		with.NewCounterFunc(prometheus.CounterOpts{Name: "cedarpost_connections_closed_total",
			Help:        "Connections closed because a plane, or one address, had as many as it may have: new ones, and older ones without an API key that gave their place to a new one.",
			ConstLabels: prometheus.Labels{"plane": plane, "why": why}}, func() float64 { return float64(n.Load()) })
	}
}

// registerClock adds the difference of the clocks.
func registerClock(r prometheus.Registerer, clock *skew) {
	promauto.With(r).NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_clock_skew_seconds",
		Help: "How far the clock of this server is ahead of that of the database; less than 0: behind. Alert on 2 s either way."}, clock.seconds)
}

// registerCertificate adds when certificates of one use end, and the failures to reload them.
func registerCertificate(r prometheus.Registerer, use string, end func() time.Time, files *reloading) {
	registerExpiry(r, use, end)
	promauto.With(r).NewCounterFunc(prometheus.CounterOpts{Name: "cedarpost_certificate_reload_failures_total", ConstLabels: prometheus.Labels{"use": use},
		Help: "Attempts to take up a new certificate from its files that failed, by use; one each ten seconds. Alert on it."},
		func() float64 { return float64(files.failures.Load()) })
}

// registerExpiry adds when certificates of one use end.
func registerExpiry(r prometheus.Registerer, use string, end func() time.Time) {
	promauto.With(r).NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_certificate_expiry_timestamp_seconds", ConstLabels: prometheus.Labels{"use": use},
		Help: "When a certificate ends, as Unix time. use=server: the TLS certificate that is served, or one of its chain if that is earlier. use=client_ca: the first of the CAs of clients. use=database: the certificate that this server presents to Postgres."},
		func() float64 { return float64(end().UnixMilli()) / 1000 })
}

// registerDatabaseCertificate adds when the certificate ends that this server presents to Postgres,
// if it has one.
func registerDatabaseCertificate(r prometheus.Registerer, db *store.DB) {
	end := func() time.Time {
		end, _ := db.TLSFiles()
		return end
	}
	if !end().IsZero() {
		registerExpiry(r, "database", end)
	}
}

// registerStandbys adds the reads of each standby, by their result.
func registerStandbys(r prometheus.Registerer, db *store.DB) {
	for i, s := range db.Standbys() {
		for result, read := range map[string]func(store.StandbyStats) int64{
			"read":   func(s store.StandbyStats) int64 { return s.Reads },
			"behind": func(s store.StandbyStats) int64 { return s.Behind },
			"failed": func(s store.StandbyStats) int64 { return s.Failed },
		} {
			promauto.With(r).NewCounterFunc(prometheus.CounterOpts{
				Name: "cedarpost_standby_reads_total", Help: "Loads that a standby answered, and those that it had to leave to another server, being behind or failing.",
				ConstLabels: prometheus.Labels{"standby": s.Name, "result": result},
			}, func() float64 { return float64(read(db.Standbys()[i])) })
		}
	}
}

// registerPlaces adds how many calls wait for places.
func registerPlaces(r prometheus.Registerer, p *access.Places) {
	promauto.With(r).NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_decision_calls_waiting",
		Help: "Calls that wait because the server makes as many decisions at once as it may, in all or for one caller."}, func() float64 { return float64(p.Waiting()) })
}

// registerShares adds how many costly calls wait for their turn.
func registerShares(r prometheus.Registerer, s *access.Shares) {
	promauto.With(r).NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_costly_calls_waiting",
		Help: "Calls whose decisions take much work, and that wait until others had their turn."}, func() float64 { return float64(s.Waiting()) })
}
