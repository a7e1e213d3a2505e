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

// strictBinary refuses fields that the contract does not know: a question that
// is understood in part could be answered wrongly.
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

// strictJSON refuses unknown fields and deep nesting. It writes empty lists and
// false too, because "permitted": [] is an answer.
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

// protoPrefix is what the protobuf module puts before its errors, with a space
// that changes from build to build.
var protoPrefix = regexp.MustCompile(`^proto:[\s\x{a0}]*`)

// decodeError is a body that does not decode, in words for the caller.
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
