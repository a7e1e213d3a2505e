package server

import (
	"strings"

	"connectrpc.com/connect/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// breakGlass is the right to publish past rules. It comes in addition to the right to publish.
const breakGlass = "BreakGlass"

// policyMetrics counts what happens to bundles.
type policyMetrics struct{ breakGlass prometheus.Counter }

// newPolicyMetrics returns metrics that r, which may be nil, has.
func newPolicyMetrics(r prometheus.Registerer) *policyMetrics {
	return &policyMetrics{breakGlass: promauto.With(r).NewCounter(prometheus.CounterOpts{
		Name: "cedarpost_break_glass_total", Help: "Bundles that were published past their rules by break-glass, on this server. Alert on it."})}
}

// breakGlassBy makes a publication go past rules for a reason; nil: it does not. The right to that is
// checked again when the publish is committed.
func (p *publication) breakGlassBy(reason *string) error {
	if reason == nil {
		return nil
	}
	if strings.TrimSpace(*reason) == "" {
		return connect.NewError(connect.CodeInvalidArgument, "break_glass: it needs a reason")
	}
	p.breakGlass, p.also = *reason, []need{{breakGlass, p.need.target}}
	return nil
}
