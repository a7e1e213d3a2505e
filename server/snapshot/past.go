package snapshot

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/cedar-policy/cedar-go"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

// pastSetsKept is how many compiled sets of the past are kept. A replay of an hour of the
// log, on several connections, seldom needs more at the same time.
const pastSetsKept = 4

// Past reads policies and entities as they were at a revision. Its methods may be called by
// several goroutines.
type Past struct {
	follower *Follower

	mu     sync.Mutex
	recent []*pastSet // the one used last comes first
}

// pastSet is a set that is compiled or being compiled. set and err are valid after done is
// closed.
type pastSet struct {
	policies string // as PastPolicies of the store names them
	done     chan struct{}
	set      *engine.Set
	err      error
}

// NewPast makes a Past of the database that a follower follows.
func NewPast(f *Follower) *Past { return &Past{follower: f} }

// Policies returns the compiled policies of a revision. It compiles them, once for all calls
// that wait, unless they are those of the newest snapshot or were used recently. The error is
// [store.ErrSwept] or [store.ErrNotFound] if the revision cannot be read, and
// [stored.ErrCompile] if its policies do not compile.
func (p *Past) Policies(ctx context.Context, revision int64) (*engine.Set, error) {
	name, err := p.follower.cfg.DB.PastPolicies(ctx, revision)
	if err != nil {
		return nil, err
	}
	if live := p.follower.snap.Load(); nameOfPolicies(live.Bundles) == name {
		return live.Set, nil
	}
	ps, found := p.find(name)
	if !found {
		// Other calls may wait for the set, so compiling does not end with this one.
		go p.compile(context.WithoutCancel(ctx), revision, ps)
	}
	select {
	case <-ps.done:
		return ps.set, ps.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// nameOfPolicies returns the name that [store.DB.PastPolicies] gives these bundles.
func nameOfPolicies(bundles []store.Bundle) string {
	names := make([]string, len(bundles))
	for i, b := range bundles {
		names[i] = fmt.Sprintf("%d %s %s", b.Version, b.Digest, b.Name)
	}
	return strings.Join(names, "\n")
}

// find returns the set of a name. If found is false, the set is new and the caller compiles
// it.
func (p *Past) find(name string) (ps *pastSet, found bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.recent, func(ps *pastSet) bool { return ps.policies == name })
	if found = i >= 0; found {
		ps = p.recent[i]
		p.recent = slices.Delete(p.recent, i, i+1)
	} else {
		ps = &pastSet{policies: name, done: make(chan struct{})}
	}
	p.recent = slices.Insert(p.recent, 0, ps)
	if len(p.recent) > pastSetsKept {
		p.recent = slices.Delete(p.recent, pastSetsKept, len(p.recent))
	}
	return ps, found
}

// compile compiles a set, and forgets it again if that fails.
func (p *Past) compile(ctx context.Context, revision int64, ps *pastSet) {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	defer close(ps.done)
	defer func() {
		if r := recover(); r != nil {
			ps.err = fmt.Errorf("compile policies of the past: panic: %v\n%s", r, debug.Stack())
		}
		if ps.err != nil { // the next call tries again
			p.mu.Lock()
			p.recent = slices.DeleteFunc(p.recent, func(o *pastSet) bool { return o == ps })
			p.mu.Unlock()
		}
	}()
	var bundles []store.Bundle
	if bundles, ps.err = p.follower.cfg.DB.PastBundles(ctx, revision); ps.err != nil {
		return
	}
	if ps.set, ps.err = stored.Compile(bundles, p.follower.snap.Load().Set); ps.err != nil {
		ps.err = fmt.Errorf("revision %d %w", revision, ps.err)
	}
}

// Prepare reads a question by the policies of a revision, which are set, and loads the
// entities that it can touch, as they were at the revision. It does not use the cache, which
// has the newest entities only. The error is a [engine.RequestError], a
// [stored.UnfitError] or that of the database.
func (p *Past) Prepare(ctx context.Context, revision int64, set *engine.Set, ask engine.Ask) (*engine.Evaluation, error) {
	pool := engine.NewPool()
	return set.Prepare(ask, pool, func(missing []cedar.EntityUID) error {
		rows, err := p.follower.cfg.DB.PastEntities(ctx, revision, stored.UIDs(missing))
		if err != nil {
			return err
		}
		found := make([]engine.Entity, len(rows))
		for i, row := range rows {
			e, err := stored.ReadEntity(set, row)
			if err != nil {
				return err
			}
			found[i] = *e
		}
		pool.Add(missing, found)
		return nil
	})
}
