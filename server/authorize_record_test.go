package server_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// recordOf reads the record of an answer and its row.
func recordOf(t testing.TB, s *servertest.Server, res *cedarpostv1.AuthorizeResponse) (*cedarpostv1.DecisionRecord, store.Decision) {
	t.Helper()
	row, err := s.DB.GetDecision(t.Context(), uuid.MustParse(res.DecisionId))
	if err != nil {
		t.Fatal(err)
	}
	rec := &cedarpostv1.DecisionRecord{}
	if err := proto.Unmarshal(row.Record, rec); err != nil {
		t.Fatal(err)
	}
	return rec, row
}

func authorize(t testing.TB, s *servertest.Server, req *cedarpostv1.AuthorizeRequest) *cedarpostv1.AuthorizeResponse {
	t.Helper()
	res, err := s.Authorization.Authorize(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func structOf(t testing.TB, text string) *structpb.Struct {
	t.Helper()
	out := &structpb.Struct{}
	if err := out.UnmarshalJSON([]byte(text)); err != nil {
		t.Fatal(err)
	}
	return out
}

// The record says in which mode it was made and how long the loads took. The column of fields
// says for each path whether it was permitted or denied.
func TestRecordModeAndFields(t *testing.T) {
	t.Parallel() // it takes long
	for _, mode := range []auditlog.Mode{auditlog.Strict, auditlog.Buffered} {
		s := servertest.New(t, func(c *server.Config) { c.Record = mode })
		s.MustLoadShop()
		req := servertest.AskShop("alice", "ViewOrder", "42", true)
		req.Fields = &cedarpostv1.FieldSelection{Paths: []string{"total", "none.such", "customer", "id"}}
		res := authorize(t, s, req)
		s.MustPut(servertest.Entity(t, `{"uid":{"type":"Shop::Role","id":"new"}}`))
		// In buffered mode the answer can come before the commit.
		if mode == auditlog.Buffered {
			s.Stop()
			s = servertest.On(t, s.URL)
		}
		rec, row := recordOf(t, s, res)
		if rec.Mode != string(mode) || rec.LoadTime.AsDuration() <= 0 || rec.LoadTime.AsDuration() > rec.EvaluationTime.AsDuration() {
			t.Errorf("mode %q, loaded in %v of %v", rec.Mode, rec.LoadTime.AsDuration(), rec.EvaluationTime.AsDuration())
		}
		want := []string{"+customer.email", "+customer.name", "+id", "-none.such", "-total"}
		if !slices.Equal(row.Fields, want) || len(row.Masked) != 0 || len(rec.Masked) != 0 {
			t.Errorf("fields %q, want %q; masked %v", row.Fields, want, rec.Masked)
		}
	}
}

// maskedBundle is an application whose requests have values that must not be stored.
var maskedBundle = []string{"schema.cedarschema", `namespace H {
  entity U { level: Long };
  @source("request") entity Form { @sensitive ssn: String, city: String, author: U };
  action Send appliesTo { principal: [U], resource: [Form], context: { @sensitive pin: Long, tags: Set<String>, @sensitive codes: Set<String> } };
}`, "p.cedar", `
@id("sends") permit (principal, action, resource) when { resource.author == principal };
@id("fails") forbid (principal, action, resource) when { context.pin + 9223372036854775807 == 1 };
@id("missing") forbid (principal, action, resource) when { principal.level > 3 };`}

func maskedRequest(t testing.TB, ssn string, pin string) *cedarpostv1.AuthorizeRequest {
	form := servertest.Entity(t, `{"uid":{"type":"H::Form","id":"f"},"attrs":{"ssn":"`+ssn+`","city":"Bern","author":{"type":"H::U","id":"u"}}}`)
	return &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`H::U::"u"`), Action: servertest.UID(`H::Action::"Send"`), Resource: form.Uid,
		Context:  structOf(t, `{"pin": `+pin+`, "tags": ["b", "a"], "codes": ["y", "x"]}`),
		Entities: []*cedarpostv1.Entity{form},
	}
}

func withMaskKey(key byte) servertest.Option {
	return func(c *server.Config) { c.MaskKey = secret.New(strings.Repeat(string(rune(key)), 32)) }
}

// Values of a request that are marked @sensitive are nowhere in the database. A caller that
// knows the value can find the decision, on a server that has the mask key.
func TestMasking(t *testing.T) {
	s := servertest.New(t, withMaskKey(1))
	s.MustApply("h", maskedBundle...)
	res := authorize(t, s, maskedRequest(t, "756.1234", "4242424242424"))
	authorize(t, s, maskedRequest(t, "756.9999", "7"))
	rec, row := recordOf(t, s, res)
	if want := []string{"context.codes", "context.pin", "entities[0].attrs.ssn"}; !slices.Equal(rec.Masked, want) || len(row.Masked) != len(want) {
		t.Errorf("masked %q, want %q", rec.Masked, want)
	}
	masked := rec.Entities[0].Attrs.Fields["ssn"].GetStructValue().GetFields()["__masked"].GetStringValue()
	if masked != hex.EncodeToString(row.Masked[2]) || len(masked) != 64 {
		t.Errorf("in place of the value: %q", masked)
	}
	// The hash is the one that docs/audit.md describes, so that others can compute it.
	for i, text := range []string{`["x","y"]`, `4242424242424`, `"756.1234"`} {
		h := hmac.New(sha256.New, bytes.Repeat([]byte{1}, 32))
		h.Write([]byte(text))
		if !bytes.Equal(h.Sum(nil), row.Masked[i]) {
			t.Errorf("%s is not hashed as documented", text)
		}
	}
	if rec.Entities[0].Attrs.Fields["city"].GetStringValue() != "Bern" || len(rec.Context.Fields["tags"].GetListValue().GetValues()) != 2 {
		t.Errorf("what is not marked is not as it came: %v", rec)
	}
	if len(res.Errors) != 2 || !strings.Contains(res.Errors[0].Message, "withheld") || !strings.Contains(res.Errors[1].Message, `H::U::"u"`) {
		t.Errorf("errors: %v", res.Errors)
	}
	find := func(s *servertest.Server, text string) int {
		t.Helper()
		q := &cedarpostv1.QueryDecisionsRequest{MaskedValue: text, PageSize: 1, From: timestamppb.New(time.Now().Add(-time.Hour))}
		page, err := s.Audit.QueryDecisions(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		n := len(page.Decisions)
		if page.NextPageToken != "" {
			if token, err := base64.RawURLEncoding.DecodeString(page.NextPageToken); err != nil || bytes.Contains(token, []byte(text)) {
				t.Errorf("page token %s %v", token, err)
			}
			q.PageToken = page.NextPageToken
			page, err = s.Audit.QueryDecisions(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			n += len(page.Decisions)
		}
		return n
	}
	for text, want := range map[string]int{
		`"756.1234"`: 1, `756.1234`: 0, // a number
		`756.1234-`: 0, `4242424242424`: 1, ` 4242424242424.0 `: 1, `"4242424242424"`: 0, `["x","y"]`: 2, `["y", "x"]`: 2, `["x"]`: 0, `Bern`: 0,
	} {
		if n := find(s, text); n != want {
			t.Errorf("%s: found in %d records, want %d", text, n, want)
		}
	}
	authorize(t, s, maskedRequest(t, "no JSON", "8"))
	if n := find(s, "no JSON"); n != 1 {
		t.Errorf("a string without quotes: found in %d records", n)
	}
	for _, table := range []string{"decisions", "events", "audit_batches", "entities"} {
		for _, secret := range []string{"756.1234", "4242424242424"} {
			if n := rowsWith(t, s.URL, table, secret); n > 0 {
				t.Errorf("%s: %d rows hold %s", table, n, secret)
			}
		}
	}
	if other := servertest.On(t, s.URL, withMaskKey(1)); find(other, "4242424242424") != 1 {
		t.Error("another server with the key does not find it")
	}
	if other := servertest.On(t, s.URL, withMaskKey(2)); find(other, "4242424242424") != 0 {
		t.Error("a server with another key finds it")
	}
	if other := servertest.On(t, s.URL, func(c *server.Config) { c.MaskKey = secret.Secret{} }); find(other, "4242424242424") != 0 {
		t.Error("a server without the key finds it")
	}
}

// rowsWith counts the rows that contain a text in any column, those of bytes included.
func rowsWith(t testing.TB, url, table, text string) (n int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	err = conn.QueryRow(t.Context(), "select count(*) from "+table+" r where strpos(r::text, $1) > 0 or strpos(r::text, $2) > 0",
		text, hex.EncodeToString([]byte(text))).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestMaskKeyFile(t *testing.T) {
	key := bytes.Repeat([]byte{7, 0xfe}, 16)
	for text, ok := range map[string]bool{
		hex.EncodeToString(key): true, strings.ToUpper(hex.EncodeToString(key)) + "\n": true,
		base64.StdEncoding.EncodeToString(key): true, base64.RawURLEncoding.EncodeToString(key) + "\n": true,
		"": false, "secret": false, hex.EncodeToString(key[1:]): false, string(key): false,
		hex.EncodeToString(key) + "\n" + hex.EncodeToString(key):                                         false,
		base64.StdEncoding.EncodeToString(key)[:20] + "\n" + base64.StdEncoding.EncodeToString(key)[20:]: false,
	} {
		file := filepath.Join(t.TempDir(), "mask.key")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := decisionlog.ReadMaskKey(file)
		if ok != (err == nil) || ok && !bytes.Equal(got, key) || !ok && !strings.Contains(err.Error(), file) {
			t.Errorf("%q: %x %v", text, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the error tells what is in the file: %v", err)
		}
	}
	file := filepath.Join(t.TempDir(), "mask.key")
	if err := decisionlog.MakeMaskKey(file); err != nil {
		t.Fatal(err)
	}
	first, err := decisionlog.ReadMaskKey(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := decisionlog.MakeMaskKey(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	again, err := decisionlog.ReadMaskKey(file)
	if err != nil || !bytes.Equal(first, again) {
		t.Errorf("made twice, open to its group: %v", err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := decisionlog.ReadMaskKey(file); err == nil || !strings.Contains(err.Error(), "all users") {
		t.Errorf("open to all: %v", err)
	}
	if _, err := decisionlog.ReadMaskKey(filepath.Join(t.TempDir(), "none")); !os.IsNotExist(err) && !strings.Contains(err.Error(), "no such file") {
		t.Errorf("no file: %v", err)
	}
	if _, err := server.New(t.Context(), server.Config{DB: servertest.New(t).DB, MaskKey: secret.New("short")}); err == nil || !strings.Contains(err.Error(), "5 bytes") {
		t.Errorf("a short key: %v", err)
	}
}

// exec runs SQL in a session of its own.
func exec(t testing.TB, url, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// The record has the trace id of a call whose traceparent header is valid
// (https://www.w3.org/TR/trace-context/#traceparent-header).
func TestTraceIDIsRecorded(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	const id = "4bf92f3577b34da6a3ce929d0e0e4736"
	for header, want := range map[string]string{
		"":                                  "",
		"00-" + id + "-00f067aa0ba902b7-01": id,
		"00-" + id + "-00f067aa0ba902b7-00": id,
		"42-" + id + "-00f067aa0ba902b7-01-of-a-later-version":      id,
		"00-" + strings.Repeat("0", 32) + "-00f067aa0ba902b7-01":    "",
		"00-" + id + "-" + strings.Repeat("0", 16) + "-01":          "",
		"00-" + strings.ToUpper(id) + "-00f067aa0ba902b7-01":        "",
		"ff-" + id + "-00f067aa0ba902b7-01":                         "",
		"00-" + id + "-00f067aa0ba902b7-01-of-the-same-version-too": "",
		"00-" + id: "",
	} {
		body := []byte(`{"principal":{"type":"Shop::User","id":"bob"},"action":{"type":"Shop::Action","id":"ViewOrder"},"resource":{"type":"Shop::Order","id":"42"},"context":{"mfa":true}}`)
		status, _, text := post(t, s.API+cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, s.Token, "application/json", body, "Traceparent", header)
		if status != http.StatusOK {
			t.Fatalf("%d %s", status, text)
		}
		page, err := s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{PageSize: 1})
		if err != nil || len(page.Decisions) != 1 {
			t.Fatal(page, err)
		}
		if got := page.Decisions[0].TraceId; got != want {
			t.Errorf("traceparent %q: recorded %q, want %q", header, got, want)
		}
	}
}
