package snapshot

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// followerMetrics counts what a follower could not apply.
type followerMetrics struct {
	failures *prometheus.CounterVec // cause
	looks    prometheus.Counter
}

func newFollowerMetrics(f *Follower) *followerMetrics {
	with := promauto.With(f.cfg.Metrics)
	m := &followerMetrics{failures: with.NewCounterVec(prometheus.CounterOpts{
		Name: "cedarpost_follow_failures_total",
		Help: "Attempts to apply new revisions that failed: policy, when a bundle does not compile (alert on it), or database."}, []string{"cause"})}
	m.looks = with.NewCounter(prometheus.CounterOpts{
		Name: "cedarpost_follow_looks_total", Help: "Times that this server asked the database for new revisions. Much more than the revisions: another login floods the notifications."})
	m.failures.WithLabelValues("policy")
	m.failures.WithLabelValues("database")
	gauge := func(name, help string, read func() float64) {
		with.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read)
	}
	gauge("cedarpost_revision", "The applied revision.", func() float64 { return float64(f.Latest().Position.Number) })
	gauge("cedarpost_revisions_behind", "Revisions committed, as far as this server heard, and not applied.", func() float64 { return float64(max(f.newest.Load()-f.Latest().Position.Number, 0)) })
	gauge("cedarpost_history_oldest_revision", "The first revision that can be read.", func() float64 { return float64(f.OldestRevision()) })
	gauge("cedarpost_entity_cache_bytes", "What the cached entities weigh, about.", func() float64 { return float64(f.cache.bytes()) })
	gauge("cedarpost_staleness_seconds", "How old policy and data may be at most.", func() float64 { return age(f.latestView().asOf).Seconds() })
	return m
}

// loaderMetrics counts how entities are found.
type loaderMetrics struct {
	lookups    *prometheus.CounterVec // result
	loads      prometheus.Counter
	loadedRows prometheus.Counter
	large      prometheus.Counter
}

func newLoaderMetrics(r prometheus.Registerer) *loaderMetrics {
	with := promauto.With(r)
	return &loaderMetrics{
		lookups: with.NewCounterVec(prometheus.CounterOpts{
			Name: "cedarpost_entity_lookups_total", Help: "Entities that decisions needed: hit, from the cache; miss, loaded; shared, by a load under way for another call."}, []string{"result"}),
		loads: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_entity_loads_total", Help: "Round trips that loaded entities."}),
		loadedRows: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_entity_loaded_rows_total", Help: "Entities that those brought."}),
		large: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_entity_large_loads_total", Help: "Loads of more than 512 KiB of entities, which wait for each other."}),
	}
}

// hubMetrics counts events and watchers.
type hubMetrics struct {
	events prometheus.Counter
	cuts   prometheus.Counter
}

func newHubMetrics(h *hub, r prometheus.Registerer) *hubMetrics {
	with := promauto.With(r)
	with.NewGaugeFunc(prometheus.GaugeOpts{Name: "cedarpost_watchers", Help: "Callers that watch what changes."}, func() float64 { return float64(len(h.places)) })
	return &hubMetrics{
		events: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_watch_events_total", Help: "Changes of the snapshot that watchers were told of, or would have been."}),
		cuts: with.NewCounter(prometheus.CounterOpts{
			Name: "cedarpost_watchers_cut_total", Help: "Watchers that did not keep up and were cut off."}),
	}
}
