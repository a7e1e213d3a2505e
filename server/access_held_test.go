package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// held is a call whose last byte is not sent yet. finish sends it, and returns the status and the body
// of the answer.
func held(t *testing.T, s *servertest.Server, key, method, body string) (finish func() (int, string)) {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(s.Admin, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	last := len(body) - 1
	fmt.Fprintf(c, "POST /cedarpost.v1.%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", method, key, len(body), body[:last])
	return func() (int, string) {
		fmt.Fprint(c, body[last:])
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(text)
	}
}

// Calls that began before their key was revoked, or their grants were deleted, do nothing any more when
// their last bytes come: unary calls, an atomic import, a publish.
func TestAttackCallsHeldOpen(t *testing.T) {
	t.Parallel()
	s := docServer(t, server.ReadSlowly)
	root := accessOf(s, s.Token)
	for name, end := range map[string]func() error{
		"revoked": func() error {
			_, err := root.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "revoked"})
			return err
		},
		"without": func() error {
			for _, role := range []string{access.Operator, access.DataWriter, access.PolicyPublisher, access.Auditor} {
				if _, err := root.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "without", Role: role, Bundle: "*"}); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		stolen := newCaller(t, s, name, grant(access.Operator, "*"), grant(access.DataWriter, "*"), grant(access.PolicyPublisher, "*"), grant(access.Auditor, "*"))
		calls := map[string]func() (int, string){}
		for method, body := range map[string]string{
			"AccessService/CreateKey":     `{"caller": "backdoor", "grants": [{"role": "operator", "bundle": "*"}]}`,
			"AccessService/ListKeys":      `{} `,
			"EntityService/WriteEntities": `{"operations": [{"put": {"uid": {"type": "Doc::User", "id": "eve"}}}]}`,
			"AuditService/QueryEvents":    `{} `,
		} {
			calls[method] = held(t, s, stolen, method, body)
		}
		own := servertest.On(t, s.URL)
		own.UseKey(stolen)
		imported, err := own.Entities.ImportEntities(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := imported.Send(&cedarpostv1.ImportEntitiesRequest{Options: &cedarpostv1.ImportOptions{Atomic: true}, Entities: []*cedarpostv1.Entity{servertest.DocUser(t, "mallory")}}); err != nil {
			t.Fatal(err)
		}
		published, err := own.Policies.ApplyBundle(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range []*cedarpostv1.ApplyBundleRequest{
			{Part: &cedarpostv1.ApplyBundleRequest_Header{Header: &cedarpostv1.BundleHeader{Name: "doc"}}},
			{Part: &cedarpostv1.ApplyBundleRequest_File{File: &cedarpostv1.FilePart{Path: "schema.cedarschema", Data: []byte(servertest.DocSchema)}}},
		} {
			if err := published.Send(m); err != nil {
				t.Fatal(err)
			}
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		for _, on := range []*servertest.Server{s, own} {
			servertest.Eventually(t, "the end of its rights", func() bool {
				_, err := accessOf(on, stolen).ListKeys(t.Context(), &cedarpostv1.ListKeysRequest{})
				return err != nil
			})
		}
		before := revision(t, s)
		refused := 0
		for method, finish := range calls {
			if status, text := finish(); status != http.StatusUnauthorized && status != http.StatusForbidden {
				t.Errorf("%s %s: %d %s", name, method, status, text)
			} else {
				refused++
			}
		}
		ended := func(what string, err error) {
			if code := connect.CodeOf(err); err == nil || code != connect.CodeUnauthenticated && code != connect.CodePermissionDenied {
				t.Errorf("%s %s: %v", name, what, err)
			} else {
				refused++
			}
		}
		_, err = imported.CloseAndReceive()
		ended("import", err)
		_, err = published.CloseAndReceive()
		ended("publish", err)
		if now := revision(t, s); now != before {
			t.Errorf("%s: revision %d, then %d", name, before, now)
		}
		t.Logf("%s: %d of %d calls that were held open are refused", name, refused, len(calls)+2)
	}
}

// Streams end with their own key, also if the caller has another one, and with the right that they need.
func TestAttackStreamsAfterTheirRight(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	root := accessOf(s, s.Token)
	follow := func(key string) cedarpostv1connect.AuditServiceExportDecisionsClientStream {
		stream, err := cedarpostv1connect.NewAuditServiceClient(s.Client(s.Admin, key)).ExportDecisions(t.Context(), &cedarpostv1.ExportDecisionsRequest{Follow: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Receive(); err != nil {
			t.Fatal(err)
		}
		return stream
	}
	ended := func(stream cedarpostv1connect.AuditServiceExportDecisionsClientStream, code connect.Code, text string) {
		t.Helper()
		var err error
		for err == nil {
			_, err = stream.Receive()
		}
		servertest.WantCode(t, err, code, text)
	}
	first := newCaller(t, s, "siem", grant(access.Auditor, "*"), grant(access.DataWriter, "doc"))
	export := follow(first)
	imports, err := cedarpostv1connect.NewEntityServiceClient(s.Client(s.Admin, first)).ImportEntities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := imports.Send(&cedarpostv1.ImportEntitiesRequest{Entities: []*cedarpostv1.Entity{servertest.DocUser(t, "ann")}}); err != nil {
		t.Fatal(err)
	}
	servertest.Eventually(t, "the import", func() bool {
		_, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"ann"`)})
		return err == nil
	})
	next, err := root.RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: "siem"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root.RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Id: next.Others[0].Id}); err != nil {
		t.Fatal(err)
	}
	ended(export, connect.CodeUnauthenticated, "was revoked")
	_ = imports.Send(&cedarpostv1.ImportEntitiesRequest{Entities: []*cedarpostv1.Entity{servertest.DocUser(t, "eve")}}) // the reply has the error
	_, err = imports.CloseAndReceive()
	servertest.WantCode(t, err, connect.CodeUnauthenticated, "was revoked")

	// The grant of all bundles goes, and one of a bundle stays.
	if _, err := root.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: "siem", Role: access.Auditor, Bundle: "doc"}}); err != nil {
		t.Fatal(err)
	}
	export = follow(next.Secret)
	if _, err := root.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "siem", Role: access.Auditor, Bundle: "*"}); err != nil {
		t.Fatal(err)
	}
	ended(export, connect.CodePermissionDenied, "ExportDecisions")
	t.Log("2 exports and 1 import of a right that had ended: all ended")
}
