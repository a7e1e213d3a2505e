// Package server connects the socket to the store: it authenticates, checks, decides with the
// engine, records and answers. Each service of the contract has its family of files. One
// Authorize call goes from edge.go through authorize.go to package decisionlog.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"buf.build/go/protovalidate"
	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/grpcreflect/v2"
	"connectrpc.com/validate"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/recentlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/proto/grpc/health/v1/healthv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// DecisionsOfProcessor is how many decisions are made at once for each processor, by default.
const DecisionsOfProcessor = 128

// Config says how to serve. DB is required; every other zero value works.
type Config struct {
	DB *store.DB
	// Listen is the address of the decision plane, default 127.0.0.1:8080. AdminListen is
	// that of the admin plane, default 127.0.0.1:8081, and OpsListen that of health and
	// metrics, default 127.0.0.1:9090. Port 0 takes a free port.
	Listen, AdminListen, OpsListen string
	// TLSCert and TLSKey are PEM files for the decision and the admin plane. They are read
	// again when they change. Without them only loopback addresses are served, unless
	// AllowPlaintext is set.
	TLSCert, TLSKey string
	AllowPlaintext  bool
	// CORSOrigins are the origins whose pages may call the decision and the admin plane from a
	// browser, such as https://console.example.org; default none.
	CORSOrigins []string
	// NoMetrics and NoHealth switch off parts of the operations plane, and Pprof switches on its
	// profiles, if OpsListen is a loopback address. If all are off, there is no such plane. NoDebug
	// switches off what a support bundle asks for, which is served on a loopback address only.
	NoMetrics, NoHealth, NoDebug, Pprof bool
	// TLSMinVersion is the least version of TLS of the decision and the admin plane, such as
	// [tls.VersionTLS13]; default TLS 1.2.
	TLSMinVersion uint16
	// Clients says which client certificates are accepted on these planes; default none.
	Clients ClientCertificates
	// MaxStaleness is how old policy and data may be before the server refuses to
	// decide, default 5 s.
	MaxStaleness time.Duration
	// CacheBytes is about how many bytes cached entities may take; default 64 MiB, negative
	// for no cache.
	CacheBytes int64
	// NoApprovals lets bundles be published without the approvals that their bundle.yaml asks for. It is
	// for development.
	NoApprovals bool
	// Record says when decisions are answered: auditlog.Strict, the default, after
	// their commit to the log, or auditlog.Buffered, before it.
	Record auditlog.Mode
	// Signing says how checkpoints of the log are signed.
	Signing decisionlog.Signing
	// DecisionRetention is how long a day of the log stays after its end: default 90
	// days, at least [store.DB.MinRetention], negative for ever.
	DecisionRetention time.Duration
	// DecisionTimeout is how long a call of the decision plane may take, default 2 s.
	DecisionTimeout time.Duration
	// Tokens verifies access tokens of callers; nil: callers have API keys and certificates.
	Tokens *access.Tokens
	// RateLimit is how many checks one caller may ask each second, 0 for no limit.
	RateLimit float64
	// MaxDecisions is how many decisions are made at once, default [DecisionsOfProcessor] for each
	// processor. A caller that is alone may make seven eighths of them, and one of several an eighth.
	// Eight checks of a batch count as one.
	MaxDecisions int
	// MaxConnections is how many connections each plane has at once, default 2048, and
	// MaxConnectionsPerAddress how many of them from one address, default half of it. Above
	// that, a new connection gets the place of one that has had no call with an API key.
	MaxConnections, MaxConnectionsPerAddress int
	// RequestBytes is how many bytes of messages the calls of a plane hold at once, default 32
	// MiB, at least 8 MiB. One caller may hold half. A decoded message takes several times its
	// bytes.
	RequestBytes int64
	// MaskKey is the key of the hashes that replace values marked @sensitive in decision
	// records: 32 random bytes, the same on every server of a database. Without it each
	// server makes a key of its own at each start. A live secret is read again every ten
	// seconds, and at [Server.Reload].
	MaskKey secret.Secret
	// HistoryRetention is how long earlier states of entities can be read, and who
	// changed them, if no decision in the log needs them longer: default 90 days, at
	// least [store.MinHistoryRetention], negative for ever.
	HistoryRetention time.Duration
	// MaxReuse is how long callers that watch what changes may keep an answer, default 5
	// minutes, negative for not at all.
	MaxReuse time.Duration
	// DrainDelay is how long a server that stops keeps serving while it is not ready, so that load
	// balancers and clients go elsewhere before its listeners close; default 0.
	DrainDelay time.Duration
	// FirstHousekeeping is how long after its start a server first removes old days of the
	// log and old history, default 5 minutes. It does so again every hour.
	FirstHousekeeping time.Duration
	// SecretFiles are the files that secrets and certificates of this configuration come from.
	// Metrics have their age, and name those that have not changed for MaxSecretAge; 0 for no limit.
	SecretFiles  []SecretFile
	MaxSecretAge time.Duration
	// Start is what the log records about the start of this server.
	Start Start
	// Name is the name of this server in the log, default that of the host. [CheckName] says
	// which names are allowed.
	Name string
	// Log gets the log lines of the server; default slog.Default.
	Log *slog.Logger
	// TracerProvider makes spans of calls, as children of the callers' spans; nil: none.
	TracerProvider trace.TracerProvider
	// Collectors are served on /metrics beside the metrics of the server.
	Collectors []prometheus.Collector

	times       timeouts // zero: defaultTimeouts
	unrecorded  bool     // for the benchmark that measures the cost of recording
	maxWatchers int      // at once; 0: the default
	answerBytes int64    // of each plane; 0: the default
	// shadowNow makes the server look for changes in shadow, and close the channel that it got, for tests.
	shadowNow chan chan struct{}
	leaving   <-chan struct{} // closed when the last part of DrainDelay begins early, for tests
	drained   <-chan struct{} // closed when DrainDelay is over early, for tests
}

func (c *Config) setDefaults() {
	c.Listen = cmp.Or(c.Listen, "127.0.0.1:8080")
	c.AdminListen = cmp.Or(c.AdminListen, "127.0.0.1:8081")
	c.OpsListen = cmp.Or(c.OpsListen, "127.0.0.1:9090")
	c.CacheBytes = cmp.Or(c.CacheBytes, 64<<20)
	c.Record = cmp.Or(c.Record, auditlog.Strict)
	c.MaxStaleness = cmp.Or(c.MaxStaleness, 5*time.Second)
	c.MaxDecisions = cmp.Or(c.MaxDecisions, DecisionsOfProcessor*runtime.GOMAXPROCS(0))
	c.DecisionRetention = cmp.Or(c.DecisionRetention, 90*24*time.Hour)
	c.HistoryRetention = cmp.Or(c.HistoryRetention, 90*24*time.Hour)
	c.DecisionTimeout = cmp.Or(c.DecisionTimeout, 2*time.Second)
	c.MaxReuse = cmp.Or(c.MaxReuse, 5*time.Minute)
	c.Log = slog.New(recentlog.Wrap(cmp.Or(c.Log, slog.Default()).Handler()))
	c.times = cmp.Or(c.times, defaultTimeouts)
	c.answerBytes = cmp.Or(c.answerBytes, answerBytes)
	c.RequestBytes = max(cmp.Or(c.RequestBytes, defaultRequestBytes), minRequestBytes)
	c.MaxConnections = cmp.Or(c.MaxConnections, defaultConnections)
	c.MaxConnectionsPerAddress = cmp.Or(c.MaxConnectionsPerAddress, (c.MaxConnections+1)/2)
	c.FirstHousekeeping = cmp.Or(c.FirstHousekeeping, firstHousekeeping)
	if c.Name == "" {
		c.Name, _ = os.Hostname()
	}
}

const (
	defaultConnections = 2048

	adminTimeout = 20 * time.Second
	drainTimeout = 10 * time.Second
)

// Server serves one database. Make it with [New], run it once with [Server.Run].
type Server struct {
	cfg      Config
	id       uuid.UUID // in the list of live servers
	follower *snapshot.Follower
	gate     *gate
	ready    *readiness
	leaving  chan struct{} // closed shortly before the listeners of a server that stops close
	recorder *decisionlog.Recorder
	signer   *decisionlog.Signer
	// noted records failed authentication, refused bundles and probing.
	noted    *decisionlog.Noted
	policies *policyService
	failures access.Failures
	cert     *certificate // nil: no TLS
	clients  *clientCAs   // nil: no client certificates
	registry *prometheus.Registry
	calls    *callMetrics
	tracing  *tracing // nil: none
	tasks    *taskMetrics
	planes   []*plane
	frequent *sampler // the log for lines that a caller can cause with each call
}

// plane is one listener with its HTTP server.
type plane struct {
	name     string
	listener net.Listener
	http     *http.Server
	bounded  *boundedListener // around listener while the server runs
}

// New loads the current policies and opens the listeners. It returns an error if a port is
// busy, if the configuration is wrong, or if the database cannot be served. An error about an
// address or a file is a [decisionlog.ConfigError], which names the field.
func New(ctx context.Context, cfg Config) (_ *Server, err error) {
	cfg.setDefaults()
	if err := CheckName(cfg.Name); err != nil {
		return nil, err
	}
	if err := CheckOrigins(cfg.CORSOrigins); err != nil {
		return nil, &decisionlog.ConfigError{Field: "CORSOrigins", Err: err}
	}
	if cfg.Pprof && !isLoopback(cfg.OpsListen) {
		return nil, &decisionlog.ConfigError{Field: "Pprof", Err: errPprofExposed}
	}
	if err := checkRetention(ctx, cfg.DB, cfg.DecisionRetention); err != nil {
		return nil, err
	}
	if keep := cfg.HistoryRetention; keep >= 0 && keep < store.MinHistoryRetention {
		return nil, fmt.Errorf("history retention of %v: the decisions of today and yesterday may need %v", keep, store.MinHistoryRetention)
	}
	registry := newRegistry()
	for _, c := range cfg.Collectors {
		if err := registry.Register(c); err != nil {
			return nil, err
		}
	}
	s := &Server{
		cfg: cfg, id: uuid.New(), leaving: make(chan struct{}), registry: registry, calls: newCallMetrics(registry), tasks: newTaskMetrics(registry),
		tracing: newTracing(cfg.TracerProvider), frequent: newSampler(cfg.Log.Handler()),
	}
	if err := cfg.DB.EnsurePartitions(ctx, time.Now()); err != nil {
		return nil, err
	}
	switch n, err := access.GrantToAll(ctx, cfg.DB); {
	case err != nil:
		return nil, err
	case n > 0:
		cfg.Log.Warn("the database has API keys from before there were grants: each of their callers has got all roles", "callers", n)
	}
	event := decisionlog.DatabaseEvents(cfg.Name)
	s.follower = snapshot.NewFollower(snapshot.Config{
		DB: cfg.DB, Log: cfg.Log, MaxStaleness: cfg.MaxStaleness, CacheBytes: uint64(max(cfg.CacheBytes, 0)), Metrics: registry,
		MaxWatchers: cfg.maxWatchers, Caller: callerFrom,
		NotListening: func(err error) { s.tasks.done(taskNotifications, err) },
		Claim: func(ctx context.Context) (uuid.UUID, error) {
			renewed, err := cfg.DB.Claim(ctx, event)
			if err != nil || !renewed.Copied {
				return uuid.Nil, err
			}
			cfg.Log.Warn("the database is a copy of another one, and has got an id of its own: tokens that the other one gave out are refused",
				"before", renewed.Before, "after", renewed.After)
			return renewed.After, nil
		},
	})
	if err := s.follower.Claim(ctx); err != nil {
		return nil, err
	}
	if err := s.follower.CatchUp(ctx); err != nil {
		return nil, err
	}
	s.logRenewed(ctx)
	s.gate = &gate{follower: s.follower, tokens: cfg.Tokens, uses: newKeyUses()}
	s.ready = newReadiness(cfg.DB, s.follower, cfg.Log)
	s.ready.look(ctx)
	defer func() {
		if err != nil {
			s.closeListeners()
		}
	}()
	if cfg.TLSCert != "" || cfg.TLSKey != "" {
		if s.cert, err = newCertificate(cfg.TLSCert, cfg.TLSKey, cfg.Log); err != nil {
			return nil, fmt.Errorf("TLS: %w", err)
		}
		registerCertificate(registry, "server", s.cert.end, &s.cert.reloading)
		s.ready.cert = s.cert
	}
	if s.clients, err = newClientCAs(cfg.Clients, s.cert != nil, cfg.Log); err != nil {
		return nil, err
	} else if s.clients != nil {
		s.gate.certificates = s.clients.certificates
		registerCertificate(registry, "client_ca", s.clients.end, &s.clients.reloading)
		s.ready.clients = s.clients
	}
	s.recorder, err = decisionlog.NewRecorder(decisionlog.Config{
		DB: cfg.DB, Name: cfg.Name, Mode: cfg.Record, Log: cfg.Log, MaskKey: cfg.MaskKey,
		Heard: s.follower.Heard, Metrics: registry, Task: s.tasks.done,
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.recorder.Close()
		}
	}()
	s.ready.recorder = s.recorder
	s.noted = decisionlog.NewNoted(s.recorder)
	registerReady(registry, s.ready)
	registerClock(registry, s.ready.clock)
	registerStandbys(registry, cfg.DB)
	registerSecretFiles(registry, cfg.SecretFiles, cfg.MaxSecretAge, time.Now)
	registerDatabaseCertificate(registry, cfg.DB)
	if s.signer, err = decisionlog.NewSigner(s.recorder, cfg.Signing); err != nil {
		return nil, err
	}
	limits := &access.Limiter{PerSecond: cfg.RateLimit}
	// All processors but one are for costly calls, the last one is for the others.
	shares := access.NewShares(max(runtime.GOMAXPROCS(0)-1, 1))
	registerShares(registry, shares)

	places := access.NewPlaces(cfg.MaxDecisions, cfg.DecisionTimeout/4)
	registerPlaces(registry, places)

	record := s.recorder.Record
	if cfg.unrecorded {
		record = func(context.Context, []store.Decision, []store.Event) error { return nil }
	}
	history := snapshot.NewPast(s.follower)
	watchers := cmp.Or(cfg.maxWatchers, snapshot.DefaultWatchers)
	decision := func(cs *connect.Server) {
		cedarpostv1connect.RegisterAuthorizationServiceHandler(cs, &authorizationService{
			db: cfg.DB, follower: s.follower, gate: s.gate,
			recorder: s.recorder, record: record, limits: limits, places: places, shares: shares, metric: newDecisionMetrics(registry), noted: s.noted,
			watchers: newSharedPlaces[string](watchers, (watchers+1)/2),
			keyWait:  cfg.times.keys, maxReuse: cfg.MaxReuse, heartbeat: cfg.times.heartbeat, stopping: s.ready.stopping,
		})
	}
	admin := func(cs *connect.Server) {
		cedarpostv1connect.RegisterEntityServiceHandler(cs, &entityService{db: cfg.DB, follower: s.follower, past: history, atomic: newSharedPlaces[string](maxAtomicImports, maxAtomicImports/2), recorder: s.recorder})
		s.policies = newPolicyService(cfg.DB, s.gate, s.recorder, s.noted, cfg.times)
		s.policies.impacts = &impacts{past: history, recorder: s.recorder, shares: shares, places: places, stopping: s.ready.stopping, running: make(chan struct{}, maxAnalyses), shadowed: map[string]shadowed{}}
		s.policies.log, s.policies.metric, s.policies.noApprovals = cfg.Log, newPolicyMetrics(registry), cfg.NoApprovals
		cedarpostv1connect.RegisterPolicyServiceHandler(cs, s.policies)
		cedarpostv1connect.RegisterAccessServiceHandler(cs, &accessService{db: cfg.DB, gate: s.gate, recorder: s.recorder})
		audit := newAuditService(cfg.DB, s.recorder, s.ready.stopping)
		audit.signer, audit.past, audit.shares = s.signer, history, shares
		audit.gate = s.gate
		cedarpostv1connect.RegisterAuditServiceHandler(cs, audit)
	}
	for _, p := range []struct {
		name, field, addr string
		handler           http.Handler
		open              bool // serves no secrets, so it needs no TLS
	}{
		{"decision", "Listen", cfg.Listen, s.rpcHandler(decision, limits, cfg.DecisionTimeout, wire.MaxAuthorizeBytes), false},
		{"admin", "AdminListen", cfg.AdminListen, s.rpcHandler(admin, limits, adminTimeout, wire.MaxAdminBytes), false},
		{"ops", "OpsListen", cfg.OpsListen, s.opsHandler(), true},
	} {
		if p.name == "ops" && cfg.NoMetrics && cfg.NoHealth && !cfg.Pprof {
			continue
		}
		if s.cert == nil && !p.open && !cfg.AllowPlaintext {
			if err := checkPlaintext(p.addr); err != nil {
				return nil, &decisionlog.ConfigError{Field: p.field, Err: err}
			}
		}
		if err := s.listen(ctx, p.name, p.addr, p.handler, p.open); err != nil {
			return nil, &decisionlog.ConfigError{Field: p.field, Err: err}
		}
	}
	if err := s.recordStart(ctx); err != nil {
		return nil, err
	}
	// Before it serves, so that it is in the list that it gives out.
	if _, err := s.present(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// logRenewed logs that the database has got a new id, as migrate gives a restored one:
// clients may have tokens that this server refuses.
func (s *Server) logRenewed(ctx context.Context) {
	id := s.follower.Latest().Position.Database
	if s.follower.HasClaimed(id) {
		return // logged already
	}
	rows, err := s.cfg.DB.QueryEvents(ctx, store.EventQuery{Kind: decisionlog.EventKind(cedarpostv1.EventRecord_DATABASE_RENEWED), Limit: 1})
	if err != nil {
		s.cfg.Log.Warn("the log does not say whether the database has got another id", "err", err)
		return
	}
	for _, row := range rows {
		if renewed := decisionlog.ReadEvent(row).GetDatabaseRenewed(); renewed.GetAfter() == id.String() {
			s.cfg.Log.Info("the database was restored or copied, and has got another id: tokens from before are refused",
				"before", renewed.GetBefore(), "after", renewed.GetAfter(), "at", row.At.UTC())
		}
	}
}

// rpcHandler makes the handler of a plane: guard, validation, services, health and
// reflection, in Connect, gRPC and gRPC-Web.
func (s *Server) rpcHandler(register func(*connect.Server), limits *access.Limiter, timeout time.Duration, maxBytes int) http.Handler {
	e := &edge{
		gate: s.gate, limits: limits, log: slog.New(s.frequent), metric: s.calls, tracing: s.tracing, noted: s.noted, failures: &s.failures, timeout: timeout, times: s.cfg.times,
		strangers: waitingRoom{most: maxStrangers}, bodies: newBodies(s.cfg.RequestBytes), answers: newBodies(s.cfg.answerBytes), maxBytes: maxBytes,
	}
	cs := connect.NewServer(e.guard, e.rights, keepLast, validate.NewServerInterceptor(validate.WithoutErrorDetails(), validate.WithValidator(validator{protovalidate.GlobalValidator})))
	register(cs)
	h := newHealth(s.ready)
	healthv1connect.RegisterHealthHandler(cs, h)
	grpcreflect.Register(cs)
	for spec := range cs.Specs() {
		h.services[serviceOf(spec.Procedure)] = true
	}
	mux := http.NewServeMux()
	connecthttp.Mount(mux, cs, wireOptions(maxBytes)...)
	mux.HandleFunc("/", noSuchRoute)
	return withCORS(http.MaxBytesHandler(withRequest(explained(mux), s.cfg.times.discard), maxStreamBytes), s.cfg.CORSOrigins)
}

// serviceOf returns the service of a procedure, "/package.Service/Method".
func serviceOf(procedure string) string {
	service, _, _ := strings.Cut(strings.TrimPrefix(procedure, "/"), "/")
	return service
}

func (s *Server) listen(ctx context.Context, name, addr string, h http.Handler, open bool) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("%s plane: %w", name, err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{
		Handler: lastCalls(h, s.ready.stopping, s.leaving), Protocols: protocols, MaxHeaderBytes: maxHeaderBytes,
		ReadHeaderTimeout: s.cfg.times.header, ReadTimeout: s.cfg.times.read,
		WriteTimeout: s.cfg.times.write, IdleTimeout: s.cfg.times.idle,
		ErrorLog: httpLog(s.frequent), ConnContext: s.connContext,
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: maxStreams, MaxReceiveBufferPerConnection: maxReceiveBuffer, MaxReceiveBufferPerStream: maxReceiveBuffer},
	}
	if s.cert != nil && !open {
		srv.TLSConfig = tlsConfig(s.cert, s.clients, s.cfg.TLSMinVersion)
		srv.Handler = s.clients.handler(srv.Handler)
	}
	bounded := newBoundedListener(l, s.cfg.MaxConnections, s.cfg.MaxConnectionsPerAddress)
	registerConnections(s.registry, name, bounded)
	s.planes = append(s.planes, &plane{name, l, srv, bounded})
	return nil
}

func (s *Server) closeListeners() {
	for _, p := range s.planes {
		_ = p.listener.Close()
	}
}

// Addr returns the address, host and port, of the "decision", "admin" or "ops" plane.
func (s *Server) Addr(plane string) string {
	for _, p := range s.planes {
		if p.name == plane {
			return p.listener.Addr().String()
		}
	}
	return ""
}

// Gatherer returns what /metrics serves.
func (s *Server) Gatherer() prometheus.Gatherer { return s.registry }

// Run serves until ctx ends or a listener fails. It returns nil if ctx ended, and else the error of the
// listener. When ctx ends, the server is not ready any more, and ends all watches. For [Config.DrainDelay]
// it still takes connections and answers calls. Each connection from before gets one more answer, and
// shortly before the end of the delay each connection does. Then the server closes its listeners, lets calls in flight finish, commits what is queued, and gives up its locks of the
// database.
func (s *Server) Run(ctx context.Context) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { s.follower.Run(background) })
	wg.Go(func() { s.ready.run(background) })
	wg.Go(func() { s.signer.Run(background) })
	wg.Go(func() { s.signer.WatchLog(background) })
	if s.cert != nil {
		wg.Go(func() { keepLoading(background, s.cert.reload) })
	}
	if s.clients != nil {
		wg.Go(func() { keepLoading(background, s.clients.reload) })
	}
	wg.Go(func() { s.watchSecrets(background) })
	wg.Go(func() { s.noted.Run(background) })
	wg.Go(func() { s.frequent.run(background) })
	wg.Go(func() { s.keepLog(background) })
	wg.Go(func() { s.sweepHistory(background) })
	wg.Go(func() { s.keepShadows(background) })
	wg.Go(func() { s.storeKeyUses(background) })
	wg.Go(func() { s.keepPresent(background) })

	failed := make(chan error, len(s.planes))
	for _, p := range s.planes {
		p.bounded.Listener = p.listener
		go func() {
			var l net.Listener = strictListener{p.bounded}
			if p.http.TLSConfig != nil {
				l = newTLSListener(p.bounded, p.http.TLSConfig, s.cfg.times.header, p.http.ErrorLog, func(peer string) {
					const reason = "client certificate refused in the TLS handshake"
					s.calls.unauthenticated.WithLabelValues(reason).Inc()
					s.noted.AuthenticationFailure(peer, "", reason)
				})
			}
			err := p.http.Serve(l)
			if !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("%s plane: %w", p.name, err)
			}
		}()
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}

	err = s.leave(context.WithoutCancel(ctx), err, failed)
	stop()
	wg.Wait()
	// Handlers of connections that drain closed may still record. After Close the recorder
	// refuses that.
	s.recorder.Close()
	s.frequent.sum()
	return err
}
