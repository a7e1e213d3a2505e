package cedarpostconnect_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpostconnect"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

const (
	ok     = connect.Code(0)
	denied = connect.CodePermissionDenied
	whole  = `{"id":"42","status":"open","total":"4999","shipping":{"address":"1Road"},"internal":{"notes":"tea"}}`
)

func TestWhoGetsWhere(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		who, method, request string
		code                 connect.Code
		answer               string // or a part of the error
	}{
		{"bob", "Get", `{"order":{"id":"42"}}`, ok, `{"id":"42","status":"open","total":"4999","shipping":{"address":"1Road"}}`},
		{"alice", "Get", `{"order":{"id":"42"}}`, ok, `{"id":"42","status":"open"}`},
		{"dave+mfa", "Get", `{"order":{"id":"42"}}`, ok, whole},
		{"bob", "Get", `{"order":{"id":"99"}}`, connect.CodeNotFound, "Not Found."},
		{"mallory", "Get", `{"order":{"id":"42"}}`, denied, "Decision "},
		{"", "Get", `{"order":{"id":"42"}}`, connect.CodeUnauthenticated, "Sign in"},
		{"panic", "Get", `{"order":{"id":"42"}}`, connect.CodeInternal, "mistake"},
		{"bob", "Get", `{}`, connect.CodeInvalidArgument, ""},
		{"bob", "Get", `{"order":{}}`, connect.CodeInvalidArgument, ""},
		{"bob", "Get", `{"order":{"id":"` + strings.Repeat("x", 1025) + `"}}`, connect.CodeInvalidArgument, ""},
		{"bob", "GetByNumber", `{"number":42,"order":{"id":"99"}}`, ok, whole},
		{"bob", "GetByNumber", `{"number":99,"order":{"id":"42"}}`, denied, ""},
		{"bob", "GetByNumber", `{}`, denied, ""},
		{"bob", "Update", `{"order":{"id":"42"},"mask":"shipping.address"}`, ok, whole},
		{"bob", "Update", `{"order":{"id":"42"},"mask":"total"}`, denied, "Denied fields: total."},
		{"bob", "Update", `{"order":{"id":"42"},"mask":"shipping.address,total"}`, denied, "total"},
		{"bob", "Update", `{"order":{"id":"42"},"mask":"unheardOf"}`, denied, "unheard_of"},
		{"bob", "Update", `{"order":{"id":"42"},"mask":""}`, denied, ""}, // all fields
		{"bob", "Update", `{"order":{"id":"42"}}`, denied, ""},
		{"bob", "Update", `{"order":{"id":"99"},"mask":"shipping.address"}`, denied, ""},
		{"dave", "Update", `{"order":{"id":"42"},"mask":"shipping.address"}`, connect.CodeUnauthenticated, "stronger"},
		{"dave+mfa", "Update", `{"order":{"id":"42"},"mask":"shipping.address"}`, ok, whole},
		{"dave", "Delete", `{"order":{"id":"42"}}`, ok, whole},
		{"dave", "Delete", `{"order":{"id":"44"}}`, connect.CodeNotFound, ""},
		{"alice", "Delete", `{"order":{"id":"42"}}`, denied, ""},
		{"erin", "Refund", `{"order":{"id":"42"}}`, connect.CodeUnauthenticated, ""},
		{"erin+mfa", "Refund", `{"order":{"id":"42"}}`, denied, "now"}, // nothing meets the obligation
		{"", "Ping", `{}`, ok, whole},
		{"dave", "Unmapped", `{"order":{"id":"42"}}`, denied, ""},
	} {
		for protocol, options := range protocols {
			answer, _, err := w.call(c.who, c.method, c.request, options...)
			code := ok
			if err != nil {
				code, answer = connect.CodeOf(err), err.Error()
			}
			seen := w.take()
			if code != c.code || (len(seen) > 0) != (c.code == ok) || c.code == ok && answer != c.answer || !strings.Contains(answer, c.answer) {
				t.Errorf("%s %s %.80s by %s: %v %s, handler saw %v", c.who, c.method, c.request, protocol, code, answer, seen)
			}
			if strings.Contains(answer, "shop/") || strings.Contains(answer, "owner-") || strings.Contains(answer, "who is") {
				t.Errorf("%s %s: the error says too much: %s", c.who, c.method, answer)
			}
		}
	}
	if text(stored) != whole {
		t.Errorf("the filter changed what the handler keeps: %s", text(stored))
	}
	n := int64(len(protocols))
	if s := w.guard.Stats(); s.Public != n || s.Unmapped["/shop.v1.Orders/Unmapped"] != n || s.Unmet != n || s.StepUp != 2*n || s.Hidden != 2*n || s.Faults != n {
		t.Errorf("%+v", s)
	}
}

func TestHeadersOfRefusals(t *testing.T) {
	w := newWorld(t)
	for protocol, options := range protocols {
		_, info, _ := w.call("erin", "Refund", `{"order":{"id":"42"}}`, options...)
		want := `Bearer error="insufficient_user_authentication", error_description="A stronger or more recent authentication is required", acr_values="mfa"`
		if got := header(info, "WWW-Authenticate"); got != want {
			t.Errorf("%s: challenge %q", protocol, got)
		}
	}
	w.svc.Away(true)
	for protocol, options := range protocols {
		_, info, err := w.call("bob", "Get", `{"order":{"id":"42"}}`, options...)
		if connect.CodeOf(err) != connect.CodeUnavailable || header(info, "Retry-After") != "1" || w.take() != nil {
			t.Errorf("%s, service away: %v, retry after %q", protocol, err, header(info, "Retry-After"))
		}
	}
	w.svc.Away(false)
	w.svc.Fail(connect.NewError(connect.CodeAborted, "the token is of a revision that this database does not have"))
	for protocol, options := range protocols {
		_, info, err := w.call("bob", "Get", `{"order":{"id":"42"}}`, options...)
		if connect.CodeOf(err) != connect.CodeAborted || header(info, "Retry-After") != "" || w.take() != nil {
			t.Errorf("%s, a revision that is lost: %v, retry after %q", protocol, err, header(info, "Retry-After"))
		}
	}
}

func header(info *connect.CallInfo, name string) string {
	if v := info.ResponseHeader().Get(name); v != "" {
		return v
	}
	return info.ResponseTrailer().Get(name)
}

func TestHiddenIsNotFound(t *testing.T) {
	w := newWorld(t)
	_, _, err := w.call("bob", "Get", `{"order":{"id":"99"}}`)
	if err == nil || err.Error() != cedarpostconnect.NotFound().Error() {
		t.Errorf("%v, and %v", err, cedarpostconnect.NotFound())
	}
}

func TestStreams(t *testing.T) {
	w := newWorld(t)
	own, others := of(newRequest(), `{"order":{"id":"42"}}`), of(newRequest(), `{"order":{"id":"99"}}`)

	// A stream to the client: each message is filtered.
	stream, err := w.client("bob").CallServerStream(t.Context(), spec("Follow"), own)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		res := newOrder()
		if err := stream.Receive(res); err != nil || strings.Contains(text(res), "tea") {
			t.Errorf("%s %v", text(res), err)
		}
	}
	if err := stream.Receive(newOrder()); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	w.take()

	// A stream from the client: each message is checked, and a handler that ignores
	// errors cannot end the call with success.
	for _, c := range []struct {
		messages []proto.Message
		code     connect.Code
		seen     int
	}{
		{[]proto.Message{own, own}, ok, 2},
		{[]proto.Message{own, others, own}, denied, 1},
		{[]proto.Message{others}, denied, 0},
		{nil, connect.CodeInvalidArgument, 0},
	} {
		stream, err := w.client("bob").CallClientStream(t.Context(), spec("Collect"))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range c.messages {
			_ = stream.Send(m) // the answer has the error
		}
		_ = stream.CloseSend()
		err = stream.Receive(newOrder())
		code := ok
		if err != nil {
			code = connect.CodeOf(err)
		}
		if seen := w.take(); code != c.code || len(seen) != c.seen {
			t.Errorf("%d messages: %v, the handler saw %v", len(c.messages), err, seen)
		}
	}

	// Streams in both directions.
	stream, err = w.client("bob").CallClientStream(t.Context(), spec("Chat"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := errors.Join(stream.Send(own), stream.Receive(newOrder())); err != nil {
			t.Error(err)
		}
	}
	if err := stream.Send(others); err != nil {
		t.Error(err)
	}
	if err := stream.Receive(newOrder()); connect.CodeOf(err) != denied {
		t.Errorf("another's order in mid-stream: %v", err)
	}
	if seen := w.take(); len(seen) != 2 {
		t.Errorf("the handler saw %v", seen)
	}
}

// A revoked right ends a streaming call. A revoked field is removed from then on.
// Obligations are met once.
func TestRevokedInMidStream(t *testing.T) {
	told := 0
	w := newWorld(t, func(c *enforce.Config) {
		c.Obligations = map[string]func(context.Context, cedarpost.Result) error{"notify_customer": func(context.Context, cedarpost.Result) error {
			told++
			return nil
		}}
	})
	w.interceptor.Recheck(0) // each time
	support, alice := cedarpost.UID("Shop::Role", "support"), cedarpost.UID("Shop::User", "alice")
	f := &fake{in: []proto.Message{of(newRequest(), `{"order":{"id":"42"}}`)}}
	call := func(who, method string, handler func(connect.ServerStream)) error {
		return w.interceptor.Intercept(func(_ context.Context, _ connect.Spec, s connect.ServerStream) error {
			if err := s.Receive(newRequest()); err != nil {
				return err
			}
			handler(s)
			return nil
		})(context.WithValue(t.Context(), userKey{}, who), spec(method), f)
	}
	err := call("alice+mfa", "Follow", func(s connect.ServerStream) {
		if err := s.Send(stored); err != nil || !strings.Contains(text(f.last), "1Road") || strings.Contains(text(f.last), "4999") {
			t.Errorf("support: %s, %v", text(f.last), err)
		}
		w.svc.RemoveParents(alice, support)
		w.svc.AddParents(alice, cedarpost.UID("Shop::Role", "finance"))
		if err := s.Send(stored); err != nil || strings.Contains(text(f.last), "1Road") || !strings.Contains(text(f.last), "4999") {
			t.Errorf("finance: %s, %v", text(f.last), err)
		}
		w.svc.RemoveParents(alice, cedarpost.UID("Shop::Role", "finance"))
		if err := s.Send(stored); err == nil {
			t.Error("it streams on")
		}
		w.svc.AddParents(alice, support)
		if err := s.Send(stored); err == nil {
			t.Error("it streams again")
		}
	})
	if connect.CodeOf(err) != denied || f.sent != 2 {
		t.Errorf("sent %d, %v", f.sent, err)
	}

	f = &fake{in: []proto.Message{of(newRequest(), `{"order":{"id":"42"}}`)}}
	err = call("erin+mfa", "Refund", func(s connect.ServerStream) { _ = s.SendHeaders(); _ = s.Send(stored) })
	if err != nil || told != 1 {
		t.Errorf("the customer was told %d times, %v", told, err)
	}
}

// fake is a stream without a network, for handlers that behave unlike generated code.
type fake struct {
	in   []proto.Message
	sent int
	last proto.Message
}

func (f *fake) Receive(msg any) error {
	if len(f.in) == 0 {
		return io.EOF
	}
	proto.Merge(msg.(proto.Message), f.in[0])
	f.in = f.in[1:]
	return nil
}
func (f *fake) Send(msg any) error {
	f.sent++
	f.last = msg.(proto.Message)
	return nil
}
func (f *fake) SendHeaders() error { f.sent++; return nil }

func TestHandlersThatGoAround(t *testing.T) {
	w := newWorld(t)
	own, others := of(newRequest(), `{"order":{"id":"42"}}`), of(newRequest(), `{"order":{"id":"99"}}`)
	receive := func(s connect.ServerStream) error { return s.Receive(newRequest()) }
	for name, c := range map[string]struct {
		in      proto.Message
		handler func(connect.ServerStream) error
		code    connect.Code
		sent    int
	}{
		"well behaved":           {own, func(s connect.ServerStream) error { _ = receive(s); return s.Send(stored) }, ok, 1},
		"sends first":            {own, func(s connect.ServerStream) error { _ = s.Send(stored); return receive(s) }, connect.CodeInternal, 0},
		"sends headers first":    {own, func(s connect.ServerStream) error { _ = s.SendHeaders(); return receive(s) }, connect.CodeInternal, 0},
		"never looks":            {own, func(connect.ServerStream) error { return nil }, connect.CodeInternal, 0},
		"sends after a refusal":  {others, func(s connect.ServerStream) error { _ = receive(s); _ = s.Send(stored); return nil }, denied, 0},
		"turns it into its own":  {others, func(s connect.ServerStream) error { _ = receive(s); return connect.NewError(connect.CodeAborted, "") }, denied, 0},
		"tries again":            {others, func(s connect.ServerStream) error { _ = receive(s); return receive(s) }, denied, 0},
		"sends what is no proto": {own, func(s connect.ServerStream) error { _ = receive(s); return s.Send("tea") }, connect.CodeInternal, 0},
	} {
		f := &fake{in: []proto.Message{c.in, own}}
		call := w.interceptor.Intercept(func(_ context.Context, _ connect.Spec, s connect.ServerStream) error { return c.handler(s) })
		err := call(context.WithValue(t.Context(), userKey{}, "bob"), spec("Follow"), f)
		code := ok
		if err != nil {
			code = connect.CodeOf(err)
		}
		if code != c.code || f.sent != c.sent {
			t.Errorf("a handler that is or does: %s: %v, sent %d", name, err, f.sent)
		}
	}
}

func TestVerify(t *testing.T) {
	w := newWorld(t)
	err := w.interceptor.Verify(w.server)
	if err == nil || !strings.Contains(err.Error(), "/shop.v1.Orders/Unmapped has no route") || strings.Count(err.Error(), "\n") != 0 {
		t.Errorf("one procedure has no route: %v", err)
	}
	all := routes()
	all["/shop.v1.Orders/Unmapped"] = cedarpostconnect.Route{Public: "for now"}
	if err := verify(t, w, all); err != nil {
		t.Error(err)
	}
	view := action("ViewOrder")
	for want, route := range map[string]cedarpostconnect.Route{
		"no field name":           {Action: view, Resource: `Shop::Order::"{name}"`},
		"no field nothing":        {Action: view, Resource: `Shop::Order::"{order.nothing}"`},
		"not a message":           {Action: view, Resource: `Shop::Order::"{number.x}"`},
		"or it is repeated":       {Action: view, Resource: `Shop::Order::"{tags}"`},
		"neither a string nor":    {Action: view, Resource: `Shop::Order::"{order}"`},
		"is not a google":         {Action: view, Resource: byID, Mask: "order"},
		"no field masks":          {Action: view, Resource: byID, Mask: "masks"},
		"has no Action":           {Resource: byID},
		"one of Resource":         {Action: view},
		"is not a template":       {Action: view, Resource: "order.id"},
		"either Public":           {Action: view, Public: "both"},
		"both Fields and All":     {Action: view, Resource: byID, Fields: []string{"id"}, AllFields: true},
		"by FailOpen has no":      {Action: view, Resource: byID, Mask: "mask", FailOpen: "why not"},
		"a route with a Mask ask": {Action: view, Resource: byID, Mask: "mask", Filter: true},
	} {
		all["/shop.v1.Orders/Unmapped"] = route
		if err := verify(t, w, all); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	delete(all, "/shop.v1.Orders/Unmapped")
	all["/shop.v1.Orders/Gone"] = cedarpostconnect.Route{Public: "it was there once"}
	all["/shop.v1.Orders/Chat"] = cedarpostconnect.Route{Action: view, Resource: byID, Filter: true}
	err = verify(t, w, all)
	for _, want := range []string{"Unmapped has no route", "does not serve", "Filter is for calls with one request"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	if _, err := cedarpostconnect.New(nil, nil); err == nil {
		t.Error("without a guard")
	}
}

func verify(t *testing.T, w *world, all map[string]cedarpostconnect.Route) error {
	t.Helper()
	i, err := cedarpostconnect.New(w.guard, all)
	if err != nil {
		return err
	}
	return i.Verify(w.server)
}

// Verify was not called, and the call still fails closed.
func TestUnverified(t *testing.T) {
	w := newWorld(t)
	for name, route := range map[string]cedarpostconnect.Route{
		"no such field": {Action: action("ViewOrder"), Resource: `Shop::Order::"{nothing}"`, FailOpen: "even so"},
		"no such mask":  {Action: action("EditOrder"), Resource: byID, Mask: "order"},
		"Filter":        {Action: action("ViewOrder"), Resource: byID, Filter: true},
		"ResourceOf panics": {Action: action("ViewOrder"), ResourceOf: func(context.Context, proto.Message) (cedarpost.EntityUID, error) {
			panic("no")
		}},
	} {
		s := spec("Get")
		if name == "Filter" {
			s = spec("Chat")
		}
		i, err := cedarpostconnect.New(w.guard, map[string]cedarpostconnect.Route{s.Procedure: route})
		if err != nil {
			t.Fatal(err)
		}
		f := &fake{in: []proto.Message{of(newRequest(), `{"order":{"id":"42"}}`)}}
		ctx := context.WithValue(t.Context(), userKey{}, "bob")
		if err := i.Intercept(w.unary)(ctx, s, f); connect.CodeOf(err) != connect.CodeInternal || f.sent != 0 || w.take() != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestProceduresThatDoNotExist(t *testing.T) {
	w := newWorld(t)
	w.server.SetUnknownHandler(func(context.Context, connect.Spec, connect.ServerStream) error {
		t.Error("a procedure that does not exist is served")
		return nil
	})
	for i := range 150 {
		s := spec("Get")
		s.Procedure = "/shop.v1.Orders/Nothing" + strings.Repeat("x", i)
		s.IdempotencyLevel = connect.IdempotencyUnknown
		if err := w.client("dave").CallUnary(t.Context(), s, newRequest(), newOrder()); connect.CodeOf(err) != denied {
			t.Errorf("%v", err)
		}
	}
	// The client chooses these names: they must not fill the list of the program's
	// names.
	if got := w.guard.Stats().Unmapped; len(got) != 1 || got["no procedure"] != 150 {
		t.Errorf("%v", got)
	}
}

func TestManyAtOnce(t *testing.T) {
	w := newWorld(t)
	var wait sync.WaitGroup
	for _, who := range []string{"bob", "alice", "dave+mfa"} {
		client := w.client(who)
		want, _, err := w.call(who, "Get", `{"order":{"id":"42"}}`)
		if err != nil {
			t.Fatal(err)
		}
		wait.Go(func() {
			for range 50 {
				res := newOrder()
				if err := client.CallUnary(t.Context(), spec("Get"), of(newRequest(), `{"order":{"id":"42"}}`), res); err != nil || text(res) != want {
					t.Errorf("%s: %s, %v", who, text(res), err)
				}
			}
		})
	}
	wait.Wait()
	if n := len(w.svc.Decisions()); n != 153 || w.guard.Stats().Allowed != 153 {
		t.Errorf("%d decisions, %+v", n, w.guard.Stats())
	}
}

// A refused client gets no header or trailer that the handler set. Those that outer
// interceptors set stay.
func TestHeadersOfTheHandlerDoNotReachTheRefused(t *testing.T) {
	w := newWorld(t)
	outer := func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			info, _ := connect.CallInfoForServerContext(ctx)
			info.ResponseHeader().Set("X-Request-Id", "7")
			return next(context.WithValue(ctx, userKey{}, info.RequestHeader().Get("X-User")), spec, stream)
		}
	}
	server := connect.NewServer(outer, w.interceptor.Intercept)
	for _, method := range []string{"Get", "Collect", "Chat", "Follow"} {
		server.Register(connect.Method{Spec: spec(method), Handler: func(ctx context.Context, _ connect.Spec, stream connect.ServerStream) error {
			info, _ := connect.CallInfoForServerContext(ctx)
			for _, h := range []*connect.Header{info.ResponseHeader(), info.ResponseTrailer()} {
				h.Set("X-Secret", "likes tea")
				h.Set("X-Request-Id", "tea")
				h.Add("Etag", `"tea"`)
			}
			if info.RequestHeader().Get("X-User") == "nobody looks" {
				return connect.NewError(connect.CodeAborted, "before a message was checked")
			}
			if err := stream.Receive(newRequest()); err != nil {
				return err
			}
			return stream.Send(stored)
		}})
	}
	mux := http.NewServeMux()
	connecthttp.Mount(mux, server)
	hs := httptest.NewUnstartedServer(mux)
	hs.Config.Protocols = new(http.Protocols)
	hs.Config.Protocols.SetHTTP1(true)
	hs.Config.Protocols.SetUnencryptedHTTP2(true)
	hs.Start()
	defer hs.Close()
	w.url = hs.URL
	for _, method := range []string{"Get", "Collect", "Chat", "Follow"} {
		for protocol, options := range protocols {
			if protocol == "get" && method != "Get" {
				continue
			}
			for _, who := range []string{"bob", "mallory", "", "nobody looks"} {
				ctx, info := connect.NewClientContext(t.Context())
				stream, err := w.client(who, options...).CallClientStream(ctx, spec(method))
				if err != nil {
					t.Fatal(err)
				}
				_ = stream.Send(of(newRequest(), `{"order":{"id":"42"}}`))
				_ = stream.CloseSend()
				for err = nil; err == nil; {
					err = stream.Receive(newOrder())
				}
				if refused := !errors.Is(err, io.EOF); refused != (who != "bob") {
					t.Fatalf("%s %s by %s: %v", who, method, protocol, err)
				}
				tea := strings.Contains(fmt.Sprint(maps.Collect(info.ResponseHeader().All()), maps.Collect(info.ResponseTrailer().All())), "tea")
				if tea != (who == "bob") {
					t.Errorf("%s %s by %s: %v %v", who, method, protocol, maps.Collect(info.ResponseHeader().All()), maps.Collect(info.ResponseTrailer().All()))
				}
				if who != "bob" && header(info, "X-Request-Id") != "7" {
					t.Errorf("%s %s by %s: request id %q", who, method, protocol, header(info, "X-Request-Id"))
				}
				_ = stream.Close()
			}
		}
	}
}
