package decisionlog

import (
	"context"
	"sync"
	"time"

	"github.com/cedarpost/cedarpost/store"
)

// policyUses notes when policies last determined a committed decision, or denied fields of one. It
// holds those since the last time that they were stored, so a crash loses the uses of mergeEvery at
// most, and it is never larger than the policies that decide.
type policyUses struct {
	mu   sync.Mutex
	last map[string]time.Time // by "bundle/id"
}

// note notes committed decisions. A question that was explained does not count: somebody tried it out.
func (u *policyUses) note(decisions []store.Decision) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.last == nil {
		u.last = map[string]time.Time{}
	}
	for i := range decisions {
		d := &decisions[i]
		if d.Explained {
			continue
		}
		for _, policies := range [...][]string{d.Policies, d.FieldForbids} {
			for _, p := range policies {
				if d.At.After(u.last[p]) {
					u.last[p] = d.At
				}
			}
		}
	}
}

// take returns what is noted, and forgets it.
func (u *policyUses) take() map[string]time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	taken := u.last
	u.last = nil
	return taken
}

// putBack notes again what could not be stored.
func (u *policyUses) putBack(taken map[string]time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for p, at := range u.last {
		if at.After(taken[p]) {
			taken[p] = at
		}
	}
	u.last = taken
}

// storeUses stores when policies were used, if there are uses that are not stored.
func (r *Recorder) storeUses(ctx context.Context) {
	taken := r.uses.take()
	if len(taken) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, mergeTimeout)
	defer cancel()
	err := r.cfg.DB.NotePolicyUses(ctx, taken)
	if err != nil {
		r.uses.putBack(taken)
		if r.stopping() {
			return
		}
		r.cfg.Log.Error("when policies last determined a decision is not stored yet", "err", err)
	}
	r.cfg.Task(TaskPolicyUses, err)
}
