package enforce

import (
	"context"
	"maps"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

const scope = "github.com/cedarpost/cedarpost/sdk/go/enforce"

type counts struct {
	allowed, public               atomic.Int64
	refused                       [kinds]atomic.Int64
	atFunction, atObject, atField atomic.Int64
	fieldsDenied, fieldsUnknown   atomic.Int64
	unmapped                      names
}

func (c *counts) refuse(r *Refusal) {
	c.refused[r.Kind].Add(1)
	switch r.At {
	case cedarpost.AtFunction:
		c.atFunction.Add(1)
	case cedarpost.AtObject:
		c.atObject.Add(1)
	case cedarpost.AtField:
		c.atField.Add(1)
	case cedarpost.NotDenied:
	}
}

// Stats are counts of requests since the guard was made. In a streaming call each message
// counts.
type Stats struct {
	// Allowed is how many were let through by a check, Public how many were to public routes.
	Allowed, Public int64
	// DeniedAtFunction, DeniedAtObject and DeniedAtField are denials by the check that
	// denied. Each was answered as StepUp, Hidden or Forbidden.
	DeniedAtFunction, DeniedAtObject, DeniedAtField int64
	StepUp, Hidden, Forbidden                       int64
	// Unmet is how many were allowed with an obligation that was not met.
	Unmet int64
	// NoPrincipal is how many had no principal.
	NoPrincipal int64
	// Malformed is how many could not be checked because of what the client sent. It includes
	// bodies that are too large or of a wrong type.
	Malformed int64
	// Unavailable is how many had no decision, Faults how many failed by a mistake of the
	// program.
	Unavailable, Faults int64
	// Conflicts is how many named a revision that the service does not have any more.
	Conflicts int64
	// Unmapped is how many had no route, by pattern or procedure: the first 100 names, and
	// "other".
	Unmapped map[string]int64
	// FieldsDenied and FieldsUnknown count values that filters removed from responses: of
	// denied fields, and of fields in no catalogue.
	FieldsDenied, FieldsUnknown int64
}

// Stats returns the counts.
func (g *Guard) Stats() Stats {
	c := &g.counts
	refused := func(k Kind) int64 { return c.refused[k].Load() }
	return Stats{
		Allowed: c.allowed.Load(), Public: c.public.Load(),
		DeniedAtFunction: c.atFunction.Load(), DeniedAtObject: c.atObject.Load(), DeniedAtField: c.atField.Load(),
		StepUp: refused(StepUp), Hidden: refused(Hidden), Forbidden: refused(Forbidden),
		Unmet: refused(Unmet), NoPrincipal: refused(NoPrincipal),
		Malformed:   refused(Malformed) + refused(TooLarge) + refused(WrongType),
		Unavailable: refused(Unavailable), Faults: refused(Fault),
		Conflicts:    refused(Conflict),
		Unmapped:     c.unmapped.all(),
		FieldsDenied: c.fieldsDenied.Load(), FieldsUnknown: c.fieldsUnknown.Load(),
	}
}

// Dropped counts the values that a filter removed from a response. It logs the first
// response of a route from which a field was removed that is in no catalogue.
func (g *Guard) Dropped(route string, d fields.Dropped) {
	g.counts.fieldsDenied.Add(int64(d.Denied))
	g.counts.fieldsUnknown.Add(int64(d.Unknown))
	if d.Unknown > 0 && g.noted.add(route) {
		g.cfg.Log.Warn("a response has fields that are in no catalogue, and they were removed; further responses are not logged", "route", route, "fields", d.UnknownPaths)
	}
}

const maxNames = 100

// names counts by name. After the first 100 names it counts as "other".
type names struct {
	mu     sync.Mutex
	counts map[string]int64
}

// add counts a name, and says whether it is the first of that name.
func (n *names) add(name string) (first bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.counts == nil {
		n.counts = map[string]int64{}
	}
	if _, known := n.counts[name]; !known && len(n.counts) >= maxNames {
		name = "other"
	}
	n.counts[name]++
	return n.counts[name] == 1
}

func (n *names) all() map[string]int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.counts)
}

// observe registers the counts with OpenTelemetry. They are read when metrics are collected.
func (g *Guard) observe(m metric.Meter) (unregister func(), err error) {
	requests, err := m.Int64ObservableCounter("cedarpost.enforce.requests",
		metric.WithDescription("Requests by outcome: allowed, public, step_up, hidden, forbidden, unmet, no_principal, malformed, unavailable, fault, conflict."))
	if err != nil {
		return nil, err
	}
	denials, err := m.Int64ObservableCounter("cedarpost.enforce.denials", metric.WithDescription("Denials by the check that denied: function, object, field."))
	if err != nil {
		return nil, err
	}
	unmapped, err := m.Int64ObservableCounter("cedarpost.enforce.unmapped", metric.WithDescription("Requests that no route is mapped for."))
	if err != nil {
		return nil, err
	}
	dropped, err := m.Int64ObservableCounter("cedarpost.enforce.fields", metric.WithDescription("Values removed from responses: denied, unknown."))
	if err != nil {
		return nil, err
	}
	by := func(key, value string) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(attribute.String(key, value)))
	}
	reg, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s := g.Stats()
		for outcome, n := range map[string]int64{
			"allowed": s.Allowed, "public": s.Public, "step_up": s.StepUp, "hidden": s.Hidden, "forbidden": s.Forbidden, "unmet": s.Unmet,
			"no_principal": s.NoPrincipal, "malformed": s.Malformed, "unavailable": s.Unavailable, "fault": s.Faults, "conflict": s.Conflicts,
		} {
			o.ObserveInt64(requests, n, by("outcome", outcome))
		}
		o.ObserveInt64(denials, s.DeniedAtFunction, by("at", "function"))
		o.ObserveInt64(denials, s.DeniedAtObject, by("at", "object"))
		o.ObserveInt64(denials, s.DeniedAtField, by("at", "field"))
		for route, n := range s.Unmapped {
			o.ObserveInt64(unmapped, n, by("route", route))
		}
		o.ObserveInt64(dropped, s.FieldsDenied, by("why", "denied"))
		o.ObserveInt64(dropped, s.FieldsUnknown, by("why", "unknown"))
		return nil
	}, requests, denials, unmapped, dropped)
	if err != nil {
		return nil, err
	}
	return func() { _ = reg.Unregister() }, nil
}
