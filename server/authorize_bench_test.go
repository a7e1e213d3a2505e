package server

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
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
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// BenchmarkAuthorize measures a decision in process with a warm cache, record committed: alice
// asks for all fields of order 42.
func BenchmarkAuthorize(b *testing.B) {
	s := shopService(b)
	req := benchRequest()
	ctx := decisionlog.WithCall(b.Context(), decisionlog.Call{Caller: "bench"})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Authorize(ctx, req); err != nil {
			b.Fatal(err)
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
func shopService(b testing.TB) *authorizationService {
	b.Helper()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	ctx := b.Context()
	db := storetest.Open(b)
	shop, err := bundle.Read(policies.Shop(), "shop")
	must(err)
	_, set := offline.Check(shop, nil, nil)
	p, err := stored.Publication(shop, set)
	must(err)
	made, err := db.PublishBundle(ctx, p)
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
	srv, err := New(ctx, Config{DB: db, Name: "bench", MaxStaleness: 1 << 60 /* nobody follows here */, MaskKey: secret.New(strings.Repeat("k", decisionlog.MaskKeyBytes)), Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: "127.0.0.1:0"})
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
