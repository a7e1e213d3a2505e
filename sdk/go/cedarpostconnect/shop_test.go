package cedarpostconnect_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	_ "google.golang.org/protobuf/types/known/fieldmaskpb" // the descriptor below imports it

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpostconnect"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// The service of a shop, written as a descriptor. On the network, its messages are the
// same as generated ones.
const definition = `
name: "shop.proto" package: "shop.v1" syntax: "proto3" dependency: "google/protobuf/field_mask.proto"
message_type { name: "Order"
  field { name: "id" json_name: "id" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
  field { name: "status" json_name: "status" number: 2 type: TYPE_STRING label: LABEL_OPTIONAL }
  field { name: "total" json_name: "total" number: 3 type: TYPE_INT64 label: LABEL_OPTIONAL }
  field { name: "shipping" json_name: "shipping" number: 4 type: TYPE_MESSAGE type_name: ".shop.v1.Shipping" label: LABEL_OPTIONAL }
  field { name: "internal" json_name: "internal" number: 5 type: TYPE_MESSAGE type_name: ".shop.v1.Internal" label: LABEL_OPTIONAL }
}
message_type { name: "Shipping" field { name: "address" json_name: "address" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL } }
message_type { name: "Internal" field { name: "notes" json_name: "notes" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL } }
message_type { name: "OrderRequest"
  field { name: "order" json_name: "order" number: 1 type: TYPE_MESSAGE type_name: ".shop.v1.Order" label: LABEL_OPTIONAL }
  field { name: "number" json_name: "number" number: 2 type: TYPE_UINT32 label: LABEL_OPTIONAL }
  field { name: "tags" json_name: "tags" number: 3 type: TYPE_STRING label: LABEL_REPEATED }
  field { name: "mask" json_name: "mask" number: 4 type: TYPE_MESSAGE type_name: ".google.protobuf.FieldMask" label: LABEL_OPTIONAL }
}
service { name: "Orders"
  method { name: "Get" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" options { idempotency_level: NO_SIDE_EFFECTS } }
  method { name: "GetByNumber" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" }
  method { name: "Update" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" }
  method { name: "Delete" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" }
  method { name: "Refund" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" }
  method { name: "Follow" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" server_streaming: true }
  method { name: "Collect" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" client_streaming: true }
  method { name: "Chat" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" client_streaming: true server_streaming: true }
  method { name: "Ping" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" }
  method { name: "Unmapped" input_type: ".shop.v1.OrderRequest" output_type: ".shop.v1.Order" }
}`

var orders = func() protoreflect.ServiceDescriptor {
	var fd descriptorpb.FileDescriptorProto
	if err := prototext.Unmarshal([]byte(definition), &fd); err != nil {
		panic(err)
	}
	file, err := protodesc.NewFile(&fd, protoregistry.GlobalFiles)
	if err != nil {
		panic(err)
	}
	return file.Services().ByName("Orders")
}()

func spec(method string) connect.Spec {
	m := orders.Methods().ByName(protoreflect.Name(method))
	s := connect.Spec{Procedure: "/shop.v1.Orders/" + method, Schema: m}
	if m.IsStreamingClient() {
		s.StreamType |= connect.StreamTypeClient
	}
	if m.IsStreamingServer() {
		s.StreamType |= connect.StreamTypeServer
	}
	if method == "Get" {
		s.IdempotencyLevel = connect.IdempotencyNoSideEffects
	}
	return s
}

func newRequest() *dynamicpb.Message {
	return dynamicpb.NewMessage(orders.Methods().ByName("Get").Input())
}

func newOrder() *dynamicpb.Message {
	return dynamicpb.NewMessage(orders.Methods().ByName("Get").Output())
}

func of[M proto.Message](m M, json string) M {
	if err := protojson.Unmarshal([]byte(json), m); err != nil {
		panic(err)
	}
	return m
}

func text(m proto.Message) string {
	b, err := protojson.Marshal(m)
	if err != nil {
		panic(err)
	}
	return strings.ReplaceAll(string(b), " ", "")
}

func action(id string) cedarpost.EntityUID { return cedarpost.UID("Shop::Action", id) }

const byID = `Shop::Order::"{order.id}"`

func routes() map[string]cedarpostconnect.Route {
	return map[string]cedarpostconnect.Route{
		"/shop.v1.Orders/Get":         {Action: action("ViewOrder"), Resource: byID, Filter: true, Hide: true},
		"/shop.v1.Orders/GetByNumber": {Action: action("ViewOrder"), Resource: `Shop::Order::"{number}"`},
		"/shop.v1.Orders/Update":      {Action: action("EditOrder"), Resource: byID, Mask: "mask"},
		"/shop.v1.Orders/Delete":      {Action: action("DeleteOrder"), Resource: byID, Hide: true},
		"/shop.v1.Orders/Refund":      {Action: action("RefundOrder"), Resource: byID},
		"/shop.v1.Orders/Follow":      {Action: action("ViewOrder"), Resource: byID, Filter: true},
		"/shop.v1.Orders/Collect":     {Action: action("ViewOrder"), Resource: byID},
		"/shop.v1.Orders/Chat":        {Action: action("ViewOrder"), Resource: byID},
		"/shop.v1.Orders/Ping":        {Public: "it says nothing"},
	}
}

// stored is the answer of every handler. The filter must not change it.
var stored = of(newOrder(), `{"id":"42","status":"open","total":"4999","shipping":{"address":"1Road"},"internal":{"notes":"tea"}}`)

type userKey struct{}

// world is a server with its handlers, and the messages that these got.
type world struct {
	t           *testing.T
	svc         *cedarposttest.Service
	guard       *enforce.Guard
	interceptor *cedarpostconnect.Interceptor
	server      *connect.Server
	url         string
	log         *syncBuffer

	mu   sync.Mutex
	seen []string
}

type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (w *world) see(what string, m proto.Message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = append(w.seen, what+" "+text(m))
}

func (w *world) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	got := w.seen
	w.seen = nil
	return got
}

// unary does the same as generated code for a unary method, and for a method that
// streams to the client.
func (w *world) unary(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
	req := newRequest()
	if err := stream.Receive(req); err != nil {
		return err
	}
	w.see(spec.Procedure[len("/shop.v1.Orders/"):], req)
	if spec.Procedure != "/shop.v1.Orders/Ping" && !cedarpostconnect.Result(ctx).Allowed() {
		w.t.Error("the handler runs, and its context has no allow")
	}
	times := 1
	if spec.StreamType == connect.StreamTypeServer {
		times = 3
	}
	for range times {
		if err := stream.Send(stored); err != nil {
			return err
		}
	}
	return nil
}

// talk receives all messages, and answers each one if the method streams to the client.
func (w *world) talk(_ context.Context, spec connect.Spec, stream connect.ServerStream) error {
	for {
		req := newRequest()
		err := stream.Receive(req)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			if text(req) != "{}" {
				w.t.Errorf("a message that was refused still has %s", text(req))
			}
			return nil // a handler that ignores errors
		}
		w.see(spec.Procedure[len("/shop.v1.Orders/"):], req)
		if spec.StreamType == connect.StreamTypeBidi {
			if err := stream.Send(stored); err != nil {
				return err
			}
		}
	}
	if spec.StreamType == connect.StreamTypeClient {
		return stream.Send(stored)
	}
	return nil
}

func newWorld(t *testing.T, options ...func(*enforce.Config)) *world {
	t.Helper()
	w := &world{t: t, svc: cedarposttest.New(t, "../../../policies/shop"), log: &syncBuffer{}}
	cfg := enforce.Config{
		Client: w.svc.Client(),
		Principal: func(ctx context.Context) (cedarpost.EntityUID, error) {
			user, _, _ := strings.Cut(ctx.Value(userKey{}).(string), "+")
			switch user {
			case "":
				return cedarpost.EntityUID{}, enforce.ErrNoPrincipal
			case "panic":
				panic("who is this?")
			}
			return cedarpost.UID("Shop::User", user), nil
		},
		Context: func(ctx context.Context) (map[string]any, error) {
			return map[string]any{"mfa": strings.HasSuffix(ctx.Value(userKey{}).(string), "+mfa")}, nil
		},
		StepUp: map[string]enforce.Challenge{"step_up_mfa": {ACRValues: []string{"mfa"}}},
		Log:    slog.New(slog.NewTextHandler(w.log, nil)),
	}
	for _, o := range options {
		o(&cfg)
	}
	var err error
	if w.guard, err = enforce.New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.guard.Close)
	if w.interceptor, err = cedarpostconnect.New(w.guard, routes()); err != nil {
		t.Fatal(err)
	}
	authenticate := func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			info, _ := connect.CallInfoForServerContext(ctx)
			return next(context.WithValue(ctx, userKey{}, info.RequestHeader().Get("X-User")), spec, stream)
		}
	}
	w.server = connect.NewServer(authenticate, w.interceptor.Intercept)
	for i := range orders.Methods().Len() {
		s := spec(string(orders.Methods().Get(i).Name()))
		handler := w.unary
		if s.StreamType&connect.StreamTypeClient != 0 {
			handler = w.talk
		}
		w.server.Register(connect.Method{Spec: s, Handler: handler})
	}
	mux := http.NewServeMux()
	connecthttp.Mount(mux, w.server)
	server := httptest.NewUnstartedServer(mux)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetHTTP1(true)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	t.Cleanup(server.Close)
	w.url = server.URL
	return w
}

// protocols are those of the network.
var protocols = map[string][]connecthttp.Option{
	"connect": nil, "json": {connecthttp.WithProtoJSON()}, "grpc": {connecthttp.WithGRPC()}, "grpcweb": {connecthttp.WithGRPCWeb()},
	"get": {connecthttp.WithHTTPGet()},
}

func (w *world) client(who string, options ...connecthttp.Option) *connect.Client {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	w.t.Cleanup(transport.CloseIdleConnections)
	return connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: transport}, w.url, options...), func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			info, _ := connect.CallInfoForClientContext(ctx)
			info.RequestHeader().Set("X-User", who)
			return next(ctx, spec)
		}
	})
}

// call makes a unary call. It returns the answer, or "", and the error and the headers.
func (w *world) call(who, method, request string, options ...connecthttp.Option) (string, *connect.CallInfo, error) {
	ctx, info := connect.NewClientContext(w.t.Context())
	res := newOrder()
	if err := w.client(who, options...).CallUnary(ctx, spec(method), of(newRequest(), request), res); err != nil {
		return "", info, err
	}
	return text(res), info, nil
}
