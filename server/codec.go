package server

import (
	"context"
	"io"
	"regexp"

	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/server/wire"
)

// strictBinary refuses fields that the contract does not know. A question that is
// understood only in part could be decided wrongly.
type strictBinary struct{ *connectproto.BinaryCodec }

// UnmarshalRead implements connect.Codec.
func (c strictBinary) UnmarshalRead(ctx context.Context, src io.Reader, msg any) error {
	if err := c.BinaryCodec.UnmarshalRead(ctx, src, msg); err != nil {
		return cleanDecodeError(err)
	}
	if m, ok := msg.(proto.Message); ok {
		return wire.RefuseUnknown(m.ProtoReflect())
	}
	return nil
}

// strictJSON refuses unknown fields and deep nesting. It also writes empty lists and false,
// because "permitted": [] is an answer.
type strictJSON struct{ *connectproto.JSONCodec }

func newStrictJSON() strictJSON {
	c := connectproto.NewJSONCodec()
	c.UnmarshalOptions = protojson.UnmarshalOptions{RecursionLimit: maxNesting}
	c.MarshalOptions = protojson.MarshalOptions{EmitDefaultValues: true}
	return strictJSON{c}
}

// UnmarshalRead implements connect.Codec.
func (c strictJSON) UnmarshalRead(ctx context.Context, src io.Reader, msg any) error {
	return cleanDecodeError(c.JSONCodec.UnmarshalRead(ctx, src, msg))
}

// protoPrefix matches the prefix of errors of the protobuf module. The kind of space in it
// differs from build to build.
var protoPrefix = regexp.MustCompile(`^proto:[\s\x{a0}]*`)

// decodeError is the error of a body that does not decode. Its text is for the caller.
type decodeError struct {
	msg   string
	cause error
}

func (e *decodeError) Error() string { return e.msg }

func (e *decodeError) Unwrap() error { return e.cause }

func cleanDecodeError(err error) error {
	if err == nil {
		return nil
	}
	return &decodeError{protoPrefix.ReplaceAllString(err.Error(), ""), err}
}
