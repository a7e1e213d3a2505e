package fields_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"pgregory.net/rapid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// rules is a second implementation of the two lists, as simple as possible: it compares
// texts.
type rules struct{ permitted, denied []string }

func under(path, list []string) bool {
	for _, p := range list {
		segments := strings.Split(p, ".")
		if len(segments) <= len(path) && slices.Equal(segments, path[:len(segments)]) {
			return true
		}
	}
	return false
}

func (r rules) allows(path []string) bool { return under(path, r.permitted) && !under(path, r.denied) }

// above says whether a permitted path is below.
func (r rules) above(path []string) bool {
	return slices.ContainsFunc(r.permitted, func(p string) bool {
		segments := strings.Split(p, ".")
		return len(segments) > len(path) && slices.Equal(segments[:len(path)], path) && !under(segments, r.denied)
	})
}

// leaf is a value without members or elements.
type leaf struct {
	path  []string
	value string
}

// leaves lists the leaves of a document in order, as they are written.
func leaves(t interface{ Fatalf(string, ...any) }, path []string, text string) (out []leaf) {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	first, err := d.Token()
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	switch first {
	case json.Delim('{'), json.Delim('['):
		for d.More() {
			below := path
			if first == json.Delim('{') {
				key, err := d.Token()
				if err != nil {
					t.Fatalf("%q: %v", text, err)
				}
				below = append(slices.Clone(path), key.(string))
			}
			var value json.RawMessage
			if err := d.Decode(&value); err != nil {
				t.Fatalf("%q: %v", text, err)
			}
			out = append(out, leaves(t, below, string(value))...)
		}
		return out
	}
	return []leaf{{path, text}}
}

func sameLeaves(a, b []leaf) bool {
	return slices.EqualFunc(a, b, func(x, y leaf) bool { return x.value == y.value && slices.Equal(x.path, y.path) })
}

// expected returns the leaves that a filter must keep.
func (r rules) expected(all []leaf) (out []leaf) {
	for _, l := range all {
		if r.allows(l.path) || l.value == "null" && (r.above(l.path) || len(l.path) == 0) {
			out = append(out, l)
		}
	}
	return out
}

var names = rapid.SampledFrom([]string{"a", "b", "c", "A", "é"})

func drawPaths(t *rapid.T, label string) []string {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) string {
		return strings.Join(rapid.SliceOfN(names, 1, 3).Draw(t, "segments"), ".")
	}), 0, 6).Draw(t, label)
}

// drawText draws a value as text, with equal keys, odd keys and odd spelling.
func drawText(t *rapid.T, depth int) string {
	kinds := []string{"word", "number", "string", "object", "object", "list"}
	if depth == 0 {
		kinds = kinds[:3]
	}
	space := func() string { return rapid.SampledFrom([]string{"", "", " ", "\n\t"}).Draw(t, "space") }
	n := rapid.IntRange(0, 4)
	switch rapid.SampledFrom(kinds).Draw(t, "kind") {
	case "word":
		return rapid.SampledFrom([]string{"null", "null", "true", "false"}).Draw(t, "word")
	case "number":
		return rapid.SampledFrom([]string{"0", "-0", "1.0", "1E+2", "12345678901234567890", "1e999"}).Draw(t, "number")
	case "string":
		return rapid.SampledFrom([]string{`""`, `"x"`, `"\u0061"`, `"\ud83d\ude00"`, `"é\n\/"`, `"<"`}).Draw(t, "string")
	case "object":
		var members []string
		for range n.Draw(t, "members") {
			key := rapid.OneOf(names.AsAny(), rapid.SampledFrom([]string{"a.b", "", `\u0061`, `a\"`}).AsAny()).Draw(t, "key")
			members = append(members, fmt.Sprintf(`%s"%s"%s:%s`, space(), key, space(), drawText(t, depth-1)))
		}
		return "{" + strings.Join(members, ",") + space() + "}"
	default:
		var elements []string
		for range n.Draw(t, "elements") {
			elements = append(elements, space()+drawText(t, depth-1)+space())
		}
		return "[" + strings.Join(elements, ",") + "]"
	}
}

func drawDocument(t *rapid.T) string {
	return rapid.Custom(func(t *rapid.T) string { return drawText(t, 4) }).
		Filter(func(s string) bool { return s[0] == '{' || s[0] == '[' }).Draw(t, "document")
}

func drawRules(t *rapid.T) (rules, *fields.Filter) {
	r := rules{drawPaths(t, "permitted"), drawPaths(t, "denied")}
	return r, fields.New(r.permitted, r.denied)
}

// The output has all permitted leaves and no others, in order and unchanged. Filtered
// again, it stays the same.
func TestExactlyThePermittedLeavesRemain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r, f := drawRules(t)
		doc := drawDocument(t)
		out, dropped, err := run(f, doc)
		if err != nil {
			t.Fatalf("%s: %v", doc, err)
		}
		if got, want := leaves(t, nil, out), r.expected(leaves(t, nil, doc)); !sameLeaves(got, want) {
			t.Fatalf("%s\nleaves %s:\n%v\nwant\n%v", doc, out, got, want)
		}
		for _, path := range holders(nil, decode(t, out)) {
			if !r.allows(path) && !r.above(path) {
				t.Fatalf("%s\nleaves %s, with %q", doc, out, path)
			}
		}
		if whole := sameLayout(t, doc, out); whole != (dropped.Denied+dropped.Unknown == 0) {
			t.Fatalf("%s\nis the same as %s: %v; %s", doc, out, whole, show(dropped))
		}
		again, dropped, err := run(f, out)
		if err != nil || again != out || dropped.Denied+dropped.Unknown > 0 {
			t.Fatalf("again: %s, %v, %v; first %s", again, dropped, err, out)
		}
		if (dropped.Unknown == 0) != (len(dropped.UnknownPaths) == 0) {
			t.Fatalf("%v", dropped)
		}
	})
}

// holders lists the paths of objects and lists, without the document itself.
func holders(path []string, v any) (out [][]string) {
	switch v := v.(type) {
	case map[string]any:
		for key, below := range v {
			out = append(out, holders(append(slices.Clone(path), key), below)...)
		}
	case []any:
		for _, below := range v {
			out = append(out, holders(path, below)...)
		}
	default:
		return nil
	}
	if len(path) > 0 {
		out = append(out, path)
	}
	return out
}

// sameLayout says whether two documents differ only in white space.
func sameLayout(t *rapid.T, a, b string) bool {
	var texts [2]strings.Builder
	for i, doc := range []string{a, b} {
		everything := fields.New([]string{"x"}, nil)
		if _, err := everything.JSON(&texts[i], strings.NewReader(`{"x":`+doc+`}`)); err != nil {
			t.Fatalf("%v", err)
		}
	}
	return texts[0].String() == texts[1].String()
}

func TestMapAndMarshalDoAsJSON(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		_, f := drawRules(t)
		doc := drawText(t, 4)
		whole, ok := decode(t, `{"a":`+doc+`,"c":{"b":`+doc+`}}`).(map[string]any)
		if !ok {
			t.Skip()
		}
		text, err := json.Marshal(whole)
		if err != nil {
			t.Fatalf("%v", err)
		}
		want, wantDropped, err := run(f, string(text))
		if err != nil {
			t.Fatalf("%v", err)
		}
		marshaled, dropped, err := f.Marshal(whole)
		if err != nil || string(marshaled) != want || show(dropped) != show(wantDropped) {
			t.Fatalf("Marshal: %s, %s, %v; want %s, %s", marshaled, show(dropped), err, want, show(wantDropped))
		}
		dropped = f.Map(whole)
		got, err := json.Marshal(whole)
		if err != nil || !sameJSON(t, string(got), want) || len(dropped.UnknownPaths) < 20 && show(dropped) != show(wantDropped) {
			t.Fatalf("Map: %s, %s, %v; want %s, %s", got, show(dropped), err, want, show(wantDropped))
		}
	})
}

// world is a struct type with the names that paths are drawn from.
type world struct {
	A *part            `json:"a"`
	B []part           `json:"b,omitempty"`
	C map[string]*part `json:"c"`
	Inner
	É any `json:"é"`
}

type Inner struct {
	Upper [2]part `json:"A"`
	Away  string  `json:"-"`
}

type part struct {
	A int      `json:"a"`
	B *string  `json:"b"`
	C []string `json:"c"`
	É *part    `json:"é,omitempty"`
}

func drawPart(t *rapid.T, depth int) part {
	p := part{A: rapid.IntRange(0, 2).Draw(t, "A")}
	if rapid.Bool().Draw(t, "has B") {
		b := rapid.SampledFrom([]string{"", "x"}).Draw(t, "B")
		p.B = &b
	}
	p.C = rapid.SliceOfN(rapid.SampledFrom([]string{"", "y"}), 0, 2).Draw(t, "C")
	if depth > 0 && rapid.Bool().Draw(t, "has É") {
		below := drawPart(t, depth-1)
		p.É = &below
	}
	return p
}

func drawWorld(t *rapid.T) *world {
	some := func() part { return drawPart(t, 1) }
	w := &world{Inner: Inner{[2]part{some(), some()}, "away"}}
	if rapid.Bool().Draw(t, "has A") {
		a := some()
		w.A = &a
	}
	for range rapid.IntRange(0, 2).Draw(t, "B") {
		w.B = append(w.B, some())
	}
	if rapid.Bool().Draw(t, "has C") {
		a, cb := some(), some()
		w.C = map[string]*part{"a": &a, "b": nil, "c.b": &cb}
	}
	w.É = rapid.SampledFrom([]any{nil, 7, "x", some(), []part{some()}, []any{some(), nil, 1}, map[string]any{"a": some(), "b": 1}}).Draw(t, "É")
	return w
}

// After Struct, all values are permitted or zero, and no permitted value is lost.
func TestStructLeavesWhatMarshalWrites(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r, f := drawRules(t)
		w := drawWorld(t)
		before, err := json.Marshal(w)
		if err != nil {
			t.Fatalf("%v", err)
		}
		want, _, err := f.Marshal(w)
		if err != nil {
			t.Fatalf("%v", err)
		}
		dropped, err := f.Struct(w)
		if err != nil || w.Away != "" || dropped.Denied == 0 {
			t.Fatalf("%v, %q, %v", err, w.Away, dropped)
		}
		after, err := json.Marshal(w)
		if err != nil {
			t.Fatalf("%v", err)
		}
		got, _, err := f.Marshal(w)
		if err != nil || !sameLeaves(solid(leaves(t, nil, string(got))), solid(leaves(t, nil, string(want)))) {
			t.Fatalf("of %s\nleaves %s\nmarshaled %s, %v; want %s", before, after, got, err, want)
		}
		for _, l := range solid(leaves(t, nil, string(after))) {
			if !r.allows(l.path) {
				t.Fatalf("%v is left in %s", l, after)
			}
		}
		if again, err := f.Struct(w); err != nil || again.Denied+again.Unknown > 0 {
			t.Fatalf("again: %v, %v", again, err)
		}
	})
}

// solid leaves out zero values.
func solid(list []leaf) []leaf {
	return slices.DeleteFunc(list, func(l leaf) bool { return slices.Contains([]string{"null", "0", `""`, "false"}, l.value) })
}

// drawMessage sets some of the fields of m.
func drawMessage(t *rapid.T, m protoreflect.Message, depth int) {
	all := m.Descriptor().Fields()
	switch m.Descriptor().FullName() {
	case "google.protobuf.Struct":
		object := drawText(t, 3)
		if object[0] != '{' || protojson.Unmarshal([]byte(object), m.Interface()) != nil {
			proto.Reset(m.Interface())
		}
		return
	case "google.protobuf.Timestamp", "google.protobuf.Duration":
		m.Set(all.ByName("seconds"), protoreflect.ValueOfInt64(7))
		return
	}
	for i := range all.Len() {
		fd := all.Get(i)
		if fd.Message() != nil && depth == 0 || !rapid.Bool().Draw(t, "set "+string(fd.Name())) {
			continue
		}
		switch {
		case fd.IsList():
			list := m.Mutable(fd).List()
			for range rapid.IntRange(1, 2).Draw(t, "length") {
				if fd.Message() != nil {
					drawMessage(t, list.AppendMutable().Message(), depth-1)
				} else {
					list.Append(drawScalar(t, fd))
				}
			}
		case fd.IsMap():
		case fd.Message() != nil:
			drawMessage(t, m.Mutable(fd).Message(), depth-1)
		default:
			m.Set(fd, drawScalar(t, fd))
		}
	}
}

func drawScalar(t *rapid.T, fd protoreflect.FieldDescriptor) protoreflect.Value {
	n := rapid.IntRange(1, 2).Draw(t, "number")
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(fd.Enum().Values().Get(fd.Enum().Values().Len() - 1).Number())
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("text")
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte("bytes"))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(1.5)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(n))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(int64(n))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	default:
		return protoreflect.ValueOfUint64(uint64(n))
	}
}

// drawLeaf draws a path through the fields of a message, by their JSON names.
func drawLeaf(t *rapid.T, md protoreflect.MessageDescriptor) string {
	var path []string
	for range rapid.IntRange(1, 4).Draw(t, "length") {
		if md == nil || md.Fields().Len() == 0 {
			break
		}
		if md.FullName() == "google.protobuf.Struct" {
			path = append(path, rapid.SliceOfN(names, 1, 2).Draw(t, "keys")...)
			break
		}
		fd := md.Fields().Get(rapid.IntRange(0, md.Fields().Len()-1).Draw(t, "field"))
		path, md = append(path, fd.JSONName()), fd.Message()
	}
	return strings.Join(path, ".")
}

func TestProtoDoesAsJSON(t *testing.T) {
	kinds := []proto.Message{&cedarpostv1.AuthorizeRequest{}, &cedarpostv1.AuthorizeResponse{}, &cedarpostv1.DecisionRecord{}, &descriptorpb.FileDescriptorProto{}}
	rapid.Check(t, func(t *rapid.T) {
		m := proto.Clone(rapid.SampledFrom(kinds).Draw(t, "type"))
		drawMessage(t, m.ProtoReflect(), 3)
		paths := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) string { return drawLeaf(t, m.ProtoReflect().Descriptor()) }), 0, 12)
		f := fields.New(paths.Draw(t, "permitted"), paths.Draw(t, "denied"))
		text := protoText(t, m)
		want, wantDropped, err := run(f, text)
		if err != nil {
			t.Fatalf("%v", err)
		}
		dropped := f.Proto(m)
		got := protoText(t, m)
		// An empty list or map is not written, but an empty object is.
		if !sameLeaves(leaves(t, nil, sorted(t, got)), leaves(t, nil, sorted(t, want))) {
			t.Fatalf("of %s\nleaves %s\nwant   %s", text, got, want)
		}
		if dropped.Denied != wantDropped.Denied || dropped.Unknown != wantDropped.Unknown {
			t.Fatalf("of %s\nleaves %s, %s; want %s", text, got, show(dropped), show(wantDropped))
		}
		if again := f.Proto(m); again.Denied+again.Unknown > 0 {
			t.Fatalf("again: %v", again)
		}
	})
}

// sorted writes a document with its keys in order.
func sorted(t *rapid.T, text string) string {
	out, err := json.Marshal(decode(t, text))
	if err != nil {
		t.Fatalf("%v", err)
	}
	return string(out)
}
