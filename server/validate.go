package server

import (
	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/server/wire"
)

// validator is protovalidate, with a quick check before it: most questions need no more than that.
type validator struct{ protovalidate.Validator }

// Validate implements protovalidate.Validator.
func (v validator) Validate(msg proto.Message, options ...protovalidate.ValidationOption) error {
	if wire.Valid(msg) {
		return nil
	}
	return v.Validator.Validate(msg, options...)
}
