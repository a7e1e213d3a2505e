package server_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// goodRequests has a valid request for each procedure that is not a stream to the caller. Each
// string in them, also in empty messages and lists, is replaced by bad text in turn.
var goodRequests = map[string]string{
	"AuthorizationService/Authorize": `{"principal":{"type":"Doc::User","id":"ann"},"action":{"type":"Doc::Action","id":"Publish"},
		"resource":{"type":"Doc::Draft","id":"d"},"requestId":"r","entities":[{"uid":{"type":"Doc::Draft","id":"d"},
		"attrs":{"author":{"type":"Doc::User","id":"ann"},"size":1}}]}`,
	"AuthorizationService/AuthorizeBatch": `{"checks":[{"principal":{"type":"Doc::User","id":"ann"},"action":{"type":"Doc::Action","id":"Read"},
		"resource":{"type":"Doc::Paper","id":"p"},"requestId":"r"}]}`,
	"AuthorizationService/GetRevision": `{}`,
	"AuthorizationService/ReportReuse": `{"reportId":"019f6e2b-5c1e-7a54-9d6a-0c3f0e6b8a11","failOpens":[{"principal":{"type":"Doc::User","id":"ann"},
		"action":{"type":"Doc::Action","id":"Read"},"resource":{"type":"Doc::Paper","id":"p"},"reason":"x","code":"y","count":"1",
		"first":"2026-01-01T00:00:00Z","last":"2026-01-01T00:00:00Z"}]}`,
	"EntityService/WriteEntities": `{"operations":[{"put":{"uid":{"type":"Doc::User","id":"ann"},"attrs":{"level":1,"nick":"a"},
		"parents":[{"type":"Doc::Group","id":"g"}]}}]}`,
	"EntityService/GetEntity":          `{"uid":{"type":"Doc::User","id":"ann"}}`,
	"EntityService/ListEntities":       `{"type":"Doc::User","attributes":[{"name":"nick","value":"x"}]}`,
	"EntityService/ImportEntities":     `{"entities":[{"uid":{"type":"Doc::User","id":"ann"},"attrs":{"level":1,"nick":"a"}}],"options":{"importId":"i"}}`,
	"EntityService/GetImport":          `{"importId":"i"}`,
	"EntityService/QueryEntityChanges": `{"uid":{"type":"Doc::User","id":"ann"}}`,
	"PolicyService/ApplyBundle":        `{"header":{"name":"doc","dryRun":true}}`,
	"PolicyService/ListBundles":        `{}`,
	"PolicyService/ListPolicies":       `{"bundle":"doc","principal":{"type":"Doc::User","id":"ann"},"action":{"type":"Doc::Action","id":"Read"},"resource":{"type":"Doc::Paper","id":"p"},"annotation":"id","annotationValue":"x"}`,
	"PolicyService/GetPolicy":          `{"bundle":"doc","id":"readers"}`,
	"PolicyService/ListVersions":       `{"bundle":"doc"}`,
	"PolicyService/DiffVersions":       `{"bundle":"doc","from":"1","to":"1"}`,
	"PolicyService/RollbackVersion":    `{"bundle":"doc","version":"1","reason":"r"}`,
	"PolicyService/DeleteBundle":       `{"bundle":"doc","reason":"r","expectVersion":"99","leaveTypes":["Doc::User"]}`,
	"PolicyService/FreezeBundle":       `{"bundle":"doc","reason":"r"}`,
	"PolicyService/UnfreezeBundle":     `{"bundle":"doc","reason":"r"}`,
	"PolicyService/CreateChange":       `{"bundle":"doc","title":"t","edits":[{"path":"a.cedar","content":"eA=="}]}`,
	"PolicyService/UpdateChange":       `{"id":"doc-1","title":"t"}`,
	"PolicyService/GetChange":          `{"id":"doc-1"}`,
	"PolicyService/ListChanges":        `{"bundle":"doc"}`,
	"PolicyService/CheckChange":        `{"id":"doc-1"}`,
	"PolicyService/ShadowChange":       `{"id":"doc-1","digest":"` + strings.Repeat("0", 64) + `"}`,
	"PolicyService/GetImpactReport":    `{"id":"doc-r0000000000000000"}`,
	"PolicyService/ApproveChange":      `{"id":"doc-1","digest":"` + strings.Repeat("0", 64) + `"}`,
	"PolicyService/DeclineChange":      `{"id":"doc-1","digest":"` + strings.Repeat("0", 64) + `"}`,
	"PolicyService/PublishChange":      `{"id":"doc-1","digest":"` + strings.Repeat("0", 64) + `"}`,
	"PolicyService/DiscardChange":      `{"id":"doc-1"}`,
	"AuditService/QueryDecisions":      `{"principal":{"type":"Doc::User","id":"ann"}}`,
	"AuditService/CountDecisions":      `{"filter":{"principal":{"type":"Doc::User","id":"ann"}},"group":"PRINCIPAL"}`,
	"AuditService/GetDecision":         `{"decisionId":"019f6e2b-5c1e-7a54-9d6a-0c3f0e6b8a11"}`,
	"AuditService/ReplayDecision":      `{"decisionId":"019f6e2b-5c1e-7a54-9d6a-0c3f0e6b8a11"}`,
	"AuditService/QueryEvents":         `{"caller":"c"}`,
	"AuditService/GetCheckpoint":       `{}`,
	"AuditService/GetInclusionProof":   `{"id":"019f6e2b-5c1e-7a54-9d6a-0c3f0e6b8a11"}`,
	"AuditService/GetConsistencyProof": `{}`,
}

// textField is one string in a request. spoil replaces it in the message at the same place.
type textField struct {
	path  string
	spoil func(m protoreflect.Message, text string)
}

// textFields lists the strings of a message, and of the messages in it, whether they are set or
// not.
func textFields(m protoreflect.MessageDescriptor, path string, depth int) (list []textField) {
	if depth == 0 {
		return nil
	}
	for i := range m.Fields().Len() {
		fd := m.Fields().Get(i)
		at := path + "." + string(fd.Name())
		switch {
		case fd.IsMap(): // of a Struct
			list = append(list, textField{at + " key", func(m protoreflect.Message, text string) {
				m.Mutable(fd).Map().Set(protoreflect.ValueOfString(text).MapKey(), m.Mutable(fd).Map().NewValue())
			}})
			for _, below := range textFields(fd.MapValue().Message(), at, depth-1) {
				list = append(list, textField{below.path, func(m protoreflect.Message, text string) {
					entries := m.Mutable(fd).Map()
					key := protoreflect.ValueOfString("nick").MapKey()
					value := entries.NewValue()
					below.spoil(value.Message(), text)
					entries.Set(key, value)
				}})
			}
		case fd.Kind() == protoreflect.StringKind && fd.IsList():
			list = append(list, textField{at, func(m protoreflect.Message, text string) {
				m.Mutable(fd).List().Append(protoreflect.ValueOfString(text))
			}})
		case fd.Kind() == protoreflect.StringKind:
			list = append(list, textField{at, func(m protoreflect.Message, text string) { m.Set(fd, protoreflect.ValueOfString(text)) }})
		case fd.Message() != nil:
			for _, below := range textFields(fd.Message(), at, depth-1) {
				list = append(list, textField{below.path, func(m protoreflect.Message, text string) {
					if !fd.IsList() {
						below.spoil(m.Mutable(fd).Message(), text)
						return
					}
					elements := m.Mutable(fd).List()
					if elements.Len() == 0 {
						elements.AppendMutable()
					}
					below.spoil(elements.Get(0).Message(), text)
				}})
			}
		}
	}
	return list
}

// callProto sends one message and returns the Connect code of the answer, "" for none.
func callProto(t *testing.T, url, token string, stream bool, m proto.Message) (code, message string) {
	t.Helper()
	body, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if !stream {
		_, code, message = post(t, url, token, "application/proto", body)
		return code, message
	}
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body)))
	end := endOfStream(t, url, token, append(frame, body...))
	var e struct {
		Error struct{ Code, Message string }
	}
	if err := json.Unmarshal(end, &e); err != nil {
		t.Fatalf("%q: %v", end, err)
	}
	return e.Error.Code, e.Error.Message
}

// No text that a caller can send makes a call fail as if the service were at fault: not a NUL
// character in any string of any request, whether the string is checked or not.
func TestAttackTextInEveryString(t *testing.T) {
	s := docServer(t)
	sent, codes, tested := 0, map[string]int{}, 0
	for _, file := range []protoreflect.FileDescriptor{
		cedarpostv1.File_cedarpost_v1_authorization_proto, cedarpostv1.File_cedarpost_v1_entity_proto,
		cedarpostv1.File_cedarpost_v1_policy_proto, cedarpostv1.File_cedarpost_v1_audit_proto,
	} {
		service := file.Services().Get(0)
		plane := s.Admin
		if service.Name() == "AuthorizationService" {
			plane = s.API
		}
		for i := range service.Methods().Len() {
			method := service.Methods().Get(i)
			if method.IsStreamingServer() {
				continue
			}
			name := string(service.Name()) + "/" + string(method.Name())
			good, ok := goodRequests[name]
			if !ok {
				t.Errorf("%s: this test has no request", name)
				continue
			}
			tested++
			base := dynamicpb.NewMessage(method.Input())
			if err := protojson.Unmarshal([]byte(good), base); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for _, field := range textFields(method.Input(), "", 6) {
				for _, text := range []string{"\x00", "a\x00b"} {
					m := proto.CloneOf(base)
					field.spoil(m, text)
					code, message := callProto(t, plane+"/cedarpost.v1."+name, s.Token, method.IsStreamingClient(), m)
					sent++
					codes[code]++
					if slices.Contains([]string{"unavailable", "internal", "unknown", "data_loss"}, code) {
						t.Errorf("%s%s: %s: %s", name, field.path, code, message)
					}
				}
			}
		}
	}
	t.Logf("attack: NUL in each string of %d procedures, %d requests: %v", tested, sent, codes)
}

// A page token that a caller makes itself, with text that cannot be stored or compared, is
// refused as a page token.
func TestAttackPageTokens(t *testing.T) {
	s := docServer(t)
	s.MustPut(servertest.DocUser(t, "ann"), servertest.DocUser(t, "bob"))
	res, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	changes, err := s.Entities.QueryEntityChanges(t.Context(), &cedarpostv1.QueryEntityChangesRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	sent := 0
	for _, c := range []struct{ procedure, token string }{
		{"ListEntities", res.NextPageToken}, {"QueryEntityChanges", changes.NextPageToken},
	} {
		text, err := base64.RawURLEncoding.DecodeString(c.token)
		if err != nil || !strings.Contains(string(text), `"ann"`) && !strings.Contains(string(text), `"bob"`) {
			t.Fatalf("%s: %q, %v", c.procedure, text, err)
		}
		for _, id := range []string{`"\u0000"`, `"a\u0000b"`} {
			spoilt := strings.NewReplacer(`"ann"`, id, `"bob"`, id).Replace(string(text))
			body := fmt.Sprintf(`{"pageToken":%q,"pageSize":1}`, base64.RawURLEncoding.EncodeToString([]byte(spoilt)))
			_, code, message := post(t, s.Admin+"/cedarpost.v1.EntityService/"+c.procedure, s.Token, "application/json", []byte(body))
			sent++
			if code != "invalid_argument" || !strings.Contains(message, "page token") {
				t.Errorf("%s: %s: %q", c.procedure, code, message)
			}
		}
	}
	t.Logf("attack: %d page tokens with NUL: all invalid_argument", sent)
}

// endOfStream sends frames to a procedure that the caller streams to, and returns the last
// message of the answer, which has its error.
func endOfStream(t *testing.T, url, token string, frames []byte) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(frames))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/connect+proto")
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	all, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	for rest := all; len(rest) >= 5; {
		n := 5 + int(binary.BigEndian.Uint32(rest[1:]))
		if rest[0]&2 != 0 {
			return rest[5:n]
		}
		rest = rest[n:]
	}
	t.Fatalf("%s: no end in %q", url, all)
	return nil
}
