package server_test

import (
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/localpg"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// pair is a primary and a standby that lacks its last writes, with servers that know the
// addresses of both.
type pair struct {
	primary, standby *localpg.Server
	s                *servertest.Server
	// late reaches the standby through this proxy.
	late    *servertest.Server
	network *servertest.Proxy
	kept    *cedarpostv1.Revision // the standby has this revision
	lost    *cedarpostv1.Revision // the standby has neither this revision nor the one before
}

var everyone = []string{"ann p", "bob p", "cleo p", "dan p"}

// newPair makes a pair. The lost writes add ann to the group and remove bob. Cleo is always in
// it.
func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{primary: storetest.NewServer(t)}
	if err := store.Migrate(t.Context(), p.primary.URL(), nil); err != nil {
		t.Fatal(err)
	}
	p.standby = storetest.NewStandby(t, p.primary)
	p.network = servertest.NewProxy(t, p.standby.URL())
	p.s = servertest.On(t, twoHosts(t, p.primary.URL(), p.standby.URL()))
	p.late = servertest.On(t, twoHosts(t, p.primary.URL(), p.network.URL()))
	p.s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	p.kept = p.s.MustPut(paper(t, "p", "staff"), servertest.DocUser(t, "ann"), servertest.DocUser(t, "bob", "staff"), servertest.DocUser(t, "cleo", "staff"))
	storetest.CutOff(t, p.standby, p.primary)
	p.s.MustPut(servertest.DocUser(t, "ann", "staff"))
	p.lost = p.s.MustPut(servertest.DocUser(t, "bob"))
	for _, s := range []*servertest.Server{p.s, p.late} {
		if got, _ := patiently(t, s, atLeast(p.lost), everyone...); got != "ADAD" {
			t.Fatalf("%s before the failover", got)
		}
	}
	return p
}

// twoHosts returns a URL with the hosts of both databases.
func twoHosts(t *testing.T, first, second string) string {
	t.Helper()
	a, err := url.Parse(first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := url.Parse(second)
	if err != nil {
		t.Fatal(err)
	}
	a.Host = strings.Join([]string{a.Host, b.Host}, ",")
	return a.String()
}

// failOver kills the primary and promotes the standby.
func (p *pair) failOver(t *testing.T) {
	t.Helper()
	if err := p.primary.Kill(); err != nil {
		t.Fatal(err)
	}
	storetest.Promote(t, p.standby)
}

// A standby without the last writes is promoted. Servers find it by themselves and drop what is
// lost: in caches, tokens and pages. One of them finds it only after the lost numbers were given
// out again, for other writes.
func TestFailover(t *testing.T) {
	t.Parallel() // it takes long
	p := newPair(t)
	page, err := p.s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	finds := func(s *servertest.Server, want string, revision int64) {
		t.Helper()
		servertest.Eventually(t, "the server has found the new primary", func() bool {
			got, at, err := reads(t, s, fully(), everyone...)
			if err == nil && (got != want || at != revision) {
				t.Fatalf("%s at revision %d, want %s at %d", got, at, want, revision)
			}
			return err == nil
		})
	}
	refuses := func(s *servertest.Server) {
		t.Helper()
		_, _, err := reads(t, s, atLeast(p.lost), everyone...)
		servertest.WantCode(t, err, connect.CodeAborted, "failover")
		_, err = s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"ann"`), At: p.lost})
		servertest.WantCode(t, err, connect.CodeAborted, "failover")
		_, err = s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1, PageToken: page.NextPageToken})
		servertest.WantCode(t, err, connect.CodeAborted, "failover")
		op := put(servertest.DocUser(t, "ann", "staff"))
		op.Precondition = &cedarpostv1.Precondition{Condition: &cedarpostv1.Precondition_IfRevision{IfRevision: p.lost}}
		_, err = servertest.Write(t, s, op)
		servertest.WantCode(t, err, connect.CodeAborted, "failover")
	}

	watching, _ := watch(t, p.s, p.kept)
	p.network.Refuse(true)
	p.failOver(t)
	finds(p.s, "DAAD", p.kept.Number)
	refuses(p.s)
	// Watchers get a reset. So do watchers that resume from a lost revision, or from one before
	// the failover: the same number can mean another revision.
	if m := watching.next(); !m.Reset_ || m.Revision.Number != p.kept.Number || m.Revision.Token[:28] == p.kept.Token[:28] {
		t.Errorf("a watcher is told %v", m)
	}
	for _, after := range []*cedarpostv1.Revision{p.lost, p.kept} {
		if _, m := watch(t, p.s, after); !m.Reset_ || m.Revision.Number != p.kept.Number {
			t.Errorf("after %v: %v", after, m)
		}
	}
	// A server may notice only in use that a connection to the old primary is broken.
	servertest.Eventually(t, "the first write", func() bool {
		_, err := servertest.Write(t, p.s, put(servertest.DocUser(t, "dan")))
		return err == nil
	})
	staff := []string{"staff"}
	var newest *cedarpostv1.Revision
	for _, step := range []struct {
		dan, cleo []string
		want      string
	}{{staff, nil, "DADA"}, {nil, staff, "DAAD"}, {staff, nil, "DADA"}} {
		newest = p.s.MustPut(servertest.DocUser(t, "dan", step.dan...), servertest.DocUser(t, "cleo", step.cleo...))
		if got, revision := patiently(t, p.s, atLeast(newest), everyone...); got != step.want || revision != newest.Number {
			t.Errorf("%s at revision %d, want %s at %d", got, revision, step.want, newest.Number)
		}
	}
	if tags, reset := watching.until(newest.Number); reset || !tags[userTag(t, p.s, "cleo")] {
		t.Errorf("afterwards a watcher is told of %v, reset %v", tags, reset)
	}
	if newest.Number <= p.lost.Number {
		t.Errorf("revision %d was lost, and now only %d is there", p.lost.Number, newest.Number)
	}
	refuses(p.s)

	p.network.Refuse(false)
	finds(p.late, "DADA", newest.Number)
	refuses(p.late)
	dense(t, p.standby.URL())
}

// Entities are read from a standby, but not if it is behind, if it is not available, or if it
// was promoted and has other writes under the same numbers.
func TestReadsFromAStandby(t *testing.T) {
	t.Parallel() // it takes long
	primary := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), primary.URL(), nil); err != nil {
		t.Fatal(err)
	}
	standby := storetest.NewStandby(t, primary)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(primary.URL()), ReadURLs: []secret.Secret{secret.New(standby.URL())}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	s := servertest.On(t, primary.URL(), func(c *server.Config) { c.DB, c.CacheBytes = db, -1 })
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	s.MustPut(paper(t, "p", "staff"))
	toggle := func(in bool) {
		t.Helper()
		groups, want := []string{"staff"}, "A"
		if !in {
			groups, want = nil, "D"
		}
		r := s.MustPut(servertest.DocUser(t, "ann", groups...))
		for range 3 {
			if got, revision := patiently(t, s, atLeast(r), "ann p"); got != want || revision != r.Number {
				t.Errorf("%s at revision %d, want %s at %d", got, revision, want, r.Number)
			}
		}
	}
	// uses asks until reads of the standby have had the result that is counted.
	uses := func(what string, count func(store.StandbyStats) int64) {
		t.Helper()
		before := count(db.Standbys()[0])
		servertest.Eventually(t, "the standby "+what, func() bool {
			toggle(true)
			toggle(false)
			return count(db.Standbys()[0]) > before || t.Failed()
		})
	}
	answers := func(s store.StandbyStats) int64 { return s.Reads }
	behind := func(s store.StandbyStats) int64 { return s.Behind }
	uses("answers", answers)
	storetest.PauseReplay(t, standby)
	uses("is behind", behind)
	storetest.ResumeReplay(t, standby)
	uses("answers", answers)
	storetest.Promote(t, standby)
	other := servertest.On(t, standby.URL())
	for revision(t, other) < revision(t, s)+20 {
		other.MustPut(servertest.DocUser(t, "ann"))
		other.MustPut(servertest.DocUser(t, "ann", "staff"))
	}
	uses("is another database", behind)
	other.Stop()
	if err := standby.Kill(); err != nil {
		t.Fatal(err)
	}
	uses("fails", func(s store.StandbyStats) int64 { return s.Failed })
}

// Callers ask during the failover. When the new primary serves, no answer is at a lost revision,
// and its log has no decision at a revision that it does not have.
func TestDecisionsWhileItFailsOver(t *testing.T) {
	t.Parallel() // it takes long
	p := newPair(t)
	var promoted, over atomic.Bool
	var after atomic.Int64
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for !over.Load() {
				late := promoted.Load()
				got, revision, err := reads(t, p.s, nil, everyone...)
				if err == nil && late && after.Add(1) > 0 && got != "DAAD" {
					t.Errorf("%s at revision %d, want DAAD at %d", got, revision, p.kept.Number)
				}
			}
		})
	}
	p.failOver(t)
	promoted.Store(true)
	servertest.Eventually(t, "answers", func() bool { return after.Load() > 100 })
	over.Store(true)
	callers.Wait()
	var unknown int
	err := servertest.Session(t, p.standby.URL()).QueryRow(t.Context(), "select count(*) from decisions where revision > (select n from revision)").Scan(&unknown)
	if err != nil || unknown > 0 {
		t.Errorf("%d decisions are recorded at revisions that there are not, %v", unknown, err)
	}
}

// Callers write during the failover. The new primary accepts no write that depends on a lost
// revision, and each accepted write has a revision of the new history.
func TestWritesWhileItFailsOver(t *testing.T) {
	t.Parallel() // it takes long
	p := newPair(t)
	if err := p.primary.Kill(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { // until a write under the condition of a lost revision is refused
		defer close(ended)
		op := put(servertest.DocUser(t, "ann", "staff", "more"))
		op.Precondition = &cedarpostv1.Precondition{Condition: &cedarpostv1.Precondition_IfRevision{IfRevision: p.lost}}
		for {
			res, err := servertest.Write(t, p.s, op)
			if err == nil {
				t.Errorf("ann is written at revision %d, on the condition that she is as she was at %d, which is lost", res.Revision.Number, p.lost.Number)
				return
			}
			if connect.CodeOf(err) == connect.CodeAborted {
				return
			}
		}
	}()
	storetest.Promote(t, p.standby)
	var acknowledged *cedarpostv1.Revision
	servertest.Eventually(t, "a write", func() bool {
		res, err := servertest.Write(t, p.s, put(servertest.DocUser(t, "dan", "staff")))
		acknowledged = res.GetRevision()
		return err == nil
	})
	if got, _ := patiently(t, p.s, atLeast(acknowledged), "dan p"); got != "A" {
		t.Errorf("%s, with the revision of the write", got)
	}
	<-ended
}
