package server

import (
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/internal/entityuid"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

const (
	maxActionLabels = 256     // actions that have labels of their own, since the start
	otherActions    = "other" // the label of all others
)

// decisionCounter counts decisions by action and outcome. It keeps the counters, so that a decision
// takes no memory. The actions are those of schemas, because only decisions that were recorded count;
// over a long time there can still be too many for labels.
type decisionCounter struct {
	vec *prometheus.CounterVec // action, decision, denied_at

	mu      sync.RWMutex
	list    map[decisionOutcome]prometheus.Counter
	actions map[actionName]bool
}

type actionName struct{ typ, id string }

type decisionOutcome struct {
	action   actionName // the zero value: all other actions
	allowed  bool
	deniedAt cedarpostv1.DeniedAt
}

func newDecisionCounter(vec *prometheus.CounterVec) *decisionCounter {
	c := &decisionCounter{vec: vec, list: map[decisionOutcome]prometheus.Counter{}, actions: map[actionName]bool{}}
	c.add(decisionOutcome{allowed: true}) // so that the metric is there from the start
	return c
}

// count counts one decision.
func (c *decisionCounter) count(action *cedarpostv1.EntityUid, allowed bool, deniedAt cedarpostv1.DeniedAt) {
	o := decisionOutcome{actionName{action.GetType(), action.GetId()}, allowed, deniedAt}
	c.mu.RLock()
	counter := c.list[o]
	if counter == nil && len(c.actions) == maxActionLabels && !c.actions[o.action] {
		o.action = actionName{}
		counter = c.list[o]
	}
	c.mu.RUnlock()
	if counter == nil {
		counter = c.add(o)
	}
	counter.Inc()
}

// add makes the counter of an outcome, or finds the one that another call has made.
func (c *decisionCounter) add(o decisionOutcome) prometheus.Counter {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o.action != (actionName{}) && !c.actions[o.action] {
		if len(c.actions) < maxActionLabels {
			// Not the strings of a message, which would stay in memory with it.
			o.action = actionName{strings.Clone(o.action.typ), strings.Clone(o.action.id)}
			c.actions[o.action] = true
		} else {
			o.action = actionName{}
		}
	}
	action, decision, at := otherActions, "allow", ""
	if o.action != (actionName{}) {
		action = entityuid.Format(o.action.typ, o.action.id)
	}
	if !o.allowed {
		decision, at = "deny", o.deniedAt.String()
	}
	counter := c.vec.WithLabelValues(action, decision, at)
	c.list[o] = counter
	return counter
}
