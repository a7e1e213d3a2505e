package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/cedarpost/cedarpost/migrations"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// fleet is two servers on one database, behind a balancer, under load.
type fleet struct {
	t        *testing.T
	database string
	shell    *shell
	key      string
	places   [2]place
	decision *balancer
	admin    *balancer

	ended   chan struct{}
	running sync.WaitGroup
	callers []*loadCaller
	writes  loadCaller
	clients []*cedarpost.Client
	lines   *syncBuffer // of the log of clients
	fresh   atomic.Pointer[freshness]
	writing atomic.Int64 // odd while a write is under way

	mu       sync.Mutex
	answered map[string]bool
	replaced int
}

// place is where one of the servers runs. Its addresses stay the same.
type place struct {
	args   []string
	listen string
	daemon *daemon
}

// loadCaller asks again and again, and counts.
type loadCaller struct {
	name                 string
	calls, failed, stale atomic.Int64
	ask                  func(context.Context, *freshness) (id string, allowed bool, revision int64, err error)
}

// freshness is the newest write: who may do what since then.
type freshness struct {
	token    string
	revision int64
	allowed  bool // whether dave may see the order
}

// unknownRevision is the revision of an answer of the SDK, which does not say its number.
const unknownRevision = -1

// pace is the time between two calls of one worker. It leaves time to the servers on a small machine.
const pace = 2 * time.Millisecond

// newFleet starts two servers of a binary on a database that is migrated. load starts the load.
func newFleet(t *testing.T, databaseURL string, sh *shell) *fleet {
	t.Helper()
	dir := t.TempDir()
	f := &fleet{t: t, database: databaseURL, ended: make(chan struct{}), answered: map[string]bool{}, lines: &syncBuffer{}}
	keyFile, auditKey := filepath.Join(dir, "key"), filepath.Join(dir, "audit.key")
	sh.exits(t, 0, nil, "audit", "keygen", "--name=audit.example.org/upgrade", auditKey)
	f.shell = sh.with(databaseURLEnv+"="+databaseURL, "CEDARPOST_TOKEN_FILE="+keyFile, "CEDARPOST_DRAIN_DELAY=3s")
	for i := range f.places {
		listen := freePort(t)
		f.places[i] = place{listen: "http://" + listen, args: []string{
			"serve", "--development-database", "--bootstrap-key-file", keyFile, fmt.Sprint("--name=server-", i),
			"--audit-key-file", auditKey, "--audit-checkpoint-file", filepath.Join(dir, fmt.Sprint("checkpoints-", i)),
			"--listen", listen, "--admin-listen", freePort(t), "--ops-listen", freePort(t),
			// A machine that is busy with other tests answers late.
			"--max-staleness=30s",
		}}
		f.places[i].daemon = f.shell.start(t, f.places[i].args...)
	}
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	f.key = strings.TrimSpace(string(key))
	f.decision = newBalancer(t, "decision", f.places[0].daemon, f.places[1].daemon)
	f.admin = newBalancer(t, "admin", f.places[0].daemon, f.places[1].daemon)
	// One after the other at one server: the other one may not have applied the schema yet.
	admin := f.shell.with("CEDARPOST_ADMIN_URL=" + f.places[0].daemon.url("admin"))
	admin.exits(t, 0, nil, "apply", "../../policies/shop")
	admin.exits(t, 0, nil, "entities", "import", "../../policies/shop/entities.json")
	return f
}

// client returns a client without retries for a plane behind a balancer. Like every client of gRPC,
// net/http sends a call again that the server says it has not begun.
func (f *fleet) client(url string, opts ...connecthttp.Option) *connect.Client {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	f.t.Cleanup(transport.CloseIdleConnections)
	return f.plain(&http.Client{Transport: transport}, url, opts...)
}

// plain returns a client that sends the key.
func (f *fleet) plain(h *http.Client, url string, opts ...connecthttp.Option) *connect.Client {
	return connect.NewClient(connecthttp.NewTransport(h, url, opts...), func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			if info, ok := connect.CallInfoForClientContext(ctx); ok {
				info.RequestHeader().Set("Authorization", "Bearer "+f.key)
			}
			return next(ctx, spec)
		}
	})
}

// load starts the callers: the SDK with both servers and through the balancer, gRPC through the
// balancer, and one that writes through the balancer.
func (f *fleet) load() {
	f.callers = append(f.callers,
		&loadCaller{name: "SDK with two servers", ask: f.sdk(0, f.places[0].listen, f.places[1].listen)},
		&loadCaller{name: "SDK behind the balancer", ask: f.sdk(-1, f.decision.url())},
		&loadCaller{name: "gRPC behind the balancer", ask: f.grpc()},
	)
	writer := cedarpostv1connect.NewEntityServiceClient(f.client(f.admin.url(), connecthttp.WithGRPC()))
	f.writes.name = "writes behind the balancer"
	eventually(f.t, "the server of the writer has applied the schema", func() bool { return f.write(writer, true) == nil })
	for _, c := range f.callers {
		for range 3 {
			f.running.Go(func() {
				for !f.over() {
					f.askOne(c)
					time.Sleep(pace)
				}
			})
		}
	}
	f.running.Go(func() {
		for n := 0; !f.over(); n++ {
			f.writes.calls.Add(1)
			if err := f.write(writer, n%2 == 1); err != nil {
				f.fails(&f.writes, err)
			}
			time.Sleep(20 * time.Millisecond) // or the load would be writes only
		}
	})
}

func (f *fleet) over() bool {
	select {
	case <-f.ended:
		return true
	default:
		return false
	}
}

// askOne makes one call, and checks that its answer knows of the newest write from before the call.
func (f *fleet) askOne(c *loadCaller) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	began, before := f.writing.Load(), f.fresh.Load()
	id, allowed, revision, err := c.ask(ctx, before)
	c.calls.Add(1)
	if err != nil {
		f.fails(c, err)
		return
	}
	quiet := began%2 == 0 && f.writing.Load() == began // nobody wrote during the call
	if revision != unknownRevision && revision < before.revision || quiet && allowed != before.allowed {
		c.stale.Add(1)
		f.t.Errorf("%s: allowed %v at revision %d, after %v at %d", c.name, allowed, revision, before.allowed, before.revision)
	}
	f.mu.Lock()
	f.answered[id] = true
	f.mu.Unlock()
}

func (f *fleet) fails(c *loadCaller, err error) {
	if n := c.failed.Add(1); n <= 5 {
		f.t.Errorf("%s: call %d: %v", c.name, c.calls.Load(), err)
	}
}

// sdk returns questions by the client of the SDK, with its cache or without one.
func (f *fleet) sdk(cacheBytes int64, servers ...string) func(context.Context, *freshness) (string, bool, int64, error) {
	client, err := cedarpost.New(cedarpost.Config{Servers: servers, Token: f.key, Timeout: time.Minute, MaxStaleness: 30 * time.Second, CacheBytes: cacheBytes,
		Log: slog.New(slog.NewTextHandler(f.lines, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		f.t.Fatal(err)
	}
	f.clients = append(f.clients, client)
	return func(ctx context.Context, fresh *freshness) (string, bool, int64, error) {
		r, err := client.Authorize(ctx, cedarpost.Check{
			Principal: cedarpost.UID("Shop::User", "dave"), Action: cedarpost.UID("Shop::Action", "ViewOrder"), Resource: cedarpost.UID("Shop::Order", "42"),
			Context: map[string]any{"mfa": true}, AtLeastAsFresh: fresh.token,
		})
		if err != nil {
			return "", false, 0, err
		}
		return r.DecisionID(), r.Allowed(), unknownRevision, nil
	}
}

// grpc returns questions by a client of gRPC.
func (f *fleet) grpc() func(context.Context, *freshness) (string, bool, int64, error) {
	return f.questions(cedarpostv1connect.NewAuthorizationServiceClient(f.client(f.decision.url(), connecthttp.WithGRPC())))
}

// questions returns questions by a client without retries.
func (f *fleet) questions(client cedarpostv1connect.AuthorizationServiceClient) func(context.Context, *freshness) (string, bool, int64, error) {
	return func(ctx context.Context, fresh *freshness) (string, bool, int64, error) {
		req := servertest.AskShop("dave", "ViewOrder", "42", true)
		req.Consistency = &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: &cedarpostv1.Revision{Token: fresh.token}}}
		r, err := client.Authorize(ctx, req)
		return r.GetDecisionId(), r.GetDecision() == cedarpostv1.Decision_ALLOW, r.GetRevision().GetNumber(), err
	}
}

// http1 returns questions over HTTP/1.1, by a client that never sends a call again. A server that stops
// has no way to refuse a call on such a connection that it closes while the call arrives.
func (f *fleet) http1() func(context.Context, *freshness) (string, bool, int64, error) {
	f.t.Helper()
	transport := &http.Transport{MaxIdleConnsPerHost: 8}
	f.t.Cleanup(transport.CloseIdleConnections)
	return f.questions(cedarpostv1connect.NewAuthorizationServiceClient(f.plain(&http.Client{Transport: transport}, f.decision.url())))
}

// write gives dave the role of a manager, or takes it away.
func (f *fleet) write(client cedarpostv1connect.EntityServiceClient, allowed bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	parents := "[]"
	if allowed {
		parents = `[{"type":"Shop::Role","id":"manager"}]`
	}
	dave := servertest.Entity(f.t, `{"uid":{"type":"Shop::User","id":"dave"},"attrs":{"region":"eu","suspended":false},"parents":`+parents+`}`)
	f.writing.Add(1)
	defer f.writing.Add(1)
	r, err := client.WriteEntities(ctx, &cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{{Operation: &cedarpostv1.EntityOperation_Put{Put: dave}}}})
	if err == nil {
		f.fresh.Store(&freshness{token: r.GetRevision().GetToken(), revision: r.GetRevision().GetNumber(), allowed: allowed})
	}
	return err
}

// goesOn waits until each caller has had so many more calls.
func (f *fleet) goesOn(calls int64) {
	f.t.Helper()
	for _, c := range append(slices.Clone(f.callers), &f.writes) {
		more := calls
		if c == &f.writes {
			more = 3
		}
		want := c.calls.Load() + more
		eventually(f.t, c.name+" goes on", func() bool { return c.calls.Load() >= want })
	}
}

// replace stops a server, and starts one of the same or of another binary in its place.
func (f *fleet) replace(i int, sh *shell) {
	f.t.Helper()
	p := &f.places[i]
	if code := p.daemon.stop(f.t, syscall.SIGTERM); code != 0 {
		f.t.Errorf("exit code %d\n%s", code, p.daemon.errs)
	}
	if text := p.daemon.errs.String(); strings.Contains(text, "calls cut off") {
		f.t.Errorf("a call was cut off:\n%s", text)
	}
	p.daemon = sh.start(f.t, p.args...)
	f.replaced++
	f.decision.use(i, p.daemon)
	f.admin.use(i, p.daemon)
	f.goesOn(50)
}

// finish ends the load, prints the counts, and looks at the log.
func (f *fleet) finish() {
	f.t.Helper()
	close(f.ended)
	f.running.Wait()
	for _, c := range append(slices.Clone(f.callers), &f.writes) {
		f.t.Logf("%-28s %7d calls, %d failed, %d stale", c.name, c.calls.Load(), c.failed.Load(), c.stale.Load())
		if c.failed.Load() > 0 {
			f.t.Errorf("%s: %d of %d calls failed", c.name, c.failed.Load(), c.calls.Load())
		}
	}
	for _, c := range f.clients {
		if err := c.Close(context.Background()); err != nil {
			f.t.Error(err)
		}
	}
	// Each watch breaks once, and the next one is at the other server.
	broken := strings.Count(f.lines.String(), "the watch of changes broke")
	f.t.Logf("%d replacements, %d watches broken", f.replaced, broken)
	if broken > 10*f.replaced {
		f.t.Errorf("%d watches broke:\n%s", broken, f.lines)
	}
	for i := range f.places {
		for line := range strings.Lines(f.places[i].daemon.errs.String()) {
			if strings.Contains(line, "level=ERROR") {
				f.t.Errorf("server %d: %s", i, line)
			}
		}
	}
	recorded := servertest.DecisionIDs(f.t, f.database)
	missing := 0
	for id := range f.answered {
		if !recorded[id] {
			missing++
		}
	}
	f.t.Logf("%d answers of decisions, %d decisions in the log, %d missing", len(f.answered), len(recorded), missing)
	if missing > 0 || len(recorded) != len(f.answered) {
		f.t.Errorf("the log has %d decisions, %d were answered, %d of these are missing", len(recorded), len(f.answered), missing)
	}
	var gap float64
	if err := servertest.Session(f.t, f.database).QueryRow(f.t.Context(), `
		select extract(epoch from max(d))::float8 from (select at - lag(at) over (order by at) as d from checkpoints) as gaps`).Scan(&gap); err != nil {
		f.t.Fatal(err)
	}
	f.t.Logf("longest time between two checkpoints: %.1f s", gap)
	r := newShell(databaseURLEnv+"="+f.database).run(f.t, "audit", "verify")
	f.t.Logf("audit verify: %s%s", r.out, r.err)
	if r.code != 0 {
		f.t.Errorf("audit verify: exit code %d", r.code)
	}
}

// Two servers are replaced one after the other, twice, while callers ask and write without a pause: no call
// fails, no answer is older than the write before it, and the log has each answer.
func TestRollingReplacement(t *testing.T) {
	pg := storetest.NewServer(t)
	sh := newShell()
	sh.with(databaseURLEnv+"="+pg.URL()).exits(t, 0, nil, "migrate")
	f := newFleet(t, pg.URL(), sh)
	f.callers = append(f.callers, &loadCaller{name: "HTTP/1.1 behind the balancer", ask: f.http1()})
	f.load()
	f.goesOn(50)
	for range 2 {
		for i := range f.places {
			f.replace(i, f.shell)
		}
	}
	f.finish()
}

// The previous release's servers go on while this release migrates the database, step by step; they are
// replaced by servers of this release, and these by the previous ones again. make upgrade builds the
// previous release and runs this.
func TestUpgradeFromPreviousRelease(t *testing.T) {
	old := os.Getenv("CEDARPOST_PREVIOUS_BINARY")
	if old == "" {
		t.Skip("needs the binary of the previous release: make upgrade")
	}
	pg := storetest.NewServer(t)
	sh := newShell().of(old)
	sh.with(databaseURLEnv+"="+pg.URL()).exits(t, 0, nil, "migrate")
	f := newFleet(t, pg.URL(), sh)
	// No HTTP/1.1: the previous release has no --drain-delay.
	f.load()
	oldShell, thisShell := f.shell, f.shell.of(binary)
	f.goesOn(50)
	for n, step := range stepsOf(t, pg.URL()) {
		t.Logf("migration %s, while servers of the previous release run", step.name)
		step.apply()
		f.goesOn(50)
		publish(t, oldShell.with("CEDARPOST_ADMIN_URL="+f.admin.url()), n)
		f.replace(n%2, oldShell) // it also starts on this schema
	}
	thisShell.exits(t, 0, nil, "migrate") // compares the schema
	for _, to := range []struct {
		name string
		*shell
	}{{"this release", thisShell}, {"the previous release", oldShell}} {
		for i := range f.places {
			t.Logf("server %d becomes one of %s", i, to.name)
			f.replace(i, to.shell)
			publish(t, to.with("CEDARPOST_ADMIN_URL="+f.admin.url()), 100+i)
		}
	}
	f.finish()
}

// publish publishes the example bundle with a policy that never applies.
func publish(t *testing.T, sh *shell, n int) {
	t.Helper()
	dir := shopCopy(t, map[string]string{"view.cedar": fmt.Sprintf("\n@id(\"step-%d\")\nforbid (principal == Shop::User::\"nobody-%d\", action == Shop::Action::\"ViewOrder\", resource);\n", n, n)})
	sh.exits(t, 0, says("published"), "apply", dir)
}

// step is a migration that the database lacks.
type step struct {
	name  string
	apply func()
}

// stepsOf lists the migrations that a database lacks, in their order.
func stepsOf(t *testing.T, databaseURL string) (steps []step) {
	t.Helper()
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	config.RuntimeParams["role"] = "cedarpost_owner"
	pool := stdlib.OpenDB(*config)
	t.Cleanup(func() { _ = pool.Close() })
	provider, err := goose.NewProvider(goose.DialectPostgres, pool, migrations.FS, goose.WithDisableGlobalRegistry(true))
	if err != nil {
		t.Fatal(err)
	}
	all, err := provider.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.State == goose.StatePending {
			steps = append(steps, step{filepath.Base(m.Source.Path), func() {
				if _, err := provider.UpTo(t.Context(), m.Source.Version); err != nil {
					t.Fatal(err)
				}
			}})
		}
	}
	if len(steps) == 0 {
		t.Fatal("the previous release has the same migrations: change scripts/previous-release")
	}
	return steps
}
