package decisionlog

import (
	"context"
	"time"
)

const (
	mergeEvery   = 10 * time.Second // between two merges: the more rows one merge has, the less each costs
	mergeTimeout = time.Minute
)

// mergeKeys merges the index of principals and resources every mergeEvery until the recorder is
// closed, so that no commit has to do it. It also stores when policies were used.
func (r *Recorder) mergeKeys() {
	defer close(r.merged)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-r.stop
		cancel()
	}()
	tick := time.NewTicker(r.cfg.mergeEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			r.mergeOnce(ctx)
			r.storeUses(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// mergeOnce merges the index, if this recorder has committed decisions since the last merge.
func (r *Recorder) mergeOnce(ctx context.Context) {
	if !r.unmerged.Swap(false) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, mergeTimeout)
	defer cancel()
	err := r.cfg.DB.MergeLogKeys(ctx)
	if err != nil {
		r.unmerged.Store(true)
		if r.stopping() {
			return
		}
		r.cfg.Log.Error("the index of principals and resources is not merged: commits have to do it, and some will take long", "err", err)
	}
	r.cfg.Task(TaskMergeKeys, err)
}
