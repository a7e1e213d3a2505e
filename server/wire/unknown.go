package wire

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// maxMessages is how deep the messages of one encoding may be nested. JSON may be nested 100
// levels deep, and an object in it has three messages: the value, the object and its entry.
const maxMessages = 320

// CheckFields returns an error if the binary encoding of a message, or of one inside of it,
// has a field that this version does not know, or has something twice that a message has
// once: a field that is not repeated, two members of a oneof, or two entries of a map with one
// key. Decoders ignore the first kind, and take the last or a mixture of the second, so that
// two readers of one message could answer different questions. JSON is as strict.
func CheckFields(data []byte, message protoreflect.MessageDescriptor) error {
	return checkFields(data, message, maxMessages)
}

func checkFields(data []byte, message protoreflect.MessageDescriptor, depth int) error {
	if depth == 0 {
		return fmt.Errorf("messages are nested deeper than %d", maxMessages)
	}
	fields := message.Fields()
	// The first bits are for the fields, the next ones for the oneofs.
	var few [2]uint64
	seen := few[:]
	if n := fields.Len() + message.Oneofs().Len(); n > 64*len(few) {
		seen = make([]uint64, n/64+1)
	}
	first := func(i int) bool {
		was := seen[i/64]
		seen[i/64] |= 1 << (i % 64)
		return was != seen[i/64]
	}
	var keys keySet
	for len(data) > 0 {
		number, typ, n := protowire.ConsumeTag(data)
		if n < 0 {
			return protowire.ParseError(n)
		}
		size := protowire.ConsumeFieldValue(number, typ, data[n:])
		if size < 0 {
			return protowire.ParseError(size)
		}
		value := data[n : n+size]
		data = data[n+size:]
		field := fields.ByNumber(number)
		if field == nil || !fits(field, typ) {
			return fmt.Errorf("%s has fields that this version does not know", message.FullName())
		}
		if !field.IsList() && !field.IsMap() {
			if !first(field.Index()) {
				return fmt.Errorf("%s has the field %q twice", message.FullName(), field.Name())
			}
			if o := field.ContainingOneof(); o != nil && !first(fields.Len()+o.Index()) {
				return fmt.Errorf("%s has two fields of the oneof %q", message.FullName(), o.Name())
			}
		}
		if field.Message() == nil {
			continue
		}
		inner, _ := protowire.ConsumeBytes(value)
		if err := checkFields(inner, field.Message(), depth-1); err != nil {
			return err
		}
		if field.IsMap() {
			key, err := mapKey(field, inner)
			if err != nil {
				return err
			}
			if !keys.add(field.Index(), key) {
				return fmt.Errorf("%s has the key %q of %q twice", message.FullName(), key, field.Name())
			}
		}
	}
	return nil
}

// fits reports whether a field may have this wire type. Decoders keep a field of another type
// among the unknown ones.
func fits(field protoreflect.FieldDescriptor, typ protowire.Type) bool {
	var own protowire.Type
	switch field.Kind() {
	case protoreflect.StringKind, protoreflect.BytesKind, protoreflect.MessageKind:
		return typ == protowire.BytesType
	case protoreflect.GroupKind:
		return false // the contract has none
	case protoreflect.FloatKind, protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind:
		own = protowire.Fixed32Type
	case protoreflect.DoubleKind, protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind:
		own = protowire.Fixed64Type
	default:
		own = protowire.VarintType
	}
	return typ == own || typ == protowire.BytesType && field.IsList() // packed
}

// mapKey returns the key of one entry of a map. checkFields has accepted the entry.
func mapKey(field protoreflect.FieldDescriptor, entry []byte) (key []byte, err error) {
	if field.MapKey().Kind() != protoreflect.StringKind {
		return nil, fmt.Errorf("the keys of %s are not strings", field.FullName())
	}
	for len(entry) > 0 {
		number, typ, n := protowire.ConsumeTag(entry)
		if number == field.MapKey().Number() {
			key, _ = protowire.ConsumeBytes(entry[n:])
			break
		}
		entry = entry[n+protowire.ConsumeFieldValue(number, typ, entry[n:]):]
	}
	return key, nil
}

// keySet holds the keys of the maps of one message. It needs no memory of its own for a few.
type keySet struct {
	few [8]struct {
		field int
		key   []byte
	}
	n    int
	many map[manyKey]struct{}
}

type manyKey struct {
	field int
	key   string
}

// add adds a key of the map with this index, and reports whether it is new.
func (s *keySet) add(field int, key []byte) bool {
	for _, k := range s.few[:s.n] {
		if k.field == field && string(k.key) == string(key) {
			return false
		}
	}
	if s.n < len(s.few) {
		s.few[s.n].field, s.few[s.n].key = field, key
		s.n++
		return true
	}
	if s.many == nil {
		s.many = map[manyKey]struct{}{}
	}
	before := len(s.many)
	s.many[manyKey{field, string(key)}] = struct{}{}
	return len(s.many) > before
}
