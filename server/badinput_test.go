package server_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/servertest"
)

const authorizePath = "/cedarpost.v1.AuthorizationService/Authorize"

// post sends a body as curl does, and returns the HTTP status, the Connect code and the message.
func post(t *testing.T, url, token, contentType string, body []byte, header ...string) (int, string, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	var e struct{ Code, Message string }
	_ = json.Unmarshal(text, &e)
	return res.StatusCode, e.Code, e.Message
}

func TestBadRequests(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	const (
		bob    = `"principal":{"type":"Shop::User","id":"bob"}`
		view   = `"action":{"type":"Shop::Action","id":"ViewOrder"}`
		order  = `"resource":{"type":"Shop::Order","id":"42"}`
		mfa    = `"context":{"mfa":true}`
		prefix = "{" + bob + "," + view + "," + order + ","
	)
	for _, c := range []struct{ name, body, code, message string }{
		{"good", prefix + mfa + "}", "", ""},
		{"entity not stored", `{"principal":{"type":"Shop::User","id":"nobody"},` + view + "," + order + "," + mfa + "}", "", ""},
		{"not JSON", `{"principal":`, "invalid_argument", "unexpected"},
		{"not an object", `[1]`, "invalid_argument", ""},
		{"empty", ``, "invalid_argument", "zero-length"},
		{"unknown field", prefix + mfa + `,"explian":true}`, "invalid_argument", `unknown field "explian"`},
		{"wrong JSON type", `{"principal":"bob",` + view + "," + order + "," + mfa + "}", "invalid_argument", ""},
		{"no principal", "{" + view + "," + order + "," + mfa + "}", "invalid_argument", "principal"},
		{"unknown action", `{` + bob + `,"action":{"type":"Shop::Action","id":"Fly"},` + order + "," + mfa + "}", "invalid_argument", `Shop::Action::"Fly" is not declared`},
		{"action group", `{` + bob + `,"action":{"type":"Shop::Action","id":"Read"},` + order + "," + mfa + "}", "invalid_argument", "group"},
		{"field action", `{` + bob + `,"action":{"type":"Shop::Action","id":"ViewOrder.field"},` + order + "," + mfa + "}", "invalid_argument", "asking for fields"},
		{"unknown type", `{"principal":{"type":"Shop::Robot","id":"r"},` + view + "," + order + "," + mfa + "}", "invalid_argument", "Shop::Robot"},
		{"NUL in id", `{"principal":{"type":"Shop::User","id":"a\u0000b"},` + view + "," + order + "," + mfa + "}", "invalid_argument", "principal.id"},
		{"context wrong type", prefix + `"context":{"mfa":"yes"}}`, "invalid_argument", "context.mfa: expected a Bool, got a string"},
		{"context null", prefix + `"context":{"mfa":null}}`, "invalid_argument", "context.mfa"},
		{"context missing", prefix + `"context":{}}`, "invalid_argument", `required attribute "mfa" is missing`},
		{"context undeclared", prefix + `"context":{"mfa":true,"admin":true}}`, "invalid_argument", `"admin" is not declared`},
		{"context member twice", prefix + `"context":{"mfa":false,"mfa":true}}`, "invalid_argument", `duplicate map key "mfa"`},
		{"context member twice, once by its code", prefix + `"context":{"mfa":false,"\u006dfa":true}}`, "invalid_argument", "duplicate map key"},
		{"context twice", prefix + mfa + "," + mfa + "}", "invalid_argument", `duplicate field "context"`},
		{"half a character", prefix + `"context":{"mfa":"\ud800"}}`, "invalid_argument", ""},
		{"stored type inline", prefix + mfa + `,"entities":[{"uid":{"type":"Shop::Order","id":"42"}}]}`, "invalid_argument", "@source"},
		{"paths and all", prefix + mfa + `,"fields":{"all":true,"paths":["id"]}}`, "invalid_argument", "one of the two"},
		{"neither paths nor all", prefix + mfa + `,"fields":{"requireAll":true}}`, "invalid_argument", "one of the two"},
		{"foreign revision", prefix + mfa + `,"consistency":{"atLeastAsFresh":{"token":"AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAE"}}}`, "aborted", "another database"},
		{"broken revision", prefix + mfa + `,"consistency":{"atLeastAsFresh":{"token":"zzz"}}}`, "invalid_argument", "not a revision token"},
		{"deep", prefix + `"context":{"mfa":` + strings.Repeat(`{"a":`, 5000) + "1" + strings.Repeat("}", 5000) + "}}", "invalid_argument", "depth"},
		{"too large", prefix + mfa + `,"requestId":"` + strings.Repeat("x", 70_000) + `"}`, "invalid_argument", "the question has more than 65536 bytes, the limit"},
		{"request id too long", prefix + mfa + `,"requestId":"` + strings.Repeat("x", 200) + `"}`, "invalid_argument", "request_id"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, code, message := post(t, s.API+authorizePath, s.Token, "application/json", []byte(c.body))
			if code != c.code || !strings.Contains(message, c.message) {
				t.Errorf("got %q %q, want %q with %q", code, message, c.code, c.message)
			}
		})
	}
	// Only the two valid requests were decided, so only they are in the log.
	if n := count(t, s); n != 2 {
		t.Errorf("%d records, want 2", n)
	}

	t.Run("unknown binary field", func(t *testing.T) {
		_, code, _ := post(t, s.API+authorizePath, s.Token, "application/proto", []byte{0xfa, 0x3f, 0x01, 'x'})
		if code != "invalid_argument" {
			t.Errorf("got %q", code)
		}
	})
	t.Run("binary principal twice", func(t *testing.T) {
		for _, id := range []string{"bob", "alice"} {
			body, err := proto.Marshal(&cedarpostv1.AuthorizeRequest{Principal: &cedarpostv1.EntityUid{Type: "Shop::User", Id: "bob"}})
			if err != nil {
				t.Fatal(err)
			}
			second, err := proto.Marshal(&cedarpostv1.AuthorizeRequest{
				Principal: &cedarpostv1.EntityUid{Type: "Shop::User", Id: id}, Action: servertest.UID(`Shop::Action::"ViewOrder"`),
				Resource: servertest.UID(`Shop::Order::"42"`), Context: &structpb.Struct{Fields: map[string]*structpb.Value{"mfa": structpb.NewBoolValue(true)}},
			})
			if err != nil {
				t.Fatal(err)
			}
			if _, code, message := post(t, s.API+authorizePath, s.Token, "application/proto", append(body, second...)); code != "invalid_argument" || !strings.Contains(message, `"principal" twice`) {
				t.Errorf("got %q %q", code, message)
			}
		}
	})
	t.Run("too large in gRPC", func(t *testing.T) {
		client := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, s.Token, connecthttp.WithGRPC()))
		req := servertest.AskShop("bob", "ViewOrder", "42", true)
		req.RequestId = strings.Repeat("x", 70_000)
		_, err := client.Authorize(t.Context(), req)
		servertest.WantCode(t, err, connect.CodeInvalidArgument, "bytes, the limit is 65536")
	})
	t.Run("too large a part of a stream", func(t *testing.T) {
		stream, err := s.Policies.ApplyBundle(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_ = stream.Send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_File{File: &cedarpostv1.FilePart{Path: "p.cedar", Data: make([]byte, 5<<20)}}})
		_, err = stream.CloseAndReceive()
		servertest.WantCode(t, err, connect.CodeInvalidArgument, "the limit is 4194304")
	})
	t.Run("gzip bomb", func(t *testing.T) {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, _ = w.Write(bytes.Repeat([]byte(" "), 4<<20))
		_ = w.Close()
		_, code, message := post(t, s.API+authorizePath, s.Token, "application/json", b.Bytes(), "Content-Encoding", "gzip")
		if code != "unimplemented" || !strings.Contains(message, "without Content-Encoding") {
			t.Errorf("got %q %q", code, message)
		}
	})
	// A client that sends all before it reads gets the answer, however large its body is.
	t.Run("much too large, over HTTP/1.1", func(t *testing.T) {
		for _, size := range []int{5 << 20, 30 << 20} {
			conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", strings.TrimPrefix(s.API, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", authorizePath, s.Token, size)
			if _, err := conn.Write(bytes.Repeat([]byte(" "), size)); err != nil {
				t.Errorf("%d bytes: %v", size, err)
			}
			answer, err := io.ReadAll(conn)
			if err != nil || !strings.Contains(string(answer), "the question has more than 65536 bytes") {
				t.Errorf("%d bytes: %q, %v", size, answer, err)
			}
			_ = conn.Close()
		}
	})
	t.Run("no call of any protocol", func(t *testing.T) {
		for _, c := range []struct {
			method, path, contentType string
			status                    int
			text                      string
		}{
			{http.MethodPost, authorizePath, "", http.StatusUnsupportedMediaType, "Content-Type: application/json"},
			{http.MethodPost, cedarpostv1connect.AuthorizationServiceWatchProcedure, "application/json", http.StatusUnsupportedMediaType, "application/connect+json"},
			{http.MethodPost, authorizePath, "text/plain", http.StatusUnsupportedMediaType, "Content-Type: application/json"},
			{http.MethodGet, authorizePath, "", http.StatusMethodNotAllowed, "a call is a POST"},
			{http.MethodPost, "/cedarpost.v1.EntityService/ListEntities", "application/json", http.StatusNotFound, "on the admin plane"},
			{http.MethodPost, "/nothing", "application/json", http.StatusNotFound, "no such route"},
		} {
			res := send(t, c.method, s.API+c.path, "Authorization", "Bearer "+s.Token, "Content-Type", c.contentType)
			if res.code != c.status || !strings.Contains(res.body, c.text) {
				t.Errorf("%s %s, %q: %d %q", c.method, c.path, c.contentType, res.code, res.body)
			}
		}
	})
	t.Run("callers", func(t *testing.T) {
		body := []byte(prefix + mfa + "}")
		for name, token := range map[string]string{"none": "", "wrong": "cedarpost_nope", "prefix": s.Token[:20], "case": strings.ToUpper(s.Token)} {
			if status, code, _ := post(t, s.API+authorizePath, token, "application/json", body); status != 401 || code != "unauthenticated" {
				t.Errorf("%s key: %d %q", name, status, code)
			}
			if status, code, _ := post(t, s.Admin+"/cedarpost.v1.EntityService/ListEntities", token, "application/json", []byte("{}")); status != 401 || code != "unauthenticated" {
				t.Errorf("%s key on the admin plane: %d %q", name, status, code)
			}
		}
		// The body of a caller that is not authenticated is not read.
		if _, code, _ := post(t, s.API+authorizePath, "", "application/json", []byte("{not json")); code != "unauthenticated" {
			t.Errorf("got %q", code)
		}
		// A plane does not serve the services of another plane.
		if status, _, _ := post(t, s.API+"/cedarpost.v1.EntityService/ListEntities", s.Token, "application/json", []byte("{}")); status != 404 {
			t.Errorf("entities on the decision plane: %d", status)
		}
	})
}

func TestOps(t *testing.T) {
	s := servertest.New(t)
	for path, want := range map[string]int{"/livez": 200, "/readyz": 200, "/metrics": 200, "/nothing": 404} {
		res, err := http.Get(s.Ops + path)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s: %d", path, res.StatusCode)
		}
	}
	// Health needs no key, on either plane.
	for _, url := range []string{s.API, s.Admin} {
		if status, code, _ := post(t, url+"/grpc.health.v1.Health/Check", "", "application/json", []byte("{}")); status != 200 {
			t.Errorf("health: %d %q", status, code)
		}
	}
}
