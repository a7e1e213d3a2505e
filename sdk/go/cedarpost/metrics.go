package cedarpost

import (
	"context"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

const scope = "github.com/cedarpost/cedarpost/sdk/go/cedarpost"

// counts are numbers of checks, by outcome.
type counts struct {
	decided, reused, failedOpen, errors atomic.Int64
	failOpenRefused                     atomic.Int64
	unleased                            atomic.Int64 // asked because there was no lease
}

// Stats are counts since the client was made.
type Stats struct {
	// Decided is how many checks the service answered, Reused how many the cache answered,
	// FailedOpen how many were let through without an answer, Errors how many failed.
	Decided, Reused, FailedOpen, Errors int64
	// FailOpenRefused is how many of Errors were checks with FailOpen that were refused
	// because [Config].FailOpenTime was used up.
	FailOpenRefused int64
	// Unleased is how many checks went to the service because the cache was not known to be
	// up to date.
	Unleased int64
	// Gaps is how often the watch missed changes, so that all answers were dropped.
	Gaps int64
	// Reported is how many uses are in the service's log, Lost how many will never be there.
	// All other uses wait to be reported.
	Reported, Lost int64
	// Leased says whether the cache is known to be up to date now.
	Leased bool
	// Entries is about how many answers are kept, Bytes about how much memory they take.
	Entries int
	Bytes   uint64
}

// Stats returns the counts.
func (c *Client) Stats() Stats {
	s := Stats{
		Decided: c.counts.decided.Load(), Reused: c.counts.reused.Load(),
		FailedOpen: c.counts.failedOpen.Load(), Errors: c.counts.errors.Load(), Unleased: c.counts.unleased.Load(),
		FailOpenRefused: c.counts.failOpenRefused.Load(),
		Reported:        c.reports.reported.Load(), Lost: c.reports.lost.Load(),
	}
	if c.cache != nil {
		s.Gaps, s.Leased = c.cache.gaps.Load(), c.cache.leased()
		s.Entries, s.Bytes = c.cache.entries.EstimatedSize(), c.cache.entries.WeightedSize()
	}
	return s
}

// observe registers the counts with OpenTelemetry. They are read when metrics are
// collected, so they cost a hit nothing.
func (c *Client) observe(m metric.Meter) (unregister func(), err error) {
	checks, err := m.Int64ObservableCounter("cedarpost.client.checks", metric.WithDescription("Checks by outcome: decided, reused, failed_open, error."))
	if err != nil {
		return nil, err
	}
	refused, err := m.Int64ObservableCounter("cedarpost.client.fail_open.refused", metric.WithDescription("Checks with FailOpen that were refused because FailOpenTime was used up. They are among the errors."))
	if err != nil {
		return nil, err
	}
	uses, err := m.Int64ObservableCounter("cedarpost.client.reuse", metric.WithDescription("Uses of kept answers, by the outcome of their report: reported, lost."))
	if err != nil {
		return nil, err
	}
	gaps, err := m.Int64ObservableCounter("cedarpost.client.gaps", metric.WithDescription("How often the watch missed changes and all answers were dropped."))
	if err != nil {
		return nil, err
	}
	leased, err := m.Int64ObservableGauge("cedarpost.client.leased", metric.WithDescription("1 while the cache is known to be up to date."))
	if err != nil {
		return nil, err
	}
	size, err := m.Int64ObservableGauge("cedarpost.client.cache.size", metric.WithUnit("By"), metric.WithDescription("About how much memory kept answers take."))
	if err != nil {
		return nil, err
	}
	outcome := func(s string) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(attribute.String("outcome", s)))
	}
	decided, reused, failedOpen, failed := outcome("decided"), outcome("reused"), outcome("failed_open"), outcome("error")
	reported, lost := outcome("reported"), outcome("lost")
	reg, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s := c.Stats()
		o.ObserveInt64(checks, s.Decided, decided)
		o.ObserveInt64(checks, s.Reused, reused)
		o.ObserveInt64(checks, s.FailedOpen, failedOpen)
		o.ObserveInt64(checks, s.Errors, failed)
		o.ObserveInt64(refused, s.FailOpenRefused)
		o.ObserveInt64(uses, s.Reported, reported)
		o.ObserveInt64(uses, s.Lost, lost)
		o.ObserveInt64(gaps, s.Gaps)
		o.ObserveInt64(leased, map[bool]int64{true: 1}[s.Leased])
		o.ObserveInt64(size, int64(s.Bytes))
		return nil
	}, checks, refused, uses, gaps, leased, size)
	if err != nil {
		return nil, err
	}
	return func() { _ = reg.Unregister() }, nil
}
