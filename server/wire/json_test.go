package wire

import (
	"bytes"
	"fmt"
	"math"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"pgregory.net/rapid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

var strict = protojson.UnmarshalOptions{RecursionLimit: 100}

// sameAsProtojson fails unless protojson reads data as ReadJSON does, if that reads it at all.
func sameAsProtojson(t interface{ Fatalf(string, ...any) }, data []byte) (read bool) {
	for _, empty := range []proto.Message{&cedarpostv1.AuthorizeRequest{}, &cedarpostv1.AuthorizeBatchRequest{}} {
		got, want := proto.Clone(empty), proto.Clone(empty)
		switch ok := ReadJSON(bytes.Clone(data), got); {
		case !ok && !proto.Equal(got, empty):
			t.Fatalf("%s: not read, and is %v", data, got)
		case ok:
			read = true
			if err := strict.Unmarshal(data, want); err != nil || !proto.Equal(got, want) {
				t.Fatalf("%s: read as %v; protojson says %v, %v", data, got, want, err)
			}
		}
	}
	return read
}

// words are not safe for concurrent use, so the tests of this package do not run in parallel.
var words = rapid.OneOf(rapid.SampledFrom([]string{"", "Shop::User", "bob", "a.b", "\"\\/\b\n\u2028<>&\x7f", "ü€😀", "1", "__entity"}), rapid.String())

func drawUID(t *rapid.T) *cedarpostv1.EntityUid {
	if rapid.IntRange(0, 9).Draw(t, "absent") == 0 {
		return nil
	}
	return &cedarpostv1.EntityUid{Type: words.Draw(t, "type"), Id: words.Draw(t, "id")}
}

func drawValue(t *rapid.T, depth int) *structpb.Value {
	kind := rapid.IntRange(0, 5).Draw(t, "kind")
	switch {
	case kind == 0:
		return structpb.NewBoolValue(rapid.Bool().Draw(t, "bool"))
	case kind == 1:
		return structpb.NewNumberValue(rapid.Float64Range(-math.MaxFloat64, math.MaxFloat64).Draw(t, "number"))
	case kind == 2 && depth > 0:
		return structpb.NewStructValue(drawRecord(t, depth-1))
	case kind == 3 && depth > 0:
		m := &structpb.ListValue{}
		for range rapid.IntRange(0, 3).Draw(t, "length") {
			m.Values = append(m.Values, drawValue(t, depth-1))
		}
		return structpb.NewListValue(m)
	case kind == 4 && rapid.IntRange(0, 9).Draw(t, "null") == 0:
		return structpb.NewNullValue()
	}
	return structpb.NewStringValue(words.Draw(t, "text"))
}

func drawRecord(t *rapid.T, depth int) *structpb.Struct {
	m := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for range rapid.IntRange(0, 3).Draw(t, "members") {
		m.Fields[words.Draw(t, "name")] = drawValue(t, depth)
	}
	return m
}

func drawQuestion(t *rapid.T) *cedarpostv1.AuthorizeRequest {
	m := &cedarpostv1.AuthorizeRequest{Principal: drawUID(t), Action: drawUID(t), Resource: drawUID(t), RequestId: words.Draw(t, "request_id")}
	m.Explain, m.WantCacheHint = rapid.Bool().Draw(t, "explain"), rapid.Bool().Draw(t, "hint")
	if rapid.Bool().Draw(t, "context") {
		m.Context = drawRecord(t, rapid.SampledFrom([]int{2, 2, 2, 40}).Draw(t, "depth"))
	}
	if rapid.Bool().Draw(t, "fields") {
		m.Fields = &cedarpostv1.FieldSelection{Paths: rapid.SliceOfN(words, 0, 3).Draw(t, "paths"), All: rapid.Bool().Draw(t, "all"), RequireAll: rapid.Bool().Draw(t, "require")}
	}
	for range rapid.IntRange(0, 2).Draw(t, "entities") {
		m.Entities = append(m.Entities, &cedarpostv1.Entity{Uid: drawUID(t), Attrs: drawRecord(t, 1), Parents: []*cedarpostv1.EntityUid{{Type: "T", Id: "p"}}})
	}
	m.Consistency = drawConsistency(t)
	if rapid.IntRange(0, 3).Draw(t, "token") == 0 {
		m.PrincipalToken = words.Draw(t, "principal_token")
	}
	return m
}

func drawConsistency(t *rapid.T) *cedarpostv1.Consistency {
	switch rapid.IntRange(0, 4).Draw(t, "consistency") {
	case 0:
		return &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_MinimizeLatency{MinimizeLatency: true}}
	case 1:
		return &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: rapid.Bool().Draw(t, "fully")}}
	case 2:
		return &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: drawRevision(t)}}
	case 3:
		return &cedarpostv1.Consistency{}
	}
	return nil
}

func drawRevision(t *rapid.T) *cedarpostv1.Revision {
	return &cedarpostv1.Revision{Token: words.Draw(t, "token"), Number: rapid.Int64().Draw(t, "number")}
}

// Questions are read as protojson reads them, and so is whatever a few changed bytes make of them.
func TestReadJSON(t *testing.T) {
	drawn, read := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		var m proto.Message = drawQuestion(t)
		if rapid.Bool().Draw(t, "batch") {
			m = &cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{drawQuestion(t), drawQuestion(t)}, Consistency: drawConsistency(t)}
		}
		options := protojson.MarshalOptions{Multiline: rapid.Bool().Draw(t, "multiline"), EmitDefaultValues: rapid.Bool().Draw(t, "defaults")}
		data, err := options.Marshal(m)
		if err != nil {
			t.Skip("not UTF-8")
		}
		if drawn++; sameAsProtojson(t, data) {
			read++
		}
		for range 3 {
			at := rapid.IntRange(0, len(data)-1).Draw(t, "at")
			data[at] = rapid.SampledFrom([]byte("\"{}[]:,\\u0nte1.-_ \x80")).Draw(t, "byte")
			sameAsProtojson(t, data)
		}
	})
	if t.Logf("%d of %d messages are read quickly", read, drawn); read < drawn*7/10 {
		t.Error("too few")
	}
}

// What is unusual or wrong is left to protojson.
func TestReadJSONLeavesTheRest(t *testing.T) {
	deep := func(n int) string {
		return `{"context":{"a":` + string(bytes.Repeat([]byte("["), n)) + string(bytes.Repeat([]byte("]"), n)) + `}}`
	}
	for _, text := range []string{
		``, `null`, `[]`, `{`, `{}{}`, `{} x`, `{"principal":null}`, `{"request_id":"x"}`, `{"request\u0049d":"x"}`, `{"unknown":1}`,
		`{"explain":true,"explain":true}`, `{"context":{"a":1,"a":2}}`, `{"context":{"a":1,"\u0061":2}}`, `{"context":{"a":1e999}}`, `{"explain":"true"}`, `{"requestId":1}`,
		`{"fields":{"paths":"a"}}`, `{"consistency":{"fullyConsistent":true,"minimizeLatency":true}}`, `{"consistency":{"atLeastAsFresh":{"number":1}}}`,
		`{"consistency":{"atLeastAsFresh":{"number":"01"}}}`, `{"consistency":{"atLeastAsFresh":{"number":"9223372036854775808"}}}`, `{"requestId":"\ud800"}`,
		"{\"requestId\":\"\xff\"}", `{"context":{"a":null}}`, deep(60), deep(10_000), `{"context":{"a":01}}`, `{"context":{"a":+1}}`, `{"explain":truE}`,
	} {
		if sameAsProtojson(t, []byte(text)) {
			t.Errorf("%.100s is read", text)
		}
	}
	for _, text := range []string{`{}`, ` { } `, `{"context":{"a":-0,"b":1e-400,"c":12345678901234567890}}`, `{"requestId":"\ud83d\ude00\u0000"}`, deep(20), `{"checks":[{}]}`} {
		if !sameAsProtojson(t, []byte(text)) {
			t.Errorf("%.100s is not read", text)
		}
	}
	if ReadJSON([]byte(`{}`), &cedarpostv1.GetEntityRequest{}) {
		t.Error("a message that it does not know is read")
	}
}

func FuzzReadJSON(f *testing.F) {
	f.Add([]byte(`{"principal":{"type":"Shop::User","id":"bob"},"context":{"mfa":true,"n":[1,{}]},"fields":{"paths":["id"]},"entities":[{"uid":{},"parents":[]}]}`))
	f.Add([]byte(`{"checks":[{"requestId":"\ud83d\ude00"}],"consistency":{"atLeastAsFresh":{"token":"x","number":"1"}}}`))
	f.Fuzz(func(t *testing.T, data []byte) { sameAsProtojson(t, data) })
}

func drawAnswer(t *rapid.T) *cedarpostv1.AuthorizeResponse {
	policy := func(label string) *cedarpostv1.PolicyRef {
		if rapid.IntRange(0, 9).Draw(t, label) == 0 {
			return nil
		}
		return &cedarpostv1.PolicyRef{Bundle: words.Draw(t, "bundle"), Id: words.Draw(t, "id")}
	}
	texts := rapid.SliceOfN(words, 0, 3)
	m := &cedarpostv1.AuthorizeResponse{Decision: cedarpostv1.Decision(rapid.IntRange(0, 3).Draw(t, "decision")), DecisionId: words.Draw(t, "decision_id"), ErrorsOmitted: rapid.Int32().Draw(t, "omitted")}
	if rapid.Bool().Draw(t, "denied") {
		m.DeniedAt = cedarpostv1.DeniedAt(rapid.IntRange(0, 4).Draw(t, "denied_at")).Enum()
	}
	if rapid.Bool().Draw(t, "fields") {
		m.Fields = &cedarpostv1.Fields{Permitted: texts.Draw(t, "permitted"), Denied: texts.Draw(t, "denied")}
	}
	for range rapid.IntRange(0, 2).Draw(t, "policies") {
		m.DeterminingPolicies = append(m.DeterminingPolicies, &cedarpostv1.PolicyRef{Bundle: words.Draw(t, "bundle"), Id: words.Draw(t, "id")})
		m.Errors = append(m.Errors, &cedarpostv1.PolicyError{Policy: policy("error"), Message: words.Draw(t, "message")})
		m.Obligations = append(m.Obligations, &cedarpostv1.Obligation{Policy: policy("obligation"), Text: words.Draw(t, "text")})
		m.Advice = append(m.Advice, &cedarpostv1.Advice{Policy: policy("advice"), Text: words.Draw(t, "text"), Paths: texts.Draw(t, "paths")})
	}
	if rapid.Bool().Draw(t, "revision") {
		m.Revision = drawRevision(t)
	}
	if rapid.Bool().Draw(t, "hint") {
		m.CacheHint = &cedarpostv1.CacheHint{Tags: rapid.SliceOfN(rapid.Uint64(), 0, 3).Draw(t, "tags")}
		if rapid.Bool().Draw(t, "age") {
			m.CacheHint.MaxAge = &durationpb.Duration{Seconds: rapid.Int64Range(-1, 1<<40).Draw(t, "seconds"), Nanos: rapid.SampledFrom([]int32{0, 1e6, 20e6, 500e6, 999e6, 1, -1, 1e9}).Draw(t, "nanos")}
		}
	}
	if rapid.IntRange(0, 19).Draw(t, "explanation") == 0 {
		m.Explanation = &cedarpostv1.Explanation{Summary: "s"}
	}
	return m
}

// Answers are written as protojson writes them.
func TestAppendJSON(t *testing.T) {
	options := protojson.MarshalOptions{EmitDefaultValues: true}
	drawn, written := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		var m proto.Message = drawAnswer(t)
		if rapid.Bool().Draw(t, "batch") {
			m = &cedarpostv1.AuthorizeBatchResponse{Revision: drawRevision(t), Results: []*cedarpostv1.AuthorizeBatchResult{
				{Result: &cedarpostv1.AuthorizeBatchResult_Response{Response: drawAnswer(t)}},
				{Result: &cedarpostv1.AuthorizeBatchResult_Error{Error: &cedarpostv1.BatchError{Code: words.Draw(t, "code"), Message: words.Draw(t, "message")}}},
			}}
		}
		drawn++
		got, ok := AppendJSON([]byte("before"), m)
		if !ok {
			if string(got) != "before" {
				t.Fatalf("not written, and is %s", got)
			}
			return
		}
		written++
		want, err := options.Marshal(m)
		if err != nil {
			t.Fatalf("written as %s; protojson says %v", got, err)
		}
		if a, b := canonical(t, got[len("before"):]), canonical(t, want); a != b {
			t.Fatalf("written as\n%s\nprotojson writes\n%s", a, b)
		}
	})
	if t.Logf("%d of %d messages are written quickly", written, drawn); written < drawn/4 {
		t.Error("too few")
	}
}

func canonical(t interface{ Fatalf(string, ...any) }, data []byte) string {
	v := jsontext.Value(bytes.Clone(data))
	if err := v.Canonicalize(); err != nil {
		t.Fatalf("%s: %v", data, err)
	}
	return string(v)
}

func BenchmarkReadJSON(b *testing.B) {
	data := []byte(`{"principal":{"type":"Shop::User","id":"bob"},"action":{"type":"Shop::Action","id":"ViewOrder"},"resource":{"type":"Shop::Order","id":"42"},"context":{"mfa":true},"fields":{"paths":["id","status","total","shipping.address"]}}`)
	for name, read := range map[string]func(*cedarpostv1.AuthorizeRequest) bool{
		"quick":     func(m *cedarpostv1.AuthorizeRequest) bool { return ReadJSON(data, m) },
		"protojson": func(m *cedarpostv1.AuthorizeRequest) bool { return strict.Unmarshal(data, m) == nil },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !read(&cedarpostv1.AuthorizeRequest{}) {
					b.Fatal("not read")
				}
			}
		})
	}
}

func BenchmarkAppendJSON(b *testing.B) {
	m := &cedarpostv1.AuthorizeResponse{
		Decision: cedarpostv1.Decision_ALLOW, Fields: &cedarpostv1.Fields{Permitted: []string{"id", "shipping.address", "status", "total"}},
		DeterminingPolicies: []*cedarpostv1.PolicyRef{{Bundle: "shop", Id: "owner-views"}, {Bundle: "shop", Id: "owner-fields"}},
		Revision:            &cedarpostv1.Revision{Token: "Am62esPq505XlsUxY_TBficAAAABAAAAAAAAAAMAAAAAAAAACWY3hu-k_kWIn3yAYvNSi8w", Number: 3}, DecisionId: "01939f60-0000-7000-8000-000000000000",
	}
	options := protojson.MarshalOptions{EmitDefaultValues: true}
	for name, write := range map[string]func([]byte) bool{
		"quick":     func(buf []byte) bool { _, ok := AppendJSON(buf, m); return ok },
		"protojson": func(buf []byte) bool { _, err := options.MarshalAppend(buf, m); return err == nil },
	} {
		b.Run(fmt.Sprint(name), func(b *testing.B) {
			b.ReportAllocs()
			buf := make([]byte, 0, 4096)
			for b.Loop() {
				if !write(buf) {
					b.Fatal("not written")
				}
			}
		})
	}
}
