// Package servertest starts a whole Cedarpost for a test: a real database, the real
// server on free ports, and clients that call it over the network. It exists so that
// tests need no mocks and see what a user sees.
package servertest

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/internal/entityuid"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/entityfile"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// Server is a running server with its clients, all of which send its key.
type Server struct {
	t   testing.TB
	DB  *store.DB
	URL string // of the database

	API, Admin, Ops string // base URLs of the planes
	Token           string
	Metrics         prometheus.Gatherer

	Authorization cedarpostv1connect.AuthorizationServiceClient
	Entities      cedarpostv1connect.EntityServiceClient
	Policies      cedarpostv1connect.PolicyServiceClient
	Audit         cedarpostv1connect.AuditServiceClient

	stop func()
}

// Option changes the server's configuration before it starts.
type Option func(*server.Config)

// New starts a server on a database of its own, without any bundle.
func New(t testing.TB, opts ...Option) *Server {
	t.Helper()
	return On(t, storetest.New(t), opts...)
}

// On starts a server on an existing migrated database. It stops with the test.
func On(t testing.TB, databaseURL string, opts ...Option) *Server {
	t.Helper()
	ctx := context.Background()
	db, err := store.Open(ctx, store.Config{DatabaseURL: secret.New(databaseURL), Server: "test", Event: decisionlog.ChangeEvents("test")})
	if err != nil {
		t.Fatal(err)
	}
	keyFile := filepath.Join(t.TempDir(), "key")
	if _, err := access.BootstrapKey(ctx, db, keyFile, true); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	cfg := server.Config{
		DB: db, Name: "test", Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: "127.0.0.1:0",
		MaskKey: secret.New(strings.Repeat("k", 32)),
		// On a busy machine a decision takes longer than the 2 s that a caller would wait, and a
		// server can hear nothing of its database for longer than the 5 s of a real one.
		DecisionTimeout: 10 * time.Second,
		MaxStaleness:    30 * time.Second,
		Log:             slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	for _, o := range opts {
		o(&cfg)
	}
	srv, err := server.New(ctx, cfg)
	// On a busy machine the start may take longer than usual.
	for range 10 {
		if !errors.Is(err, context.DeadlineExceeded) {
			break
		}
		srv, err = server.New(ctx, cfg)
	}
	if err != nil {
		t.Fatal(err)
	}
	running, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- srv.Run(running) }()
	s := &Server{
		t: t, DB: db, Metrics: srv.Gatherer(), URL: databaseURL, Token: strings.TrimSpace(string(key)),
		API: "http://" + srv.Addr("decision"), Admin: "http://" + srv.Addr("admin"), Ops: "http://" + srv.Addr("ops"),
	}
	var once sync.Once
	s.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("server stopped with %v", err)
			}
			db.Close()
		})
	}
	t.Cleanup(s.stop)
	s.UseKey(s.Token)
	return s
}

// UseKey makes the clients send another key.
func (s *Server) UseKey(token string) {
	s.Token = token
	s.Authorization = cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, token))
	admin := s.Client(s.Admin, token)
	s.Entities = cedarpostv1connect.NewEntityServiceClient(admin)
	s.Policies = cedarpostv1connect.NewPolicyServiceClient(admin)
	s.Audit = cedarpostv1connect.NewAuditServiceClient(admin)
}

// Stop stops the server cleanly before the test ends.
func (s *Server) Stop() { s.stop() }

// Client returns a Connect client for a plane with a key; options choose the
// protocol.
func (s *Server) Client(url, token string, opts ...connecthttp.Option) *connect.Client {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	s.t.Cleanup(transport.CloseIdleConnections)
	return connect.NewClient(
		connecthttp.NewTransport(&http.Client{Transport: transport, Timeout: 10 * time.Minute}, url, opts...),
		func(next connect.ClientFunc) connect.ClientFunc {
			return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
				if info, ok := connect.CallInfoForClientContext(ctx); ok && token != "" {
					info.RequestHeader().Set("Authorization", "Bearer "+token)
				}
				return next(ctx, spec)
			}
		})
}

// Apply uploads a bundle's files and returns the answer. Callers may break: tests put other bundles in place.
func (s *Server) Apply(name string, files []bundle.File) (*cedarpostv1.ApplyBundleResponse, error) {
	stream, err := s.Policies.ApplyBundle(context.Background())
	if err != nil {
		return nil, err
	}
	send := func(m *cedarpostv1.ApplyBundleRequest) {
		// If the server refuses in mid-stream, the error is that of the answer.
		_ = stream.Send(m)
	}
	send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_Header{Header: &cedarpostv1.BundleHeader{Name: name, AllowBreaking: true}}})
	for _, f := range files {
		rest := f.Content
		for first := true; first || len(rest) > 0; first = false {
			part := rest[:min(len(rest), 1<<20)]
			rest = rest[len(part):]
			send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_File{File: &cedarpostv1.FilePart{Path: f.Path, Data: part}}})
		}
	}
	return stream.CloseAndReceive()
}

// MustApply uploads a bundle given as alternating paths and contents.
func (s *Server) MustApply(name string, pathsAndContents ...string) *cedarpostv1.ApplyBundleResponse {
	s.t.Helper()
	res, err := s.Apply(name, Files(pathsAndContents...))
	if err != nil {
		s.t.Fatal(err)
	}
	return res
}

// Files makes the files of a bundle from alternating paths and contents.
func Files(pathsAndContents ...string) []bundle.File {
	var out []bundle.File
	for i := 0; i+1 < len(pathsAndContents); i += 2 {
		out = append(out, bundle.File{Path: pathsAndContents[i], Content: []byte(pathsAndContents[i+1])})
	}
	return out
}

// MustLoadShop publishes the example bundle and imports its entities.
func (s *Server) MustLoadShop() {
	s.t.Helper()
	loaded, err := shop()
	if err == nil {
		_, err = s.Apply("shop", loaded.files)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.MustPut(loaded.entities...)
}

// shopData is the example bundle. Nobody may change it.
type shopData struct {
	files    []bundle.File
	entities []*cedarpostv1.Entity
}

// shop reads the example bundle once: with the race detector that takes a tenth of a second.
var shop = sync.OnceValues(func() (loaded shopData, err error) {
	b, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		return loaded, err
	}
	loaded.files = b.Files
	i := slices.IndexFunc(b.Files, func(f bundle.File) bool { return f.Path == bundle.EntitiesName })
	loaded.entities, err = entityfile.Parse(b.Files[i].Content)
	return loaded, err
})

// ShopFiles returns the files of the example bundle.
func ShopFiles(t testing.TB) []bundle.File {
	t.Helper()
	b, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	return b.Files
}

// MustPut stores entities.
func (s *Server) MustPut(list ...*cedarpostv1.Entity) *cedarpostv1.Revision {
	s.t.Helper()
	var ops []*cedarpostv1.EntityOperation
	for _, e := range list {
		ops = append(ops, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: e}})
	}
	res, err := s.Entities.WriteEntities(context.Background(), &cedarpostv1.WriteEntitiesRequest{Operations: ops})
	if err != nil {
		s.t.Fatal(err)
	}
	return res.Revision
}

// UID reads Cedar text, Shop::User::"bob".
func UID(text string) *cedarpostv1.EntityUid {
	typ, id, err := entityuid.Parse(text)
	if err != nil {
		panic(err)
	}
	return &cedarpostv1.EntityUid{Type: typ, Id: id}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	// The server may log while the test ends; t.Log would panic then.
	if w.t.Context().Err() == nil {
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}
