package cedarposttest

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/server/wire"
)

// twins are a real server, over the network and with a database, and the service of this
// package.
type twins struct {
	server *servertest.Server
	served cedarpostv1connect.AuthorizationServiceClient
	svc    *Service
	kit    cedarpostv1connect.AuthorizationServiceClient
}

func newTwins(t *testing.T) *twins {
	t.Helper()
	s := servertest.New(t)
	s.MustLoadShop()
	svc := NewFS(t, policies.Shop())
	return &twins{s, s.Authorization, svc, cedarpostv1connect.NewAuthorizationServiceClient(connect.NewClient(svc.transport))}
}

type tester interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// sameError fails the test unless both calls returned the same error or none. ok says
// that neither returned one.
func sameError(t tester, what any, served, kit error) (ok bool) {
	t.Helper()
	text := func(err error) string {
		if err == nil {
			return "no error"
		}
		return err.Error()
	}
	if text(served) != text(kit) || connect.CodeOf(served) != connect.CodeOf(kit) {
		t.Errorf("%.1000v\n real: %s\n  kit: %s", what, text(served), text(kit))
	}
	return served == nil && kit == nil
}

// bare removes from an answer what differs between any two services. Of a cache hint it
// keeps the age alone, since the tags of the kit are coarser.
func bare(r *cedarpostv1.AuthorizeResponse) *cedarpostv1.AuthorizeResponse {
	if r == nil {
		return nil
	}
	r.DecisionId, r.Revision = "", nil
	if r.CacheHint != nil {
		r.CacheHint = &cedarpostv1.CacheHint{MaxAge: r.CacheHint.MaxAge}
	}
	return r
}

func same(t tester, what any, served, kit *cedarpostv1.AuthorizeResponse) {
	t.Helper()
	if !proto.Equal(bare(served), bare(kit)) {
		t.Errorf("%v\n real: %v\n  kit: %v", what, served, kit)
	}
}

// ask sends one question to both and compares the answers.
func (w *twins) ask(t tester, req *cedarpostv1.AuthorizeRequest) {
	t.Helper()
	served, servedErr := w.served.Authorize(context.Background(), req)
	kit, kitErr := w.kit.Authorize(context.Background(), req)
	if sameError(t, req, servedErr, kitErr) {
		same(t, req, served, kit)
	}
}

func (w *twins) askBatch(t tester, checks []*cedarpostv1.AuthorizeRequest) {
	t.Helper()
	req := &cedarpostv1.AuthorizeBatchRequest{Checks: checks}
	served, servedErr := w.served.AuthorizeBatch(context.Background(), req)
	kit, kitErr := w.kit.AuthorizeBatch(context.Background(), req)
	if !sameError(t, req, servedErr, kitErr) {
		return
	}
	if len(served.Results) != len(kit.Results) {
		t.Fatalf("%d results, the kit has %d", len(served.Results), len(kit.Results))
	}
	for i := range served.Results {
		bare(served.Results[i].GetResponse())
		bare(kit.Results[i].GetResponse())
		if !proto.Equal(served.Results[i], kit.Results[i]) {
			t.Errorf("%v\n real: %v\n  kit: %v", checks[i], served.Results[i], kit.Results[i])
		}
	}
}

// Every check of the example's tests gets the same answer from the real server.
func TestConformanceOfChecks(t *testing.T) {
	w := newTwins(t)
	b, err := bundle.Read(policies.Shop(), "")
	if err != nil {
		t.Fatal(err)
	}
	var batch []*cedarpostv1.AuthorizeRequest
	for _, test := range b.Tests {
		ctx, err := structpb.NewStruct(test.Context)
		if err != nil {
			t.Fatal(err)
		}
		ref := func(r bundle.Ref) *cedarpostv1.EntityUid { return &cedarpostv1.EntityUid{Type: r.Type, Id: r.ID} }
		req := &cedarpostv1.AuthorizeRequest{
			Principal: ref(test.Principal), Action: ref(test.Action), Resource: ref(test.Resource), Context: ctx, WantCacheHint: true,
		}
		if test.AllFields || len(test.Fields) > 0 {
			req.Fields = &cedarpostv1.FieldSelection{Paths: test.Fields, All: test.AllFields, RequireAll: test.RequireAll}
		}
		w.ask(t, req)
		batch = append(batch, proto.CloneOf(req))
		req.Explain = true
		w.ask(t, req)
	}
	if len(batch) < 30 {
		t.Errorf("only %d checks", len(batch))
	}
	w.askBatch(t, batch)
}

// pick draws a member of a list.
func pick[T any](t *rapid.T, name string, list ...T) T { return rapid.SampledFrom(list).Draw(t, name) }

func drawUID(t *rapid.T, name string, usual ...string) *cedarpostv1.EntityUid {
	switch rapid.IntRange(0, 19).Draw(t, name+" kind") {
	case 0:
		return nil
	case 1:
		return &cedarpostv1.EntityUid{Type: pick(t, name, "Shop::Nothing", "", "Shop::Field", "Shop::Action", "a b"), Id: "x"}
	case 2:
		return servertest.UID(pick(t, name, `Shop::User::"bob"`, `Shop::Order::"42"`, `Shop::Store::"main"`, `Shop::Role::"staff"`))
	}
	return servertest.UID(pick(t, name, usual...))
}

var (
	users   = []string{"bob", "carol", "alice", "erin", "dave", "mallory", "grace", "heidi", "judy", "nobody", "é\n\"'"}
	orders  = []string{"42", "43", "44", "99", "1", "none"}
	actions = []string{"ViewOrder", "EditOrder", "DeleteOrder", "RefundOrder", "CreateOrder", "ListOrders", "Read", "ViewOrder.field", "Fly"}
	paths   = []string{"id", "status", "items", "total", "customer", "customer.name", "customer.email", "shipping.address", "internal", "internal.notes", "internal.margin", "supplier", ""}
)

func named(typ string, ids []string) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = bundle.Ref{Type: typ, ID: id}.String()
	}
	return out
}

func drawContext(t *rapid.T) *structpb.Struct {
	m := map[string]any{"mfa": rapid.Bool().Draw(t, "mfa")}
	switch rapid.IntRange(0, 19).Draw(t, "context") {
	case 0:
		return nil
	case 1:
		m["mfa"] = pick[any](t, "no mfa", "yes", 1.0, nil, []any{true}, map[string]any{"__entity": map[string]any{"type": "A", "id": "b"}})
	case 2:
		m[pick(t, "more", "now", "field", "", "é")] = pick[any](t, "value", true, "x", 1.5)
	}
	s, err := structpb.NewStruct(m)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func drawRequest(t *rapid.T) *cedarpostv1.AuthorizeRequest {
	resources := append(named("Shop::Order", orders), `Shop::Store::"main"`, `Shop::Store::"other"`)
	req := &cedarpostv1.AuthorizeRequest{
		Principal: drawUID(t, "principal", named("Shop::User", users)...),
		Action:    drawUID(t, "action", named("Shop::Action", actions)...),
		Resource:  drawUID(t, "resource", resources...),
		Context:   drawContext(t), WantCacheHint: rapid.Bool().Draw(t, "cache hint"),
	}
	if rapid.Bool().Draw(t, "fields") {
		req.Fields = &cedarpostv1.FieldSelection{
			Paths: rapid.SliceOfN(rapid.SampledFrom(paths), 0, 4).Draw(t, "paths"), All: rapid.IntRange(0, 3).Draw(t, "all") == 0,
			RequireAll: rapid.Bool().Draw(t, "require all"),
		}
		if req.Fields.All && rapid.IntRange(0, 9).Draw(t, "both") > 0 {
			req.Fields.Paths = nil
		}
	}
	if rapid.IntRange(0, 19).Draw(t, "inline") == 0 {
		req.Entities = []*cedarpostv1.Entity{{Uid: drawUID(t, "entity", `Shop::Order::"new"`)}}
	}
	return req
}

// change makes the same write in both.
func (w *twins) change(t *rapid.T) {
	uid := cedarpost.UID("Shop::User", pick(t, "written", users...))
	to := []cedarpost.EntityUID{cedarpost.UID("Shop::Role", pick(t, "role", "support", "finance", "manager", "staff"))}
	wire := func(u cedarpost.EntityUID) *cedarpostv1.EntityUid {
		return &cedarpostv1.EntityUid{Type: u.Type, Id: u.ID}
	}
	op := &cedarpostv1.EntityOperation{}
	var own func() string
	switch rapid.IntRange(0, 4).Draw(t, "write") {
	case 0:
		suspended, region := rapid.Bool().Draw(t, "suspended"), pick[any](t, "region", "eu", "us", 3.0)
		attrs := map[string]any{"region": region, "suspended": suspended}
		e := &cedarpostv1.Entity{Uid: wire(uid), Parents: []*cedarpostv1.EntityUid{wire(to[0])}}
		e.Attrs, _ = structpb.NewStruct(attrs)
		op.Operation = &cedarpostv1.EntityOperation_Put{Put: e}
		own = func() string { return w.svc.Put(cedarpost.Entity{UID: uid, Attrs: attrs, Parents: to}) }
	case 1:
		op.Operation = &cedarpostv1.EntityOperation_Delete{Delete: &cedarpostv1.DeleteEntity{Uid: wire(uid), Cascade: true}}
		own = func() string { return w.svc.Delete(uid) }
	case 2:
		op.Operation = &cedarpostv1.EntityOperation_AddParents{AddParents: &cedarpostv1.ChangeParents{Uid: wire(uid), Parents: []*cedarpostv1.EntityUid{wire(to[0])}}}
		own = func() string { return w.svc.AddParents(uid, to...) }
	case 3:
		op.Operation = &cedarpostv1.EntityOperation_RemoveParents{RemoveParents: &cedarpostv1.ChangeParents{Uid: wire(uid), Parents: []*cedarpostv1.EntityUid{wire(to[0])}}}
		own = func() string { return w.svc.RemoveParents(uid, to...) }
	case 4: // it can make a role its own ancestor
		parent := cedarpost.UID("Shop::Role", pick(t, "parent", "support", "finance", "staff"))
		op.Operation = &cedarpostv1.EntityOperation_AddParents{AddParents: &cedarpostv1.ChangeParents{Uid: wire(to[0]), Parents: []*cedarpostv1.EntityUid{wire(parent)}}}
		own = func() string { return w.svc.AddParents(to[0], parent) }
	}
	_, servedErr := w.server.Entities.WriteEntities(context.Background(), &cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{op}})
	refused := w.svc.refusal(own)
	if (servedErr == nil) != (refused == "") || servedErr != nil && !strings.HasSuffix(servedErr.Error(), refused) {
		t.Errorf("%v\n real: %v\n  kit: %s", op, servedErr, refused)
	}
}

// catch takes the place of a test, so that a failure can be compared.
type catch struct{ noTest }

// refusal returns the text that a write was refused with, or "".
func (s *Service) refusal(write func() string) (message string) {
	old := s.t
	s.t = catch{}
	defer func() {
		s.t = old
		if r := recover(); r != nil {
			message = strings.TrimPrefix(fmt.Sprint(r), "cedarposttest: ")
		}
	}()
	write()
	return ""
}

// Both give the same answer to any question after any write.
func TestConformance(t *testing.T) {
	w := newTwins(t)
	rapid.Check(t, func(t *rapid.T) {
		if rapid.Bool().Draw(t, "change") {
			w.change(t)
		}
		var batch []*cedarpostv1.AuthorizeRequest
		for range rapid.IntRange(1, 10).Draw(t, "questions") {
			req := drawRequest(t)
			batch = append(batch, proto.CloneOf(req))
			req.Explain = rapid.IntRange(0, 3).Draw(t, "explain") == 0
			w.ask(t, req)
		}
		w.askBatch(t, batch)
	})
}

// Both refuse the same texts, sizes and revisions of a question, with the same errors.
func TestConformanceOfTheEdge(t *testing.T) {
	w := newTwins(t)
	good := func() *cedarpostv1.AuthorizeRequest {
		ctx, _ := structpb.NewStruct(map[string]any{"mfa": true})
		return &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Shop::User::"bob"`), Action: servertest.UID(`Shop::Action::"ViewOrder"`),
			Resource: servertest.UID(`Shop::Order::"42"`), Context: ctx,
		}
	}
	for name, spoil := range map[string]func(*cedarpostv1.AuthorizeRequest){
		"large": func(r *cedarpostv1.AuthorizeRequest) {
			r.Context.Fields["mfa"] = structpb.NewStringValue(strings.Repeat("x", 70_000))
		},
		"not UTF-8":  func(r *cedarpostv1.AuthorizeRequest) { r.Principal.Id = "\xff" },
		"long id":    func(r *cedarpostv1.AuthorizeRequest) { r.Principal.Id = strings.Repeat("x", 5000) },
		"request id": func(r *cedarpostv1.AuthorizeRequest) { r.RequestId = strings.Repeat("x", 129) },
		"no token":   func(r *cedarpostv1.AuthorizeRequest) { r.Consistency = atLeast("") },
		"bad token":  func(r *cedarpostv1.AuthorizeRequest) { r.Consistency = atLeast("AAAA") },
		"of another database": func(r *cedarpostv1.AuthorizeRequest) {
			r.Consistency = atLeast(NewFS(t, policies.Shop()).revision(1).Token)
		},
		"fully consistent": func(r *cedarpostv1.AuthorizeRequest) {
			r.Consistency = &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: true}}
		},
		"not at all consistent": func(r *cedarpostv1.AuthorizeRequest) {
			r.Consistency = &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			req := good()
			spoil(req)
			w.ask(t, req)
			w.askBatch(t, []*cedarpostv1.AuthorizeRequest{req})
		})
	}
	for name, n := range map[string]int{"empty batch": 0, "large batch": 101} {
		t.Run(name, func(t *testing.T) {
			var batch []*cedarpostv1.AuthorizeRequest
			for range n {
				batch = append(batch, good())
			}
			w.askBatch(t, batch)
		})
	}
	t.Run("revision to come", func(t *testing.T) {
		ask := func(c cedarpostv1connect.AuthorizationServiceClient) error {
			res, err := c.GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
			if err != nil {
				t.Fatal(err)
			}
			req := good()
			req.Consistency = atLeast(later(res.Revision.Token))
			_, err = c.Authorize(t.Context(), req)
			return err
		}
		sameError(t, "later", ask(w.served), ask(w.kit))
	})
}

func atLeast(token string) *cedarpostv1.Consistency {
	return &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: &cedarpostv1.Revision{Token: token}}}
}

// sizes are calls with a message of a given size. Only the limit of bytes refuses the
// message, or validation after it.
var sizes = map[string]struct {
	limit int
	call  func(ctx context.Context, c cedarpostv1connect.AuthorizationServiceClient, bytes int) error
}{
	"Authorize": {wire.MaxAuthorizeBytes, func(ctx context.Context, c cedarpostv1connect.AuthorizationServiceClient, bytes int) error {
		req := &cedarpostv1.AuthorizeRequest{}
		_, err := c.Authorize(ctx, padded(req, &req.RequestId, bytes))
		return err
	}},
	"AuthorizeBatch": {wire.MaxBatchBytes, func(ctx context.Context, c cedarpostv1connect.AuthorizationServiceClient, bytes int) error {
		check := &cedarpostv1.AuthorizeRequest{}
		_, err := c.AuthorizeBatch(ctx, padded(&cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{check}}, &check.RequestId, bytes))
		return err
	}},
	"ReportReuse": {wire.MaxReportBytes, func(ctx context.Context, c cedarpostv1connect.AuthorizationServiceClient, bytes int) error {
		req := &cedarpostv1.ReportReuseRequest{}
		_, err := c.ReportReuse(ctx, padded(req, &req.ReportId, bytes))
		return err
	}},
	"Watch": {wire.MaxSmallBytes, func(ctx context.Context, c cedarpostv1connect.AuthorizationServiceClient, bytes int) error {
		after := &cedarpostv1.Revision{}
		stream, err := c.Watch(ctx, padded(&cedarpostv1.WatchRequest{After: after}, &after.Token, bytes))
		if err == nil {
			_, err = stream.Receive()
		}
		return err
	}},
	// This message has no field. Only a message of another version can be large.
	"GetRevision": {wire.MaxSmallBytes, func(ctx context.Context, c cedarpostv1connect.AuthorizationServiceClient, bytes int) error {
		req := &cedarpostv1.GetRevisionRequest{}
		if bytes > wire.MaxSmallBytes {
			req.ProtoReflect().SetUnknown(protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), make([]byte, bytes)))
		}
		_, err := c.GetRevision(ctx, req)
		return err
	}},
}

// padded sets a text of a message to the length with which the message has a given
// size.
func padded[M proto.Message](m M, text *string, bytes int) M {
	for *text = strings.Repeat("x", bytes); proto.Size(m) > bytes; {
		*text = (*text)[1:]
	}
	if n := proto.Size(m); n != bytes {
		panic(fmt.Sprintf("no text makes %d bytes, the next length makes %d", bytes, n))
	}
	return m
}

// Both refuse a message with a field of another version.
func TestConformanceOfUnknownFields(t *testing.T) {
	w := newTwins(t)
	req := &cedarpostv1.GetRevisionRequest{}
	req.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
	_, served := w.served.GetRevision(t.Context(), req)
	_, kit := w.kit.GetRevision(t.Context(), req)
	sameError(t, "an unknown field", served, kit)
	if connect.CodeOf(served) != connect.CodeInvalidArgument {
		t.Errorf("got %v", served)
	}
}

// Both refuse messages of each call above the same size.
func TestConformanceOfSizes(t *testing.T) {
	w := newTwins(t)
	methods := cedarpostv1.File_cedarpost_v1_authorization_proto.Services().ByName("AuthorizationService").Methods()
	for i := range methods.Len() {
		name := string(methods.Get(i).Name())
		size, ok := sizes[name]
		if !ok {
			t.Errorf("%s: the sizes of its messages are not compared", name)
			continue
		}
		for _, bytes := range []int{size.limit, size.limit + 1} {
			served, kit := size.call(t.Context(), w.served, bytes), size.call(t.Context(), w.kit, bytes)
			sameError(t, fmt.Sprintf("%s of %d bytes", name, bytes), served, kit)
			if refused := connect.CodeOf(served) == connect.CodeInvalidArgument && strings.Contains(fmt.Sprint(served), "bytes, the limit"); refused != (bytes > size.limit) {
				t.Errorf("%s of %d bytes, at most %d: %v", name, bytes, size.limit, served)
			}
		}
	}
}

// later returns a token of the same history with a far larger number.
func later(token string) string {
	t, err := wire.ParseToken(token)
	if err != nil {
		panic(err)
	}
	t.Number, t.Anchor = t.Number+1000, t.Anchor+1000
	return t.Revision().Token
}
