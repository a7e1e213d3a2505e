package fields

import (
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Proto clears the fields of m that are not permitted, in place. A segment of a path is the
// name of a field in the .proto file or its JSON name; the catalogue should use only one of
// the two kinds. A field that the catalogue has under both names, or under a name that also
// means another field of the message, is dropped as denied.
//
// Repeated fields are lists. A map is an object with the keys of its JSON: if the map itself
// is a permitted path, all of it stays, otherwise only permitted keys ("labels.env").
// google.protobuf.Struct, Value and ListValue are filtered as the JSON that they stand for.
// Any, Timestamp, Duration, FieldMask and the wrappers are plain values. Extensions, and
// fields that the message type does not know, have no path: they stay only inside a permitted
// field, and are dropped as unknown elsewhere, under the name "#" and their number. If a path
// inside a permitted field is denied, unknown fields in it are dropped too, because one of
// them might be the denied one. Fields that are not set are not counted. A message that loses
// a required field (proto2) can no longer be marshaled.
func (f *Filter) Proto(m proto.Message) Dropped {
	if m == nil {
		return Dropped{}
	}
	var w protoWalk
	if !w.message(m.ProtoReflect(), f.top()) {
		proto.Reset(m)
	}
	return w.result()
}

// protoWalk goes through messages. Below a node that keeps nothing it only counts, and the
// caller clears the whole field.
type protoWalk struct{ tally }

// message removes from m the fields that are not permitted at n, and says whether m stays.
func (w *protoWalk) message(m protoreflect.Message, n *node) bool {
	if keep, ok := w.known(n); ok {
		return keep
	}
	if !m.IsValid() { // a nil pointer
		return w.null(n)
	}
	before := w.total()
	fields := m.Descriptor().Fields()
	switch m.Descriptor().FullName() {
	case "google.protobuf.Struct":
		w.dropUnknown(m, n)
		return w.entries(m.Mutable(fields.ByName("fields")).Map(), n)
	case "google.protobuf.ListValue":
		w.dropUnknown(m, n)
		return w.elements(m.Mutable(fields.ByName("values")).List(), n, true)
	case "google.protobuf.Value":
		w.dropUnknown(m, n)
		return w.value(m, n)
	case "google.protobuf.Any":
		if n.whole { // a denied path is inside, where the filter cannot reach
			return w.deny()
		}
		return w.unknown()
	case "google.protobuf.Timestamp", "google.protobuf.Duration", "google.protobuf.FieldMask",
		"google.protobuf.BoolValue", "google.protobuf.BytesValue", "google.protobuf.DoubleValue",
		"google.protobuf.FloatValue", "google.protobuf.Int32Value", "google.protobuf.Int64Value",
		"google.protobuf.StringValue", "google.protobuf.UInt32Value", "google.protobuf.UInt64Value":
		return w.scalar(n)
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name, child := protoChild(n, fd)
		mark := w.push(name, child != nil)
		defer w.pop(mark)
		if !w.field(fd, v, child) && n.keeps() {
			m.Clear(fd)
		}
		return true
	})
	w.dropUnknown(m, n)
	return w.settled(n, before)
}

// protoChild finds the node of a field by either of its names.
func protoChild(n *node, fd protoreflect.FieldDescriptor) (string, *node) {
	if fd.IsExtension() {
		if n.whole {
			return "", wholeNode
		}
		return "#" + strconv.Itoa(int(fd.Number())), nil
	}
	text, json := string(fd.Name()), fd.JSONName()
	a, b := n.kids[text], n.kids[json]
	switch {
	case a == nil && b == nil:
		return json, n.child(json)
	case a != nil && b != nil && text != json:
		return json, deniedNode
	}
	fields := fd.ContainingMessage().Fields()
	for _, name := range []string{text, json} {
		if n.kids[name] == nil {
			continue
		}
		if other := fields.ByName(protoreflect.Name(name)); other != nil && other.Number() != fd.Number() {
			return name, deniedNode
		}
		if other := fields.ByJSONName(name); other != nil && other.Number() != fd.Number() {
			return name, deniedNode
		}
	}
	if a != nil {
		return text, a
	}
	return json, b
}

// field removes from the field's value v the parts that are not permitted at n, and says
// whether the field stays.
func (w *protoWalk) field(fd protoreflect.FieldDescriptor, v protoreflect.Value, n *node) bool {
	if keep, ok := w.known(n); ok {
		return keep
	}
	switch {
	case fd.IsMap():
		return w.entries(v.Map(), n)
	case fd.IsList():
		return w.elements(v.List(), n, fd.Message() != nil)
	case fd.Message() != nil:
		return w.message(v.Message(), n)
	}
	return w.scalar(n)
}

func (w *protoWalk) entries(m protoreflect.Map, n *node) bool {
	before := w.total()
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		child := n.child(k.String())
		mark := w.push(k.String(), child != nil)
		defer w.pop(mark)
		keep, ok := w.known(child)
		if !ok {
			if value, isMessage := v.Interface().(protoreflect.Message); isMessage {
				keep = w.message(value, child)
			} else {
				keep = w.scalar(child)
			}
		}
		if !keep && n.keeps() {
			m.Clear(k)
		}
		return true
	})
	return w.settled(n, before)
}

func (w *protoWalk) elements(l protoreflect.List, n *node, messages bool) bool {
	before, left := w.total(), 0
	for i := range l.Len() {
		var keep bool
		if messages {
			keep = w.message(l.Get(i).Message(), n)
		} else {
			keep = w.scalar(n)
		}
		if keep {
			if left < i {
				l.Set(left, l.Get(i))
			}
			left++
		}
	}
	if n.keeps() {
		l.Truncate(left)
	}
	return w.settled(n, before)
}

// value filters a google.protobuf.Value, which is any JSON value.
func (w *protoWalk) value(m protoreflect.Message, n *node) bool {
	fd := m.WhichOneof(m.Descriptor().Oneofs().ByName("kind"))
	switch {
	case fd == nil:
		return w.scalar(n)
	case fd.Name() == "null_value":
		return w.null(n)
	case fd.Message() != nil:
		return w.message(m.Mutable(fd).Message(), n)
	}
	return w.scalar(n)
}

// dropUnknown drops fields that m's type does not know, perhaps of a newer version.
func (w *protoWalk) dropUnknown(m protoreflect.Message, n *node) {
	raw := m.GetUnknown()
	if len(raw) == 0 {
		return
	}
	for len(raw) > 0 {
		number, _, size := protowire.ConsumeField(raw)
		if size < 0 {
			break
		}
		mark := w.push("#"+strconv.Itoa(int(number)), true)
		w.unknown()
		w.pop(mark)
		raw = raw[size:]
	}
	if n.keeps() {
		m.SetUnknown(nil)
	}
}
