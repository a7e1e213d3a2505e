package server

import (
	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/server/wire"
)

// validator is protovalidate, which is not asked about questions that keep all rules.
type validator struct{ protovalidate.Validator }

// Validate implements protovalidate.Validator.
func (v validator) Validate(msg proto.Message, options ...protovalidate.ValidationOption) error {
	if wire.Valid(msg) {
		return nil
	}
	return v.Validator.Validate(msg, options...)
}
