package server_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// tokenAt returns the token of another revision of the same history. The token of a revision
// that does not exist yet has a wrong mark.
func tokenAt(r *cedarpostv1.Revision, number int64) *cedarpostv1.Revision {
	t, err := wire.ParseToken(r.GetToken())
	if err != nil {
		panic(err)
	}
	t.Anchor, t.Number = max(t.Anchor, number), number
	return t.Revision()
}

// watcher reads a stream of Watch.
type watcher struct {
	t    testing.TB
	in   cedarpostv1connect.AuthorizationServiceWatchClientStream
	last int64 // the revision of the last message
}

// watch opens a stream and returns its first message.
func watch(t testing.TB, s *servertest.Server, after *cedarpostv1.Revision) (*watcher, *cedarpostv1.WatchResponse) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	in, err := s.Authorization.Watch(ctx, &cedarpostv1.WatchRequest{After: after})
	if err != nil {
		t.Fatal(err)
	}
	w := &watcher{t: t, in: in}
	first, err := in.Receive()
	if err != nil {
		t.Fatal(err)
	}
	w.last = first.Revision.Number
	if after == nil { // the server may not have applied all yet
		p, err := s.DB.Current(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		w.until(p.Number)
	}
	return w, first
}

// next returns the next message, which must follow the one before.
func (w *watcher) next() *cedarpostv1.WatchResponse {
	w.t.Helper()
	m, err := w.in.Receive()
	if err != nil {
		w.t.Fatal(err)
	}
	if m.After != w.last || m.Revision.Number < m.After && !m.Reset_ {
		w.t.Fatalf("%v comes after revision %d", m, w.last)
	}
	w.last = m.Revision.Number
	return m
}

// until reads messages up to a revision. reset reports whether one of them was a reset.
func (w *watcher) until(revision int64) (tags map[uint64]bool, reset bool) {
	w.t.Helper()
	tags = map[uint64]bool{}
	for w.last < revision {
		m := w.next()
		for _, tag := range m.Tags {
			tags[tag] = true
		}
		reset = reset || m.Reset_
	}
	return tags, reset
}

// end reads to the end and returns the last message and the error.
func (w *watcher) end() (last *cedarpostv1.WatchResponse, err error) {
	for {
		m, err := w.in.Receive()
		if err != nil {
			return last, err
		}
		last = m
	}
}

func database(t testing.TB, s *servertest.Server) uuid.UUID {
	t.Helper()
	p, err := s.DB.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p.Database
}

func userTag(t testing.TB, s *servertest.Server, id string) uint64 {
	return snapshot.EntityTag(database(t, s), "Doc::User", id)
}

// While many callers write, each server tells watchers of each revision once, with the tags of
// what changed.
func TestWatchIsContiguous(t *testing.T) {
	a := docServer(t)
	servers := []*servertest.Server{a, servertest.On(t, a.URL)}
	first := servers[1].MustPut(servertest.DocUser(t, "first"))
	db := database(t, a)
	var watchers []*watcher
	for _, s := range servers {
		w, m := watch(t, s, first)
		if m.After != first.Number || m.Revision.Number != first.Number || len(m.Tags) != 0 || m.Reset_ {
			t.Fatalf("began with %v", m)
		}
		watchers = append(watchers, w)
	}
	var mu sync.Mutex
	wrote := map[int64][]uint64{} // by revision
	var writers sync.WaitGroup
	const many, each = 8, 12
	for i := range many {
		writers.Go(func() {
			for j := range each {
				ids := []string{fmt.Sprint("u", i), fmt.Sprint("u", i, "-", j)}
				res, err := servertest.Write(t, servers[j%2], put(servertest.DocUser(t, ids[0], fmt.Sprint("g", j))), put(servertest.DocUser(t, ids[1])))
				if err != nil {
					t.Error(err)
					return
				}
				var tags []uint64
				for _, id := range ids {
					tags = append(tags, snapshot.EntityTag(db, "Doc::User", id))
				}
				mu.Lock()
				wrote[res.Revision.Number] = tags
				mu.Unlock()
			}
		})
	}
	writers.Wait()
	end := slices.Max(slices.Collect(maps.Keys(wrote)))
	if end != first.Number+many*each {
		t.Fatalf("%d revisions, want %d", end-first.Number, many*each)
	}
	for i, w := range watchers {
		for w.last < end {
			m := w.next()
			var want []uint64
			for n := m.After + 1; n <= m.Revision.Number; n++ {
				want = append(want, wrote[n]...)
			}
			slices.Sort(want)
			if want = slices.Compact(want); !slices.Equal(m.Tags, want) || m.Reset_ {
				t.Errorf("server %d: %v, want the tags %v", i, m, want)
			}
		}
	}
}

// A watcher resumes from the events that the server has in memory, or from the history in the
// store.
func TestWatchResumes(t *testing.T) {
	t.Parallel() // it takes long
	old := docServer(t)
	start := old.MustPut(servertest.DocUser(t, "ann"))
	middle := old.MustPut(servertest.DocUser(t, "bob"))
	end := old.MustPut(servertest.DocUser(t, "carl"))
	ann, bob, carl := userTag(t, old, "ann"), userTag(t, old, "bob"), userTag(t, old, "carl")
	fresh := servertest.On(t, old.URL) // it makes an API key, which is a revision
	now, err := fresh.Authorization.GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
	if err != nil || now.Revision.Number != end.Number+1 {
		t.Fatalf("%v, %v", now, err)
	}
	end = now.Revision
	for name, s := range map[string]*servertest.Server{"remembers": old, "has just started": fresh} {
		if _, _, err := reads(t, s, atLeast(end), "ann p"); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			after *cedarpostv1.Revision
			from  int64
			tags  []uint64
			reset bool
		}{
			{nil, end.Number, nil, false},
			{end, end.Number, nil, false},
			{middle, middle.Number, []uint64{carl}, false},
			{start, start.Number, []uint64{bob, carl}, false},
			{tokenAt(start, start.Number-1), start.Number - 1, []uint64{ann, bob, carl}, false},
			{middle, middle.Number, []uint64{carl}, false}, // once more
			{tokenAt(end, end.Number+1000), end.Number, nil, true},
			{&cedarpostv1.Revision{Token: wire.Token{Number: 1, Anchor: 1, Mark: uuid.New()}.Revision().Token}, end.Number, nil, true}, // another database
		} {
			_, m := watch(t, s, c.after)
			slices.Sort(c.tags)
			if m.After != c.from || m.Revision.Number != end.Number || !slices.Equal(m.Tags, c.tags) || m.Reset_ != c.reset {
				t.Errorf("a server that %s, after %v: %v", name, c.after, m)
			}
		}
	}
	// A server that has just started does not know how a bundle was before.
	if _, m := watch(t, fresh, tokenAt(start, 1)); !m.Reset_ || m.Revision.Number != end.Number {
		t.Errorf("beyond a publish: %v", m)
	}
	// A watch from a revision that is not applied yet waits for it.
	w, m := watch(t, fresh, old.MustPut(servertest.DocUser(t, "dan")))
	if m.Reset_ || m.After != end.Number+1 {
		t.Errorf("of the newest: %v", m)
	}
	last := old.MustPut(servertest.DocUser(t, "eve"))
	if tags, reset := w.until(last.Number); reset || len(tags) != 1 || !tags[userTag(t, old, "eve")] {
		t.Errorf("then %v, %v", tags, reset)
	}

	stream, err := old.Authorization.Watch(t.Context(), &cedarpostv1.WatchRequest{After: &cedarpostv1.Revision{Token: "x"}})
	if err == nil {
		_, err = stream.Receive()
	}
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "after: not a revision token")

	// A server that has the events in memory knows what changed in revisions that were swept.
	// Others do not.
	servertest.MustExec(t, servertest.Session(t, old.URL), "update revisions set at = now() - interval '100 days'")
	if _, err := old.DB.Sweep(t.Context(), store.MinHistoryRetention); err != nil {
		t.Fatal(err)
	}
	later := servertest.On(t, old.URL)
	if _, m := watch(t, later, middle); !m.Reset_ {
		t.Errorf("of what is swept: %v", m)
	}
	if _, m := watch(t, fresh, middle); m.Reset_ || !slices.Contains(m.Tags, carl) {
		t.Errorf("of what is swept and remembered: %v", m)
	}
}

// If only the policies of a bundle change, watchers get the tag of the bundle. If anything else
// of it changes, they get a reset.
func TestWatchOfPublishing(t *testing.T) {
	s := docServer(t)
	w, _ := watch(t, s, nil)
	publish := func(name string, want uint64, files ...string) {
		t.Helper()
		res := s.MustApply(name, files...)
		tags, reset := w.until(res.Revision.Number)
		if reset != (want == 0) || !reset && (len(tags) != 1 || !tags[want]) {
			t.Errorf("%s: %v, reset %v, want %v", name, tags, reset, want)
		}
	}
	db := database(t, s)
	doc, guards, other := snapshot.BundleTag(db, "doc"), snapshot.BundleTag(db, "guardrails"), snapshot.BundleTag(db, "other")
	const schema, policies = "schema.cedarschema", "policies.cedar"
	publish("doc", doc, schema, servertest.DocSchema, policies, servertest.DocPolicies+"// more\n@id(\"x\") forbid (principal, action, resource) when { principal == Doc::User::\"x\" };")
	publish("doc", 0, schema, servertest.DocSchema+" ", policies, servertest.DocPolicies)
	publish("doc", 0, schema, servertest.DocSchema+" ", policies, servertest.DocPolicies, "bundle.yaml", "on_forbid_error: skip\n")
	publish("guardrails", 0, schema, "", policies, `@id("a") forbid (principal, action, resource) when { principal == Doc::User::"x" };`)
	publish("guardrails", guards, schema, "", policies, `@id("a") forbid (principal, action, resource) when { principal == Doc::User::"y" };`)
	const otherSchema = `namespace O { entity U; entity R; entity FieldGroup in [FieldGroup]; entity Field in [Field, FieldGroup]; action Do appliesTo { principal: [U], resource: [R] }; }`
	publish("other", 0, schema, otherSchema, policies, `@id("a") permit (principal, action, resource);`)
	publish("other", other, schema, otherSchema, policies, `@id("b") permit (principal, action, resource);`)
	publish("other", 0, schema, otherSchema, policies, `@id("b") permit (principal, action, resource);`,
		"fields.yaml", "O::R:\n  a: []\n")
}

func TestManyWatchers(t *testing.T) {
	var cutOff atomic.Bool
	s := docServer(t, func(c *server.Config) {
		c.Log = slog.New(slog.NewTextHandler(logTo(func(line string) {
			if strings.Contains(line, "calls cut off") {
				cutOff.Store(true)
			}
		}), nil))
	})
	const many = 1000
	watchers := make([]*watcher, many)
	for i := range watchers {
		watchers[i], _ = watch(t, s, nil)
	}
	var last *cedarpostv1.Revision
	for i := range 10 {
		last = s.MustPut(servertest.DocUser(t, fmt.Sprint("u", i)))
	}
	var all sync.WaitGroup
	for _, w := range watchers {
		all.Go(func() {
			for w.last < last.Number {
				m, err := w.in.Receive()
				if err != nil || m.After != w.last || m.Reset_ || len(m.Tags) == 0 {
					t.Errorf("%v, %v after %d", m, err, w.last)
					return
				}
				w.last = m.Revision.Number
			}
		})
	}
	all.Wait()

	// They do not delay the stop of the server, and learn of it.
	s.Stop()
	if cutOff.Load() {
		t.Error("the server had to cut watchers off")
	}
	for _, w := range watchers {
		_, err := w.end()
		servertest.WantCode(t, err, connect.CodeUnavailable, "the server is stopping")
	}
}

// logTo passes each line of a log to a function.
type logTo func(line string)

func (f logTo) Write(p []byte) (int, error) {
	f(string(p))
	return len(p), nil
}

// A watch ends with the API key that it began with, and goes on while another key of its caller ends.
func TestWatchEndsWithTheKey(t *testing.T) {
	s := docServer(t)
	w, _ := watch(t, s, nil)
	revoke := func(which string) {
		servertest.MustExec(t, servertest.Session(t, s.URL), `do $$
			declare k record; num bigint;
			begin
				for k in select id from api_keys where revoked_at is null `+which+` loop
					update revision set n = n + 1 returning n into num;
					insert into revisions (n, caller) values (num, 'test');
					update api_keys set revoked_at = now() where id = k.id;
					insert into revision_entries (revision, kind, type, id) values (num, 'key', '', k.id);
				end loop;
			end $$`)
	}
	servertest.On(t, s.URL) // makes another API key of the caller
	revoke("order by created_at desc limit 1")
	res, err := servertest.Write(t, s, put(servertest.DocUser(t, "ann")))
	if err != nil {
		t.Fatal(err)
	}
	if tags, _ := w.until(res.Revision.Number); !tags[userTag(t, s, "ann")] {
		t.Errorf("told of %v", tags)
	}
	revoke("order by created_at limit 1")
	_, err = w.end()
	servertest.WantCode(t, err, connect.CodeUnauthenticated, "revoked")
}

// A watcher gets the tag of each entity of an import.
func TestWatchOfAnImport(t *testing.T) {
	t.Parallel() // it takes long
	watchImport(t, 11_000)
}

// TestSoakWatchOfAnImport is the long form.
func TestSoakWatchOfAnImport(t *testing.T) {
	servertest.Soak(t)
	watchImport(t, 100_000)
}

func watchImport(t *testing.T, all int) {
	s := docServer(t)
	w, _ := watch(t, s, nil)
	_, first := watch(t, s, nil)
	stream, err := s.Entities.ImportEntities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// A server that applies more than 10,000 changes at once sends a reset. So the test sends
	// entities only when most of those before them have been told.
	const each, most = 1000, 5000
	level := servertest.DocUser(t, "").Attrs
	sent := make(chan error, 1)
	room := make(chan struct{}, most/each)
	go func() {
		for from := 0; from < all; from += each {
			select {
			case room <- struct{}{}:
			case <-t.Context().Done():
				return
			}
			var list []*cedarpostv1.Entity
			for i := from; i < from+each; i++ {
				list = append(list, &cedarpostv1.Entity{Uid: &cedarpostv1.EntityUid{Type: "Doc::User", Id: fmt.Sprint(i)}, Attrs: level})
			}
			if err := stream.Send(&cedarpostv1.ImportEntitiesRequest{Entities: list}); err != nil {
				break
			}
		}
		_, err := stream.CloseAndReceive()
		sent <- err
	}()
	db := database(t, s)
	missing := map[uint64]bool{}
	for i := range all {
		missing[snapshot.EntityTag(db, "Doc::User", fmt.Sprint(i))] = true
	}
	for known := 0; len(missing) > 0; {
		m := w.next()
		if m.Reset_ {
			t.Fatal("a reset")
		}
		for _, tag := range m.Tags {
			if !missing[tag] {
				t.Fatal("told twice, or of nothing")
			}
			delete(missing, tag)
		}
		for ; known <= all-len(missing)-each; known += each {
			<-room
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	// A watcher that resumes from before the import gets a reset.
	if _, m := watch(t, s, first.Revision); !m.Reset_ {
		t.Errorf("told of %d tags", len(m.Tags))
	}
	if _, m := watch(t, servertest.On(t, s.URL), first.Revision); !m.Reset_ {
		t.Errorf("told of %d tags", len(m.Tags))
	}
}
