package wire

import (
	"fmt"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// RefuseUnknown returns an error if a message, or one inside of it, has fields that this
// version does not know. A question that is understood in part could be answered wrongly.
func RefuseUnknown(m protoreflect.Message) (err error) {
	if len(m.GetUnknown()) > 0 {
		return fmt.Errorf("%s has fields that this version does not know", m.Descriptor().FullName())
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			if fd.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					err = RefuseUnknown(v.Message())
					return err == nil
				})
			}
		case fd.Message() == nil:
		case fd.IsList():
			for i := range v.List().Len() {
				if err = RefuseUnknown(v.List().Get(i).Message()); err != nil {
					break
				}
			}
		default:
			err = RefuseUnknown(v.Message())
		}
		return err == nil
	})
	return err
}
