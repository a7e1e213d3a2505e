package server_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// held is a call that was admitted, and whose last byte is not sent yet. finish sends it, and returns the
// status and the body of the answer.
func held(t *testing.T, s *servertest.Server, key, method, body string) (finish func() (int, string)) {
	t.Helper()
	return heldAs(t, s, key, method, "application/json", body)
}

// heldStream is held for a stream with one message.
func heldStream(t *testing.T, s *servertest.Server, key, method, message string) (finish func() (int, string)) {
	t.Helper()
	envelope := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	return heldAs(t, s, key, method, "application/connect+json", string(envelope)+message)
}

func heldAs(t *testing.T, s *servertest.Server, key, method, contentType, body string) (finish func() (int, string)) {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(s.Admin, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	last := len(body) - 1
	answers := bufio.NewReader(c)
	fmt.Fprintf(c, "POST /cedarpost.v1.%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: %s\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", method, key, contentType, len(body))
	// The server asks for the body after it has admitted the caller.
	res, err := http.ReadResponse(answers, nil)
	if err != nil || res.StatusCode != http.StatusContinue {
		t.Fatalf("%s: %v, %v", method, res, err)
	}
	_ = res.Body.Close()
	fmt.Fprint(c, body[:last])
	return func() (int, string) {
		fmt.Fprint(c, body[last:])
		res, err := http.ReadResponse(answers, nil)
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

// Two bundles, doc and other, alike but for their namespaces.
func twoBundles(t *testing.T) *servertest.Server {
	t.Helper()
	s := docServer(t)
	s.MustApply("other", "schema.cedarschema", strings.ReplaceAll(servertest.DocSchema, "namespace Doc", "namespace Other"), "policies.cedar", strings.ReplaceAll(servertest.DocPolicies, "Doc::", "Other::"))
	return s
}

// askIn asks a question about an action of a namespace, and returns the id of the decision.
func askIn(t *testing.T, s *servertest.Server, ns string) string {
	t.Helper()
	res, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{Principal: servertest.UID(ns + `::User::"eve"`), Action: servertest.UID(ns + `::Action::"Read"`), Resource: servertest.UID(ns + `::Paper::"p"`)})
	if err != nil {
		t.Fatal(err)
	}
	return res.DecisionId
}

// Grants for all bundles are replaced by grants for one bundle while the last bytes of calls are held
// back. The answers show that bundle only.
func TestAttackHeldCallsKeepWideRights(t *testing.T) {
	t.Parallel()
	s := twoBundles(t)
	root := accessOf(s, s.Token)
	newCaller(t, s, "foreign", grant(access.Enforcer, "other"))
	for _, ns := range []string{"Doc", "Other"} {
		askIn(t, s, ns)
	}
	wide := newCaller(t, s, "wide", grant(access.Auditor, "*"), grant(access.Operator, "*"), grant(access.DataWriter, "*"))
	from := `"from": "` + time.Now().Add(-time.Hour).UTC().Format(time.RFC3339) + `"`
	calls := map[string]func() (int, string){}
	for method, body := range map[string]string{
		"AuditService/QueryDecisions": `{` + from + `}`,
		"AuditService/CountDecisions": `{"group": "ACTION", "filter": {` + from + `}}`,
		"PolicyService/ListBundles":   `{} `,
		"AccessService/ListGrants":    `{} `,
		"AccessService/ListKeys":      `{} `,
	} {
		calls[method] = held(t, s, wide, method, body)
	}
	// An import of another caller, which the wide right lets others take over.
	first := func(ns string) string {
		return `{"options": {"importId": "weekly", "more": true}, "entities": [{"uid": {"type": "` + ns + `::User", "id": "ann"}, "attrs": {"level": 1}}]}`
	}
	const imports = "EntityService/ImportEntities"
	if _, text := heldStream(t, s, newCaller(t, s, "victim", grant(access.DataWriter, "other")), imports, first("Other"))(); strings.Contains(text, "error") {
		t.Fatal(text)
	}
	takeover := heldStream(t, s, wide, imports, first("Doc"))
	for _, role := range []string{access.Auditor, access.Operator, access.DataWriter} {
		if _, err := root.PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: "wide", Role: role, Bundle: "doc"}}); err != nil {
			t.Fatal(err)
		}
		if _, err := root.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "wide", Role: role, Bundle: "*"}); err != nil {
			t.Fatal(err)
		}
	}
	cut := 0
	for method, finish := range calls {
		status, text := finish()
		told := strings.Contains(text, "Other::Action") || strings.Contains(text, `"other"`) || strings.Contains(text, `"foreign"`)
		if status != http.StatusOK || told {
			t.Errorf("%s: %d %s", method, status, text)
			continue
		}
		cut++
	}
	if _, text := takeover(); !strings.Contains(text, "already_exists") {
		t.Errorf("takeover: %s", text)
	}
	t.Logf("attack: calls that are held open until their wide grants are cut to one bundle: %d of %d answers show that bundle only, the takeover of an import is refused", cut, len(calls))
}

// The key of a caller that reads a bundle slowly is revoked. The server sends no more of the bundle
// than what was under way.
func TestAttackReaderOfABundleWithoutItsKey(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	const size = 16 << 20
	base, err := s.DB.PolicyRevision(t.Context(), 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.DB.PublishBundle(t.Context(), store.Publish{
		Bundle: store.Bundle{Name: "large", Digest: "d", Fields: "[]"}, Files: []store.File{{Path: "a", Content: bytes.Repeat([]byte("x"), size)}}, Caller: "test", BaseRevision: base,
	}); err != nil {
		t.Fatal(err)
	}
	secret := newCaller(t, s, "reader", grant(access.Auditor, "large"))
	c, err := net.Dial("tcp", strings.TrimPrefix(s.Admin, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.(*net.TCPConn).SetReadBuffer(256 << 10)
	message := `{"name": "large"}`
	envelope := string(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))) + message
	fmt.Fprintf(c, "POST /cedarpost.v1.PolicyService/GetBundle HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer %s\r\nContent-Type: application/connect+json\r\nContent-Length: %d\r\n\r\n%s", secret, len(envelope), envelope)
	head := make([]byte, 1024)
	if n, err := io.ReadFull(c, head); err != nil {
		t.Fatalf("%q, %v", head[:n], err)
	}
	if _, err := accessOf(s, s.Token).RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: "reader"}); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(c)
	if err != nil || !strings.Contains(string(rest[max(0, len(rest)-500):]), "unauthenticated") || len(rest) > size {
		t.Errorf("%d bytes, %q, %v", len(rest), rest[max(0, len(rest)-200):], err)
	}
	t.Logf("attack: a caller reads a bundle of %d MiB slowly, and its key is revoked: %.1f MiB more were sent", size>>20, float64(len(rest))/(1<<20))
}
