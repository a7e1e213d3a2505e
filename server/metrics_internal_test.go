package server

import (
	"fmt"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// However many actions there are, the metric has a bounded number of series, and no decision is missing.
func TestActionLabelsAreBounded(t *testing.T) {
	r := prometheus.NewRegistry()
	m := newDecisionMetrics(r)
	const actions = 1000
	for range 2 {
		for i := range actions {
			action := &cedarpostv1.EntityUid{Type: "Shop::Action", Id: fmt.Sprint("Do", i)}
			m.decisions.count(action, true, 0)
			m.decisions.count(action, false, cedarpostv1.DeniedAt_OBJECT)
		}
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	total, series, others := 0.0, 0, 0.0
	for _, f := range families {
		if f.GetName() != "cedarpost_decisions_total" {
			continue
		}
		for _, p := range f.GetMetric() {
			series++
			total += p.GetCounter().GetValue()
			for _, l := range p.GetLabel() {
				if l.GetName() == "action" && l.GetValue() == otherActions {
					others += p.GetCounter().GetValue()
				}
			}
		}
	}
	if series != 2*(maxActionLabels+1) || total != 4*actions || others != 4*(actions-maxActionLabels) {
		t.Errorf("%d series, %v decisions, %v of them of other actions", series, total, others)
	}
	known := &cedarpostv1.EntityUid{Type: "Shop::Action", Id: "Do1"}
	unknown := &cedarpostv1.EntityUid{Type: "Shop::Action", Id: "Do999"}
	if n := testing.AllocsPerRun(100, func() {
		m.decisions.count(known, true, 0)
		m.decisions.count(unknown, true, 0)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
