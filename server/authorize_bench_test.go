package server

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/entityfile"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/telemetry"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// BenchmarkAuthorize measures a decision in process with a warm cache, record committed: alice
// asks for all fields of order 42.
func BenchmarkAuthorize(b *testing.B) { benchAuthorize(b, nil) }

// BenchmarkAuthorizeUnsampled is the same with traces on, of a call that is not sampled.
func BenchmarkAuthorizeUnsampled(b *testing.B) { benchAuthorize(b, unsampled(b)) }

// BenchmarkTracing measures what traces add to a call that is not sampled.
func BenchmarkTracing(b *testing.B) {
	tracing, header, spec := newTracing(unsampled(b)), http.Header{}, authorizeSpec()
	b.ReportAllocs()
	for b.Loop() {
		parent, _ := tracing.parent(b.Context(), header)
		_, span := tracing.begin(b.Context(), parent, header, spec, time.Now(), "bench")
		endCall(span, header, nil)
	}
}

// unsampled returns a provider that makes spans of no call.
func unsampled(b testing.TB) trace.TracerProvider {
	b.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1") // nobody is there, and nothing is sent
	b.Setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
	b.Setenv("OTEL_TRACES_SAMPLER_ARG", "0")
	tel, err := telemetry.Open(b.Context(), telemetry.Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(tel.Close)
	return tel.Tracing()
}

func benchAuthorize(b *testing.B, p trace.TracerProvider) {
	s := shopServiceTraced(b, p)
	req := benchRequest()
	ctx := decisionlog.WithCall(b.Context(), decisionlog.Call{Caller: "bench"})
	tracing, header, spec := newTracing(p), http.Header{}, authorizeSpec()
	b.ReportAllocs()
	began := cpuTime(b)
	for b.Loop() {
		parent, _ := tracing.parent(ctx, header)
		traced, span := tracing.begin(ctx, parent, header, spec, time.Now(), "bench")
		_, err := s.Authorize(traced, req)
		if err != nil {
			b.Fatal(err)
		}
		endCall(span, header, err)
	}
	b.ReportMetric(float64(cpuTime(b)-began)/float64(b.N), "cpu-ns/op")
}

// cpuTime returns the time that this process has run on processors.
func cpuTime(b *testing.B) time.Duration {
	var use syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &use); err != nil {
		b.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}

// authorizeSpec is what the edge knows about a call of Authorize.
func authorizeSpec() connect.Spec {
	return connect.Spec{
		Procedure: cedarpostv1connect.AuthorizationServiceAuthorizeProcedure,
		Schema:    cedarpostv1.File_cedarpost_v1_authorization_proto.Services().ByName("AuthorizationService").Methods().ByName("Authorize"),
	}
}

// A call that is not sampled costs three small allocations, with the headers of a trace, too.
func TestUnsampledCallsCostLittle(t *testing.T) {
	on, spec := newTracing(unsampled(t)), authorizeSpec()
	for name, c := range map[string]struct {
		tracing *tracing
		header  http.Header
		most    float64
	}{
		"traces off":                       {nil, http.Header{}, 0},
		"traces on":                        {on, http.Header{}, 3},
		"of a caller that does not sample": {on, http.Header{"Traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}}, 5}, // two for the caller's ids
	} {
		n := testing.AllocsPerRun(100, func() {
			parent, id := c.tracing.parent(t.Context(), c.header)
			ctx, span := c.tracing.begin(t.Context(), parent, c.header, spec, time.Now(), "bench")
			if span != nil || ctx != t.Context() || id.IsValid() != (len(c.header) > 0) {
				t.Fatal("sampled")
			}
		})
		if n > c.most {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func benchRequest() *cedarpostv1.AuthorizeRequest {
	uid := func(typ, id string) *cedarpostv1.EntityUid { return &cedarpostv1.EntityUid{Type: typ, Id: id} }
	return &cedarpostv1.AuthorizeRequest{
		Principal: uid("Shop::User", "alice"), Action: uid("Shop::Action", "ViewOrder"), Resource: uid("Shop::Order", "42"),
		Context:   &structpb.Struct{Fields: map[string]*structpb.Value{"mfa": structpb.NewBoolValue(true)}},
		Fields:    &cedarpostv1.FieldSelection{All: true},
		RequestId: "req-1",
	}
}

// shopService returns the decision service on a database of its own, with the shop.
func shopService(b testing.TB) *authorizationService { return shopServiceTraced(b, nil) }

// shopServiceTraced is the same, with spans of a provider; nil: none.
func shopServiceTraced(b testing.TB, p trace.TracerProvider) *authorizationService {
	b.Helper()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	ctx := b.Context()
	db, err := store.Open(ctx, store.Config{DatabaseURL: secret.New(storetest.New(b)), MaxConns: 8, Event: storetest.Event, TracerProvider: p})
	must(err)
	b.Cleanup(db.Close)
	shop, err := bundle.Read(policies.Shop(), "shop")
	must(err)
	_, set := offline.Check(shop, nil, nil)
	published, err := stored.Publication(shop, set)
	must(err)
	made, err := db.PublishBundle(ctx, published)
	must(err)
	list, err := entityfile.Parse(shop.Entities)
	must(err)
	w := store.EntityWrite{Caller: "bench", PolicyRevision: made.Revision}
	for _, e := range list {
		checked, err := set.ReadEntity(wire.Entity(e))
		must(err)
		row, err := stored.Entity(checked)
		must(err)
		w.Ops = append(w.Ops, store.Op{Kind: store.Put, Entity: row})
	}
	_, err = db.WriteEntities(ctx, w)
	must(err)
	srv, err := New(ctx, Config{DB: db, TracerProvider: p, Name: "bench", MaxStaleness: 1 << 60 /* nobody follows here */, MaskKey: secret.New(strings.Repeat("k", decisionlog.MaskKeyBytes)), Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: "127.0.0.1:0"})
	must(err)
	b.Cleanup(func() {
		srv.closeListeners()
		srv.recorder.Close()
	})
	return &authorizationService{
		db: db, follower: srv.follower,
		recorder: srv.recorder, record: srv.recorder.Record, limits: &access.Limiter{}, places: access.NewPlaces(1, 0), shares: access.NewShares(1), metric: newDecisionMetrics(prometheus.NewRegistry()), noted: srv.noted,
	}
}

// What the edge does for one question before its message is checked: it authenticates the caller,
// makes its rights, and looks them up twice.
func BenchmarkGate(b *testing.B) {
	service := shopService(b)
	key, text := access.NewKey("orders", nil)
	_, err := service.db.ChangeAccess(b.Context(), "bench", func(context.Context, store.Access) (store.AccessChange, error) {
		return store.AccessChange{Put: access.AllGrants("orders", "bench"), Add: []store.Key{key}}, nil
	})
	if err == nil {
		err = service.follower.CatchUp(b.Context())
	}
	if err != nil {
		b.Fatal(err)
	}
	g := &gate{follower: service.follower, uses: newKeyUses()}
	header := http.Header{"Authorization": {"Bearer " + text}}
	ask := &cedarpostv1.AuthorizeRequest{Action: &cedarpostv1.EntityUid{Type: "Shop::Action", Id: "ViewOrder"}}
	procedure := cedarpostv1connect.AuthorizationServiceAuthorizeProcedure
	b.ReportAllocs()
	for b.Loop() {
		_, r, err := g.authenticate(b.Context(), header, nil)
		if err == nil {
			err = mayBegin(r, procedure)
		}
		if err != nil {
			b.Fatal(err)
		}
		for _, n := range rules[procedure].needs(service.follower.Latest().Set, ask) {
			if err := check(r, procedure, n); err != nil {
				b.Fatal(err)
			}
		}
	}
}
