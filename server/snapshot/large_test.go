package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A large load waits for a place. Usual loads do not, and a call whose time ends while it waits
// does not look like an outage.
func TestLargeLoadsWait(t *testing.T) {
	db := storetest.Open(t)
	long := strings.Repeat("r", 1000)
	put := func(typ, id string, parents ...store.UID) store.Op {
		return store.Op{Kind: store.Put, Entity: store.Entity{UID: store.UID{Type: typ, ID: id}, Parents: parents}}
	}
	roles := func(from, n int) (list []store.UID) {
		for i := range n {
			list = append(list, store.UID{Type: "Role", ID: fmt.Sprint(from+i) + long})
		}
		return list
	}
	ops := []store.Op{put("User", "usual", roles(0, 10)...)}
	// user puts a user who is in groups that are in n roles: one entity may not have so many.
	user := func(id string, from, n int) {
		var groups []store.UID
		for i := 0; i < n; i += 200 {
			g := store.UID{Type: "Role", ID: fmt.Sprint(id, i)}
			groups = append(groups, g)
			ops = append(ops, put(g.Type, g.ID, roles(from+i, min(200, n-i))...))
		}
		ops = append(ops, put("User", id, groups...))
	}
	user("large", 0, 600)
	user("other", 1000, 600)
	for i := range 10 { // together too large
		user(fmt.Sprint("many", i), 2000+1000*i, 900)
	}
	if _, err := db.WriteEntities(t.Context(), store.EntityWrite{Caller: "test", Ops: ops}); err != nil {
		t.Fatal(err)
	}
	f := NewFollower(Config{DB: db, Log: slog.New(slog.DiscardHandler), MaxStaleness: time.Hour, CacheBytes: 64 << 20, Metrics: prometheus.NewRegistry()})
	if err := f.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	set, findings := engine.Compile([]engine.Source{{
		Name:     "b",
		Schema:   `entity Role in [Role]; entity User in [Role]; entity Doc; action view appliesTo { principal: User, resource: Doc };`,
		Policies: []engine.PolicyText{{Text: `@id("a") permit (principal, action, resource);`}},
	}}, nil)
	if set == nil {
		t.Fatal(findings)
	}
	snap := &Snapshot{Set: set, Position: f.Latest().Position, schema: f.Latest().schema}
	l := f.loader
	prepare := func(ctx context.Context, users ...string) ([]engine.Evaluation, error) {
		var asks []engine.Ask
		for _, u := range users {
			asks = append(asks, engine.Ask{Principal: cedar.NewEntityUID("User", cedar.String(u)), Action: cedar.NewEntityUID("Action", "view"), Resource: cedar.NewEntityUID("Doc", "d")})
		}
		list, _, err := l.prepare(ctx, snap, asks, nil)
		return list, err
	}
	for range cap(l.large) {
		l.large <- struct{}{}
	}
	if list, err := prepare(t.Context(), "usual"); err != nil || list[0].Err != nil {
		t.Errorf("a usual question while all places are taken: %v", err)
	}
	brief, cancel := context.WithTimeout(t.Context(), time.Second)
	_, err := prepare(brief, "large")
	if !errors.Is(err, ErrLargeLoad) || brief.Err() != nil {
		t.Errorf("a large question without a place: %v; the call's own deadline: %v", err, brief.Err())
	}
	cancel()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := prepare(gone, "large"); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that has left: %v", err)
	}

	// A call that waits while another one loads the same entities does not load them again.
	waits := make(chan error)
	go func() {
		_, err := prepare(t.Context(), "large")
		waits <- err
	}()
	e := engine.Entity{UID: cedar.NewEntityUID("User", "large")}
	l.cache.keep(snap, []loaded{{e.UID, &e, 1}, {uid: cedar.NewEntityUID("Doc", "d")}})
	<-l.large
	if err := <-waits; err != nil {
		t.Error(err)
	}
	if list, err := prepare(t.Context(), "other", "usual"); err != nil || list[0].Err != nil || list[1].Err != nil {
		t.Errorf("a large question with a place: %v", err)
	}
	var many []string
	for i := range 10 {
		many = append(many, fmt.Sprint("many", i))
	}
	list, err := prepare(t.Context(), append(many, "usual")...)
	if err != nil {
		t.Fatal(err)
	}
	for i := range list {
		if list[i].Err != nil {
			t.Errorf("question %d of a batch whose entities are too large together: %v", i, list[i].Err)
		}
	}
	if len(l.large) != cap(l.large)-1 || len(l.flights) != 0 {
		t.Errorf("%d places are taken, %d loads under way", len(l.large), len(l.flights))
	}
}
