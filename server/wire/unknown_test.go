package wire_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/wire"
)

func question(t testing.TB, text string) []byte {
	t.Helper()
	req := &cedarpostv1.AuthorizeRequest{}
	if err := protojson.Unmarshal([]byte(text), req); err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func check(data []byte) error {
	return wire.CheckFields(data, (&cedarpostv1.AuthorizeRequest{}).ProtoReflect().Descriptor())
}

// The encoding of two questions, one after the other, is that of a third one, in which later
// fields win or are mixed with earlier ones. It is refused, as JSON with a member twice is.
func TestFieldsSentTwiceAreRefused(t *testing.T) {
	const (
		bob   = `{"principal":{"type":"Shop::User","id":"bob"}}`
		order = `{"resource":{"type":"Shop::Order","id":"42"}}`
	)
	nested := func(number protowire.Number, inner ...[]byte) (out []byte) {
		var all []byte
		for _, b := range inner {
			all = append(all, b...)
		}
		return protowire.AppendBytes(protowire.AppendTag(out, number, protowire.BytesType), all)
	}
	fields := (&cedarpostv1.AuthorizeRequest{}).ProtoReflect().Descriptor().Fields()
	number := func(name string) protowire.Number { return fields.ByName(protoreflect.Name(name)).Number() }
	text := func(n protowire.Number, s string) []byte { return nested(n, []byte(s)) }
	entry := func(key string, value ...[]byte) []byte { return nested(1, text(1, key), nested(2, value...)) }
	truth := func(v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, 4, protowire.VarintType), v)
	}
	deep := func(levels int) []byte {
		return question(t, `{"context":`+strings.Repeat(`{"a":`, levels)+`1`+strings.Repeat(`}`, levels)+`}`)
	}
	many := func(last string) []byte {
		var entries []byte
		for i := range 20 {
			entries = append(entries, entry(fmt.Sprintf("k%d", i), truth(1))...)
		}
		return nested(number("context"), entries, entry(last, truth(1)))
	}
	for name, c := range map[string]struct {
		data []byte
		want string // "" if it is accepted
	}{
		"two fields":                {append(question(t, bob), question(t, order)...), ""},
		"a message twice":           {append(question(t, bob), question(t, bob)...), `has the field "principal" twice`},
		"a text twice":              {append(text(number("request_id"), "a"), text(number("request_id"), "b")...), `"request_id" twice`},
		"inside of a field":         {nested(number("principal"), text(1, "Shop::User"), text(2, "bob"), text(2, "eve")), `"id" twice`},
		"two of a oneof":            {nested(number("context"), entry("mfa", truth(1), text(3, "yes"))), `oneof "kind"`},
		"a key twice":               {nested(number("context"), entry("mfa", truth(0)), entry("mfa", truth(1))), `the key "mfa" of "fields" twice`},
		"two keys":                  {nested(number("context"), entry("mfa", truth(0)), entry("mfb", truth(1))), ""},
		"the key of an entry twice": {nested(number("context"), nested(1, text(1, "a"), text(1, "b"))), `"key" twice`},
		"a late key twice":          {many("k19"), `the key "k19"`},
		"an early key twice":        {many("k3"), `the key "k3"`},
		"many keys":                 {many("k20"), ""},
		"no key, twice":             {nested(number("context"), nested(1), nested(1)), `the key ""`},
		"an unknown field":          {text(999, "x"), "does not know"},
		"another wire type":         {protowire.AppendVarint(protowire.AppendTag(nil, number("principal"), protowire.VarintType), 1), "does not know"},
		"a group":                   {protowire.AppendTag(protowire.AppendTag(nil, 999, protowire.StartGroupType), 999, protowire.EndGroupType), "does not know"},
		"as deep as in JSON":        {deep(99), ""},
		"deeper":                    {deep(120), "deeper than"},
	} {
		err := check(c.data)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// The keys of all maps in the contract are texts: CheckFields compares no others.
func TestMapsHaveTextsAsKeys(t *testing.T) {
	protoregistry.GlobalTypes.RangeMessages(func(mt protoreflect.MessageType) bool {
		fields := mt.Descriptor().Fields()
		for i := range fields.Len() {
			if f := fields.Get(i); strings.HasPrefix(string(f.FullName()), "cedarpost.") && f.IsMap() && f.MapKey().Kind() != protoreflect.StringKind {
				t.Errorf("%s has other keys", f.FullName())
			}
		}
		return true
	})
}

// FuzzCheckFields compares with the decoder. A message that both accept has no unknown fields, and
// is refused when it is sent a second time behind itself, unless it has only lists.
func FuzzCheckFields(f *testing.F) {
	good := question(f, `{"principal":{"type":"a","id":"b"},"context":{"a":{"b":[1,true,"c"]},"d":null},"fields":{"paths":["x","y"]},"explain":true}`)
	f.Add(good)
	f.Add(append(good, good...))
	f.Add(good[:len(good)-1])
	f.Fuzz(func(t *testing.T, data []byte) {
		req, known := &cedarpostv1.AuthorizeRequest{}, &cedarpostv1.AuthorizeRequest{}
		if check(data) != nil || proto.Unmarshal(data, req) != nil {
			return
		}
		if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, known); err != nil || !proto.Equal(req, known) {
			t.Fatalf("%x has unknown fields: %v", data, err)
		}
		once := false
		req.ProtoReflect().Range(func(fd protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
			once = once || !fd.IsList()
			return true
		})
		if twice := slices.Concat(data, data); once && check(twice) == nil {
			t.Fatalf("%x is accepted", twice)
		}
	})
}

func BenchmarkCheckFields(b *testing.B) {
	data := question(b, `{"principal":{"type":"Shop::User","id":"bob"},"action":{"type":"Shop::Action","id":"ViewOrder"},
		"resource":{"type":"Shop::Order","id":"42"},"context":{"mfa":true},"fields":{"all":true}}`)
	b.ReportAllocs()
	for b.Loop() {
		if err := check(data); err != nil {
			b.Fatal(err)
		}
	}
}
