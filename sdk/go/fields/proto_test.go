package fields_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// orderType has parts that no message of this repository has: maps, Any, and names that
// mean two fields.
const orderType = `{
  "name": "order.proto", "syntax": "proto3",
  "dependency": ["google/protobuf/any.proto", "google/protobuf/timestamp.proto"],
  "messageType": [{
    "name": "Order",
    "field": [
      {"name": "display_name", "number": 1, "type": "TYPE_STRING", "label": "LABEL_OPTIONAL"},
      {"name": "labels", "number": 2, "type": "TYPE_MESSAGE", "label": "LABEL_REPEATED", "typeName": ".Order.LabelsEntry"},
      {"name": "parts", "number": 3, "type": "TYPE_MESSAGE", "label": "LABEL_REPEATED", "typeName": ".Order.PartsEntry"},
      {"name": "any", "number": 4, "type": "TYPE_MESSAGE", "label": "LABEL_OPTIONAL", "typeName": ".google.protobuf.Any"},
      {"name": "at", "number": 5, "type": "TYPE_MESSAGE", "label": "LABEL_OPTIONAL", "typeName": ".google.protobuf.Timestamp"},
      {"name": "kin", "number": 6, "type": "TYPE_MESSAGE", "label": "LABEL_OPTIONAL", "typeName": ".Order"},
      {"name": "first", "number": 7, "type": "TYPE_STRING", "label": "LABEL_OPTIONAL", "jsonName": "second"},
      {"name": "second", "number": 8, "type": "TYPE_STRING", "label": "LABEL_OPTIONAL", "jsonName": "third"},
      {"name": "tags", "number": 9, "type": "TYPE_STRING", "label": "LABEL_REPEATED"}
    ],
    "nestedType": [
      {"name": "LabelsEntry", "options": {"mapEntry": true}, "field": [
        {"name": "key", "number": 1, "type": "TYPE_STRING", "label": "LABEL_OPTIONAL"},
        {"name": "value", "number": 2, "type": "TYPE_STRING", "label": "LABEL_OPTIONAL"}]},
      {"name": "PartsEntry", "options": {"mapEntry": true}, "field": [
        {"name": "key", "number": 1, "type": "TYPE_INT32", "label": "LABEL_OPTIONAL"},
        {"name": "value", "number": 2, "type": "TYPE_MESSAGE", "label": "LABEL_OPTIONAL", "typeName": ".Order"}]}
    ]
  }]
}`

type files struct{}

func (files) FindFileByPath(path string) (protoreflect.FileDescriptor, error) {
	if strings.Contains(path, "any") {
		return anypb.File_google_protobuf_any_proto, nil
	}
	return timestamppb.File_google_protobuf_timestamp_proto, nil
}

func (files) FindDescriptorByName(name protoreflect.FullName) (protoreflect.Descriptor, error) {
	if name == "google.protobuf.Any" {
		return (*anypb.Any)(nil).ProtoReflect().Descriptor(), nil
	}
	return (*timestamppb.Timestamp)(nil).ProtoReflect().Descriptor(), nil
}

func orderMessage(t *testing.T, json string) proto.Message {
	var fdp descriptorpb.FileDescriptorProto
	if err := protojson.Unmarshal([]byte(orderType), &fdp); err != nil {
		t.Fatal(err)
	}
	fd, err := protodesc.NewFile(&fdp, files{})
	if err != nil {
		t.Fatal(err)
	}
	m := dynamicpb.NewMessage(fd.Messages().ByName("Order"))
	if err := protojson.Unmarshal([]byte(json), m); err != nil {
		t.Fatal(err)
	}
	return m
}

const stamp = `"1970-01-01T00:00:01Z"`

func TestProto(t *testing.T) {
	for _, c := range []struct{ says, paths, doc, want, dropped string }{
		{"an empty list permits nothing", "", `{"displayName":"n","kin":{"tags":["x"]}}`, `{}`, "0 denied, 2 unknown displayName kin"},
		{"a JSON name", "displayName", `{"displayName":"n","tags":["x"]}`, `{"displayName":"n"}`, "0 denied, 1 unknown tags"},
		{"a name of the .proto file", "display_name -tags", `{"displayName":"n","tags":["x"]}`, `{"displayName":"n"}`, "1 denied, 0 unknown "},
		{"both names", "display_name displayName", `{"displayName":"n"}`, `{}`, "1 denied, 0 unknown "},
		{"both names, one of them denied", "display_name -displayName", `{"displayName":"n"}`, `{}`, "1 denied, 0 unknown "},
		{"a name of one field that is the JSON name of another", "second", `{"second":"1","third":"2"}`, `{}`, "2 denied, 0 unknown "},
		{"a name that means one field only", "first third", `{"second":"1","third":"2"}`, `{"second":"1","third":"2"}`, ""},
		{"a list at a leaf", "tags", `{"tags":["x","y"]}`, `{"tags":["x","y"]}`, ""},
		{"plain values in a list above a leaf", "tags.x", `{"tags":["x","y"]}`, `{}`, "0 denied, 2 unknown tags"},
		{"a whole map", "labels", `{"labels":{"env":"p","a.b":"q"}}`, `{"labels":{"env":"p","a.b":"q"}}`, ""},
		{"a key of a map", "labels.env", `{"labels":{"env":"p","a.b":"q","team":"t"}}`, `{"labels":{"env":"p"}}`, `0 denied, 2 unknown labels."a.b" labels.team`},
		{"a map with refused keys only", "-labels.env", `{"labels":{"env":"p"}}`, `{}`, "1 denied, 0 unknown "},
		{"messages in a map", "parts.7.displayName", `{"parts":{"7":{"displayName":"n","tags":["x"]},"8":{}}}`, `{"parts":{"7":{"displayName":"n"}}}`, "0 denied, 2 unknown parts.7.tags parts.8"},
		{"a map without messages above a leaf", "labels.env.x", `{"labels":{"env":"p"}}`, `{}`, "0 denied, 1 unknown labels.env"},
		{"Any is a plain value", "any.value", `{"any":{"@type":"type.googleapis.com/google.protobuf.Timestamp","value":` + stamp + `}}`, `{}`, "0 denied, 1 unknown any"},
		{"Any stays whole", "any", `{"any":{"@type":"type.googleapis.com/google.protobuf.Timestamp","value":` + stamp + `}}`, `{"any":{"@type":"type.googleapis.com/google.protobuf.Timestamp","value":` + stamp + `}}`, ""},
		{"Any with something denied inside", "any -any.value", `{"any":{"@type":"type.googleapis.com/google.protobuf.Timestamp","value":` + stamp + `}}`, `{}`, "1 denied, 0 unknown "},
		{"Timestamp is a plain value", "at.seconds", `{"at":` + stamp + `}`, `{}`, "0 denied, 1 unknown at"},
		{"a message that loses all", "kin.tags", `{"kin":{"displayName":"n"}}`, `{"kin":{}}`, "0 denied, 1 unknown kin.displayName"},
		{"a message with refused fields only", "-kin.tags", `{"kin":{"tags":["x"],"displayName":"n"}}`, `{}`, "1 denied, 1 unknown kin.displayName"},
		{"an empty message with refused fields only", "-kin.tags", `{"kin":{}}`, `{}`, "1 denied, 0 unknown "},
		{"a denied path below a permitted one", "kin -kin.kin.tags", `{"kin":{"tags":["x"],"kin":{"tags":["y"],"displayName":"n"}}}`, `{"kin":{"tags":["x"],"kin":{"displayName":"n"}}}`, "1 denied, 0 unknown "},
	} {
		m := orderMessage(t, c.doc)
		dropped := filter(c.paths).Proto(m)
		if c.dropped == "" {
			c.dropped = "0 denied, 0 unknown "
		}
		if got := protoText(t, m); !sameJSON(t, got, c.want) || show(dropped) != c.dropped {
			t.Errorf("%s: %s of %s is\n%s, dropping %s; want\n%s, dropping %s", c.says, c.paths, c.doc, got, show(dropped), c.want, c.dropped)
		}
	}
}

func protoText(t interface{ Fatalf(string, ...any) }, m proto.Message) string {
	text, err := protojson.MarshalOptions{AllowPartial: true}.Marshal(m)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return string(text)
}

func TestProtoStruct(t *testing.T) {
	doc := `{"a":{"b":1,"c":[{"d":null,"e":2},7,null]},"f":null,"g":"x"}`
	var s structpb.Struct
	if err := protojson.Unmarshal([]byte(doc), &s); err != nil {
		t.Fatal(err)
	}
	for _, paths := range []string{"", "a", "a.b", "a.c.d", "a.c.x f.x g.x", "-a.c.d f", "a -a.c.e"} {
		m := &cedarpostv1.AuthorizeRequest{Context: proto.Clone(&s).(*structpb.Struct)}
		permitted, denied := lists(paths)
		below := fields.New(prefixed("context.", permitted), prefixed("context.", denied))
		dropped := below.Proto(m)
		want, wantDropped, err := run(below, `{"context":`+doc+`}`)
		if err != nil || !sameJSON(t, protoText(t, m), want) || show(dropped) != show(wantDropped) {
			t.Errorf("%s leaves %s, %s; want %s, %s", paths, protoText(t, m), show(dropped), want, show(wantDropped))
		}
		value := structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{structpb.NewStructValue(proto.Clone(&s).(*structpb.Struct)), nil}})
		value.GetListValue().Values = value.GetListValue().Values[:1]
		filter(paths).Proto(value)
		if want, _, err := run(filter(paths), `[`+doc+`]`); err != nil || !sameJSON(t, protoText(t, value), want) {
			t.Errorf("a list, %s: %s, want %s", paths, protoText(t, value), want)
		}
	}
}

func prefixed(prefix string, paths []string) (out []string) {
	for _, p := range paths {
		out = append(out, prefix+p)
	}
	return out
}

// A field that the message type does not know may be of a newer version.
func TestProtoUnknownFields(t *testing.T) {
	raw := protowire.AppendVarint(protowire.AppendTag(nil, 1234, protowire.VarintType), 7)
	raw = protowire.AppendString(protowire.AppendTag(raw, 1235, protowire.BytesType), "secret")
	fresh := func() *cedarpostv1.AuthorizeRequest {
		m := &cedarpostv1.AuthorizeRequest{Principal: &cedarpostv1.EntityUid{Type: "T", Id: "x"}, Context: &structpb.Struct{}}
		m.ProtoReflect().SetUnknown(raw)
		m.Principal.ProtoReflect().SetUnknown(raw)
		m.Context.ProtoReflect().SetUnknown(raw)
		return m
	}
	for paths, want := range map[string]string{
		"principal.id context.x":                     "0 denied, 7 unknown #1234 #1235 context.#1234 context.#1235 principal.#1234 principal.#1235 principal.type",
		"principal -principal.id context -context.x": "1 denied, 6 unknown #1234 #1235 context.#1234 context.#1235 principal.#1234 principal.#1235",
	} {
		m := fresh()
		if dropped := filter(paths).Proto(m); show(dropped) != want {
			t.Errorf("%s: %s", paths, show(dropped))
		}
		if bytes, _ := proto.Marshal(m); strings.Contains(string(bytes), "secret") {
			t.Errorf("%s: the unknown field is still there", paths)
		}
	}
	m := fresh()
	filter("principal").Proto(m)
	if len(m.Principal.ProtoReflect().GetUnknown()) == 0 || len(m.ProtoReflect().GetUnknown()) > 0 {
		t.Error("a permitted message stays whole")
	}
}

func TestProtoExtensions(t *testing.T) {
	fresh := func() *descriptorpb.FileDescriptorProto {
		o := &descriptorpb.FieldOptions{Deprecated: proto.Bool(true)}
		if err := proto.Unmarshal(protowire.AppendVarint(protowire.AppendTag(nil, 50001, protowire.VarintType), 1), o); err != nil {
			t.Fatal(err)
		}
		return &descriptorpb.FileDescriptorProto{Extension: []*descriptorpb.FieldDescriptorProto{{Options: o}}}
	}
	m := fresh()
	if dropped := filter("extension.options.deprecated").Proto(m); show(dropped) != "0 denied, 1 unknown extension.options.#50001" {
		t.Error(show(dropped))
	}
	// A field with an extension whose type is linked in: validation rules.
	rules := (&cedarpostv1.FieldSelection{}).ProtoReflect().Descriptor().Fields().ByName("paths").Options().(*descriptorpb.FieldOptions)
	options := proto.Clone(rules).(*descriptorpb.FieldOptions)
	options.Deprecated = proto.Bool(true)
	seen := 0
	options.ProtoReflect().Range(func(fd protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if fd.IsExtension() {
			seen++
		}
		return true
	})
	if seen == 0 {
		t.Fatal("no extension to drop")
	}
	// "field" is the name of the extension without its package.
	if dropped := filter("deprecated field").Proto(options); dropped.Unknown != seen || !sameJSON(t, protoText(t, options), `{"deprecated":true}`) {
		t.Error(show(dropped), options)
	}
}

// A value that is removed as a whole does not change for its other holders.
func TestWhatGoesOfAMessageIsNotChanged(t *testing.T) {
	entity := &cedarpostv1.Entity{Uid: &cedarpostv1.EntityUid{Type: "T", Id: "x"}}
	entity.Attrs = &structpb.Struct{Fields: map[string]*structpb.Value{
		"a": structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{structpb.NewBoolValue(true)}})}}
	was := proto.Clone(entity)
	m := &cedarpostv1.AuthorizeRequest{Entities: []*cedarpostv1.Entity{entity}}
	filter("-entities.uid.id -entities.attrs.a.b -entities.attrs.c").Proto(m)
	if len(m.Entities) > 0 || !proto.Equal(entity, was) {
		t.Error(m, entity)
	}
}

func TestProtoOddMessages(t *testing.T) {
	filter("a").Proto(nil)
	filter("a").Proto((*cedarpostv1.AuthorizeRequest)(nil))
	filter("seconds").Proto((*timestamppb.Timestamp)(nil))
	holes := &structpb.ListValue{Values: []*structpb.Value{nil, structpb.NewStructValue(nil), structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{"a": nil}})}}
	if dropped := filter("a.b").Proto(holes); show(dropped) != "0 denied, 0 unknown " {
		t.Error(show(dropped))
	}
	empty := &cedarpostv1.AuthorizeRequest{Entities: []*cedarpostv1.Entity{nil, {}, nil}}
	if dropped := filter("entities.uid.id").Proto(empty); len(empty.Entities) != 3 || dropped.Unknown > 0 {
		t.Error(show(dropped))
	}
	if dropped := filter("-entities.uid.id").Proto(empty); empty.Entities != nil || dropped.Denied != 3 {
		t.Error(show(dropped))
	}
	if dropped := filter("seconds").Proto(timestamppb.New(timestamppb.Now().AsTime())); show(dropped) != "0 denied, 1 unknown ." {
		t.Error(show(dropped))
	}
	at := &timestamppb.Timestamp{Seconds: 7}
	filter("seconds").Proto(at)
	if at.Seconds != 0 {
		t.Error("a plain value as a document stayed")
	}
}
