package wire

import (
	"bytes"
	"io"
	"math"
	"strconv"
	"strings"
	"sync"

	"github.com/go-json-experiment/json/jsontext"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// The JSON of questions and answers is read and written here without reflection, which takes a
// third of the time that protojson needs. protojson stays the definition: what is unusual is left to
// it, and so is every error. Tests compare the two.

// maxQuickDepth bounds the nesting of JSON that is read here. What is nested deeper is left to
// protojson, which knows the limit.
const maxQuickDepth = 32

// ReadJSON reads a question or a batch of questions as protojson does. It returns false if data is
// not a usual message, or no message at all; then msg is empty. msg must be empty before.
func ReadJSON(data []byte, msg any) bool {
	r := readers.Get().(*jsonReader)
	defer func() {
		r.dec.Reset(nothing) // it must not hold data
		readers.Put(r)
	}()
	r.dec.Reset(bytes.NewBuffer(data))
	r.failed = false
	switch m := msg.(type) {
	case *cedarpostv1.AuthorizeRequest:
		r.question(m)
		if r.end() {
			return true
		}
		m.Reset()
	case *cedarpostv1.AuthorizeBatchRequest:
		r.batch(m)
		if r.end() {
			return true
		}
		m.Reset()
	}
	return false
}

var nothing = strings.NewReader("")

var readers = sync.Pool{New: func() any { return &jsonReader{dec: jsontext.NewDecoder(new(bytes.Buffer))} }}

// jsonReader reads JSON until something is unusual. Then failed is set, and nothing that it
// returns counts.
type jsonReader struct {
	dec    *jsontext.Decoder
	failed bool
}

// end reports whether all was read, and nothing is left.
func (r *jsonReader) end() bool {
	if r.failed {
		return false
	}
	_, err := r.dec.ReadToken()
	return err == io.EOF //nolint:errorlint // as the decoder returns it
}

func (r *jsonReader) fail() { r.failed = true }

// raw reads a value of a kind. The bytes are valid until the next call.
func (r *jsonReader) raw(kind jsontext.Kind) []byte {
	if r.failed || r.dec.PeekKind() != kind {
		r.fail()
		return nil
	}
	v, err := r.dec.ReadValue()
	if err != nil {
		r.fail()
	}
	return v
}

// text reads a string.
func (r *jsonReader) text() string {
	v := r.raw('"')
	if r.failed {
		return ""
	}
	if bytes.IndexByte(v, '\\') < 0 {
		return string(v[1 : len(v)-1])
	}
	out, err := jsontext.AppendUnquote(nil, v)
	if err != nil {
		r.fail()
	}
	return string(out)
}

// boolean reads true or false.
func (r *jsonReader) boolean() bool {
	kind := r.dec.PeekKind()
	if kind != 't' && kind != 'f' {
		r.fail()
		return false
	}
	return len(r.raw(kind)) == len("true")
}

// open reads the beginning of an object or a list.
func (r *jsonReader) open(kind jsontext.Kind) {
	if r.failed || r.dec.PeekKind() != kind || r.dec.StackDepth() >= maxQuickDepth {
		r.fail()
		return
	}
	if _, err := r.dec.ReadToken(); err != nil {
		r.fail()
	}
}

// more reports whether another member follows. At the end it reads the end.
func (r *jsonReader) more(end jsontext.Kind) bool {
	if r.failed {
		return false
	}
	if r.dec.PeekKind() != end {
		return true
	}
	if _, err := r.dec.ReadToken(); err != nil {
		r.fail()
	}
	return false
}

// object reads an object. member reads the value of a name, or fails. The decoder refuses an object
// that has a name twice.
func (r *jsonReader) object(member func(name []byte)) {
	for r.open('{'); r.more('}'); {
		name := r.raw('"')
		if r.failed {
			return
		}
		member(name[1 : len(name)-1])
	}
}

// list reads a list. element reads one element.
func (r *jsonReader) list(element func()) {
	for r.open('['); r.more(']'); {
		element()
	}
}

func (r *jsonReader) batch(m *cedarpostv1.AuthorizeBatchRequest) {
	r.object(func(name []byte) {
		switch string(name) {
		case "checks":
			r.list(func() {
				check := &cedarpostv1.AuthorizeRequest{}
				r.question(check)
				m.Checks = append(m.Checks, check)
			})
		case "consistency":
			m.Consistency = r.consistency()
		default:
			r.fail()
		}
	})
}

func (r *jsonReader) question(m *cedarpostv1.AuthorizeRequest) {
	r.object(func(name []byte) {
		switch string(name) {
		case "principal":
			m.Principal = r.uid()
		case "action":
			m.Action = r.uid()
		case "resource":
			m.Resource = r.uid()
		case "context":
			m.Context = r.record()
		case "fields":
			m.Fields = r.fields()
		case "entities":
			r.list(func() { m.Entities = append(m.Entities, r.entity()) })
		case "consistency":
			m.Consistency = r.consistency()
		case "explain":
			m.Explain = r.boolean()
		case "requestId":
			m.RequestId = r.text()
		case "wantCacheHint":
			m.WantCacheHint = r.boolean()
		case "principalToken":
			m.PrincipalToken = r.text()
		default:
			r.fail()
		}
	})
}

func (r *jsonReader) uid() *cedarpostv1.EntityUid {
	m := &cedarpostv1.EntityUid{}
	r.object(func(name []byte) {
		switch string(name) {
		case "type":
			m.Type = r.text()
		case "id":
			m.Id = r.text()
		default:
			r.fail()
		}
	})
	return m
}

func (r *jsonReader) entity() *cedarpostv1.Entity {
	m := &cedarpostv1.Entity{}
	r.object(func(name []byte) {
		switch string(name) {
		case "uid":
			m.Uid = r.uid()
		case "attrs":
			m.Attrs = r.record()
		case "parents":
			r.list(func() { m.Parents = append(m.Parents, r.uid()) })
		case "tags":
			m.Tags = r.record()
		default:
			r.fail()
		}
	})
	return m
}

func (r *jsonReader) fields() *cedarpostv1.FieldSelection {
	m := &cedarpostv1.FieldSelection{}
	r.object(func(name []byte) {
		switch string(name) {
		case "paths":
			r.list(func() { m.Paths = append(m.Paths, r.text()) })
		case "all":
			m.All = r.boolean()
		case "requireAll":
			m.RequireAll = r.boolean()
		default:
			r.fail()
		}
	})
	return m
}

// consistency reads a requirement. A second one is left to protojson, which refuses it.
func (r *jsonReader) consistency() *cedarpostv1.Consistency {
	m := &cedarpostv1.Consistency{}
	r.object(func(name []byte) {
		switch {
		case m.Requirement != nil:
			r.fail()
		case string(name) == "minimizeLatency":
			m.Requirement = &cedarpostv1.Consistency_MinimizeLatency{MinimizeLatency: r.boolean()}
		case string(name) == "fullyConsistent":
			m.Requirement = &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: r.boolean()}
		case string(name) == "atLeastAsFresh":
			m.Requirement = &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: r.revision()}
		default:
			r.fail()
		}
	})
	return m
}

// revision reads a revision whose number is a string of digits, as answers have it.
func (r *jsonReader) revision() *cedarpostv1.Revision {
	m := &cedarpostv1.Revision{}
	r.object(func(name []byte) {
		switch string(name) {
		case "token":
			m.Token = r.text()
		case "number":
			text := r.text()
			n, err := strconv.ParseInt(text, 10, 64)
			if m.Number = n; err != nil || strconv.FormatInt(n, 10) != text {
				r.fail()
			}
		default:
			r.fail()
		}
	})
	return m
}

// record reads a context, attributes or tags.
func (r *jsonReader) record() *structpb.Struct {
	m := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for r.open('{'); r.more('}'); {
		name := r.text()
		m.Fields[name] = r.value()
	}
	return m
}

func (r *jsonReader) value() *structpb.Value {
	switch kind := r.dec.PeekKind(); kind {
	case '"':
		return structpb.NewStringValue(r.text())
	case 't', 'f':
		return structpb.NewBoolValue(r.boolean())
	case '0':
		n, err := strconv.ParseFloat(string(r.raw(kind)), 64)
		if err != nil {
			r.fail()
		}
		return structpb.NewNumberValue(n)
	case '{':
		return structpb.NewStructValue(r.record())
	case '[':
		m := &structpb.ListValue{}
		r.list(func() { m.Values = append(m.Values, r.value()) })
		return structpb.NewListValue(m)
	default: // null, or no JSON
		r.fail()
		return nil
	}
}

// AppendJSON appends an answer, or the answers of a batch, to data, as protojson does with
// EmitDefaultValues. It returns false if msg is another message, or one that is left to protojson;
// then data is as it was.
func AppendJSON(data []byte, msg any) ([]byte, bool) {
	w := jsonWriter{out: data}
	switch m := msg.(type) {
	case *cedarpostv1.AuthorizeResponse:
		w.answer(m)
	case *cedarpostv1.AuthorizeBatchResponse:
		w.batch(m)
	default:
		return data, false
	}
	if w.failed {
		return data, false
	}
	return w.out, true
}

// jsonWriter appends JSON. failed means that the message is left to protojson.
type jsonWriter struct {
	out    []byte
	failed bool
}

func (w *jsonWriter) add(text string) { w.out = append(w.out, text...) }

// text appends a string. One that is not UTF-8 is an error, which protojson names.
func (w *jsonWriter) text(s string) {
	out, err := jsontext.AppendQuote(w.out, s)
	if err != nil {
		w.failed = true
		return
	}
	w.out = out
}

// listOf appends a list.
func listOf[T any](w *jsonWriter, list []T, element func(T)) {
	w.add("[")
	for i, e := range list {
		if i > 0 {
			w.add(",")
		}
		element(e)
	}
	w.add("]")
}

func (w *jsonWriter) batch(m *cedarpostv1.AuthorizeBatchResponse) {
	w.add(`{"results":`)
	listOf(w, m.Results, func(r *cedarpostv1.AuthorizeBatchResult) {
		switch r := r.GetResult().(type) {
		case *cedarpostv1.AuthorizeBatchResult_Response:
			w.add(`{"response":`)
			w.answer(r.Response)
		case *cedarpostv1.AuthorizeBatchResult_Error:
			w.add(`{"error":{"code":`)
			w.text(r.Error.GetCode())
			w.add(`,"message":`)
			w.text(r.Error.GetMessage())
			w.add("}")
		default:
			w.failed = true
		}
		w.add("}")
	})
	w.revision(m.Revision)
	w.add("}")
}

func (w *jsonWriter) answer(m *cedarpostv1.AuthorizeResponse) {
	decision, known := cedarpostv1.Decision_name[int32(m.GetDecision())]
	if m == nil || m.Explanation != nil || !known { // rare
		w.failed = true
		return
	}
	w.add(`{"decision":"` + decision + `"`)
	if m.DeniedAt != nil {
		name, known := cedarpostv1.DeniedAt_name[int32(*m.DeniedAt)]
		w.failed = w.failed || !known
		w.add(`,"deniedAt":"` + name + `"`)
	}
	if f := m.Fields; f != nil {
		w.add(`,"fields":{"permitted":`)
		listOf(w, f.Permitted, w.text)
		w.add(`,"denied":`)
		listOf(w, f.Denied, w.text)
		w.add("}")
	}
	w.add(`,"determiningPolicies":`)
	listOf(w, m.DeterminingPolicies, w.policy)
	w.add(`,"errors":`)
	listOf(w, m.Errors, func(e *cedarpostv1.PolicyError) { w.ofPolicy(e.GetPolicy(), "message", e.GetMessage()); w.add("}") })
	w.add(`,"obligations":`)
	listOf(w, m.Obligations, func(o *cedarpostv1.Obligation) { w.ofPolicy(o.GetPolicy(), "text", o.GetText()); w.add("}") })
	w.add(`,"advice":`)
	listOf(w, m.Advice, func(a *cedarpostv1.Advice) {
		w.ofPolicy(a.GetPolicy(), "text", a.GetText())
		w.add(`,"paths":`)
		listOf(w, a.GetPaths(), w.text)
		w.add("}")
	})
	w.revision(m.Revision)
	w.add(`,"decisionId":`)
	w.text(m.DecisionId)
	if h := m.CacheHint; h != nil {
		w.hint(h)
	}
	w.add(`,"errorsOmitted":` + strconv.Itoa(int(m.ErrorsOmitted)) + "}")
}

// ofPolicy appends the beginning of an object about a policy: the policy, and one text. The caller
// closes the object.
func (w *jsonWriter) ofPolicy(p *cedarpostv1.PolicyRef, name, text string) {
	w.add("{")
	if p != nil {
		w.add(`"policy":`)
		w.policy(p)
		w.add(",")
	}
	w.add(`"` + name + `":`)
	w.text(text)
}

func (w *jsonWriter) policy(p *cedarpostv1.PolicyRef) {
	w.add(`{"bundle":`)
	w.text(p.GetBundle())
	w.add(`,"id":`)
	w.text(p.GetId())
	w.add("}")
}

func (w *jsonWriter) revision(r *cedarpostv1.Revision) {
	if r == nil {
		return
	}
	w.add(`,"revision":{"token":`)
	w.text(r.Token)
	w.add(`,"number":"` + strconv.FormatInt(r.Number, 10) + `"}`)
}

// hint appends a hint whose time is in whole milliseconds, as the service makes it.
func (w *jsonWriter) hint(h *cedarpostv1.CacheHint) {
	w.add(`,"cacheHint":{`)
	if d := h.MaxAge; d != nil {
		ms := d.Nanos / 1e6
		if d.Seconds < 0 || d.Seconds > math.MaxInt32 || d.Nanos < 0 || d.Nanos >= 1e9 || ms*1e6 != d.Nanos {
			w.failed = true
			return
		}
		w.add(`"maxAge":"` + strconv.FormatInt(d.Seconds, 10))
		if ms > 0 {
			w.add("." + strconv.Itoa(1000 + int(ms))[1:])
		}
		w.add(`s",`)
	}
	w.add(`"tags":`)
	listOf(w, h.Tags, func(tag uint64) { w.add(`"` + strconv.FormatUint(tag, 10) + `"`) })
	w.add("}")
}
